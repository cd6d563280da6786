//! A session that runs on a thread of its own, and how far it is.

use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use super::cancel::Cancel;
use super::progress::Progress;

/// Told what happens, on a thread of the session.
pub(super) type OnProgress = Box<dyn FnMut(&Progress) + Send>;

/// How far a session is, and who waits for it to go on.
#[derive(Debug)]
pub(super) struct Course {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// The regions belong to the destination.
    handed_over: bool,
    ended: bool,
    last: Option<Progress>,
}

impl Course {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                handed_over: false,
                ended: false,
                last: None,
            }),
            changed: Condvar::new(),
        })
    }

    /// The regions belong to the destination.
    pub(super) fn hand_over(&self) {
        self.lock().handed_over = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it is held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A session on its way. Dropped, it is cancelled, and waited for.
#[derive(Debug)]
pub(super) struct Running<R> {
    course: Arc<Course>,
    cancel: Cancel,
    thread: Option<JoinHandle<R>>,
}

impl<R: Send + 'static> Running<R> {
    /// Runs `session`, which says how far it is.
    pub(super) fn start(
        name: &str,
        on_progress: Option<OnProgress>,
        session: impl FnOnce(&Course, &Cancel, Sender<Progress>) -> R + Send + 'static,
    ) -> std::io::Result<Self> {
        let course = Course::new();
        let cancel = Cancel::default();
        let (told, heard) = channel();
        let listening = {
            let course = Arc::clone(&course);
            let mut on_progress = on_progress;
            thread::Builder::new()
                .name(format!("{name}-progress"))
                .spawn(move || {
                    // Until the session drops its end.
                    for progress in heard {
                        if let Some(on_progress) = &mut on_progress {
                            on_progress(&progress);
                        }
                        course.lock().last = Some(progress);
                    }
                })?
        };
        let thread = {
            let (course, cancel) = (Arc::clone(&course), cancel.clone());
            thread::Builder::new()
                .name(name.to_owned())
                .spawn(move || {
                    let _ended = Ended(&course);
                    let result = session(&course, &cancel, told);
                    if let Err(panic) = listening.join() {
                        std::panic::resume_unwind(panic);
                    }
                    result
                })?
        };
        Ok(Self {
            course,
            cancel,
            thread: Some(thread),
        })
    }

    /// Waits until the regions were handed over, or it has ended without; says which.
    pub(super) fn wait_for_hand_over(&self) -> bool {
        let state = self.course.lock();
        let state = self
            .course
            .changed
            .wait_while(state, |state| !state.handed_over && !state.ended)
            .unwrap_or_else(PoisonError::into_inner);
        state.handed_over
    }

    /// Waits for its end.
    pub(super) fn join(mut self) -> R {
        let thread = self.thread.take().expect("only this takes it");
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    pub(super) fn cancel(&self) {
        self.cancel.cancel();
    }

    pub(super) fn last(&self) -> Option<Progress> {
        self.course.lock().last.clone()
    }
}

struct Ended<'a>(&'a Course);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.lock().ended = true;
        self.0.changed.notify_all();
    }
}

impl<R> Drop for Running<R> {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.cancel.cancel();
            // What a panic of it has to say was said on its thread.
            let _ = thread.join();
        }
    }
}
