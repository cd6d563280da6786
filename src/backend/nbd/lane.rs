//! A connection that is opened when it is needed, and anew when it was lost.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::ConnectError;
use super::connection::Connection;

/// How long one waits after a failed attempt before the next, at first and at most: a server that is started again should be found soon,
/// and one that is gone not be run down.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// A place for a connection.
#[derive(Debug, Default)]
pub(super) struct Lane {
    state: Mutex<State>,
    changed: Condvar,
    /// How many operations have chosen this lane and are not done.
    users: AtomicUsize,
}

#[derive(Debug, Default)]
struct State {
    connection: Option<Arc<Connection>>,
    /// Somebody is connecting.
    connecting: bool,
    /// When to try again, after an attempt that failed, and how long to wait after the next that fails.
    retry: Option<(Instant, Duration)>,
    /// What the last attempt said, if it failed.
    failure: Option<String>,
    /// The remote is being closed.
    closed: bool,
}

/// An operation's use of a lane, for [`Lane::users`].
#[derive(Debug)]
pub(super) struct Using<'a>(pub(super) &'a Lane);

impl Drop for Using<'_> {
    fn drop(&mut self) {
        self.0.users.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Lane {
    pub(super) fn holding(connection: Connection) -> Self {
        let lane = Self::default();
        lane.lock().connection = Some(Arc::new(connection));
        lane
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing under the lock panics half-way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn choose(&self) -> Using<'_> {
        self.users.fetch_add(1, Ordering::Relaxed);
        Using(self)
    }

    pub(super) fn users(&self) -> usize {
        self.users.load(Ordering::Relaxed)
    }

    /// The connection, if there is one and it is good.
    pub(super) fn open(&self) -> Option<Arc<Connection>> {
        let state = self.lock();
        state
            .connection
            .as_ref()
            .filter(|connection| !connection.is_broken())
            .map(Arc::clone)
    }

    /// Whether an attempt to connect failed not long ago.
    pub(super) fn has_failed(&self) -> bool {
        self.lock().retry.is_some_and(|(at, _)| at > Instant::now())
    }

    /// Why there is no connection, as far as that was tried.
    pub(super) fn failure(&self) -> Option<String> {
        self.lock().failure.clone()
    }

    /// The connection; a new one by `dial` if there is none. Of several callers one connects, and the others wait for it. An attempt
    /// that failed is repeated after a pause, as long as `again` says so.
    ///
    /// # Errors
    /// What the last attempt said, or, if none was made in time, nothing.
    pub(super) fn get(
        &self,
        deadline: Instant,
        dial: impl Fn() -> Result<Connection, ConnectError>,
        again: impl Fn(&ConnectError) -> bool,
    ) -> Result<Arc<Connection>, Option<ConnectError>> {
        let mut last = None;
        let mut state = self.lock();
        loop {
            if let Some(connection) = &state.connection {
                if !connection.is_broken() {
                    return Ok(Arc::clone(connection));
                }
                state.connection = None;
            }
            let now = Instant::now();
            if state.closed || now >= deadline {
                return Err(last);
            }
            let until = match state.retry {
                _ if state.connecting => deadline,
                Some((at, _)) if at > now => at.min(deadline),
                _ => {
                    state.connecting = true;
                    drop(state);
                    let connecting = Connecting(self);
                    let dialled = dial();
                    drop(connecting);
                    // Others may connect again when they can see what has come of it, and not before.
                    state = self.lock();
                    state.connecting = false;
                    self.changed.notify_all();
                    match dialled {
                        Ok(connection) => {
                            let connection = Arc::new(connection);
                            state.connection = Some(Arc::clone(&connection));
                            state.retry = None;
                            state.failure = None;
                            if state.closed {
                                connection.hang_up();
                            }
                            return Ok(connection);
                        }
                        Err(error) => {
                            let pause = state.retry.map_or(FIRST_PAUSE, |(_, pause)| pause);
                            state.retry =
                                Some((Instant::now() + pause, (pause * 2).min(LONGEST_PAUSE)));
                            state.failure = Some(error.to_string());
                            if !again(&error) {
                                return Err(Some(error));
                            }
                            last = Some(error);
                        }
                    }
                    continue;
                }
            };
            state = self
                .changed
                .wait_timeout(state, until.saturating_duration_since(now))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Does not try again for `time`.
    pub(super) fn rest(&self, time: Duration) {
        self.lock().retry = Some((Instant::now() + time, FIRST_PAUSE));
    }

    /// Ends the connection in the proper way, and lets nobody open another.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        let connection = state.connection.take();
        drop(state);
        self.changed.notify_all();
        if let Some(connection) = connection {
            connection.hang_up();
        }
    }
}

/// Lets others connect if a panic ends the attempt.
struct Connecting<'a>(&'a Lane);

impl Drop for Connecting<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.lock().connecting = false;
            self.0.changed.notify_all();
        }
    }
}
