//! Bytes at any position, over chunks that are read and written whole.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::stripes::Stripes;
use super::{ChunkBitmap, ChunkIndex, ChunkRun, ChunkStore, Storage, check_range};

/// How many chunks one call removes: their numbers fill a few pages.
const REMOVED_AT_ONCE: usize = 1024;

/// A storage over a [`ChunkStore`]: any range, of which the chunks in the middle are passed through and those that it
/// only begins or ends in are read, changed and written.
///
/// A range of many chunks is one batch of the store. A chunk that is written whole is never read. A chunk that is
/// missing reads as zeros, and one that is zeroed whole becomes missing. Writes of the same chunk wait for each other,
/// so that neither undoes the other; reads wait for nobody.
#[derive(Debug)]
pub struct Chunked {
    store: Arc<dyn ChunkStore>,
    stripes: Stripes,
}

/// A chunk, the bytes of it that a range covers, and where these lie in the range.
#[derive(Debug, Clone)]
struct Part {
    chunk: ChunkIndex,
    inside: Range<usize>,
    of_range: Range<usize>,
    /// Whether that is all of the chunk.
    whole: bool,
}

impl Chunked {
    /// The bytes of the chunks of `store`.
    pub fn new(store: Arc<dyn ChunkStore>) -> Self {
        Self {
            store,
            stripes: Stripes::new(),
        }
    }

    fn size(&self) -> u64 {
        u64::from(self.store.chunk_size().bytes())
    }

    /// How long `chunk`, one that exists, is.
    fn len_of(&self, chunk: ChunkIndex) -> usize {
        in_memory(self.size().min(self.store.len() - chunk.0 * self.size()))
    }

    /// Cuts a range, which was checked, at the borders of chunks.
    fn parts(&self, offset: u64, len: usize) -> impl ExactSizeIterator<Item = Part> + '_ {
        let size = self.size();
        let end = offset + len as u64;
        let count = if len == 0 {
            0
        } else {
            in_memory((end - 1) / size - offset / size + 1)
        };
        (0..count).map(move |n| {
            let chunk = offset / size + n as u64;
            let start = offset.max(chunk * size);
            let end = end.min((chunk + 1) * size);
            let inside = in_memory(start - chunk * size)..in_memory(end - chunk * size);
            let chunk = ChunkIndex(chunk);
            Part {
                whole: inside.len() == self.len_of(chunk),
                of_range: in_memory(start - offset)..in_memory(end - offset),
                chunk,
                inside,
            }
        })
    }

    /// Reads chunks whole, and calls `found` with each one's place and bytes, or `None`.
    fn get(
        &self,
        chunks: &[ChunkIndex],
        mut found: impl FnMut(usize, Option<&[u8]>),
    ) -> io::Result<()> {
        let mut answered = 0;
        let mut wrong = None;
        self.store.get(chunks, &mut |place, bytes| {
            answered += 1;
            let expected = self.len_of(chunks[place]);
            match bytes {
                Some(bytes) if bytes.len() != expected => wrong = Some((place, bytes.len())),
                bytes => found(place, bytes),
            }
        })?;
        // Whatever a store does, the caller's buffer is never taken for data.
        if let Some((place, len)) = wrong {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("chunk {} came with {len} bytes", chunks[place].0),
            ));
        }
        if answered != chunks.len() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("{answered} of {} chunks were answered", chunks.len()),
            ));
        }
        Ok(())
    }

    /// Makes chunks of `run` missing that are not.
    fn remove(&self, run: ChunkRun) -> io::Result<()> {
        if run.count == 0 {
            return Ok(());
        }
        let present = self.store.present(run)?;
        let mut chunks = present.runs_within(run).flat_map(|run| run.range());
        loop {
            let batch: Vec<ChunkIndex> = chunks
                .by_ref()
                .take(REMOVED_AT_ONCE)
                .map(ChunkIndex)
                .collect();
            let (Some(first), Some(last)) = (batch.first(), batch.last()) else {
                return Ok(());
            };
            let _locked = self
                .stripes
                .lock(ChunkRun::new(first.0, last.0 - first.0 + 1));
            self.store.remove(&batch)?;
        }
    }

    /// Zeros a part of a chunk; one that is missing stays so.
    fn zero_part(&self, part: &Part) -> io::Result<()> {
        let _locked = self.stripes.lock(ChunkRun::new(part.chunk.0, 1));
        let mut chunk = None;
        self.get(&[part.chunk], |_, bytes| chunk = bytes.map(<[u8]>::to_vec))?;
        let Some(mut chunk) = chunk else {
            return Ok(());
        };
        chunk[part.inside.clone()].fill(0);
        self.store.put(&[(part.chunk, &chunk)])
    }
}

