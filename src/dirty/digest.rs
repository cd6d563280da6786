//! Changes found by reading everything again: right everywhere, and slow.

use std::io;
use std::mem;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use xxhash_rust::xxh3::xxh3_64;

use super::DirtyTracker;
use super::area::not_started;
use crate::chunk::{ChunkBitmap, ChunkSize, Storage};

/// Tracks the changes of a region by a digest of each chunk: for kernels and storages that nothing else works with.
///
/// Sees every change, whoever made it. Start and each take read all of the data (some seconds for 16 GiB); holes are
/// not read. Keeps 8 bytes for each chunk, 0.2 % of the region with the smallest chunks.
///
/// One change can escape it: a chunk that is read, to be sent, while it is not what it was at the last take, and that
/// is then changed back. So read what is sent through [`observed`](Self::observed): later takes compare with what was
/// read there.
#[derive(Debug)]
pub struct Digest {
    storage: Arc<dyn Storage>,
    chunk_size: ChunkSize,
    state: Mutex<Option<State>>,
}

#[derive(Debug)]
struct State {
    digests: Vec<u64>,
    /// Taken and put back, or found by a take that failed later.
    pending: ChunkBitmap,
}

impl Digest {
    /// Tracks all of `storage`, cut into chunks of `chunk_size`.
    pub fn new(storage: Arc<dyn Storage>, chunk_size: ChunkSize) -> Self {
        Self {
            storage,
            chunk_size,
            state: Mutex::new(None),
        }
    }

    /// Says that `chunk` was read, and that the `xxh3_64` of what was read is `digest`: the chunk counts as changed
    /// for as long as its digest differs. A chunk outside of the region, or a tracker not started, is ignored.
    pub fn observe(&self, chunk: u64, digest: u64) {
        let mut state = self.state();
        let place = usize::try_from(chunk).ok().zip(state.as_mut());
        if let Some(known) = place.and_then(|(chunk, state)| state.digests.get_mut(chunk)) {
            *known = digest;
        }
    }

    /// The region, to be read by who sends it: the chunks that are read whole are [observed](Self::observe).
    #[must_use]
    pub fn observed(self: &Arc<Self>) -> Arc<dyn Storage> {
        Arc::new(Observed(Arc::clone(self)))
    }

    fn state(&self) -> MutexGuard<'_, Option<State>> {
        // A panic while reading leaves digests of different takes side by side, each of them a true one.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn chunks(&self) -> u64 {
        self.chunk_size.chunks_in(self.storage.len())
    }

    fn bytes_of(&self, chunk: u64) -> Range<u64> {
        let size = u64::from(self.chunk_size.bytes());
        chunk * size..((chunk + 1) * size).min(self.storage.len())
    }

    /// Calls `found` with each chunk in order, and its digest.
    fn digests(&self, mut found: impl FnMut(u64, u64)) -> io::Result<()> {
        let size = u64::from(self.chunk_size.bytes());
        let mut block = vec![0; self.chunk_size.bytes() as usize];
        let zeros = xxh3_64(&block);
        let mut data = ChunkBitmap::empty(self.chunks());
        for range in self.storage.data_ranges(0..self.storage.len())? {
            let start = range.start / size;
            let count = self.chunk_size.chunks_in(range.end).saturating_sub(start);
            data.insert_run(crate::chunk::ChunkRun::new(start, count));
        }
        for chunk in 0..self.chunks() {
            let bytes = self.bytes_of(chunk);
            let len = usize::try_from(bytes.end - bytes.start).expect("at most a chunk");
            let digest = if data.contains(chunk) {
                self.storage.read_exact_at(&mut block[..len], bytes.start)?;
                xxh3_64(&block[..len])
            } else if bytes.end - bytes.start == size {
                zeros
            } else {
                block.fill(0);
                xxh3_64(&block[..len])
            };
            found(chunk, digest);
        }
        Ok(())
    }
}

/// A region whose reads its tracker is told of.
#[derive(Debug)]
struct Observed(Arc<Digest>);

impl Storage for Observed {
    fn len(&self) -> u64 {
        self.0.storage.len()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.storage.read_exact_at(buf, offset)?;
        let size = u64::from(self.0.chunk_size.bytes());
        let end = offset + buf.len() as u64;
        for chunk in offset.div_ceil(size)..self.0.chunk_size.chunks_in(end) {
            let bytes = self.0.bytes_of(chunk);
            if bytes.end <= end {
                let at = |position: u64| usize::try_from(position - offset).expect("in the buffer");
                self.0
                    .observe(chunk, xxh3_64(&buf[at(bytes.start)..at(bytes.end)]));
            }
        }
        Ok(())
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.0.storage.write_all_at(buf, offset)
    }

