//! What the machine does, and what it may be asked meanwhile.

use std::io;
use std::net::SocketAddr;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use memferry::migrate::{Cancel, Progress};
use serde_json::{Value, json};
use vmm_integration::Throttle;

use crate::args::Plan;
use crate::machine::{Ending, Machine, MachineError};
use crate::migration::{self, Arrived, Departed, Kept, MigrateError, Receiving};

/// What ends the program.
#[derive(Debug)]
pub(crate) enum End {
    /// Somebody asked.
    Quit,
    /// A processor ended.
    Guest {
        /// Which.
        cpu: usize,
        /// Why.
        ending: Ending,
    },
}

/// A machine and what it does.
#[derive(Debug)]
pub(crate) struct Desk {
    machine: Arc<Machine>,
    stage: Mutex<Stage>,
    end: Mutex<Sender<End>>,
}

/// Where the guest is.
#[derive(Debug)]
enum Stage {
    /// Nowhere yet.
    Waiting,
    /// Here.
    Here {
        runs: bool,
        /// Where it waits for pages that will not come: they are kept armed.
        lacking: Option<Kept>,
    },
    /// On its way to another machine.
    Leaving(Cancel),
    /// On its way to this one.
    Arriving(Cancel),
    /// In another machine. It never runs here again, unless it comes back.
    Gone,
    /// Nobody knows, or a part of it is elsewhere; the text says what to do.
    Stuck(String),
}

impl Stage {
    fn name(&self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Here { runs: true, .. } => "running",
            Self::Here { runs: false, .. } => "paused",
            Self::Leaving(_) => "leaving",
            Self::Arriving(_) => "arriving",
            Self::Gone => "gone",
            Self::Stuck(_) => "stuck",
        }
    }
}