impl Storage for Chunked {
    fn len(&self) -> u64 {
        self.store.len()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        check_range(self.len(), offset, buf.len() as u64)?;
        let parts: Vec<Part> = self.parts(offset, buf.len()).collect();
        let chunks: Vec<ChunkIndex> = parts.iter().map(|part| part.chunk).collect();
        if chunks.is_empty() {
            return Ok(());
        }
        self.get(&chunks, |place, bytes| {
            let part = &parts[place];
            let to = &mut buf[part.of_range.clone()];
            match bytes {
                Some(bytes) => to.copy_from_slice(&bytes[part.inside.clone()]),
                None => to.fill(0),
            }
        })
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        check_range(self.len(), offset, buf.len() as u64)?;
        let parts: Vec<Part> = self.parts(offset, buf.len()).collect();
        let Some(first) = parts.first() else {
            return Ok(());
        };
        let _locked = self
            .stripes
            .lock(ChunkRun::new(first.chunk.0, parts.len() as u64));
        // The first and the last, at most.
        let partial: Vec<&Part> = parts.iter().filter(|part| !part.whole).collect();
        let mut patched: Vec<Vec<u8>> = partial
            .iter()
            .map(|part| vec![0; self.len_of(part.chunk)])
            .collect();
        if !partial.is_empty() {
            let chunks: Vec<ChunkIndex> = partial.iter().map(|part| part.chunk).collect();
            self.get(&chunks, |place, bytes| {
                if let Some(bytes) = bytes {
                    patched[place].copy_from_slice(bytes);
                }
            })?;
        }
        for (part, chunk) in partial.iter().zip(&mut patched) {
            chunk[part.inside.clone()].copy_from_slice(&buf[part.of_range.clone()]);
        }
        let mut patched = patched.iter();
        let batch: Vec<(ChunkIndex, &[u8])> = parts
            .iter()
            .map(|part| {
                let bytes = if part.whole {
                    &buf[part.of_range.clone()]
                } else {
                    patched.next().expect("one was made for each")
                };
                (part.chunk, bytes)
            })
            .collect();
        self.store.put(&batch)
    }

