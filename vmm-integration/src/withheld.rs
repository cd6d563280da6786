//! Post-copy at once: nothing is copied while the guest runs at the source.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use memferry::chunk::{ChunkBitmap, ChunkRun, ChunkSize, Storage};
use memferry::dirty::DirtyTracker;
use memferry::migrate::SourceRegion;

/// A region that has no data in the first pass, all of whose data is dirty when that is over: so the first pass is over at once, and what
/// follows it, post-copy, begins.
#[derive(Debug)]
pub(crate) struct Withheld {
    storage: Arc<dyn Storage>,
    tracker: Arc<dyn DirtyTracker>,
    chunk_size: ChunkSize,
    /// Whether the next take is the first one. Until then there is no data; after it, for who compares, there is.
    first: AtomicBool,
}

impl Withheld {
    /// The same region, withheld.
    pub(crate) fn of(region: SourceRegion, chunk_size: ChunkSize) -> SourceRegion {
        let withheld = Arc::new(Self {
            storage: region.storage,
            tracker: region.tracker,
            chunk_size,
            first: AtomicBool::new(true),
        });
        SourceRegion {
            name: region.name,
            storage: Arc::<Self>::clone(&withheld),
            tracker: withheld,
            late: region.late,
        }
    }
}

impl Storage for Withheld {
    fn len(&self) -> u64 {
        self.storage.len()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.storage.read_exact_at(buf, offset)
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.storage.write_all_at(buf, offset)
    }

    fn flush(&self) -> io::Result<()> {
        self.storage.flush()
    }

    fn data_ranges(&self, within: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        if self.first.load(Ordering::SeqCst) {
            return Ok(Vec::new());
        }
        self.storage.data_ranges(within)
    }
}

impl DirtyTracker for Withheld {
    fn start(&self) -> io::Result<()> {
        self.first.store(true, Ordering::SeqCst);
        self.tracker.start()
    }

    fn take(&self) -> io::Result<ChunkBitmap> {
        let mut dirty = self.tracker.take()?;
        if self.first.swap(false, Ordering::SeqCst) {
            let chunk = u64::from(self.chunk_size.bytes());
            for range in self.storage.data_ranges(0..self.storage.len())? {
                let (start, end) = (range.start / chunk, range.end.div_ceil(chunk));
                dirty.insert_run(ChunkRun::new(start, end - start));
            }
        }
        Ok(dirty)
    }

    fn restore(&self, chunks: &ChunkBitmap) -> io::Result<()> {
        self.tracker.restore(chunks)
    }

    fn stop(&self) -> io::Result<()> {
        self.tracker.stop()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use memferry::backend::MemoryStorage;
    use memferry::dirty::Tracked;

    #[test]
    fn there_is_no_data_until_all_of_it_is_dirty() {
        let memory = Tracked::new(Arc::new(MemoryStorage::new(8 * 4096)), ChunkSize::PAGE);
        let memory = Arc::new(memory);
        memory.write_all_at(&[1], 4096).unwrap();
        let region = Withheld::of(
            SourceRegion {
                name: "memory".into(),
                storage: Arc::<Tracked>::clone(&memory),
                tracker: Arc::<Tracked>::clone(&memory),
                late: None,
            },
            ChunkSize::PAGE,
        );
        let data = || region.storage.data_ranges(0..8 * 4096).unwrap();
        let taken = || -> Vec<u64> {
            let taken = region.tracker.take().unwrap();
            taken
                .runs()
                .flat_map(|run| run.start.0..run.end())
                .collect()
        };
        region.tracker.start().unwrap();
        assert_eq!(data(), []);
        memory.write_all_at(&[1], 5 * 4096).unwrap();
        let all = taken();
        assert!(all.contains(&1) && all.contains(&5), "{all:?}");
        assert!(!data().is_empty());
        memory.write_all_at(&[1], 6 * 4096).unwrap();
        assert_eq!(taken(), [6]);
    }
}
