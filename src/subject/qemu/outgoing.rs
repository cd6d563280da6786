//! A QEMU guest where it runs now.

use std::io::Write;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use serde_json::json;

use super::error::{QemuError, Refusal, Refusals};
use super::machine::{Machine, RunState};
use super::qmp::Qmp;
use super::qmp_error::QmpError;
use super::settings::Settings;
use super::status;
use super::stream::Capture;
use super::undo;
use super::will::{Executor, LastWill, STAMPED, Stage};
use crate::subject::{Description, Outgoing, SubjectError};

/// What QEMU may believe that the guest can be stopped for, at first. QEMU stops the guest when what its own part of the
/// stream has left (firmware, video memory) passes in this time. With a guest that keeps drawing it may never, so this is
/// doubled whenever QEMU hesitates.
const FIRST_DOWNTIME_LIMIT_MS: u64 = 5;

/// QEMU's own limit is 2,000 s; beyond a second the guest is better left running and the operator told.
const LAST_DOWNTIME_LIMIT_MS: u64 = 1000;

/// More than any socket pair passes: QEMU's 128 MiB/s are for networks.
const BANDWIDTH: u64 = 1 << 40;

/// Limits between which nothing differs: this much of one tells one sender from another.
const STAMPS: u64 = 1 << 32;

/// How long a drop may try to get the guest to run again.
const LAST_ATTEMPT: Duration = Duration::from_secs(5);

/// How long the parts took, for reports.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OutgoingTimings {
    /// From the `migrate` command to the guest's stop. Most of it the guest still runs.
    pub until_suspended: Duration,
    /// From `migrate-continue` to QEMU's `completed`, everything having passed.
    pub save: Duration,
    /// Bytes of device state.
    pub state_len: u64,
}

/// A QEMU guest that may leave.
///
/// On drop a guest that is suspended, and neither resumed nor released, is made to run again as well as that goes.
#[derive(Debug)]
pub struct OutgoingQemu {
    qmp: Qmp,
    machine: Machine,
    phase: Phase,
    settings: Option<Settings>,
    /// What the guest did when it was suspended, and goes back to.
    before: RunState,
    capture: Option<Capture>,
    /// Each descriptor that QEMU is given has a name of its own.
    attempts: u64,
    timings: OutgoingTimings,
    /// The bandwidth limit that this sender has set, and no other.
    stamp: u64,
    /// Last, so that the connection is closed when it is dropped: QEMU serves one at a time.
    executor: Option<Box<dyn Executor>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// QEMU is as it was found, but for its settings.
    Idle,
    /// The guest was paused when it was to be suspended: nothing was asked of QEMU.
    AlreadyPaused,
    /// QEMU was told to migrate; it may have stopped the guest or not.
    Migrating,
    /// QEMU has stopped the guest and waits.
    Suspended,
    /// QEMU was told to send the device state. By itself it completes, or fails and lets the guest run.
    Saving,
    /// QEMU is done with it.
    Saved,
    /// The guest belongs to somebody else.
    Released,
}

impl OutgoingQemu {
    /// A guest to be moved away; `machine` is what [`Machine::inspect`] found behind the same `qmp`. Talks to nobody.
    ///
    /// # Errors
    /// [`Refusal::SourceState`] if the guest neither runs nor is paused.
    pub fn new(qmp: Qmp, machine: Machine) -> Result<Self, QemuError> {
        check_state(&machine.run_state)?;
        Ok(Self {
            before: machine.run_state.clone(),
            qmp,
            machine,
            phase: Phase::Idle,
            settings: None,
            capture: None,
            attempts: 0,
            timings: OutgoingTimings::default(),
            executor: None,
            stamp: 0,
        })
    }

    /// Sees to it that `executor` always knows what to do if this process dies.
    #[must_use]
    pub fn with_executor(mut self, executor: Box<dyn Executor>) -> Self {
        self.executor = Some(executor);
        self
    }

    /// Says what is to be done if this process dies from here on. One that is gone cannot be told, and does nothing either:
    /// the migration is not given up for that.
    fn note(&mut self, stage: Option<Stage>) {
        let Some(executor) = &mut self.executor else {
            return;
        };
        let will = stage
            .zip(self.settings.as_ref())
            .map(|(stage, settings)| LastWill {
                settings: settings.clone(),
                stage,
                ran: self.before == RunState::Running,
                stamp: self.stamp,
            });
        if executor.note(will.as_ref()).is_err() {
            self.executor = None;
        }
    }

