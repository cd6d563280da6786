//! A machine's guest leaves, or arrives.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::{self, Sender};
use std::time::{Duration, Instant};

use memferry::migrate::{
    Budget, Cancel, LeechError, LeechOptions, LeechOutcome, Micros, Progress, SeedError,
    SeedOptions, SeedOutcome,
};
use memferry::transport::{ConnectError, Listener, Pairing, PairingError, Session};
use serde_json::Value;
use vmm_integration::{Arrival, ArrivingError, ArrivingRam, Departure};

use crate::args::{Plan, PostCopyChoice};
use crate::machine::{Guest, Machine, MachineError, Memory, Throttling};

/// How long the source may take to come once it has begun to.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long to wait for a source.
const WAIT: Duration = Duration::from_secs(600);

/// Why a guest was not migrated as it should have been.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MigrateError {
    /// The string is none.
    #[error(transparent)]
    Pairing(#[from] PairingError),
    /// The other side cannot be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// What the guest writes cannot be tracked.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The guest's memory cannot be arrived in.
    #[error(transparent)]
    Arriving(#[from] ArrivingError),
    /// Nobody can come.
    #[error("there can be no address to come to")]
    Listen(#[source] io::Error),
    /// The migration failed at the source.
    #[error(transparent)]
    Seed(#[from] SeedError),
    /// The migration failed at the destination.
    #[error(transparent)]
    Leech(#[from] LeechError),
}

/// Where the guest is after it was to leave.
#[derive(Debug)]
pub(crate) enum Departed {
    /// In the other machine; what is to be told of it.
    Gone(Value),
    /// Here.
    Stays { runs: bool, why: MigrateError },
    /// It must not run here, and not all is well.
    Unclear(MigrateError),
}

/// Sends the guest to the machine that printed `pairing`; `runs` is whether it runs now.
pub(crate) fn send(
    machine: &Arc<Machine>,
    runs: bool,
    pairing: &str,
    plan: &Plan,
    progress: Sender<Progress>,
    cancel: &Cancel,
) -> Departed {
    let prepared = || -> Result<_, MigrateError> {
        let pairing: Pairing = pairing.parse()?;
        let departure = Departure::new(Arc::clone(machine.memory()), machine.trackers()?)
            .mapped_shared()
            .options(options(plan))
            .progress(progress)
            .cancel(cancel.clone());
        let silence = Duration::from_millis(plan.silence);
        let session = Session::connect(&pairing, plan.lanes, silence, Instant::now() + PATIENCE)?;
        Ok((departure, session))
    };
    let (mut departure, session) = match prepared() {
        Ok(prepared) => prepared,
        Err(why) => return Departed::Stays { runs, why },
    };
    if plan.post_copy == PostCopyChoice::AtOnce {
        departure = departure.at_once();
    }
    if plan.throttle {
        let mut throttling = Throttling::new(machine);
        departure = departure.throttling(move |policy| throttling.follow(policy));
    }
    match departure.run(&session, &mut Guest::leaving(machine, runs)) {
        Ok(SeedOutcome::Moved(report)) => {
            Departed::Gone(serde_json::to_value(report).expect("a report is plain data"))
        }
        Ok(SeedOutcome::Forecast(_)) => unreachable!("nobody asked for a dry run"),
        Err(why @ SeedError::Aborted { .. }) => Departed::Stays {
            runs,
            why: why.into(),
        },
        Err(why @ SeedError::Stuck { .. }) => Departed::Stays {
            runs: false,
            why: why.into(),
        },
        Err(why) => Departed::Unclear(why.into()),
    }
}

fn options(plan: &Plan) -> SeedOptions {
    SeedOptions {
        budget: Budget {
            downtime: Micros::from_millis(plan.downtime),
            post_copy: plan.post_copy.into(),
            rounds: plan.rounds,
        },
        bandwidth: plan.bandwidth,
        verify: plan.verify.into(),
        silence: Duration::from_millis(plan.silence),
        subject_deadline: Duration::from_millis(plan.deadline),
        // Some kilobytes of state, and no device that takes its time.
        fixed_blackout: Duration::from_millis(5),
        ..SeedOptions::default()
    }
}

/// Where the guest is after it was to arrive.
#[derive(Debug)]
pub(crate) enum Arrived {
    /// Here; what is to be told of it.
    Here { runs: bool, report: Value },
    /// Here, and some of its memory will not come.
    Lacking {
        runs: bool,
        kept: Kept,
        why: MigrateError,
    },
    /// Where it was.
    Not(MigrateError),
    /// It must not run here without somebody's decision.
    Unclear(MigrateError),
}

/// What keeps a guest waiting for pages that will not come, rather than have it read zeros.
#[derive(Debug)]
pub(crate) struct Kept {
    _arrival: Arrival<Memory>,
    advice: String,
}

impl Kept {
    /// What is missing, and what to do.
    pub(crate) fn advice(&self) -> &str {
        &self.advice
    }
}

/// A machine that waits for a guest.
#[derive(Debug)]
pub(crate) struct Receiving {
    machine: Arc<Machine>,
    arrival: Arrival<Memory>,
    listener: Listener,
    pairing: Pairing,
}

impl Receiving {
    /// Listens at `address`.
    pub(crate) fn open(
        machine: Arc<Machine>,
        address: SocketAddr,
        without_post_copy: bool,
    ) -> Result<Self, MigrateError> {
        let memory = Arc::clone(machine.memory());
        let arrival = if without_post_copy {
            Arrival::into_ram(ArrivingRam::without_faults(memory)?)
        } else {
            Arrival::new(memory)?
        };
        let listen = || -> io::Result<(Listener, Pairing)> {
            let listener = Listener::bind(address)?;
            let pairing = Pairing::new(listener.local_addr()?.to_string())?;
            Ok((listener, pairing))
        };
        let (listener, pairing) = listen().map_err(MigrateError::Listen)?;
        Ok(Self {
            machine,
            arrival,
            listener,
            pairing,
        })
    }

    /// What the source needs.
    pub(crate) fn pairing(&self) -> String {
        self.pairing.to_string()
    }

    /// Waits for the guest and takes it.
    pub(crate) fn run(self, progress: Sender<Progress>, cancel: &Cancel) -> Arrived {
        let give_up = Instant::now() + WAIT;
        let waiting = || !cancel.is_cancelled() && Instant::now() < give_up;
        let (listener, pairing) = (&self.listener, &self.pairing);
        let silence = LeechOptions::default().silence;
        let session = match listener.accept(pairing, silence, PATIENCE, waiting, |_, _| {}) {
            Ok(session) => session,
            Err(error) => return Arrived::Not(error.into()),
        };
        let arrival = self.arrival.progress(progress).cancel(cancel.clone());
        let mut guest = Guest::arriving(&self.machine);
        let received = arrival.run(&session, &mut guest);
        let runs = guest.runs();
        match received {
            Ok(LeechOutcome::Moved(report)) => Arrived::Here {
                runs,
                report: serde_json::to_value(report).expect("a report is plain data"),
            },
            Ok(LeechOutcome::DryRun) => unreachable!("a machine never asks for a dry run"),
            Err(why @ LeechError::Aborted { .. }) => Arrived::Not(why.into()),
            Err(why @ LeechError::Lost { .. }) => Arrived::Lacking {
                runs,
                kept: Kept {
                    // It is kept for as long as the guest waits, and whom it told of its progress waits for the last of it.
                    _arrival: arrival.progress(mpsc::channel().0),
                    advice: why.to_string(),
                },
                why: why.into(),
            },
            Err(why) => Arrived::Unclear(why.into()),
        }
    }
}
