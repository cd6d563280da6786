//! Data that was given back and became a hole.

use std::io;
use std::mem;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::DirtyTracker;
use super::area::not_started;
use crate::chunk::{ChunkBitmap, ChunkRun, ChunkSize, Storage};

/// Names the chunks that had data and have a hole now: what a guest's balloon gave back. For trackers of writes that
/// do not see it: the late tracker of a region, or joined with the other one by [`Union`](super::Union).
///
/// Asks the storage for its [data ranges](Storage::data_ranges), about 10 ms for each GiB of data, and keeps a bit for
/// each 4 KiB; smaller holes are not seen. A hole that was filled again in between is a write, which the other tracker
/// sees.
#[derive(Debug)]
pub struct Discards {
    storage: Arc<dyn Storage>,
    chunk_size: ChunkSize,
    state: Mutex<Option<State>>,
}

#[derive(Debug)]
struct State {
    /// The pages with data, whatever the chunk size: a chunk may lose one page and keep others.
    data: ChunkBitmap,
    /// Chunks taken and put back.
    pending: ChunkBitmap,
}

impl Discards {
    /// Watches all of `storage`, cut into chunks of `chunk_size`.
    pub fn new(storage: Arc<dyn Storage>, chunk_size: ChunkSize) -> Self {
        Self {
            storage,
            chunk_size,
            state: Mutex::new(None),
        }
    }

    fn state(&self) -> MutexGuard<'_, Option<State>> {
        // A panic elsewhere leaves the sets as they were: no change to them is half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn no_chunks(&self) -> ChunkBitmap {
        ChunkBitmap::empty(self.chunk_size.chunks_in(self.storage.len()))
    }

    fn data(&self) -> io::Result<ChunkBitmap> {
        let mut data = ChunkBitmap::empty(ChunkSize::PAGE.chunks_in(self.storage.len()));
        for range in self.storage.data_ranges(0..self.storage.len())? {
            data.insert_run(covering(&range, ChunkSize::PAGE));
        }
        Ok(data)
    }
}

impl DirtyTracker for Discards {
    fn start(&self) -> io::Result<()> {
        let mut state = self.state();
        *state = None;
        *state = Some(State {
            data: self.data()?,
            pending: self.no_chunks(),
        });
        Ok(())
    }

    fn take(&self) -> io::Result<ChunkBitmap> {
        let mut state = self.state();
        let State { data, pending } = state.as_mut().ok_or_else(not_started)?;
        let now = self.data()?;
        data.subtract(&now);
        for lost in data.runs() {
            let page = u64::from(ChunkSize::PAGE.bytes());
            let bytes = lost.start.0 * page..lost.end() * page;
            pending.insert_run(covering(&bytes, self.chunk_size));
        }
        *data = now;
        Ok(mem::replace(pending, self.no_chunks()))
    }

    fn restore(&self, chunks: &ChunkBitmap) -> io::Result<()> {
        let mut state = self.state();
        let state = state.as_mut().ok_or_else(not_started)?;
        state.pending.union_with(chunks);
        Ok(())
    }

    fn stop(&self) -> io::Result<()> {
        *self.state() = None;
        Ok(())
    }
}

/// The chunks that `bytes` touch.
fn covering(bytes: &Range<u64>, chunk_size: ChunkSize) -> ChunkRun {
    let start = bytes.start / u64::from(chunk_size.bytes());
    let end = chunk_size.chunks_in(bytes.end);
    ChunkRun::new(start, end.saturating_sub(start))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::FileStorage;
    use crate::sys::memfd::memfd;

    const PAGE: u64 = 4096;

    fn discards(len: u64, chunk_size: ChunkSize) -> (Arc<FileStorage>, Discards) {
        let file = Arc::new(FileStorage::new(memfd("discards", len).unwrap()).unwrap());
        let tracker = Discards::new(file.clone(), chunk_size);
        (file, tracker)
    }

    #[test]
    fn a_chunk_that_loses_one_of_its_pages_is_named_once() {
        let size = ChunkSize::new(16384).unwrap();
        let (file, tracker) = discards(16 * PAGE + 1, size);
        file.write_all_at(&[1; 3 * 4096], 4 * PAGE).unwrap();
        file.write_all_at(&[1], 16 * PAGE).unwrap();
        tracker.start().unwrap();
        file.punch(5 * PAGE..6 * PAGE).unwrap();
        file.punch(16 * PAGE..16 * PAGE + 1).unwrap();
        let taken = tracker.take().unwrap();
        let named: Vec<_> = taken.runs().flat_map(|run| run.range()).collect();
        // The last page ends beyond the end of this file, and becomes a hole all the same.
        assert_eq!(named, [1, 4]);
        assert!(tracker.take().unwrap().is_empty());
        tracker.restore(&taken).unwrap();
        assert_eq!(tracker.take().unwrap(), taken);
    }

    #[test]
    fn new_data_is_no_discard_and_is_missed_when_it_goes() {
        let (file, tracker) = discards(16 * PAGE, ChunkSize::PAGE);
        tracker.start().unwrap();
        file.write_all_at(&[1], 3 * PAGE).unwrap();
        assert!(tracker.take().unwrap().is_empty());
        file.punch(0..16 * PAGE).unwrap();
        assert!(tracker.take().unwrap().contains(3));
        tracker.stop().unwrap();
        tracker.stop().unwrap();
        assert!(tracker.take().is_err());
    }
}
