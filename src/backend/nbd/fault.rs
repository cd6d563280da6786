//! Why a connection is of no use any more.

use std::fmt;
use std::io;
use std::sync::Arc;

use crate::nbd::{ChunkKind, DecodeError};

/// A server that does not keep to the protocol. The connection was dropped; nothing that came over it is used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Misbehaviour {
    /// Bytes that mean nothing.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// A reply to nothing.
    #[error("it answered a request that was not made, or was answered already (cookie {0})")]
    Cookie(u64),
    /// Bytes that were not asked for.
    #[error(
        "it sent bytes {offset}+{len} for a read of {wanted_offset}+{wanted_len}, or sent some twice"
    )]
    Range {
        /// Where its bytes are.
        offset: u64,
        /// How many they are.
        len: u64,
        /// Where those that were asked for are.
        wanted_offset: u64,
        /// How many they are.
        wanted_len: u64,
    },
    /// Answers without end.
    #[error("it answered with more than was asked for")]
    TooMuch,
    /// Success without all of its bytes.
    #[error("it said that a read was done and had sent {covered} of {wanted} bytes")]
    Short {
        /// How many it sent.
        covered: u64,
        /// How many were asked for.
        wanted: u64,
    },
    /// A reply of a kind that does not belong to the request, or to what was agreed on.
    #[error("it answered with {0:?} what that is no answer to")]
    Kind(ChunkKind),
    /// A simple reply where structured ones were agreed on.
    #[error(
        "it sent the bytes of a read without structure, though structured replies were agreed on"
    )]
    Unstructured,
    /// A payload of a length that its kind cannot have.
    #[error("it announced a payload of {len} bytes for {kind:?}")]
    Length {
        /// The kind.
        kind: ChunkKind,
        /// The length.
        len: u32,
    },
    /// An option's answer where another option's was due.
    #[error("it answered another option than the one that was asked")]
    Option,
    /// It agreed to an export and did not say how large it is.
    #[error("it agreed to the export and did not say how large it is")]
    NoSize,
    /// An export larger than a file can be.
    #[error("it said that the export has {0} bytes, which is more than anything can have")]
    Size(u64),
    /// Sizes of requests that contradict each other.
    #[error("its block sizes contradict each other")]
    BlockSizes,
    /// Bytes before TLS that belong to nothing, perhaps put there by a stranger.
    #[error(
        "it sent bytes between its agreement to TLS and the handshake; they may be of a stranger"
    )]
    BeforeTls,
}

/// Why a connection to a server has ended, for all who used it. The error of an operation that failed by it holds it as its inner error.
#[derive(Debug, Clone)]
pub struct Fault(Arc<Cause>);

#[derive(Debug)]
enum Cause {
    /// The connection failed; another may do.
    Lost(io::Error),
    /// The server cannot be trusted with another try of the same.
    Misbehaved(Misbehaviour),
}

impl Fault {
    /// What the server did that no server should, if that is why.
    #[must_use]
    pub fn misbehaviour(&self) -> Option<&Misbehaviour> {
        match &*self.0 {
            Cause::Lost(_) => None,
            Cause::Misbehaved(misbehaviour) => Some(misbehaviour),
        }
    }

    /// Whether another connection could do better.
    pub(super) fn is_of_the_connection(&self) -> bool {
        matches!(*self.0, Cause::Lost(_))
    }

    /// Whether the deadline has passed.
    pub(super) fn is_late(&self) -> bool {
        matches!(&*self.0, Cause::Lost(error) if error.kind() == io::ErrorKind::TimedOut)
    }
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Self(Arc::new(Cause::Lost(error)))
    }
}

impl From<Misbehaviour> for Fault {
    fn from(misbehaviour: Misbehaviour) -> Self {
        Self(Arc::new(Cause::Misbehaved(misbehaviour)))
    }
}

impl From<DecodeError> for Fault {
    fn from(error: DecodeError) -> Self {
        Misbehaviour::from(error).into()
    }
}

/// What a user is told.
impl From<Fault> for io::Error {
    fn from(fault: Fault) -> Self {
        let kind = match &*fault.0 {
            Cause::Lost(error) => match error.kind() {
                // An end that nobody expected is no end of the storage.
                io::ErrorKind::UnexpectedEof => io::ErrorKind::ConnectionAborted,
                kind => kind,
            },
            Cause::Misbehaved(_) => io::ErrorKind::InvalidData,
        };
        Self::new(kind, fault)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.0 {
            Cause::Lost(error) => write!(f, "the connection to the server was lost: {error}"),
            Cause::Misbehaved(_) => {
                f.write_str("the server does not keep to the NBD protocol, and was cut off")
            }
        }
    }
}

impl std::error::Error for Fault {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &*self.0 {
            Cause::Lost(error) => error.source(),
            Cause::Misbehaved(misbehaviour) => Some(misbehaviour),
        }
    }
}