    fn zero(&self, range: Range<u64>) -> io::Result<()> {
        let count = range
            .end
            .checked_sub(range.start)
            .ok_or(io::ErrorKind::InvalidInput)?;
        check_range(self.len(), range.start, count)?;
        if count == 0 {
            return Ok(());
        }
        let size = self.size();
        let start = range.start.div_ceil(size);
        let end = if range.end == self.len() {
            range.end.div_ceil(size)
        } else {
            range.end / size
        };
        self.remove(ChunkRun::new(start, end.saturating_sub(start)))?;
        // What is left lies in the first chunk, the last, or the only one.
        let head = range.start..range.end.min(start * size);
        let tail = range.start.max(head.end).max(end * size)..range.end;
        for left in [head, tail].into_iter().filter(|left| !left.is_empty()) {
            for part in self.parts(left.start, in_memory(left.end - left.start)) {
                self.zero_part(&part)?;
            }
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.store.flush()
    }

    fn data_ranges(&self, within: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let end = within.end.min(self.len());
        if within.start >= end {
            return Ok(Vec::new());
        }
        let size = self.size();
        let first = within.start / size;
        let run = ChunkRun::new(first, end.div_ceil(size) - first);
        let present: ChunkBitmap = self.store.present(run)?;
        let ranges = present.runs_within(run).map(|run| {
            let start = (run.start.0 * size).max(within.start);
            start..run.end().saturating_mul(size).min(end)
        });
        Ok(ranges.collect())
    }
}

fn in_memory(len: u64) -> usize {
    usize::try_from(len).expect("a part of a buffer fits the memory")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::chunk::conformance::{Calls, MapStore};
    use crate::chunk::{ChunkSize, Fault, FaultyStore, Operation};

    const PAGE: u64 = 4096;

    mod of_pages {
        use super::*;
        crate::chunk::conformance::storage_conformance!(|len| {
            Arc::new(Chunked::new(Arc::new(MapStore::new(ChunkSize::PAGE, len)))) as _
        });
    }

    mod of_large_chunks {
        use super::*;
        crate::chunk::conformance::storage_conformance!(|len| {
            let large = ChunkSize::new(64 << 10).unwrap();
            Arc::new(Chunked::new(Arc::new(MapStore::new(large, len)))) as _
        });
    }

    fn chunked(len: u64) -> (Chunked, Arc<MapStore>) {
        let store = Arc::new(MapStore::new(ChunkSize::PAGE, len));
        (Chunked::new(store.clone()), store)
    }

    #[test]
    fn a_range_of_many_chunks_is_one_batch_and_whole_chunks_are_not_read() {
        let (storage, store) = chunked(100 * PAGE);
        let batch = |gets, got, puts, put| Calls {
            gets,
            got,
            puts,
            put,
            removes: 0,
        };
        storage.write_all_at(&[1; 40 * 4096], 8 * PAGE).unwrap();
        assert_eq!(store.calls(), batch(0, 0, 1, 40));
        storage.write_all_at(&[2; 40 * 4096], 8 * PAGE + 1).unwrap();
        assert_eq!(store.calls(), batch(1, 2, 1, 41));
        storage.write_all_at(&[2; 10], 50 * PAGE).unwrap();
        assert_eq!(store.calls(), batch(1, 1, 1, 1));
        storage.read_exact_at(&mut [0; 40 * 4096], 10).unwrap();
        assert_eq!(store.calls(), batch(1, 41, 0, 0));
        storage.write_all_at(&[], 10).unwrap();
        storage.read_exact_at(&mut [], 10).unwrap();
        assert_eq!(store.calls(), Calls::default());
    }

    #[test]
    fn a_short_last_chunk_that_is_written_to_its_end_is_not_read() {
        let (storage, store) = chunked(PAGE + 10);
        storage.write_all_at(&[1; 10], PAGE).unwrap();
        assert_eq!(
            (
                store.calls().gets,
                store.present(ChunkRun::new(0, 2)).unwrap().count()
            ),
            (0, 1)
        );
        storage.zero(PAGE..PAGE + 10).unwrap();
        assert!(store.present(ChunkRun::new(0, 2)).unwrap().is_empty());
    }

    #[test]
    fn zeroing_removes_whole_chunks_and_puts_no_zeros_where_nothing_is() {
        let (storage, store) = chunked(1 << 36);
        storage.write_all_at(&[1; 3 * 4096], 0).unwrap();
        let _ = store.calls();
        storage.zero(100..1 << 36).unwrap();
        assert_eq!(
            store
                .present(ChunkRun::new(0, 8))
                .map(|set| set.count())
                .unwrap(),
            1
        );
        let calls = store.calls();
        assert_eq!((calls.removes, calls.puts), (1, 1));
        storage.zero(PAGE * 7 + 1..PAGE * 8 + 1).unwrap();
        assert_eq!(store.calls().puts, 0);
        let data = storage.data_ranges(1..1 << 36).unwrap();
        assert_eq!((data.len(), data[0].clone()), (1, 1..PAGE));
    }

    /// r3map's buffer was reused from chunk to chunk, so that a chunk that was missing read as its neighbour.
    #[test]
    fn a_missing_chunk_beside_others_reads_as_zeros() {
        let (storage, _) = chunked(3 * PAGE);
        storage.write_all_at(&[1; 4096], 0).unwrap();
        storage.write_all_at(&[3; 4096], 2 * PAGE).unwrap();
        let mut buf = vec![9; 3 * 4096];
        storage.read_exact_at(&mut buf, 0).unwrap();
        assert!(buf[4096..8192].iter().all(|&byte| byte == 0));
    }

    /// Answers with what it is not asked for.
    #[derive(Debug)]
    struct Liar(MapStore, Option<&'static [u8]>, usize);

    impl ChunkStore for Liar {
        fn chunk_size(&self) -> ChunkSize {
            self.0.chunk_size()
        }
        fn len(&self) -> u64 {
            self.0.len()
        }
        fn get(
            &self,
            _: &[ChunkIndex],
            found: &mut dyn FnMut(usize, Option<&[u8]>),
        ) -> io::Result<()> {
            for place in 0..self.2 {
                found(place, self.1);
            }
            Ok(())
        }
        fn put(&self, chunks: &[(ChunkIndex, &[u8])]) -> io::Result<()> {
            self.0.put(chunks)
        }
        fn remove(&self, chunks: &[ChunkIndex]) -> io::Result<()> {
            self.0.remove(chunks)
        }
        fn present(&self, within: ChunkRun) -> io::Result<ChunkBitmap> {
            self.0.present(within)
        }
        fn flush(&self) -> io::Result<()> {
            self.0.flush()
        }
    }

    #[test]
    fn a_short_answer_or_none_is_an_error_and_never_data() {
        for (bytes, answers) in [
            (Some(&[1; 100][..]), 1),
            (Some(&[1; 5000][..]), 1),
            (None, 0),
        ] {
            let store = MapStore::new(ChunkSize::PAGE, 2 * PAGE);
            let storage = Chunked::new(Arc::new(Liar(store, bytes, answers)));
            let error = storage.read_exact_at(&mut [0; 10], 0).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
            assert!(storage.write_all_at(&[1; 10], 5).is_err());
        }
    }

    #[test]
    fn a_partial_write_whose_chunk_cannot_be_read_writes_nothing() {
        let store = Arc::new(MapStore::new(ChunkSize::PAGE, 4 * PAGE));
        let faulty = FaultyStore::new(store.clone());
        let faults = faulty.faults();
        let storage = Chunked::new(Arc::new(faulty));
        faults.add(Fault::error(io::ErrorKind::TimedOut).on(Operation::Read));
        let error = storage.write_all_at(&[1; 4096], 10).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert_eq!(store.calls().put, 0);
        storage.write_all_at(&[1; 4096], 0).unwrap();
        faults.clear();
        faults.add(Fault::error(io::ErrorKind::StorageFull).on(Operation::Write));
        let error = storage.write_all_at(&[2; 10], 10).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        let mut buf = [0; 30];
        storage.read_exact_at(&mut buf, 0).unwrap();
        assert_eq!(buf, [1; 30]);
    }

    #[test]
    fn two_partial_writes_of_one_chunk_do_not_undo_each_other() {
        let faulty = FaultyStore::new(Arc::new(MapStore::new(ChunkSize::PAGE, PAGE)));
        let faults = faulty.faults();
        let storage = Chunked::new(Arc::new(faulty));
        // One has read the chunk and not yet written it when the other comes.
        faults.add(
            Fault::stall(Duration::from_secs(60))
                .on(Operation::Write)
                .times(1),
        );
        std::thread::scope(|scope| {
            let slow = scope.spawn(|| storage.write_all_at(&[1; 10], 0));
            faults.await_stalled(1, Duration::from_secs(60));
            let other = scope.spawn(|| storage.write_all_at(&[2; 10], 10));
            let whole = scope.spawn(|| storage.zero(20..4096));
            faults.release();
            for thread in [slow, other, whole] {
                thread.join().unwrap().unwrap();
            }
        });
        let mut buf = [0; 20];
        storage.read_exact_at(&mut buf, 0).unwrap();
        assert_eq!((&buf[..10], &buf[10..]), (&[1; 10][..], &[2; 10][..]));
    }
}
