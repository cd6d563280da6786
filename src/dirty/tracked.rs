//! Writes seen as they pass through us.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::DirtyTracker;
use super::area::not_started;
use crate::chunk::sync::atomic::{AtomicBool, Ordering};
use crate::chunk::{AtomicBitmap, ChunkBitmap, ChunkRun, ChunkSize, Marks, Storage};

/// A storage that notes which of its chunks are written through it.
///
/// A chunk is marked **after** its write has returned, also if it failed, which may have been half-way: so who takes the
/// marks and then reads has read the write, or finds its mark at the next take. A mark is one atomic operation a chunk
/// run, without a lock; writes never wait for each other or for a take. One bit a chunk.
///
/// Writes that go around it are not seen.
#[derive(Debug)]
pub struct Tracked {
    storage: Arc<dyn Storage>,
    chunk_size: ChunkSize,
    dirty: AtomicBitmap,
    /// Between start and stop. Writes are marked in any case: then nothing can slip between a start and a mark.
    started: AtomicBool,
}

impl Tracked {
    /// Tracks the writes to `storage` that go through this, in chunks of `chunk_size`.
    pub fn new(storage: Arc<dyn Storage>, chunk_size: ChunkSize) -> Self {
        let chunks = chunk_size.chunks_in(storage.len());
        Self {
            storage,
            chunk_size,
            dirty: AtomicBitmap::empty(chunks),
            started: AtomicBool::new(false),
        }
    }

    /// What it is cut into.
    #[must_use]
    pub fn chunk_size(&self) -> ChunkSize {
        self.chunk_size
    }

    /// What is marked when this goes away, however the write ends.
    fn marking(&self, range: Range<u64>) -> Marking<'_> {
        Marking {
            dirty: &self.dirty,
            run: self.touched(&range),
        }
    }

    fn touched(&self, range: &Range<u64>) -> ChunkRun {
        if range.start >= range.end {
            return ChunkRun::new(0, 0);
        }
        let start = range.start / u64::from(self.chunk_size.bytes());
        let end = self.chunk_size.chunks_in(range.end);
        ChunkRun::new(start, end - start)
    }

    fn check_started(&self) -> io::Result<()> {
        if self.started.load(Ordering::Acquire) {
            Ok(())
        } else {
            Err(not_started())
        }
    }
}

struct Marking<'a> {
    dirty: &'a AtomicBitmap,
    run: ChunkRun,
}

impl Drop for Marking<'_> {
    fn drop(&mut self) {
        self.dirty.insert_run(self.run);
    }
}

impl Storage for Tracked {
    fn len(&self) -> u64 {
        self.storage.len()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.storage.read_exact_at(buf, offset)
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let _marking = self.marking(offset..offset.saturating_add(buf.len() as u64));
        self.storage.write_all_at(buf, offset)
    }

    fn zero(&self, range: Range<u64>) -> io::Result<()> {
        let _marking = self.marking(range.clone());
        self.storage.zero(range)
    }

    fn flush(&self) -> io::Result<()> {
        self.storage.flush()
    }

    fn data_ranges(&self, within: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        self.storage.data_ranges(within)
    }

    fn read_ahead_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.storage.read_ahead_at(buf, offset)
    }

    fn is_at_hand(&self, range: Range<u64>) -> bool {
        self.storage.is_at_hand(range)
    }
}

impl DirtyTracker for Tracked {
    fn start(&self) -> io::Result<()> {
        self.dirty.take();
        self.started.store(true, Ordering::Release);
        Ok(())
    }

    fn take(&self) -> io::Result<ChunkBitmap> {
        self.check_started()?;
        Ok(self.dirty.take())
    }

    fn restore(&self, chunks: &ChunkBitmap) -> io::Result<()> {
        self.check_started()?;
        self.dirty.union_with(chunks);
        Ok(())
    }

    fn stop(&self) -> io::Result<()> {
        self.started.store(false, Ordering::Release);
        Ok(())
    }
}

impl Marks for Tracked {
    /// Nothing before the start and after the stop.
    fn marked(&self, within: Range<u64>) -> Vec<Range<u64>> {
        let end = within.end.min(self.storage.len());
        if self.check_started().is_err() || within.start >= end {
            return Vec::new();
        }
        let size = u64::from(self.chunk_size.bytes());
        let run = self.touched(&(within.start..end));
        let dirty = self.dirty.runs_within(run);
        dirty
            .into_iter()
            .map(|run| {
                let start = (run.start.0 * size).max(within.start);
                start..run.end().saturating_mul(size).min(end)
            })
            .collect()
    }
}

