//! Chunks that are larger than the pages that writes are reported by.

use std::io;
use std::sync::Arc;

use memferry::chunk::{ChunkBitmap, ChunkRun, ChunkSize};
use memferry::dirty::DirtyTracker;
use memferry::sys::mapping::page_size;

/// Names the chunks that the pages are in that another tracker names.
#[derive(Debug)]
pub(crate) struct Coarse {
    pages: Arc<dyn DirtyTracker>,
    /// How many pages make a chunk.
    factor: u64,
    /// How many pages the region has.
    len: u64,
}

impl Coarse {
    /// For a region of `len` bytes; `pages` itself where a chunk is a page.
    pub(crate) fn of(
        pages: Arc<dyn DirtyTracker>,
        chunk_size: ChunkSize,
        len: u64,
    ) -> Arc<dyn DirtyTracker> {
        let factor = u64::from(chunk_size.bytes()) / page_size();
        if factor <= 1 {
            return pages;
        }
        Arc::new(Self {
            pages,
            factor,
            len: len.div_ceil(page_size()),
        })
    }
}

impl DirtyTracker for Coarse {
    fn start(&self) -> io::Result<()> {
        self.pages.start()
    }

    fn take(&self) -> io::Result<ChunkBitmap> {
        let mut chunks = ChunkBitmap::empty(self.len.div_ceil(self.factor));
        for run in self.pages.take()?.runs() {
            let first = run.start.0 / self.factor;
            let end = run.end().div_ceil(self.factor);
            chunks.insert_run(ChunkRun::new(first, end - first));
        }
        Ok(chunks)
    }

    fn restore(&self, chunks: &ChunkBitmap) -> io::Result<()> {
        let mut pages = ChunkBitmap::empty(self.len);
        for run in chunks.runs() {
            let first = run.start.0 * self.factor;
            let end = (run.end() * self.factor).min(self.len);
            pages.insert_run(ChunkRun::new(first, end - first));
        }
        self.pages.restore(&pages)
    }

    fn stop(&self) -> io::Result<()> {
        self.pages.stop()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use memferry::backend::MemoryStorage;
    use memferry::chunk::Storage;
    use memferry::dirty::Tracked;

    #[test]
    fn every_promise_of_a_tracker_is_kept_by_larger_chunks() {
        let len = 40_960;
        let storage = Arc::new(MemoryStorage::new(len));
        let tracked = Arc::new(Tracked::new(storage, ChunkSize::PAGE));
        let chunk = ChunkSize::new(16_384).unwrap();
        let coarse = Coarse::of(tracked.clone(), chunk, len);
        coarse.start().unwrap();
        tracked.write_all_at(&[1], 4095).unwrap();
        tracked.write_all_at(&[1, 2], 32_767).unwrap();
        let runs = |chunks: &ChunkBitmap| -> Vec<_> {
            chunks.runs().map(|run| (run.start.0, run.count)).collect()
        };
        let taken = coarse.take().unwrap();
        assert_eq!((taken.chunks(), runs(&taken)), (3, vec![(0, 3)]));
        assert!(coarse.take().unwrap().is_empty());
        let mut last = ChunkBitmap::empty(3);
        last.insert(2);
        coarse.restore(&last).unwrap();
        assert_eq!(runs(&tracked.take().unwrap()), [(8, 2)]);
        coarse.stop().unwrap();
    }
}
