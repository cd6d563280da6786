//! Which blocks of a sparse region have data: those alone have to be write-protected and scanned.

use std::fs::File;
use std::io;
use std::ops::Range;

use crate::chunk::{ChunkBitmap, ChunkRun};
use crate::sys::sparse::{next_data, next_hole};

/// The unit that is write-protected as a whole: what one page of page table covers, so that protecting a block with
/// data in it costs no page table that the data has not cost already.
const BLOCK: u64 = 2 << 20;

/// The blocks of a region in which data has been seen. A block is never forgotten.
#[derive(Debug)]
pub(super) struct Populated {
    /// Where to look; without a file every block counts as populated.
    file: Option<File>,
    len: u64,
    seen: ChunkBitmap,
}

impl Populated {
    pub(super) fn new(file: Option<File>, len: u64) -> Self {
        Self {
            file,
            len,
            seen: ChunkBitmap::empty(len.div_ceil(BLOCK)),
        }
    }

    /// The blocks that have data now and were not seen before. Asks only about blocks not seen.
    pub(super) fn discover(&self) -> io::Result<ChunkBitmap> {
        let Some(file) = &self.file else {
            let mut all = ChunkBitmap::full(self.seen.chunks());
            all.subtract(&self.seen);
            return Ok(all);
        };
        let mut fresh = ChunkBitmap::empty(self.seen.chunks());
        let mut unseen = ChunkBitmap::full(self.seen.chunks());
        unseen.subtract(&self.seen);
        for run in unseen.runs() {
            let bytes = self.bytes(run);
            let mut next = bytes.start;
            while next < bytes.end {
                match next_data(file, next)? {
                    Some(data) if data < bytes.end => {
                        fresh.insert(data / BLOCK);
                        next = (data / BLOCK + 1) * BLOCK;
                    }
                    _ => break,
                }
            }
        }
        Ok(fresh)
    }

    /// Counts `fresh` among the blocks seen.
    pub(super) fn add(&mut self, fresh: &ChunkBitmap) {
        self.seen.union_with(fresh);
    }

    /// The bytes of the blocks seen.
    pub(super) fn seen(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.ranges(&self.seen)
    }

    /// The bytes of `blocks`.
    pub(super) fn ranges<'a>(
        &'a self,
        blocks: &'a ChunkBitmap,
    ) -> impl Iterator<Item = Range<u64>> + 'a {
        blocks.runs().map(|run| self.bytes(run))
    }

    /// Calls `found` with the data in `range`.
    pub(super) fn data(
        &self,
        range: Range<u64>,
        mut found: impl FnMut(Range<u64>),
    ) -> io::Result<()> {
        let Some(file) = &self.file else {
            found(range);
            return Ok(());
        };
        let mut next = range.start;
        while next < range.end {
            let Some(start) = next_data(file, next)?.filter(|&start| start < range.end) else {
                break;
            };
            let end = next_hole(file, start)?.map_or(range.end, |end| end.min(range.end));
            found(start..end);
            // A hole right there was punched between the two questions.
            next = end.max(start + 1);
        }
        Ok(())
    }

    fn bytes(&self, run: ChunkRun) -> Range<u64> {
        run.start.0 * BLOCK..(run.end() * BLOCK).min(self.len)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::sys::memfd::memfd;

    fn named(blocks: &ChunkBitmap) -> Vec<u64> {
        blocks.runs().flat_map(|run| run.range()).collect()
    }

    #[test]
    fn a_block_is_discovered_once_and_others_that_get_data_later() {
        let file = memfd("populated", 10 * BLOCK + 1).unwrap();
        let mut populated = Populated::new(Some(file.try_clone().unwrap()), 10 * BLOCK + 1);
        file.write_all_at(&[1; 2], 3 * BLOCK - 1).unwrap();
        file.write_all_at(&[1], 10 * BLOCK).unwrap();
        let fresh = populated.discover().unwrap();
        assert_eq!(named(&fresh), [2, 3, 10]);
        populated.add(&fresh);
        file.write_all_at(&[1], 5 * BLOCK).unwrap();
        assert_eq!(named(&populated.discover().unwrap()), [5]);
        let seen: Vec<_> = populated.seen().collect();
        assert_eq!(seen, [2 * BLOCK..4 * BLOCK, 10 * BLOCK..10 * BLOCK + 1]);
    }

    #[test]
    fn without_a_file_everything_is_populated() {
        let mut populated = Populated::new(None, 3 * BLOCK);
        let fresh = populated.discover().unwrap();
        assert_eq!(named(&fresh), [0, 1, 2]);
        populated.add(&fresh);
        assert!(populated.discover().unwrap().is_empty());
    }
}
