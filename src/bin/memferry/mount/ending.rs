//! Ending a mount: what was written is saved, then the mount taken away; or, if the user insists, the other way round.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::json;

use super::exec::Program;
use super::place::{Failures, Held, Place, lock};
use super::region::Region;
use crate::output::Output;

/// How often it is tried again while somebody uses the mount, or the server is away.
const AGAIN: Duration = Duration::from_millis(500);

/// How long saving may take once the user has insisted.
const FORCED: Duration = Duration::from_secs(3);

/// How long saving may take when nobody insists: a server that is started again in the meantime saves all.
const PATIENCE: Duration = Duration::from_secs(600);

/// A mount that is being ended.
pub(super) struct Ending {
    region: Arc<Region>,
    place: Arc<Place>,
    output: Output,
}

impl Ending {
    pub(super) fn new(region: Arc<Region>, place: Place, output: Output) -> Self {
        Self {
            region,
            place: Arc::new(place),
            output,
        }
    }

    /// Ends it. A signal forces it.
    ///
    /// # Errors
    /// If something that was written is not saved.
    pub(super) fn run(
        self,
        signal: &Receiver<()>,
        mut program: Option<&mut Program>,
        deadline: Duration,
    ) -> anyhow::Result<()> {
        if let Some(program) = &mut program {
            // It could do nothing more without its file.
            program.ask_to_end();
        }
        let forced = Arc::new(AtomicBool::new(false));
        // Not waited for once it is forced: it may be waiting for a server that is away.
        let failures = Arc::new(Mutex::new(Failures::default()));
        let unmounting = {
            let (place, forced, output) =
                (Arc::clone(&self.place), Arc::clone(&forced), self.output);
            let failures = Arc::clone(&failures);
            std::thread::spawn(move || unmount(&place, &forced, &failures, output))
        };
        while !unmounting.is_finished() {
            match signal.recv_timeout(Duration::from_millis(20)) {
                Ok(()) => {
                    forced.store(true, Ordering::Relaxed);
                    if let Some(program) = &mut program {
                        program.kill();
                    }
                    say_what_is_at_stake(&self.region, self.output);
                    break;
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        let forced = forced.load(Ordering::Relaxed);
        if forced || !unmounting.join().unwrap_or(false) {
            self.place.force();
        }
        let deadline = match forced {
            true => FORCED,
            false => PATIENCE.max(deadline),
        };
        let failures = std::mem::take(&mut *lock(&failures));
        let Self {
            region,
            place,
            output,
        } = self;
        drop(place);
        save(&region, signal, deadline, failures, output)
    }
}

fn say_what_is_at_stake(region: &Region, output: Output) {
    let dirty = region.progress().map(|progress| progress.dirty);
    output.event("forced", &json!({ "dirty": dirty }));
    let known = match dirty {
        Some(dirty) => format!("{} that are not saved yet", bytesize::ByteSize(dirty)),
        None => "what the server has not said to be durable".to_owned(),
    };
    output.remark(&format!(
        "memferry: taking it away from whoever uses it. At stake are {known}, and what programs have written and the kernel has not \
         passed on"
    ));
}

/// Saves what was written, however long it takes up to `deadline`. A signal forces it.
fn save(
    region: &Arc<Region>,
    signal: &Receiver<()>,
    deadline: Duration,
    failures: Failures,
    output: Output,
) -> anyhow::Result<()> {
    let (sender, saved) = mpsc::channel();
    let closing = Arc::clone(region);
    std::thread::spawn(move || sender.send(closing.close(deadline, failures)));
    // Until a signal comes it ends by itself.
    let mut until = None;
    loop {
        match saved.recv_timeout(Duration::from_millis(20)) {
            Ok(result) => return result,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Err(region.give_up()),
        }
        if until.is_none() && signal.try_recv().is_ok() {
            say_what_is_at_stake(region, output);
            until = Some(Instant::now() + FORCED);
        }
        if until.is_some_and(|until| Instant::now() >= until) {
            return Err(region.give_up());
        }
    }
}

/// Unmounts, however long it takes, unless it is forced. Leaves in `failures` what could not be saved.
fn unmount(place: &Place, forced: &AtomicBool, failures: &Mutex<Failures>, output: Output) -> bool {
    let mut said = String::new();
    let until = Instant::now() + PATIENCE;
    loop {
        let why = match place.unmount(failures) {
            Ok(()) => return true,
            #[cfg(feature = "nbd-device")]
            Err(Held::Never) => return false,
            Err(Held::Busy(why)) => why,
            Err(Held::Failed(error)) => format!("{error:#}"),
        };
        if forced.load(Ordering::Relaxed) || Instant::now() >= until {
            return false;
        }
        if why != said {
            output.event("waiting", &json!({ "reason": why }));
            output.remark(&format!("memferry: {why}; trying again, Ctrl-C forces it"));
            said = why;
        }
        std::thread::park_timeout(AGAIN);
    }
}
