//! A storage whose length is no whole number of blocks, as one whose length is.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use crate::chunk::Storage;

/// A storage with zeros behind its end, up to a whole number of blocks: a block device has nothing smaller.
///
/// Zeros may be written behind the end, which changes nothing: whoever writes the last block whole does. Anything else is refused with
/// [`io::ErrorKind::StorageFull`] before any of it is written, for nobody would keep it.
#[derive(Debug)]
pub(super) struct Padded {
    storage: Arc<dyn Storage>,
    /// The length of the storage.
    end: u64,
    len: u64,
}

impl Padded {
    /// `None` if there would be more bytes than a position can count.
    pub(super) fn new(storage: Arc<dyn Storage>, block_size: u32) -> Option<Self> {
        let end = storage.len();
        let len = end.checked_next_multiple_of(u64::from(block_size))?;
        // The kernel counts with a sign.
        i64::try_from(len).ok()?;
        Some(Self { storage, end, len })
    }

    /// How many of `len` bytes from `offset` on the storage has; the others lie behind its end.
    fn kept(&self, offset: u64, len: usize) -> io::Result<usize> {
        let beyond = offset
            .checked_add(len as u64)
            .is_none_or(|end| end > self.len);
        if beyond {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let left = self.end.saturating_sub(offset);
        Ok(usize::try_from(left).map_or(len, |left| left.min(len)))
    }

    fn read(
        &self,
        buf: &mut [u8],
        offset: u64,
        read: impl FnOnce(&mut [u8], u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let (kept, behind) = buf.split_at_mut(self.kept(offset, buf.len())?);
        behind.fill(0);
        if kept.is_empty() {
            return Ok(());
        }
        read(kept, offset)
    }

    fn cut(&self, range: &Range<u64>) -> Range<u64> {
        range.start.min(self.end)..range.end.min(self.end)
    }
}

impl Storage for Padded {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.read(buf, offset, |buf, offset| {
            self.storage.read_exact_at(buf, offset)
        })
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let (kept, behind) = buf.split_at(self.kept(offset, buf.len())?);
        if behind.iter().any(|&byte| byte != 0) {
            return Err(io::Error::new(
                io::ErrorKind::StorageFull,
                format!(
                    "only zeros can be written behind byte {} of the region; the rest of its last block is padding",
                    self.end
                ),
            ));
        }
        if kept.is_empty() {
            return Ok(());
        }
        self.storage.write_all_at(kept, offset)
    }

    fn zero(&self, range: Range<u64>) -> io::Result<()> {
        if range.start > range.end {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if range.end > self.len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let range = self.cut(&range);
        if range.is_empty() {
            return Ok(());
        }
        self.storage.zero(range)
    }

    fn flush(&self) -> io::Result<()> {
        self.storage.flush()
    }

    fn data_ranges(&self, within: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        self.storage.data_ranges(self.cut(&within))
    }

    fn read_ahead_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.read(buf, offset, |buf, offset| {
            self.storage.read_ahead_at(buf, offset)
        })
    }

    fn is_at_hand(&self, range: Range<u64>) -> bool {
        let range = self.cut(&range);
        range.is_empty() || self.storage.is_at_hand(range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::MemoryStorage;

    fn padded(len: u64) -> (Arc<dyn Storage>, Padded) {
        let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new(len));
        let padded = Padded::new(Arc::clone(&storage), 4096).unwrap();
        (storage, padded)
    }

    #[test]
    fn what_lies_behind_the_end_reads_as_zeros() {
        let (storage, padded) = padded(5000);
        storage.write_all_at(&[7; 5000], 0).unwrap();
        assert_eq!(padded.len(), 8192);
        let mut block = [1; 4096];
        padded.read_exact_at(&mut block, 4096).unwrap();
        assert_eq!(block[..904], [7; 904]);
        assert!(block[904..].iter().all(|&byte| byte == 0));
        padded.read_ahead_at(&mut block, 4096).unwrap();
        assert!(block[904..].iter().all(|&byte| byte == 0));
        let mut tail = [1; 10];
        padded.read_exact_at(&mut tail, 8182).unwrap();
        assert_eq!(tail, [0; 10]);
    }

    #[test]
    fn zeros_behind_the_end_are_dropped_and_anything_else_is_refused_before_any_of_it_is_written() {
        let (storage, padded) = padded(5000);
        let mut block = [0; 4096];
        block[..904].fill(3);
        padded.write_all_at(&block, 4096).unwrap();
        block[..904].fill(4);
        block[904] = 1;
        let refused = padded.write_all_at(&block, 4096).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::StorageFull);
        let mut kept = [0; 904];
        storage.read_exact_at(&mut kept, 4096).unwrap();
        assert_eq!(kept, [3; 904]);
    }

    #[test]
    fn zeroing_and_looking_stop_at_the_end() {
        let (storage, padded) = padded(5000);
        padded.write_all_at(&[9; 5000], 0).unwrap();
        padded.zero(4096..8192).unwrap();
        padded.zero(5000..8192).unwrap();
        let mut byte = [1];
        storage.read_exact_at(&mut byte, 4999).unwrap();
        assert_eq!(byte, [0]);
        let ranges = padded.data_ranges(0..8192).unwrap();
        assert!(ranges.iter().all(|range| range.end <= 5000), "{ranges:?}");
    }

    #[test]
    fn beyond_the_last_block_there_is_nothing() {
        let (_, padded) = padded(5000);
        let outside = |result: io::Result<()>| {
            assert_eq!(result.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        };
        outside(padded.read_exact_at(&mut [0; 2], 8191));
        outside(padded.write_all_at(&[0; 2], 8191));
        outside(padded.write_all_at(&[0; 2], u64::MAX));
        outside(padded.zero(0..8193));
    }

    #[test]
    fn a_length_that_no_device_can_have_is_none() {
        #[derive(Debug)]
        struct Huge;
        impl Storage for Huge {
            fn len(&self) -> u64 {
                u64::MAX - 5
            }
            fn read_exact_at(&self, _: &mut [u8], _: u64) -> io::Result<()> {
                Ok(())
            }
            fn write_all_at(&self, _: &[u8], _: u64) -> io::Result<()> {
                Ok(())
            }
            fn flush(&self) -> io::Result<()> {
                Ok(())
            }
            fn data_ranges(&self, _: Range<u64>) -> io::Result<Vec<Range<u64>>> {
                Ok(Vec::new())
            }
        }
        assert!(Padded::new(Arc::new(Huge), 4096).is_none());
    }
}
