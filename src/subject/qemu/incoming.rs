//! A QEMU that waits for a guest.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::error::{QemuError, Refusal, Refusals};
use super::machine::{FILE, KIND, Machine, QEMU_VERSION, RUN_STATE, RunState, preallocated};
use super::qmp::Qmp;
use super::qmp_error::QmpError;
use super::settings::Settings;
use super::status;
use super::stream::{Spooled, StreamError};
use crate::subject::{Description, Incoming, SubjectError};

/// How long a drop may try to put QEMU's settings back.
const LAST_ATTEMPT: Duration = Duration::from_secs(1);

/// How much of what QEMU wrote before it exited is quoted.
const LAST_WORDS: usize = 2048;

/// How long the parts took, for reports.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct IncomingTimings {
    /// From `migrate-incoming` to `completed`, page faults served meanwhile included.
    pub load: Duration,
    /// From `cont` to the running guest.
    pub resume: Duration,
    /// Bytes of device state.
    pub state_len: u64,
}

/// A QEMU, started with `-incoming defer`, that a guest may come to.
///
/// On drop QEMU's settings are put back, if nothing was loaded yet; it can be used for another attempt then.
#[derive(Debug)]
pub struct IncomingQemu {
    qmp: Qmp,
    machine: Machine,
    phase: Phase,
    settings: Option<Settings>,
    /// Whether the guest ran at the source. Set by [`accept`](Incoming::accept), which has to do with `&self`.
    to_run: AtomicBool,
    timings: IncomingTimings,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Waiting,
    /// QEMU was given a state, and is lost if that is not whole.
    Loading,
    Loaded,
    Running,
}

impl IncomingQemu {
    /// A QEMU to be moved into; `machine` is what [`Machine::inspect`] found behind the same `qmp`. Only asks.
    ///
    /// # Errors
    /// [`QemuError::Refused`] if it was not started with `-incoming defer`, or if all its pages are present already.
    pub fn new(mut qmp: Qmp, machine: Machine, deadline: Instant) -> Result<Self, QemuError> {
        let mut reasons = Vec::new();
        if machine.run_state == RunState::InMigrate {
            // Without `defer` it listens already, and says where.
            let answer = status::query(&mut qmp, deadline)?;
            if answer.as_object().is_some_and(|answer| !answer.is_empty()) {
                reasons.push(Refusal::IncomingStarted);
            }
        } else {
            reasons.push(Refusal::NotIncoming {
                state: machine.run_state.to_string(),
            });
        }
        reasons.extend(preallocated(&mut qmp, &machine, deadline)?);
        Refusals::check(reasons)?;
        Ok(Self {
            qmp,
            machine,
            phase: Phase::Waiting,
            settings: None,
            to_run: AtomicBool::new(true),
            timings: IncomingTimings::default(),
        })
    }

    /// The QEMU as it was found.
    #[must_use]
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// How long the parts took.
    #[must_use]
    pub fn timings(&self) -> IncomingTimings {
        self.timings
    }

    /// Sets QEMU up to load a device state without RAM, and to stay stopped when it has. Loading prepares as well, if need
    /// be; done before, it is no part of the blackout.
    ///
    /// # Errors
    /// If QEMU is too old.
    pub fn prepare(&mut self, deadline: Instant) -> Result<(), QemuError> {
        if self.settings.is_some() {
            return Ok(());
        }
        self.qmp.reconnect_if_broken(deadline)?;
        let settings = Settings::apply(
            &mut self.qmp,
            &["x-ignore-shared", "events"],
            &[
                ("tls-creds", "".into()),
                ("tls-hostname", "".into()),
                ("mode", "normal".into()),
            ],
            deadline,
        )?;
        self.settings = Some(settings);
        // While it waits for a guest, this means that it does not run it by itself, as though started with -S.
        self.qmp.execute("stop", &Value::Null, deadline)?;
        Ok(())
    }