    fn flush(&self) -> io::Result<()> {
        self.0.storage.flush()
    }

    fn zero(&self, range: Range<u64>) -> io::Result<()> {
        self.0.storage.zero(range)
    }

    fn data_ranges(&self, within: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        self.0.storage.data_ranges(within)
    }
}

impl DirtyTracker for Digest {
    fn start(&self) -> io::Result<()> {
        let mut state = self.state();
        *state = None;
        let mut digests = Vec::with_capacity(
            usize::try_from(self.chunks()).map_err(|_| io::ErrorKind::OutOfMemory)?,
        );
        self.digests(|_, digest| digests.push(digest))?;
        *state = Some(State {
            digests,
            pending: ChunkBitmap::empty(self.chunks()),
        });
        Ok(())
    }

    fn take(&self) -> io::Result<ChunkBitmap> {
        let mut state = self.state();
        let State { digests, pending } = state.as_mut().ok_or_else(not_started)?;
        let mut known = digests.iter_mut();
        self.digests(|chunk, digest| {
            let known = known.next().expect("as many digests as chunks");
            if mem::replace(known, digest) != digest {
                pending.insert(chunk);
            }
        })?;
        Ok(mem::replace(pending, ChunkBitmap::empty(self.chunks())))
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::backend::FileStorage;
    use crate::dirty::conformance::{Tracked, conformance};
    use crate::sys::memfd::memfd;

    #[derive(Debug)]
    struct DigestedFile {
        file: Arc<FileStorage>,
        tracker: Digest,
    }

    fn digested_file(len: u64, chunk_size: ChunkSize) -> DigestedFile {
        let file = Arc::new(FileStorage::new(memfd("digested", len).unwrap()).unwrap());
        let tracker = Digest::new(file.clone(), chunk_size);
        DigestedFile { file, tracker }
    }

    impl Tracked for DigestedFile {
        fn tracker(&self) -> &dyn DirtyTracker {
            &self.tracker
        }

        fn write(&self, offset: u64, bytes: &[u8]) {
            self.file.write_all_at(bytes, offset).unwrap();
        }

        fn read(&self, offset: u64, buf: &mut [u8]) {
            self.file.read_exact_at(buf, offset).unwrap();
        }

        fn allocated(&self) -> u64 {
            self.file.file().metadata().unwrap().blocks() * 512
        }
    }

    conformance!(digested_file);

    #[test]
    fn a_chunk_that_is_changed_back_after_it_was_read_is_named_when_the_read_was_observed() {
        let fixture = digested_file(8192, ChunkSize::PAGE);
        fixture.tracker.start().unwrap();
        fixture.write(0, &[1]);
        let mut read = [0; 4096];
        fixture.read(0, &mut read);
        fixture.tracker.observe(0, xxh3_64(&read));
        fixture.write(0, &[0]);
        assert!(fixture.tracker.take().unwrap().contains(0));
        fixture.tracker.observe(7, 0);
    }

    #[test]
    fn data_that_becomes_a_hole_is_a_change() {
        let fixture = digested_file(8192, ChunkSize::PAGE);
        fixture.write(4096, &[1; 4096]);
        fixture.tracker.start().unwrap();
        fixture.file.punch(4096..8192).unwrap();
        assert!(fixture.tracker.take().unwrap().contains(1));
    }

    #[test]
    fn a_change_that_was_read_and_then_undone_is_named() {
        let file = Arc::new(FileStorage::new(memfd("undone", 3 * 4096 + 5).unwrap()).unwrap());
        let tracker = Arc::new(Digest::new(file.clone(), ChunkSize::PAGE));
        tracker.start().unwrap();
        file.write_all_at(&[1; 5], 3 * 4096).unwrap();
        file.write_all_at(&[1], 4096).unwrap();
        let mut sent = vec![0; 3 * 4096 + 5];
        tracker.observed().read_exact_at(&mut sent, 0).unwrap();
        file.write_all_at(&[0; 5], 3 * 4096).unwrap();
        file.write_all_at(&[0], 4096).unwrap();
        let named: Vec<_> = tracker
            .take()
            .unwrap()
            .runs()
            .flat_map(|run| run.range())
            .collect();
        assert_eq!(named, [1, 3]);
    }
}
