//! How a session ends, on either side: why, and in which order its sockets are closed.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use migrate_proto::{Layout, ProtocolError};

use crate::subject::SubjectError;

/// How long the last messages may take to reach the peer once the session has ended.
pub(super) const LINGER: Duration = Duration::from_secs(2);

/// What ended a session.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// The protocol, the peer or the network.
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    /// The subject.
    #[error(transparent)]
    Subject(#[from] SubjectError),
    /// Something on this machine.
    #[error("{what}: {source}")]
    Local {
        /// What was attempted.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

/// An error of this machine as a cause, for `map_err`.
pub(super) fn local(what: &'static str) -> impl FnOnce(io::Error) -> Cause {
    move |source| Cause::Local { what, source }
}

/// Bytes of `chunks` chunks, the last ones counted whole.
pub(super) fn bytes_of(layout: &Layout, chunks: u64) -> u64 {
    (chunks * u64::from(layout.chunk_size().bytes())).min(layout.bytes())
}

/// Waits for `done`, until `end` at the latest. Only ever at the end of a session, where nothing signals.
pub(super) fn wait_until(end: Instant, done: impl Fn() -> bool) {
    while !done() && Instant::now() < end {
        thread::park_timeout(Duration::from_micros(200));
    }
}
