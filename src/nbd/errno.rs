//! The errors of the transmission phase.

use std::io;

/// Why a request failed, as a number on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Errno {
    /// The export is read-only, or the server does not allow it.
    Perm,
    /// The medium failed.
    Io,
    /// The server had no memory for it.
    NoMem,
    /// The request makes no sense.
    Inval,
    /// There is no room, or it is beyond the end.
    NoSpc,
    /// The answer would be too long.
    Overflow,
    /// It cannot be done in the way that was asked for.
    NotSup,
    /// The server is about to go away.
    Shutdown,
    /// A number that the specification does not know; to be taken as [`Inval`](Self::Inval).
    Unknown(u32),
}

impl Errno {
    /// The number on the wire; never 0, which means success.
    #[must_use]
    pub const fn to_wire(self) -> u32 {
        match self {
            Self::Perm => 1,
            Self::Io => 5,
            Self::NoMem => 12,
            Self::Inval => 22,
            Self::NoSpc => 28,
            Self::Overflow => 75,
            Self::NotSup => 95,
            Self::Shutdown => 108,
            Self::Unknown(number) => number,
        }
    }

    /// The error that a number stands for, `None` for success.
    #[must_use]
    pub const fn from_wire(number: u32) -> Option<Self> {
        Some(match number {
            0 => return None,
            1 => Self::Perm,
            5 => Self::Io,
            12 => Self::NoMem,
            22 => Self::Inval,
            28 => Self::NoSpc,
            75 => Self::Overflow,
            95 => Self::NotSup,
            108 => Self::Shutdown,
            other => Self::Unknown(other),
        })
    }

    /// What a client is told of an error of the storage. What the specification has no number for is [`Errno::Io`].
    #[must_use]
    pub fn of(error: &io::Error) -> Self {
        // EDQUOT is a full disk to whom it concerns.
        const EDQUOT: i32 = 122;
        match error.raw_os_error() {
            Some(1 | 13 | 30) => return Self::Perm,
            Some(12) => return Self::NoMem,
            Some(28 | 27 | EDQUOT) => return Self::NoSpc,
            _ => {}
        }
        match error.kind() {
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Self::Perm,
            io::ErrorKind::OutOfMemory => Self::NoMem,
            io::ErrorKind::StorageFull
            | io::ErrorKind::QuotaExceeded
            | io::ErrorKind::FileTooLarge => Self::NoSpc,
            _ => Self::Io,
        }
    }
}

impl std::fmt::Display for Errno {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Perm => "not permitted",
            Self::Io => "input/output error",
            Self::NoMem => "out of memory",
            Self::Inval => "invalid request",
            Self::NoSpc => "no space left, or beyond the end",
            Self::Overflow => "the answer would be too long",
            Self::NotSup => "not supported",
            Self::Shutdown => "the server is shutting down",
            Self::Unknown(number) => return write!(f, "unknown error {number}"),
        })
    }
}

impl std::error::Error for Errno {}

/// What a client's user is told.
impl From<Errno> for io::Error {
    fn from(errno: Errno) -> Self {
        let kind = match errno {
            Errno::Perm => io::ErrorKind::PermissionDenied,
            Errno::Io => io::ErrorKind::Other,
            Errno::NoMem => io::ErrorKind::OutOfMemory,
            Errno::Inval | Errno::Unknown(_) | Errno::Overflow => io::ErrorKind::InvalidInput,
            Errno::NoSpc => io::ErrorKind::StorageFull,
            Errno::NotSup => io::ErrorKind::Unsupported,
            Errno::Shutdown => io::ErrorKind::ConnectionAborted,
        };
        Self::new(kind, errno)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_error_survives_the_wire() {
        for number in 1..200 {
            assert_eq!(Errno::from_wire(number).unwrap().to_wire(), number);
        }
        assert_eq!(Errno::from_wire(0), None);
    }

    #[test]
    fn errors_of_a_medium_have_numbers() {
        let check = |error: io::Error, expected: Errno| assert_eq!(Errno::of(&error), expected);
        check(io::Error::from_raw_os_error(28), Errno::NoSpc);
        check(io::Error::from_raw_os_error(122), Errno::NoSpc);
        check(io::Error::from_raw_os_error(30), Errno::Perm);
        check(io::ErrorKind::TimedOut.into(), Errno::Io);
        check(io::ErrorKind::UnexpectedEof.into(), Errno::Io);
        // An error that came from a server goes on as what it was.
        for errno in [Errno::Perm, Errno::Io, Errno::NoMem, Errno::NoSpc] {
            check(errno.into(), errno);
        }
    }
}
