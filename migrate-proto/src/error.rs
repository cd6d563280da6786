//! What can go wrong: reading a peer's bytes, the order of its messages, and the reasons that travel.

use alloc::string::String;

/// Bytes of a peer that mean nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// The body ends before its last field.
    #[error("a message ends before its last field")]
    UnexpectedEnd,
    /// The body goes on after its last field.
    #[error("a message goes on after its last field")]
    TrailingBytes,
    /// No message has this tag.
    #[error("no message has the tag {tag}")]
    UnknownTag {
        /// The tag that came.
        tag: u8,
    },
    /// A field has a value that it cannot have.
    #[error("a message has an impossible {field}")]
    InvalidValue {
        /// Which field.
        field: &'static str,
    },
    /// A length is above what the protocol allows.
    #[error("a frame announces {len} bytes of {part}; at most {limit} are allowed")]
    TooLong {
        /// Which part of the frame.
        part: &'static str,
        /// The announced length in bytes.
        len: u32,
        /// The limit in bytes.
        limit: u32,
    },
    /// The check sum of a frame does not match: the bytes were damaged, or are not of this protocol.
    #[error("a frame is damaged, or its sender does not speak this protocol")]
    BadCheck,
}

/// Why a session ends early, in a form that travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum AbortCode {
    /// The user asked for it.
    Cancelled,
    /// No common version or a required capability is missing.
    Incompatible,
    /// Regions, sizes or the subject's description do not match.
    Mismatch,
    /// The peer broke the protocol.
    Protocol,
    /// Something on the sender's machine failed: memory, disk, the subject.
    Failed,
    /// The dirty rate does not let the migration end within its limits.
    NotConverging,
    /// The verification before hand-over found a difference.
    Different,
    /// The peer was silent for too long.
    Silent,
    /// A code that this version does not know.
    Unknown(u16),
}

impl AbortCode {
    pub(crate) fn to_wire(self) -> u16 {
        match self {
            Self::Cancelled => 1,
            Self::Incompatible => 2,
            Self::Mismatch => 3,
            Self::Protocol => 4,
            Self::Failed => 5,
            Self::NotConverging => 6,
            Self::Different => 7,
            Self::Silent => 8,
            Self::Unknown(code) => code,
        }
    }

    pub(crate) fn from_wire(code: u16) -> Self {
        match code {
            1 => Self::Cancelled,
            2 => Self::Incompatible,
            3 => Self::Mismatch,
            4 => Self::Protocol,
            5 => Self::Failed,
            6 => Self::NotConverging,
            7 => Self::Different,
            8 => Self::Silent,
            other => Self::Unknown(other),
        }
    }
}

/// Why a session cannot go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProtocolError {
    /// Bytes that mean nothing.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// A message that may not come now.
    #[error("the peer sent {message} while this side was {phase}")]
    Unexpected {
        /// What came.
        message: &'static str,
        /// What this side was doing.
        phase: &'static str,
    },
    /// The two sides have no version in common, or one requires what the other does not have.
    #[error("the two sides do not speak the same protocol: {reason}")]
    Unsupported {
        /// What differs, with both values.
        reason: String,
    },
    /// The two sides do not fit together.
    #[error("the two sides do not fit together: {reason}")]
    Incompatible {
        /// What differs, with both values.
        reason: String,
    },
    /// A message that contradicts what was agreed or said before.
    #[error("the peer broke the protocol: {reason}")]
    Violation {
        /// What it did.
        reason: &'static str,
    },
    /// The peer ended the session.
    #[error("the other side ended the migration ({code:?}): {reason}")]
    PeerAborted {
        /// Its code.
        code: AbortCode,
        /// Its reason.
        reason: String,
    },
    /// Nothing was heard for too long.
    #[error("nothing was heard of the other side for {seconds} s")]
    Silent {
        /// The limit that passed.
        seconds: u64,
    },
    /// The plan forbids post-copy, and the memory changes faster than it can be sent.
    #[error(
        "the migration does not converge: {remaining} bytes were dirty after round {round}, and the link moves {bandwidth} bytes/s; \
         allow post-copy, raise the downtime limit, or slow the guest down"
    )]
    NotConverging {
        /// Bytes in the last dirty set.
        remaining: u64,
        /// Bytes a second that the link moved.
        bandwidth: u64,
        /// The round that was the last straw.
        round: u32,
    },
    /// Verification before hand-over found chunks that differ.
    #[error("{different} chunks differ between source and destination; nothing was handed over")]
    Different {
        /// How many.
        different: u64,
    },
    /// This side ended the session.
    #[error("{reason}")]
    Aborted {
        /// The code the peer is told.
        code: AbortCode,
        /// Why.
        reason: String,
    },
}

impl ProtocolError {
    /// The code that the peer is told.
    #[must_use]
    pub fn code(&self) -> AbortCode {
        match self {
            Self::Decode(_) | Self::Unexpected { .. } | Self::Violation { .. } => {
                AbortCode::Protocol
            }
            Self::Unsupported { .. } => AbortCode::Incompatible,
            Self::Incompatible { .. } => AbortCode::Mismatch,
            Self::PeerAborted { code, .. } | Self::Aborted { code, .. } => *code,
            Self::Silent { .. } => AbortCode::Silent,
            Self::NotConverging { .. } => AbortCode::NotConverging,
            Self::Different { .. } => AbortCode::Different,
        }
    }
}