    /// Whether QEMU still answers; what the guest does in it does not matter.
    ///
    /// # Errors
    /// If it has ended, or does not answer by the deadline.
    pub fn answers(&mut self, deadline: Instant) -> Result<(), QemuError> {
        self.qmp.reconnect_if_broken(deadline)?;
        RunState::query(&mut self.qmp, deadline).map(drop)
    }

    fn load_guest(&mut self, state: &mut dyn Read, deadline: Instant) -> Result<(), QemuError> {
        if self.phase != Phase::Waiting {
            return Err(QemuError::Order {
                what: "loading a device state",
                when: "into a QEMU that was given one before; start it anew",
            });
        }
        self.prepare(deadline)?;
        let state = Spooled::read(state)?;
        self.timings.state_len = state.len();
        let (ours, theirs) = UnixStream::pair().map_err(StreamError::SetUp)?;
        self.qmp
            .pass_fd("memferry-state", theirs.as_fd(), deadline)?;
        drop(theirs);
        self.qmp.drain_events();
        let log = Log::of(self.machine.pid);

        // Said when it was prepared, but somebody else may have said `cont` since: it would run what it loads at once, and
        // the source would run on as well if the migration were then given up.
        self.qmp.execute("stop", &Value::Null, deadline)?;
        let began = Instant::now();
        self.phase = Phase::Loading;
        let uri = json!({"uri": "fd:memferry-state"});
        let loaded = self
            .qmp
            .execute("migrate-incoming", &uri, deadline)
            .map_err(QemuError::from)
            .and_then(|_| self.feed(&state, &ours, deadline));
        self.timings.load = began.elapsed();
        if let Err(QemuError::Qmp(QmpError::Refused { .. })) = &loaded {
            // It was never given anything.
            self.phase = Phase::Waiting;
        }
        match loaded {
            Err(QemuError::Qmp(error)) if error.is_closed() => Err(QemuError::Exited {
                last_words: log.and_then(|log| log.last_words()),
            }),
            other => other,
        }?;
        self.phase = Phase::Loaded;
        match RunState::query(&mut self.qmp, deadline)? {
            RunState::Running => {
                // Two must not run; this one has no right to.
                self.qmp.execute("stop", &Value::Null, deadline)?;
                Err(QemuError::RunState {
                    state: "running".to_owned(),
                    during: "its state has only been loaded",
                    remedy: "something else let it run before it was handed over; end this QEMU, the source's copy goes on",
                })
            }
            _ => Ok(()),
        }
    }

    /// Gives QEMU the state and waits until it is loaded.
    fn feed(
        &mut self,
        state: &Spooled,
        to: &UnixStream,
        deadline: Instant,
    ) -> Result<(), QemuError> {
        let fed = state.feed(to, deadline);
        let loaded = status::wait(
            &mut self.qmp,
            "loading the device state",
            |status| status == "completed",
            |_| Ok(()),
            // A QEMU that was not given everything never completes; it may have exited, which tells more.
            if fed.is_ok() {
                deadline
            } else {
                deadline.min(Instant::now() + LAST_ATTEMPT)
            },
        );
        match (fed, loaded) {
            (_, Ok(_)) => Ok(()),
            (Err(fed), Err(QemuError::Late { .. })) => Err(fed.into()),
            (_, Err(error)) => Err(error),
        }
    }

    fn resume_guest(&mut self, deadline: Instant) -> Result<(), QemuError> {
        if self.phase != Phase::Loaded {
            return Err(QemuError::Order {
                what: "running the guest",
                when: "before its state is loaded, or twice",
            });
        }
        self.qmp.reconnect_if_broken(deadline)?;
        let began = Instant::now();
        if self.to_run.load(Ordering::Relaxed) {
            self.qmp.execute("cont", &Value::Null, deadline)?;
            while RunState::query(&mut self.qmp, deadline)? != RunState::Running {
                self.qmp.wait_event(
                    "letting the guest run",
                    |event| event.name == "RESUME",
                    deadline,
                )?;
            }
        }
        self.timings.resume = began.elapsed();
        self.phase = Phase::Running;
        self.restore_settings(deadline)
    }