#[cfg(not(loom))]
#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::MemoryStorage;
    use crate::dirty::conformance;

    const PAGE: u64 = 4096;

    #[derive(Debug)]
    struct Region {
        memory: Arc<MemoryStorage>,
        tracked: Tracked,
    }

    impl conformance::Tracked for Region {
        fn tracker(&self) -> &dyn DirtyTracker {
            &self.tracked
        }

        fn write(&self, offset: u64, bytes: &[u8]) {
            self.tracked.write_all_at(bytes, offset).unwrap();
        }

        fn read(&self, offset: u64, buf: &mut [u8]) {
            self.tracked.read_exact_at(buf, offset).unwrap();
        }

        fn allocated(&self) -> u64 {
            self.memory.allocated()
        }
    }

    fn region(len: u64, chunk_size: ChunkSize) -> Region {
        let memory = Arc::new(MemoryStorage::new(len));
        Region {
            tracked: Tracked::new(memory.clone(), chunk_size),
            memory,
        }
    }

    conformance::conformance!(region);

    crate::chunk::conformance::storage_conformance!(|len| {
        Arc::new(region(len, ChunkSize::PAGE).tracked) as _
    });

    fn named(tracked: &Tracked) -> Vec<u64> {
        let taken = tracked.take().unwrap();
        taken.runs().flat_map(|run| run.range()).collect()
    }

    /// Looks at its own marks while it is written, then fails or panics as told.
    #[derive(Debug, Default)]
    struct Looking {
        tracked: std::sync::OnceLock<std::sync::Weak<Tracked>>,
        panics: bool,
    }

    impl Storage for Looking {
        fn len(&self) -> u64 {
            16 * PAGE
        }

        fn read_exact_at(&self, _: &mut [u8], _: u64) -> io::Result<()> {
            Ok(())
        }

        fn write_all_at(&self, _: &[u8], _: u64) -> io::Result<()> {
            let tracked = self.tracked.get().unwrap().upgrade().unwrap();
            assert_eq!(
                tracked.marked(0..16 * PAGE),
                [],
                "marked before it was written"
            );
            assert!(!self.panics, "as told");
            Err(io::Error::other("failed half-way"))
        }

        fn flush(&self) -> io::Result<()> {
            Ok(())
        }

        fn data_ranges(&self, _: Range<u64>) -> io::Result<Vec<Range<u64>>> {
            Ok(Vec::new())
        }
    }

    fn looking(panics: bool) -> Arc<Tracked> {
        let storage = Arc::new(Looking {
            panics,
            ..Looking::default()
        });
        let tracked = Arc::new(Tracked::new(storage.clone(), ChunkSize::PAGE));
        storage.tracked.set(Arc::downgrade(&tracked)).unwrap();
        tracked.start().unwrap();
        tracked
    }

    #[test]
    fn write_then_mark_also_when_the_write_failed_half_way() {
        let tracked = looking(false);
        assert!(tracked.write_all_at(&[1; 2], PAGE - 1).is_err());
        assert_eq!(named(&tracked), [0, 1]);
        assert!(tracked.zero(5 * PAGE..6 * PAGE).is_err());
        assert_eq!(named(&tracked), [5]);
    }

    #[test]
    fn a_write_that_panics_is_marked() {
        let tracked = looking(true);
        let writer = tracked.clone();
        let ended = std::thread::spawn(move || writer.write_all_at(&[1], 0)).join();
        assert!(ended.is_err());
        assert_eq!(named(&tracked), [0]);
    }

    #[test]
    fn what_is_zeroed_is_dirty_and_what_is_outside_is_not() {
        let Region { tracked, .. } = region(3 * PAGE + 1, ChunkSize::PAGE);
        tracked.start().unwrap();
        tracked.zero(PAGE..2 * PAGE).unwrap();
        tracked.write_all_at(&[], 2 * PAGE).unwrap();
        assert!(tracked.write_all_at(&[1], u64::MAX).is_err());
        assert_eq!(named(&tracked), [1]);
    }

    #[test]
    fn looking_at_the_marks_does_not_take_them() {
        let Region { tracked, .. } = region(10 * PAGE + 100, ChunkSize::PAGE);
        tracked.write_all_at(&[1], 0).unwrap();
        assert_eq!(tracked.marked(0..u64::MAX), [], "not started");
        tracked.start().unwrap();
        tracked.write_all_at(&[1; 2], PAGE - 1).unwrap();
        tracked.write_all_at(&[1], 10 * PAGE + 99).unwrap();
        for _ in 0..2 {
            assert_eq!(
                tracked.marked(0..u64::MAX),
                [0..2 * PAGE, 10 * PAGE..10 * PAGE + 100]
            );
        }
        let cut = tracked.marked(100..PAGE + 1);
        assert_eq!((cut.len(), cut[0].clone()), (1, 100..PAGE + 1));
        assert_eq!(tracked.marked(2 * PAGE..10 * PAGE), []);
        assert_eq!(named(&tracked), [0, 1, 10]);
        assert_eq!(tracked.marked(0..u64::MAX), []);
    }
}

