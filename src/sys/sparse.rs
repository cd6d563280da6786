//! Where a file has data, and where it has holes.

use std::io;
use std::os::fd::AsFd;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

/// The first position at or after `offset` that may hold anything but zeros; `None` if there is none. A file system
/// that knows no holes has data everywhere.
///
/// Moves the cursor of the file, as does [`next_hole`].
///
/// # Errors
/// What the file system says.
pub fn next_data(file: impl AsFd, offset: u64) -> io::Result<Option<u64>> {
    match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Ok(position) => Ok(Some(position)),
        Err(Errno::NXIO) => Ok(None),
        Err(Errno::INVAL | Errno::SPIPE) => Ok(Some(offset)),
        Err(errno) => Err(errno.into()),
    }
}

/// The first hole at or after `offset`, the end of the file being one; `None` beyond the end, and where no holes are
/// known.
///
/// # Errors
/// What the file system says.
pub fn next_hole(file: impl AsFd, offset: u64) -> io::Result<Option<u64>> {
    match rustix::fs::seek(file, SeekFrom::Hole(offset)) {
        Ok(position) => Ok(Some(position)),
        Err(Errno::NXIO | Errno::INVAL | Errno::SPIPE) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}