    fn restore_settings(&mut self, deadline: Instant) -> Result<(), QemuError> {
        match self.settings.take() {
            Some(settings) => settings.restore(&mut self.qmp, deadline),
            None => Ok(()),
        }
    }
}

impl Incoming for IncomingQemu {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn accept(&self, source: &Description) -> Result<(), SubjectError> {
        let ours = self.machine.describe();
        compare(source, &ours).map_err(SubjectError::new)?;
        let runs = value(source, RUN_STATE) != Some("paused");
        self.to_run.store(runs, Ordering::Relaxed);
        Ok(())
    }

    fn load(
        &mut self,
        state: &mut (dyn Read + Send),
        deadline: Instant,
    ) -> Result<(), SubjectError> {
        self.load_guest(state, deadline)
            .map_err(|error| error.while_("cannot load the guest's device state"))
    }

    /// As the trait says. A guest that was paused at the source stays paused.
    fn resume(&mut self, deadline: Instant) -> Result<(), SubjectError> {
        self.resume_guest(deadline).map_err(|error| {
            let runs = self.phase == Phase::Running;
            error.while_(if runs {
                "the guest runs here, but QEMU's migration capabilities could not be put back: switch x-ignore-shared off \
                 before this guest is ever saved to a file"
            } else {
                "the guest belongs to this QEMU, but does not run; `cont` on its QMP socket lets it"
            })
        })
    }
}

impl Drop for IncomingQemu {
    fn drop(&mut self) {
        // Loaded and not handed over: an operator decides, and is to find the settings as they were.
        if matches!(self.phase, Phase::Waiting | Phase::Loaded) {
            // Nobody is left to be told.
            let _ = self.restore_settings(Instant::now() + LAST_ATTEMPT);
        }
    }
}

/// Says what differs, and what to do about it.
fn compare(source: &Description, ours: &Description) -> Result<(), String> {
    if source.kind != KIND {
        return Err(format!(
            "the source sends a {:?}, and this end is a QEMU: use the command for that kind",
            source.kind
        ));
    }
    for (name, theirs) in &source.attributes {
        if name == QEMU_VERSION {
            continue;
        }
        if name.starts_with(FILE) {
            // The destination's memory is emptied first, which would be the source's.
            if ours
                .attributes
                .iter()
                .any(|(n, mine)| n.starts_with(FILE) && mine == theirs)
            {
                return Err(format!(
                    "both QEMUs have the same RAM file ({name}): start the destination with a mem-path of its own"
                ));
            }
            continue;
        }
        if name == RUN_STATE {
            if !matches!(theirs.as_str(), "running" | "paused") {
                return Err(format!(
                    "the guest at the source is {theirs:?}; it has to be running or paused"
                ));
            }
            continue;
        }
        match value(ours, name) {
            Some(mine) if mine == theirs => {}
            Some(mine) => {
                return Err(format!(
                    "{name} is {theirs:?} at the source and {mine:?} here: {}",
                    remedy(name)
                ));
            }
            None => {
                return Err(format!(
                    "{name} is {theirs:?} at the source and does not exist here: {}",
                    remedy(name)
                ));
            }
        }
    }
    for (name, mine) in &ours.attributes {
        if value(source, name).is_none() && !name.starts_with(FILE) {
            return Err(format!(
                "{name} is {mine:?} here and does not exist at the source: {}",
                remedy(name)
            ));
        }
    }
    Ok(())
}

fn value<'a>(description: &'a Description, name: &str) -> Option<&'a str> {
    let found = description.attributes.iter().find(|(n, _)| n == name);
    found.map(|(_, value)| value.as_str())
}

