//! What can go wrong with a QEMU guest, and what is refused before anything is touched.

use std::time::Duration;

use super::backend::BackendError;
use super::qmp_error::QmpError;
use super::stream::StreamError;
use crate::subject::SubjectError;

/// Why a QEMU guest could not be inspected, suspended, saved, loaded or run.
#[derive(Debug, thiserror::Error)]
pub enum QemuError {
    /// The conversation failed.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The guest is of a kind that cannot be moved safely.
    #[error("{0}")]
    Refused(Refusals),
    /// The file behind the guest's RAM cannot be opened.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The device state did not pass.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// QEMU answered something else than this client understands.
    #[error("QEMU's answer to {command} lacks {lacks}: its version is not supported")]
    Answer {
        /// The command.
        command: String,
        /// What was looked for.
        lacks: &'static str,
    },
    /// QEMU's migration took a turn that was not asked for.
    #[error("QEMU's migration went to {status:?} while {during}{}", detail(reason))]
    Migration {
        /// What was going on.
        during: &'static str,
        /// QEMU's status.
        status: String,
        /// QEMU's words, if it has any.
        reason: Option<String>,
    },
    /// QEMU's process cannot be told from its socket.
    #[error(
        "cannot tell QEMU's process id from its QMP socket, as it is in another PID namespace: name it"
    )]
    UnknownProcess,
    /// QEMU did not get there by the deadline.
    #[error(
        "QEMU did not finish {during} within {waited:?}; its last migration status was {status:?}"
    )]
    Late {
        /// What was going on.
        during: &'static str,
        /// How long was waited.
        waited: Duration,
        /// QEMU's last status.
        status: String,
    },
    /// QEMU 7.2 exits when it cannot load a state.
    #[error(
        "the destination QEMU exited while it loaded the device state{}; start it anew with -incoming defer and migrate again",
        detail(last_words)
    )]
    Exited {
        /// What it wrote to its standard error, where that is a file.
        last_words: Option<String>,
    },
    /// The guest is not in the run state that was needed.
    #[error("the guest is {state} while {during}: {remedy}")]
    RunState {
        /// QEMU's run state.
        state: String,
        /// What was going on.
        during: &'static str,
        /// What an operator can do.
        remedy: &'static str,
    },
    /// A call out of order.
    #[error("{what} cannot be done {when}")]
    Order {
        /// What was asked.
        what: &'static str,
        /// The state that it was asked in.
        when: &'static str,
    },
}

impl QemuError {
    /// The error as the engine sees it, with what was being done.
    pub(super) fn while_(self, doing: &str) -> SubjectError {
        SubjectError::because(doing, self)
    }
}

fn detail(words: &Option<String>) -> String {
    words
        .as_ref()
        .map_or_else(String::new, |words| format!(" ({words})"))
}

/// All reasons why a guest is refused: at least one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusals(pub Vec<Refusal>);

impl Refusals {
    /// An error if there is a reason for one.
    pub(super) fn check(reasons: Vec<Refusal>) -> Result<(), QemuError> {
        if reasons.is_empty() {
            return Ok(());
        }
        Err(QemuError::Refused(Self(reasons)))
    }
}

impl std::fmt::Display for Refusals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "this QEMU guest cannot be migrated: ")?;
        for (position, reason) in self.0.iter().enumerate() {
            if position > 0 {
                write!(f, "; ")?;
            }
            write!(f, "{reason}")?;
        }
        Ok(())
    }
}

/// One reason not to migrate, and the way out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// RAM that is no named file: plain `-m`, a DIMM of `memory-backend-ram`, a memfd.
    #[error(
        "RAM {id:?} is a {kind}, which has no file to copy from: use -object \
         memory-backend-file,id={id},share=on,size=…,mem-path=… and -M …,memory-backend={id} (or -device pc-dimm,memdev={id})"
    )]
    BackendKind {
        /// The backend's id.
        id: String,
        /// Its QOM type.
        kind: String,
    },
    /// RAM whose writes do not reach the file.
    #[error("RAM {id:?} is a file but private to QEMU: add share=on to its -object")]
    NotShared {
        /// The backend's id.
        id: String,
    },
    /// RAM that cannot be written.
    #[error("RAM {id:?} is read-only: remove readonly=on from its -object")]
    ReadOnly {
        /// The backend's id.
        id: String,
    },
    /// RAM that begins in the middle of its file.
    #[error(
        "RAM {id:?} begins at offset {offset} of its file, which is not supported: give it a file of its own"
    )]
    Offset {
        /// The backend's id.
        id: String,
        /// Bytes into the file.
        offset: u64,
    },
    /// The file is emptied when QEMU exits, while it may still have to serve the destination.
    #[error(
        "RAM {id:?} has discard-data=on, which would empty the file when QEMU exits: remove it from its -object"
    )]
    DiscardData {
        /// The backend's id.
        id: String,
    },
    /// Every page is present from the start, so none can be fetched on demand.
    #[error(
        "RAM {id:?} has prealloc=on, which leaves no page to be filled on demand: remove it at the destination"
    )]
    Prealloc {
        /// The backend's id.
        id: String,
    },
    /// RAM that belongs to no backend.
    #[error(
        "the guest has {total} bytes of RAM but its memory backends have {covered}: give all of it a memory-backend-file"
    )]
    Uncovered {
        /// What the guest has, in bytes.
        total: u64,
        /// What the backends have, in bytes.
        covered: u64,
    },
    /// Something outside QEMU writes RAM, unseen by dirty tracking.
    #[error(
        "{device:?} is a {kind}: its writes to guest RAM do not pass through QEMU and cannot be tracked; unplug it first"
    )]
    ForeignWriter {
        /// The device or network back end.
        device: String,
        /// Its type.
        kind: String,
    },
    /// A device that changes the shape of RAM behind our back.
    #[error("{device:?} is a {kind}, which is not supported yet; unplug it first")]
    Device {
        /// The device.
        device: String,
        /// Its type.
        kind: String,
    },
    /// QEMU itself knows why not.
    #[error("QEMU says: {reason}")]
    Blocked {
        /// QEMU's words.
        reason: String,
    },
    /// Somebody else migrates it.
    #[error(
        "a migration is under way already (status {status:?}): wait for it, or end it with `migrate_cancel` \
         and `cont`, which lets the guest run on after a memferry that died"
    )]
    MigrationActive {
        /// QEMU's migration status.
        status: String,
    },
    /// Neither running nor paused.
    #[error(
        "the guest's run state is {state:?}, and it has to be running or paused{}",
        hint(state)
    )]
    SourceState {
        /// QEMU's run state.
        state: String,
    },
    /// The destination runs a guest already.
    #[error(
        "the destination QEMU's run state is {state:?}, not \"inmigrate\": start it with -incoming defer"
    )]
    NotIncoming {
        /// QEMU's run state.
        state: String,
    },
    /// The destination listens for another sender.
    #[error(
        "the destination QEMU already waits for a migration of its own: start it with -incoming defer"
    )]
    IncomingStarted,
    /// QEMU is too old.
    #[error("this QEMU does not know the capability {name:?}: it has to be 4.0 or newer")]
    Capability {
        /// The capability.
        name: String,
    },
}

fn hint(state: &str) -> &'static str {
    match state {
        "postmigrate" => {
            ": it was migrated before; if that copy is gone, let it run with `cont`, and `stop` it again if it was paused"
        }
        "inmigrate" => ": this QEMU waits to receive a guest; is this the destination?",
        _ => "",
    }
}