    /// The guest as it was found.
    #[must_use]
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// How long the parts of the last attempt took.
    #[must_use]
    pub fn timings(&self) -> OutgoingTimings {
        self.timings
    }

    /// Sets QEMU up for a migration of the device state alone. The guest does not notice; what is changed is put back by
    /// [`resume`](Outgoing::resume). Suspending prepares as well, if need be; done before, it costs the guest nothing.
    ///
    /// # Errors
    /// If QEMU is too old, or refuses because a migration is under way.
    pub fn prepare(&mut self, deadline: Instant) -> Result<(), QemuError> {
        if self.settings.is_some() {
            return Ok(());
        }
        self.qmp.reconnect_if_broken(deadline)?;
        self.stamp = stamp()?;
        let settings = Settings::apply(
            &mut self.qmp,
            &["x-ignore-shared", "events", "pause-before-switchover"],
            &[
                ("downtime-limit", FIRST_DOWNTIME_LIMIT_MS.into()),
                (STAMPED, self.stamp.into()),
                // QEMU would speak TLS on the socket pair too.
                ("tls-creds", "".into()),
                ("tls-hostname", "".into()),
                ("mode", "normal".into()),
            ],
            deadline,
        )?;
        self.settings = Some(settings);
        self.note(Some(Stage::Prepared));
        Ok(())
    }

    fn suspend_guest(&mut self, deadline: Instant) -> Result<(), QemuError> {
        if self.phase != Phase::Idle {
            return Err(QemuError::Order {
                what: "suspending the guest",
                when: "while it is suspended or after it was released",
            });
        }
        self.prepare(deadline)?;
        let now = RunState::query(&mut self.qmp, deadline)?;
        check_state(&now)?;
        if now != self.machine.run_state {
            return Err(QemuError::RunState {
                state: now.to_string(),
                during: "it is to be suspended",
                remedy: "its owner stopped or continued it since the migration began; migrate again",
            });
        }
        self.before = now;
        if self.before == RunState::Paused {
            // A `migrate` that is cancelled would leave a paused guest in postmigrate, from where QEMU migrates no more. So
            // nothing is asked before the state is wanted.
            self.qmp.drain_events();
            self.phase = Phase::AlreadyPaused;
            return Ok(());
        }
        self.migrate_until_stopped(deadline)
    }

    /// `migrate`, up to the point where the guest has stopped and the stream waits.
    fn migrate_until_stopped(&mut self, deadline: Instant) -> Result<(), QemuError> {
        self.timings = OutgoingTimings::default();
        let (capture, theirs) = Capture::begin()?;
        self.attempts += 1;
        let name = format!("memferry-state-{}", self.attempts);
        self.qmp.pass_fd(&name, theirs.as_fd(), deadline)?;
        drop(theirs);
        self.qmp.drain_events();
        self.capture = Some(capture);
        self.phase = Phase::Migrating;

        self.note(Some(Stage::Migrating));
        let began = Instant::now();
        let uri = format!("fd:{name}");
        self.qmp
            .execute("migrate", &json!({"uri": uri}), deadline)?;
        let mut limit = FIRST_DOWNTIME_LIMIT_MS;
        status::wait(
            &mut self.qmp,
            "stopping the guest",
            |status| status == "pre-switchover",
            |qmp| {
                if limit < LAST_DOWNTIME_LIMIT_MS {
                    limit *= 2;
                    let limit = json!({"downtime-limit": limit});
                    qmp.execute("migrate-set-parameters", &limit, deadline)?;
                }
                Ok(())
            },
            deadline,
        )?;
        self.timings.until_suspended = began.elapsed();
        match RunState::query(&mut self.qmp, deadline)? {
            RunState::FinishMigrate => {
                self.phase = Phase::Suspended;
                Ok(())
            }
            other => Err(QemuError::RunState {
                state: other.to_string(),
                during: "QEMU says that it has stopped it for the migration",
                remedy: "something else controls this QEMU; migrate again without it",
            }),
        }
    }