fn remedy(name: &str) -> &'static str {
    match name {
        "machine" => {
            "start the destination QEMU with -M and the source's versioned type; if it does not know that, it is too old"
        }
        "accel" => "start the destination QEMU with the same -accel",
        "cpu" => "start the destination QEMU with the same -cpu",
        "vcpus" => "start the destination QEMU with the same -smp",
        "uuid" => "start the destination QEMU with the same -uuid",
        "devices" => {
            "start the destination QEMU with the same -device options, hot-plugged ones included"
        }
        _ if name.starts_with("backend:") => {
            "start the destination QEMU with the same -m and -object memory-backend-file, with the same ids and sizes"
        }
        _ => "use the same version of memferry at both ends",
    }
}

/// QEMU's standard error, where that is a file that can be read.
#[derive(Debug)]
struct Log {
    file: File,
    /// What is there already is about something else.
    from: u64,
}

impl Log {
    fn of(pid: u32) -> Option<Self> {
        let path = format!("/proc/{pid}/fd/2");
        if !std::fs::metadata(&path).ok()?.is_file() {
            return None;
        }
        let file = File::open(path).ok()?;
        let from = file.metadata().ok()?.len();
        Some(Self { file, from })
    }

    /// What was written since, on one line.
    fn last_words(&self) -> Option<String> {
        let mut words = vec![0; LAST_WORDS];
        let count = self.file.read_at(&mut words, self.from).ok()?;
        let words = String::from_utf8_lossy(&words[..count]);
        let lines: Vec<&str> = words
            .lines()
            .map(str::trim)
            .filter(|l| !l.is_empty())
            .collect();
        (!lines.is_empty()).then(|| lines.join("; "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn description(attributes: &[(&str, &str)]) -> Description {
        Description {
            kind: KIND.into(),
            attributes: attributes
                .iter()
                .map(|(name, value)| ((*name).into(), (*value).into()))
                .collect(),
        }
    }

    #[track_caller]
    fn check(source: &[(&str, &str)], ours: &[(&str, &str)], expected: Result<(), &str>) {
        let result = compare(&description(source), &description(ours));
        match (result, expected) {
            (Ok(()), Ok(())) => {}
            (Err(error), Err(part)) if error.contains(part) => {}
            (result, expected) => panic!("{result:?} is not {expected:?}"),
        }
    }

    #[test]
    fn another_machine_type_is_named_with_both_values() {
        check(
            &[("machine", "pc-i440fx-7.2")],
            &[("machine", "pc-q35-7.2")],
            Err("machine is \"pc-i440fx-7.2\" at the source and \"pc-q35-7.2\" here"),
        );
    }

    #[test]
    fn a_backend_that_only_the_source_has_is_named() {
        check(&[("backend:m1", "4096")], &[], Err("backend:m1"));
    }

    #[test]
    fn a_backend_that_only_the_destination_has_is_named() {
        check(&[], &[("backend:m1", "4096")], Err("backend:m1"));
    }

    /// The destination's memory is emptied before anything is copied: with one file that would be the source's.
    #[test]
    fn two_ends_that_share_a_ram_file_are_refused() {
        let file = |inode| format!("4f7c2a10-0000-4000-8000-000000000000:27:{inode}");
        let (one, other) = (file(5), file(6));
        check(
            &[("file:m0", &one)],
            &[("file:m1", &one)],
            Err("both QEMUs have the same RAM file"),
        );
        check(&[("file:m0", &one)], &[("file:m0", &other)], Ok(()));
        check(&[("file:m0", &one)], &[], Ok(()));
        check(&[], &[("file:m0", &other)], Ok(()));
    }

    #[test]
    fn another_qemu_version_is_fine() {
        check(
            &[(QEMU_VERSION, "7.2.22")],
            &[(QEMU_VERSION, "10.0.2")],
            Ok(()),
        );
    }

    #[test]
    fn an_attribute_this_version_does_not_know_is_refused() {
        check(&[("enclave", "sgx")], &[], Err("same version of memferry"));
    }

    #[test]
    fn a_guest_that_crashed_at_the_source_is_refused() {
        check(
            &[(RUN_STATE, "guest-panicked")],
            &[(RUN_STATE, "inmigrate")],
            Err("guest-panicked"),
        );
    }
}
