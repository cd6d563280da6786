//! Bytes at fixed positions.

use std::fmt::Debug;
use std::io;
use std::ops::Range;

/// Bytes at fixed positions, read and written whole.
///
/// All methods may be called from any thread at any time and may block on the medium. Positions that were
/// never written read as zeros.
pub trait Storage: Debug + Send + Sync {
    /// The length in bytes.
    fn len(&self) -> u64;

    /// Whether there are no bytes at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `buf` with the bytes from `offset` on.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] if the range reaches beyond [`len`](Self::len); else what the medium says.
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;

    /// Writes all of `buf` from `offset` on.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] if the range reaches beyond [`len`](Self::len); else what the medium says.
    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;

    /// Returns when everything written before is durable.
    ///
    /// # Errors
    /// What the medium says; nothing written since the last good flush may be taken as durable then.
    fn flush(&self) -> io::Result<()>;

    /// The ranges that may hold anything but zeros, in order; what lies between them reads as zeros.
    ///
    /// Looking never allocates or fetches what is not there.
    ///
    /// # Errors
    /// What the medium says.
    fn data_ranges(&self) -> io::Result<Vec<Range<u64>>>;
}
