//! Device state while it comes in: kept in memory that does not count as resident, and checked before it is used.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use xxhash_rust::xxh3::Xxh3Default;

use crate::sys::memfd::memfd;

/// The pieces that have come.
#[derive(Debug)]
pub(super) struct IncomingState {
    file: File,
}

impl IncomingState {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            file: memfd("memferry-device-state", 0)?,
        })
    }

    /// Keeps a piece. The protocol has checked that there are no gaps.
    pub(super) fn put(&self, offset: u64, piece: &[u8]) -> io::Result<()> {
        self.file.write_all_at(piece, offset)
    }

    /// The whole state, to be read from its beginning.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidData`] if it is not what the source sent.
    pub(super) fn finish(&self, len: u64, digest: u64) -> io::Result<impl Read + Send + use<>> {
        let mut file = self.file.try_clone()?;
        file.seek(SeekFrom::Start(0))?;
        let mut hasher = Box::new(Xxh3Default::new());
        let mut buffer = vec![0; 64 << 10];
        let mut left = len;
        while left > 0 {
            let part = usize::try_from(left).map_or(buffer.len(), |left| left.min(buffer.len()));
            file.read_exact(&mut buffer[..part])?;
            hasher.update(&buffer[..part]);
            left -= part as u64;
        }
        if hasher.digest() != digest {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the device state was damaged on its way",
            ));
        }
        file.seek(SeekFrom::Start(0))?;
        Ok(file.take(len))
    }
}