    fn save_guest(&mut self, sink: &mut dyn Write, deadline: Instant) -> Result<(), QemuError> {
        if self.phase == Phase::AlreadyPaused {
            let events = self.qmp.drain_events();
            self.migrate_until_stopped(deadline)?;
            let ran =
                |events: &[super::qmp_codec::Event]| events.iter().any(|e| e.name == "RESUME");
            if ran(&events) {
                return Err(QemuError::RunState {
                    state: "no longer as it was".to_owned(),
                    during: "it should have stayed paused",
                    remedy: "its owner let it run meanwhile; migrate again",
                });
            }
        }
        if self.phase != Phase::Suspended {
            return Err(QemuError::Order {
                what: "saving the state",
                when: "before the guest is suspended or after it was saved",
            });
        }
        self.note(Some(Stage::Saving));
        let capture = self.capture.as_ref().expect("a migration has a capture");
        let began = Instant::now();
        self.phase = Phase::Saving;
        let state = json!({"state": "pre-switchover"});
        self.qmp.execute("migrate-continue", &state, deadline)?;
        self.timings.state_len = capture.copy_to(sink, deadline)?;
        status::wait(
            &mut self.qmp,
            "saving the device state",
            |status| status == "completed",
            |_| Ok(()),
            deadline,
        )?;
        self.timings.save = began.elapsed();
        match RunState::query(&mut self.qmp, deadline)? {
            RunState::PostMigrate => {
                self.phase = Phase::Saved;
                Ok(())
            }
            other => Err(QemuError::RunState {
                state: other.to_string(),
                during: "its state has been saved",
                remedy: "something else controls this QEMU; migrate again without it",
            }),
        }
    }

    fn resume_guest(&mut self, deadline: Instant) -> Result<(), QemuError> {
        if self.phase == Phase::Released {
            return Err(QemuError::Order {
                what: "resuming the guest here",
                when: "after it was released to the destination",
            });
        }
        self.qmp.reconnect_if_broken(deadline)?;
        if matches!(
            self.phase,
            Phase::Migrating | Phase::Suspended | Phase::Saving | Phase::Saved
        ) {
            undo::end_migration(&mut self.qmp, self.phase == Phase::Saving, deadline)?;
            if self.before == RunState::Running {
                undo::run(&mut self.qmp, deadline)?;
            }
            self.capture = None;
        }
        self.phase = Phase::Idle;
        if let Some(settings) = self.settings.take() {
            let restored = settings.restore(&mut self.qmp, deadline);
            if restored.is_err() {
                // So that the next call tries again.
                self.settings = Some(settings);
            }
            restored?;
        }
        self.note(None);
        Ok(())
    }
}

impl Outgoing for OutgoingQemu {
    fn describe(&self) -> Description {
        self.machine.describe()
    }

    fn suspend(&mut self, deadline: Instant) -> Result<(), SubjectError> {
        self.suspend_guest(deadline)
            .map_err(|error| error.while_("cannot suspend the guest; it is to be resumed"))
    }

    fn save(&mut self, sink: &mut dyn Write, deadline: Instant) -> Result<(), SubjectError> {
        self.save_guest(sink, deadline).map_err(|error| {
            error.while_("cannot save the guest's device state; it is to be resumed")
        })
    }

    /// As the trait says. A guest that its owner had paused stays stopped; if its state had been saved already, QEMU calls
    /// that `postmigrate` and lets it run with `cont`, but migrates it again only after that.
    fn resume(&mut self, deadline: Instant) -> Result<(), SubjectError> {
        self.resume_guest(deadline).map_err(|error| {
            error.while_(
                "cannot resume the guest at the source; if QEMU lives, `migrate_cancel` and then `cont` on its QMP socket \
                 let it run (first end a destination QEMU that holds the same disks)",
            )
        })
    }

    /// To be called *before* the destination is told that it may run: from here on nothing, not even a drop, lets this
    /// copy run.
    fn release(&mut self) {
        self.note(None);
        self.phase = Phase::Released;
        self.capture = None;
    }
}

impl Drop for OutgoingQemu {
    fn drop(&mut self) {
        let touched = self.settings.is_some() || self.phase != Phase::Idle;
        if touched && self.phase != Phase::Released {
            // Nobody is left to be told.
            let _ = self.resume_guest(Instant::now() + LAST_ATTEMPT);
        }
    }
}

/// A bandwidth limit of one's own.
fn stamp() -> Result<u64, QemuError> {
    let mut random = [0; 8];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty()).map_err(
        |errno| QmpError::Io {
            during: "asking the kernel for random numbers".into(),
            source: errno.into(),
        },
    )?;
    Ok(BANDWIDTH + u64::from_le_bytes(random) % STAMPS)
}

fn check_state(state: &RunState) -> Result<(), QemuError> {
    let reasons = match state {
        RunState::Running | RunState::Paused => Vec::new(),
        other => vec![Refusal::SourceState {
            state: other.to_string(),
        }],
    };
    Refusals::check(reasons)
}
