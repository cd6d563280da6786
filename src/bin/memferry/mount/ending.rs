//! Ending a mount: what was written is saved, then the mount taken away; or, if the user insists, the other way round.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use serde_json::json;

use super::exec::Program;
use super::place::{Held, Place};
use super::region::Region;
use crate::output::Output;

/// How often it is tried again while somebody uses the mount, or the server is away.
const AGAIN: Duration = Duration::from_millis(500);

/// How long saving may take once the user has insisted.
const FORCED: Duration = Duration::from_secs(3);

/// How long saving may take when nobody insists: a server that is started again in the meantime saves all.
const PATIENCE: Duration = Duration::from_secs(600);

/// A mount that is being ended.
pub(super) struct Ending<'a> {
    region: &'a Region,
    place: Place,
    output: Output,
}

impl<'a> Ending<'a> {
    pub(super) fn new(region: &'a Region, place: Place, output: Output) -> Self {
        Self {
            region,
            place,
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
        if let Some(program) = &program {
            // It does not go on when its file is gone; one that has ended is not asked.
            program.ask_to_end();
        }
        let forced = AtomicBool::new(false);
        let unmounted = std::thread::scope(|scope| {
            let unmounting = scope.spawn(|| self.unmount(&forced));
            while !unmounting.is_finished() {
                match signal.recv_timeout(Duration::from_millis(20)) {
                    Ok(()) => {
                        forced.store(true, Ordering::Relaxed);
                        if let Some(program) = &mut program {
                            program.kill();
                        }
                        self.say_what_is_at_stake();
                        // It may be waiting for a server that is away; it is detached from under it.
                        self.place.force();
                        break;
                    }
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => break,
                }
            }
            unmounting.join().unwrap_or(false)
        });
        let Self { region, place, .. } = self;
        if !unmounted {
            place.force();
        }
        drop(place);
        let patience = if forced.load(Ordering::Relaxed) {
            FORCED
        } else {
            PATIENCE.max(deadline)
        };
        region.close(patience)
    }

    /// Unmounts, however long it takes, unless it is forced.
    fn unmount(&self, forced: &AtomicBool) -> bool {
        let mut said = String::new();
        let until = Instant::now() + PATIENCE;
        loop {
            let why = match self.place.unmount() {
                Ok(()) => return true,
                Err(Held::Busy(why)) => why,
                Err(Held::Failed(error)) => format!("{error:#}"),
            };
            if forced.load(Ordering::Relaxed) || Instant::now() >= until {
                return false;
            }
            if why != said {
                self.output.event("waiting", &json!({ "reason": why }));
                self.output
                    .remark(&format!("memferry: {why}; trying again, Ctrl-C forces it"));
                said = why;
            }
            std::thread::park_timeout(AGAIN);
        }
    }

    fn say_what_is_at_stake(&self) {
        let dirty = self.region.progress().map(|progress| progress.dirty);
        self.output.event("forced", &json!({ "dirty": dirty }));
        let known = match dirty {
            Some(dirty) => format!("{} that are not saved yet", bytesize::ByteSize(dirty)),
            None => "what the server has not said to be durable".to_owned(),
        };
        self.output.remark(&format!(
            "memferry: taking it away from whoever uses it. At stake are {known}, and what programs have written and the kernel has not \
             passed on"
        ));
    }
}