/// Why something is not done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DeskError {
    /// Not now.
    #[error("a machine that is {stage} cannot {what}")]
    NotNow {
        /// What it does.
        stage: &'static str,
        /// What was asked.
        what: &'static str,
    },
    /// The machine failed.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The migration failed.
    #[error(transparent)]
    Migrate(#[from] MigrateError),
    /// The console takes nothing.
    #[error("nothing can be typed on the console")]
    Console(#[from] io::Error),
}

impl Desk {
    /// For a machine with a program, or one that waits for a guest. `end` is told when it is to end.
    pub(crate) fn new(machine: Machine, has_guest: bool, end: Sender<End>) -> Self {
        let stage = if has_guest {
            Stage::Here {
                runs: false,
                lacking: None,
            }
        } else {
            Stage::Waiting
        };
        Self {
            machine: Arc::new(machine),
            stage: Mutex::new(stage),
            end: Mutex::new(end),
        }
    }

    fn stage(&self) -> MutexGuard<'_, Stage> {
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it does.
    pub(crate) fn status(&self) -> Value {
        let stage = self.stage();
        let advice = match &*stage {
            Stage::Stuck(advice) => Some(advice.clone()),
            Stage::Here {
                lacking: Some(kept),
                ..
            } => Some(kept.advice().to_owned()),
            _ => None,
        };
        let cpus: Vec<String> = self
            .machine
            .standing()
            .iter()
            .map(ToString::to_string)
            .collect();
        let throttles = self.machine.throttles().into_iter();
        let throttles: Vec<u8> = throttles.map(Throttle::as_percent).collect();
        json!({
            "stage": stage.name(),
            "cpus": cpus,
            "exits": self.machine.exits(),
            "throttle": throttles,
            "dirty_rate": self.machine.dirty_rates(),
            "tsc_khz": self.machine.tsc_khz(),
            "advice": advice,
        })
    }

    /// Stops the guest.
    pub(crate) fn pause(&self, deadline: Instant) -> Result<(), DeskError> {
        let mut stage = self.stage();
        let Stage::Here { runs, .. } = &mut *stage else {
            return Err(not_now(&stage, "pause"));
        };
        if let Err(error) = self.machine.stand(deadline) {
            if *runs {
                self.machine.run();
            }
            return Err(error.into());
        }
        *runs = false;
        Ok(())
    }

    /// Lets it run.
    pub(crate) fn resume(&self) -> Result<(), DeskError> {
        let mut stage = self.stage();
        let Stage::Here { runs, .. } = &mut *stage else {
            return Err(not_now(&stage, "resume"));
        };
        *runs = true;
        self.machine.run();
        Ok(())
    }

    /// Types on its console.
    pub(crate) fn type_in(&self, bytes: &[u8]) -> Result<usize, DeskError> {
        Ok(self.machine.type_in(bytes)?)
    }

    /// Gives up a migration.
    pub(crate) fn cancel(&self) -> Result<(), DeskError> {
        let stage = self.stage();
        let (Stage::Leaving(cancel) | Stage::Arriving(cancel)) = &*stage else {
            return Err(not_now(&stage, "cancel"));
        };
        cancel.cancel();
        Ok(())
    }

    /// Ends the program.
    pub(crate) fn quit(&self) {
        let end = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        // If nobody listens any more it ends already.
        let _ = end.send(End::Quit);
    }

    /// Sends the guest to the machine that printed `pairing`.
    pub(crate) fn migrate(
        &self,
        pairing: &str,
        plan: &Plan,
        news: &mut dyn FnMut(Value),
    ) -> Result<Value, DeskError> {
        let cancel = Cancel::default();
        let runs = {
            let mut stage = self.stage();
            let Stage::Here {
                runs,
                lacking: None,
            } = *stage
            else {
                return Err(not_now(&stage, "migrate"));
            };
            *stage = Stage::Leaving(cancel.clone());
            runs
        };
        let machine = &self.machine;
        let sent = tell(news, |progress| {
            migration::send(machine, runs, pairing, plan, progress, &cancel)
        });
        let (stage, result) = match sent {
            Departed::Gone(report) => (Stage::Gone, Ok(report)),
            Departed::Stays { runs, why } => (
                Stage::Here {
                    runs,
                    lacking: None,
                },
                Err(why.into()),
            ),
            Departed::Unclear(why) => (Stage::Stuck(why.to_string()), Err(why.into())),
        };
        *self.stage() = stage;
        result
    }

    /// Waits for a guest.
    pub(crate) fn receive(
        &self,
        listen: SocketAddr,
        without_post_copy: bool,
        news: &mut dyn FnMut(Value),
    ) -> Result<Value, DeskError> {
        let cancel = Cancel::default();
        let before = {
            let mut stage = self.stage();
            match *stage {
                Stage::Waiting | Stage::Gone => {
                    std::mem::replace(&mut *stage, Stage::Arriving(cancel.clone()))
                }
                _ => return Err(not_now(&stage, "receive")),
            }
        };
        let receiving = match Receiving::open(Arc::clone(&self.machine), listen, without_post_copy)
        {
            Ok(receiving) => receiving,
            Err(error) => {
                *self.stage() = before;
                return Err(error.into());
            }
        };
        news(json!({ "pairing": receiving.pairing() }));
        let received = tell(news, |progress| receiving.run(progress, &cancel));
        let (stage, result) = match received {
            Arrived::Here { runs, report } => (
                Stage::Here {
                    runs,
                    lacking: None,
                },
                Ok(report),
            ),
            Arrived::Lacking { runs, kept, why } => (
                Stage::Here {
                    runs,
                    lacking: Some(kept),
                },
                Err(why.into()),
            ),
            Arrived::Not(why) => (Stage::Waiting, Err(why.into())),
            Arrived::Unclear(why) => (Stage::Stuck(why.to_string()), Err(why.into())),
        };
        *self.stage() = stage;
        result
    }
}

fn not_now(stage: &Stage, what: &'static str) -> DeskError {
    DeskError::NotNow {
        stage: stage.name(),
        what,
    }
}

/// Runs `work` on a thread of its own, and passes on what it tells meanwhile.
fn tell<T: Send>(
    news: &mut dyn FnMut(Value),
    work: impl FnOnce(Sender<Progress>) -> T + Send,
) -> T {
    thread::scope(|scope| {
        let (sender, events) = mpsc::channel();
        let working = scope.spawn(move || work(sender));
        for event in events {
            news(serde_json::to_value(event).expect("progress is plain data"));
        }
        working
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
