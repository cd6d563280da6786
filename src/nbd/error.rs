//! Bytes of a peer that mean nothing.

/// Why bytes of a peer are not what the specification says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// It does not begin as it must.
    #[error(
        "the peer sent {found:#x} where {what} begins: it does not speak this protocol, or the two are out of step"
    )]
    Magic {
        /// What should have begun.
        what: &'static str,
        /// What came.
        found: u64,
    },
    /// It ends before its last field.
    #[error("{what} ends before its last field")]
    UnexpectedEnd {
        /// What was read.
        what: &'static str,
    },
    /// It goes on after its last field.
    #[error("{what} goes on after its last field")]
    TrailingBytes {
        /// What was read.
        what: &'static str,
    },
    /// It is longer than this side takes.
    #[error("{what} has {len} bytes or parts; at most {limit} are taken")]
    TooLong {
        /// What was read.
        what: &'static str,
        /// Its length.
        len: u64,
        /// The most that is taken.
        limit: u64,
    },
    /// A name is not UTF-8, or has a zero byte.
    #[error("{what} is no text")]
    NotText {
        /// What was read.
        what: &'static str,
    },
    /// A field has a value that it cannot have.
    #[error("{what} has the impossible value {value}")]
    Impossible {
        /// Which field.
        what: &'static str,
        /// What it says.
        value: u64,
    },
}
