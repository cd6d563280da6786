//! Bytes at fixed positions.

use std::fmt::Debug;
use std::io;
use std::ops::Range;
use std::sync::Arc;

/// Bytes at fixed positions, read and written whole.
///
/// All methods may be called from any thread at any time and may block on the medium, but none for ever: what waits
/// for a peer or a device has a deadline. Positions that were never written read as zeros. A write that has returned is
/// seen by every read that begins afterwards; of a read and a write of the same bytes at the same time, the read sees
/// each byte old or new.
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
    /// [`io::ErrorKind::UnexpectedEof`] if the range reaches beyond [`len`](Self::len); else what the medium says: any part
    /// of the range may have been written then.
    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;

    /// Makes `range` read as zeros, and gives its room back where the medium can.
    ///
    /// # Errors
    /// As [`write_all_at`](Self::write_all_at).
    fn zero(&self, range: Range<u64>) -> io::Result<()> {
        write_zeros(self, range)
    }

    /// Returns when everything written before is durable.
    ///
    /// # Errors
    /// What the medium says; nothing written since the last good flush may be taken as durable then. A loss is told once, as
    /// the kernel does: a later flush speaks for what was written after this one, so who still has the bytes writes them again.
    fn flush(&self) -> io::Result<()>;

    /// The ranges of `within` that may hold anything but zeros, in order, cut to `within` and to the length; what lies between them
    /// reads as zeros.
    ///
    /// Looking never allocates or fetches what is not there.
    ///
    /// # Errors
    /// What the medium says.
    fn data_ranges(&self, within: Range<u64>) -> io::Result<Vec<Range<u64>>>;

    /// As [`read_exact_at`](Self::read_exact_at), for bytes that nobody waits for yet: a medium that can lets those go first
    /// for which somebody does.
    ///
    /// # Errors
    /// As [`read_exact_at`](Self::read_exact_at).
    fn read_ahead_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_exact_at(buf, offset)
    }

    /// Whether reading `range` now would be a copy of this machine's memory and wait for nothing, so that a thread that serves others, too, may do it
    /// itself. A hint: it may be wrong by the time of the read.
    fn is_at_hand(&self, range: Range<u64>) -> bool {
        let _ = range;
        false
    }
}

/// Writes zeros over `range`, as bytes: what [`Storage::zero`] does on a medium that cannot do better.
///
/// # Errors
/// As [`Storage::write_all_at`]; [`io::ErrorKind::InvalidInput`] if the range ends before it starts.
pub fn write_zeros<S: Storage + ?Sized>(storage: &S, range: Range<u64>) -> io::Result<()> {
    static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
    if range.start > range.end {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut offset = range.start;
    while offset < range.end {
        let len =
            usize::try_from(range.end - offset).map_or(ZEROS.len(), |left| left.min(ZEROS.len()));
        storage.write_all_at(&ZEROS[..len], offset)?;
        offset += len as u64;
    }
    Ok(())
}

/// Checks that `count` bytes from `offset` on are within a storage of `len` bytes.
///
/// # Errors
/// [`io::ErrorKind::UnexpectedEof`] if they are not, which [`Storage`] promises.
pub(crate) fn check_range(len: u64, offset: u64, count: u64) -> io::Result<()> {
    match offset.checked_add(count) {
        Some(end) if end <= len => Ok(()),
        _ => Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            format!("{count} bytes at {offset} are outside of a storage of {len} bytes"),
        )),
    }
}

impl<S: Storage + ?Sized> Storage for Arc<S> {
    fn len(&self) -> u64 {
        (**self).len()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        (**self).read_exact_at(buf, offset)
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        (**self).write_all_at(buf, offset)
    }

    fn zero(&self, range: Range<u64>) -> io::Result<()> {
        (**self).zero(range)
    }

    fn flush(&self) -> io::Result<()> {
        (**self).flush()
    }

    fn data_ranges(&self, within: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        (**self).data_ranges(within)
    }

    fn read_ahead_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        (**self).read_ahead_at(buf, offset)
    }

    fn is_at_hand(&self, range: Range<u64>) -> bool {
        (**self).is_at_hand(range)
    }
}
