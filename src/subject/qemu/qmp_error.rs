//! What can go wrong in a conversation with QEMU.

use std::io::{self, ErrorKind};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::qmp_codec::CodecError;

/// Why a conversation with QEMU failed.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// There is no way to the socket.
    #[error(
        "cannot connect to the QMP socket {}: check the path, and that QEMU runs with -qmp unix:PATH,server=on,wait=off",
        path.display()
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the kernel says.
        source: io::Error,
    },
    /// The socket takes the connection, and nobody speaks.
    #[error(
        "the QMP socket {} accepted the connection but did not greet within {waited:?}: QEMU serves one client at a \
         time, so another one is probably connected; end it, or give QEMU a second -qmp socket",
        path.display()
    )]
    NoGreeting {
        /// The socket.
        path: PathBuf,
        /// How long the greeting was waited for.
        waited: Duration,
    },
    /// No answer by the deadline.
    #[error("no answer from QEMU within {waited:?} ({during}): is it stopped or overloaded?")]
    Timeout {
        /// The command, or what was waited for.
        during: String,
        /// How long.
        waited: Duration,
    },
    /// The peer is gone.
    #[error("QEMU closed its QMP connection ({during}): it has exited or was killed")]
    Closed {
        /// The command, or what was waited for.
        during: String,
    },
    /// The connection failed.
    #[error("the QMP connection failed ({during})")]
    Io {
        /// The command, or what was waited for.
        during: String,
        /// What the kernel says.
        source: io::Error,
    },
    /// What came is not QMP.
    #[error(
        "the peer does not speak QMP ({during}): is this the socket of -qmp, and not of -monitor or -serial?"
    )]
    Malformed {
        /// The command, or what was waited for.
        during: String,
        /// What is wrong with it.
        source: CodecError,
    },
    /// QEMU answered with an error.
    #[error("QEMU refused {command}: {desc}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's error class, for example `GenericError` or `CommandNotFound`.
        class: String,
        /// QEMU's words.
        desc: String,
    },
}

impl QmpError {
    /// Whether the peer is gone, so that nothing more can be asked of it here.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        matches!(self, Self::Closed { .. })
    }

    pub(super) fn from_io(during: &str, began: Instant, source: io::Error) -> Self {
        let during = during.to_owned();
        if is_timeout(&source) {
            let waited = began.elapsed();
            return Self::Timeout { during, waited };
        }
        match source.kind() {
            ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => Self::Closed { during },
            _ => Self::Io { during, source },
        }
    }
}

/// Whether the deadline passed; a socket with a time-out says "would block".
pub(super) fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}