#[cfg(loom)]
#[cfg(test)]
mod loom_models {
    use loom::cell::UnsafeCell;
    use loom::sync::Arc;
    use loom::thread;

    use super::*;
    use crate::chunk::sync::atomic::AtomicU64;

    /// One byte in a chunk of its own; loom chooses which of the values a read may see it sees.
    #[derive(Debug, Default)]
    struct Byte(AtomicU64);

    impl Storage for Byte {
        fn len(&self) -> u64 {
            1
        }

        fn read_exact_at(&self, buf: &mut [u8], _: u64) -> io::Result<()> {
            buf[0] = u8::try_from(self.0.load(Ordering::Relaxed)).unwrap();
            Ok(())
        }

        fn write_all_at(&self, buf: &[u8], _: u64) -> io::Result<()> {
            self.0.store(buf[0].into(), Ordering::Relaxed);
            Ok(())
        }

        fn flush(&self) -> io::Result<()> {
            Ok(())
        }

        fn data_ranges(&self, _: Range<u64>) -> io::Result<Vec<Range<u64>>> {
            Ok(Vec::new())
        }
    }

    fn tracked() -> Arc<Tracked> {
        let byte = std::sync::Arc::new(Byte::default());
        Arc::new(Tracked::new(byte, ChunkSize::PAGE))
    }

    fn read(tracked: &Tracked) -> u8 {
        let mut buf = [0];
        tracked.read_exact_at(&mut buf, 0).unwrap();
        buf[0]
    }

    /// Take, then read: what the copy lacks, a later take names.
    #[test]
    fn loom_a_write_is_in_the_copy_or_named_by_the_next_take() {
        loom::model(|| {
            let tracked = tracked();
            tracked.start().unwrap();
            tracked.write_all_at(&[1], 0).unwrap();
            let writer = {
                let tracked = tracked.clone();
                thread::spawn(move || tracked.write_all_at(&[2], 0).unwrap())
            };
            let mut copy = 0;
            if !tracked.take().unwrap().is_empty() {
                copy = read(&tracked);
            }
            writer.join().unwrap();
            if !tracked.take().unwrap().is_empty() {
                copy = read(&tracked);
            }
            assert_eq!(copy, 2);
        });
    }

    /// Start, then read all: the same for a write that is under way meanwhile.
    #[test]
    fn loom_a_write_during_the_start_is_in_the_copy_or_named() {
        loom::model(|| {
            let tracked = tracked();
            let writer = {
                let tracked = tracked.clone();
                thread::spawn(move || tracked.write_all_at(&[2], 0).unwrap())
            };
            tracked.start().unwrap();
            let mut copy = read(&tracked);
            writer.join().unwrap();
            if !tracked.take().unwrap().is_empty() {
                copy = read(&tracked);
            }
            assert_eq!(copy, 2);
        });
    }

    /// Two that take share what is marked, and nothing is in neither's part.
    #[test]
    fn loom_a_mark_is_taken_once() {
        loom::model(|| {
            let set = Arc::new((AtomicBitmap::empty(2), UnsafeCell::new(())));
            let other = set.clone();
            let marker = thread::spawn(move || {
                other.1.with_mut(drop);
                other.0.insert_run(ChunkRun::new(0, 1));
                other.0.insert_run(ChunkRun::new(1, 1));
            });
            let first = set.0.take();
            if first.contains(0) {
                // What was done before the mark is seen by who took it.
                set.1.with(drop);
            }
            marker.join().unwrap();
            let second = set.0.take();
            assert_eq!(first.count() + second.count(), 2);
        });
    }
}
