//! A storage of one's own over one that many share.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::stripes::Stripes;
use super::{AtomicBitmap, ChunkBitmap, ChunkRun, ChunkSize, Marks, Storage, check_range};

/// The first bytes of a map that is kept.
const MAGIC: [u8; 8] = *b"mfcow\0\0\x01";
/// Where the bits of a map begin: behind what it begins with, and at a page, so that they are written alone.
const MAP_HEAD: u64 = 4096;
/// How many words of a map are written at once.
const WORDS_AT_ONCE: usize = 512;

/// A storage that begins as the same bytes as a *base*, which it never writes: chunks that are written are in an
/// *overlay* from then on.
///
/// Many may share a base: a golden image, or memory that many clones start from. Whoever may write the base itself must
/// not do so. The first write to a part of a chunk copies the chunk, under a lock of that chunk; a chunk that is written
/// or zeroed whole is not read. Which chunks are in the overlay, and so differ from the base, is one bit a chunk in
/// memory; with [`with_map`](Self::with_map) it is also kept.
#[derive(Debug)]
pub struct Cow {
    base: Arc<dyn Storage>,
    overlay: Arc<dyn Storage>,
    chunk_size: ChunkSize,
    /// The chunks that are in the overlay. Never taken out again, so who sees one here needs no lock.
    own: AtomicBitmap,
    copying: Stripes,
    /// Held for reading by who changes the overlay.
    changing: RwLock<()>,
    map: Option<Map>,
}

/// Where the set of the overlay's chunks is kept.
#[derive(Debug)]
struct Map {
    storage: Arc<dyn Storage>,
    state: Mutex<Saved>,
}

#[derive(Debug)]
struct Saved {
    /// What of the set is durable.
    chunks: ChunkBitmap,
    /// Chunks of the overlay that are not in the map, and that a flush of the overlay has failed for: a later one does not
    /// speak for them.
    doubtful: ChunkBitmap,
}

impl Cow {
    /// `base`, with writes going to `overlay`, which is as long; what it holds is not looked at.
    ///
    /// Which chunks were written is forgotten with this value. So are the writes, then, whatever the overlay is.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] if the lengths differ.
    pub fn new(
        base: Arc<dyn Storage>,
        overlay: Arc<dyn Storage>,
        chunk_size: ChunkSize,
    ) -> io::Result<Self> {
        if base.len() != overlay.len() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "an overlay of {} bytes is over a base of {}: make it as long",
                    overlay.len(),
                    base.len()
                ),
            ));
        }
        Ok(Self {
            own: AtomicBitmap::empty(chunk_size.chunks_in(base.len())),
            base,
            overlay,
            chunk_size,
            copying: Stripes::new(),
            changing: RwLock::new(()),
            map: None,
        })
    }

    /// As [`new`](Self::new), and goes on where an earlier one with the same map was at its last good flush, at least.
    ///
    /// `map` has [`map_len`](Self::map_len) bytes, all zeros at first. [`flush`](Storage::flush) makes the overlay durable
    /// before the map that refers to it.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] if the lengths differ, or the map is of another length or chunk size;
    /// [`io::ErrorKind::InvalidData`] if it is no map; else what the media say.
    pub fn with_map(
        base: Arc<dyn Storage>,
        overlay: Arc<dyn Storage>,
        chunk_size: ChunkSize,
        map: Arc<dyn Storage>,
    ) -> io::Result<Self> {
        let mut cow = Self::new(base, overlay, chunk_size)?;
        let wanted = Self::map_len(cow.len(), chunk_size);
        if map.len() != wanted {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("a map has {} bytes and should have {wanted}", map.len()),
            ));
        }
        let head = head(cow.len(), chunk_size);
        let mut found = [0; 24];
        map.read_exact_at(&mut found, 0)?;
        if found == [0; 24] {
            map.write_all_at(&head, 0)?;
            map.flush()?;
        } else if found[..8] != MAGIC {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "that is no map of an overlay: name the one that was made with it",
            ));
        } else if found != head {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the map is of an overlay of another length or chunk size",
            ));
        }
        let saved = read_map(&*map, cow.own_chunks())?;
        cow.own.union_with(&saved);
        cow.map = Some(Map {
            storage: map,
            state: Mutex::new(Saved {
                doubtful: ChunkBitmap::empty(saved.chunks()),
                chunks: saved,
            }),
        });
        Ok(cow)
    }

    /// How long the map of a storage of `len` bytes is.
    #[must_use]
    pub fn map_len(len: u64, chunk_size: ChunkSize) -> u64 {
        MAP_HEAD + chunk_size.chunks_in(len).div_ceil(64) * 8
    }

    /// The chunks that were written or zeroed: those that may differ from the base.
    #[must_use]
    pub fn differing(&self) -> ChunkBitmap {
        self.own.snapshot()
    }

    /// What it is cut into.
    #[must_use]
    pub fn chunk_size(&self) -> ChunkSize {
        self.chunk_size
    }

    fn own_chunks(&self) -> u64 {
        self.chunk_size.chunks_in(self.len())
    }

    fn size(&self) -> u64 {
        u64::from(self.chunk_size.bytes())
    }

    fn bytes_of(&self, run: ChunkRun) -> Range<u64> {
        let end = run.end().saturating_mul(self.size());
        run.start.0 * self.size()..end.min(self.len())
    }

    /// Cuts `range`, which was checked, into pieces that are in the overlay, or not.
    fn pieces(&self, range: Range<u64>) -> Vec<(Range<u64>, bool)> {
        if range.is_empty() {
            return Vec::new();
        }
        let first = range.start / self.size();
        let run = ChunkRun::new(first, range.end.div_ceil(self.size()) - first);
        let mut pieces = Vec::new();
        let mut next = range.start;
        for run in self.own.runs_within(run) {
            let own = self.bytes_of(run);
            let own = own.start.max(range.start)..own.end.min(range.end);
            if next < own.start {
                pieces.push((next..own.start, false));
            }
            next = own.end;
            pieces.push((own, true));
        }
        if next < range.end {
            pieces.push((next..range.end, false));
        }
        pieces
    }

    fn read(
        &self,
        buf: &mut [u8],
        offset: u64,
        how: impl Fn(&dyn Storage, &mut [u8], u64) -> io::Result<()>,
    ) -> io::Result<()> {
        check_range(self.len(), offset, buf.len() as u64)?;
        let chunk = offset / self.size();
        if offset % self.size() + buf.len() as u64 <= self.size() {
            // Most reads: of one chunk.
            let from = if self.own.contains(chunk) {
                &self.overlay
            } else {
                &self.base
            };
            return how(&**from, buf, offset);
        }
        let mut left = buf;
        for (piece, is_own) in self.pieces(offset..offset + left.len() as u64) {
            let (part, rest) = left.split_at_mut(in_memory(piece.end - piece.start));
            let from = if is_own { &self.overlay } else { &self.base };
            how(&**from, part, piece.start)?;
            left = rest;
        }
        Ok(())
    }

    /// Changes `range`, which was checked: calls `change` with parts of it that are to be changed in the overlay.
    ///
    /// Parts of chunks that are not there yet are copied first; whole chunks are not.
    fn change(
        &self,
        range: Range<u64>,
        change: impl Fn(Range<u64>) -> io::Result<()>,
    ) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let _changing = self.changing.read().unwrap_or_else(PoisonError::into_inner);
        let first = range.start / self.size();
        let run = ChunkRun::new(first, range.end.div_ceil(self.size()) - first);
        if self.own.runs_within(run) == [run] {
            return change(range);
        }
        let _copying = self.copying.lock(run);
        for edge in [run.start.0, run.end() - 1] {
            let chunk = self.bytes_of(ChunkRun::new(edge, 1));
            let whole = range.start <= chunk.start && chunk.end <= range.end;
            if !whole && !self.own.contains(edge) {
                let mut bytes = vec![0; in_memory(chunk.end - chunk.start)];
                self.base.read_exact_at(&mut bytes, chunk.start)?;
                self.overlay.write_all_at(&bytes, chunk.start)?;
                // As it was: the change may fail, and reads may see it from here on.
                self.own.insert_run(ChunkRun::new(edge, 1));
            }
        }
        change(range)?;
        self.own.insert_run(run);
        Ok(())
    }
}

impl Cow {
    /// Makes the overlay durable, and then the map that refers to it.
    fn flush_with(&self, map: &Map) -> io::Result<()> {
        // After a panic less is taken for saved than is.
        let mut state = map.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.write_again(&state.doubtful)?;
        // The map may name only what the overlay has on its medium: so first look, then flush, then write what was seen.
        let mut own = self.differing();
        if let Err(error) = self.overlay.flush() {
            own.subtract(&state.chunks);
            state.doubtful.union_with(&own);
            return Err(error);
        }
        state.doubtful.clear();
        map.save(&mut state.chunks, &own)
    }

    /// Writes chunks of the overlay into it once more.
    ///
    /// More than what was written to them may be lost otherwise: the map would hide the rest of them in the base.
    fn write_again(&self, chunks: &ChunkBitmap) -> io::Result<()> {
        if chunks.is_empty() {
            return Ok(());
        }
        // Nobody changes what is read here and written back.
        let _alone = self
            .changing
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        for run in chunks.runs() {
            for chunk in run.range() {
                let range = self.bytes_of(ChunkRun::new(chunk, 1));
                let mut bytes = vec![0; in_memory(range.end - range.start)];
                self.overlay.read_exact_at(&mut bytes, range.start)?;
                self.overlay.write_all_at(&bytes, range.start)?;
            }
        }
        Ok(())
    }
}

impl Storage for Cow {
    fn len(&self) -> u64 {
        self.base.len()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.read(buf, offset, |from, buf, offset| {
            from.read_exact_at(buf, offset)
        })
    }

    fn read_ahead_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.read(buf, offset, |from, buf, offset| {
            from.read_ahead_at(buf, offset)
        })
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        check_range(self.len(), offset, buf.len() as u64)?;
        self.change(offset..offset + buf.len() as u64, |part| {
            let from = in_memory(part.start - offset);
            let to = in_memory(part.end - offset);
            self.overlay.write_all_at(&buf[from..to], part.start)
        })
    }

    fn zero(&self, range: Range<u64>) -> io::Result<()> {
        let count = range
            .end
            .checked_sub(range.start)
            .ok_or(io::ErrorKind::InvalidInput)?;
        check_range(self.len(), range.start, count)?;
        self.change(range, |part| self.overlay.zero(part))
    }

    fn flush(&self) -> io::Result<()> {
        match &self.map {
            None => self.overlay.flush(),
            Some(map) => self.flush_with(map),
        }
    }

    fn data_ranges(&self, within: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let end = within.end.min(self.len());
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for (piece, is_own) in self.pieces(within.start.min(end)..end) {
            let from = if is_own { &self.overlay } else { &self.base };
            for range in from.data_ranges(piece)? {
                match ranges.last_mut() {
                    Some(last) if last.end == range.start => last.end = range.end,
                    _ => ranges.push(range),
                }
            }
        }
        Ok(ranges)
    }

    fn is_at_hand(&self, range: Range<u64>) -> bool {
        let range = range.start..range.end.min(self.len());
        self.pieces(range).into_iter().all(|(piece, is_own)| {
            let from = if is_own { &self.overlay } else { &self.base };
            from.is_at_hand(piece)
        })
    }
}

impl Marks for Cow {
    /// What may differ from the base.
    fn marked(&self, within: Range<u64>) -> Vec<Range<u64>> {
        let end = within.end.min(self.len());
        let pieces = self.pieces(within.start.min(end)..end);
        let own = pieces.into_iter().filter(|(_, is_own)| *is_own);
        own.map(|(piece, _)| piece).collect()
    }
}

impl Map {
    /// Writes what differs from what is durable, and makes that so.
    fn save(&self, saved: &mut ChunkBitmap, own: &ChunkBitmap) -> io::Result<()> {
        let words = own.words();
        for (n, part) in words.chunks(WORDS_AT_ONCE).enumerate() {
            let first = n * WORDS_AT_ONCE;
            // A flush that saw less may come later; bits are set and never cleared.
            let is_saved = part
                .iter()
                .zip(&saved.words()[first..])
                .all(|(a, b)| a & !b == 0);
            if is_saved {
                continue;
            }
            let both = part.iter().zip(&saved.words()[first..]).map(|(a, b)| a | b);
            let bytes: Vec<u8> = both.flat_map(u64::to_le_bytes).collect();
            self.storage
                .write_all_at(&bytes, MAP_HEAD + first as u64 * 8)?;
        }
        self.storage.flush()?;
        saved.union_with(own);
        Ok(())
    }
}

/// What a map begins with.
fn head(len: u64, chunk_size: ChunkSize) -> [u8; 24] {
    let mut head = [0; 24];
    head[..8].copy_from_slice(&MAGIC);
    head[8..16].copy_from_slice(&len.to_le_bytes());
    head[16..20].copy_from_slice(&chunk_size.bytes().to_le_bytes());
    head
}

fn read_map(map: &dyn Storage, chunks: u64) -> io::Result<ChunkBitmap> {
    let mut set = ChunkBitmap::empty(chunks);
    let mut bytes = vec![0; WORDS_AT_ONCE * 8];
    let words = set.words().len();
    for first in (0..words).step_by(WORDS_AT_ONCE) {
        let count = WORDS_AT_ONCE.min(words - first);
        let bytes = &mut bytes[..count * 8];
        map.read_exact_at(bytes, MAP_HEAD + first as u64 * 8)?;
        for (n, word) in bytes.as_chunks::<8>().0.iter().enumerate() {
            set.set_word(first + n, u64::from_le_bytes(*word));
        }
    }
    Ok(set)
}

fn in_memory(len: u64) -> usize {
    usize::try_from(len).expect("a part of a buffer fits the memory")
}

#[cfg(not(loom))]
#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::backend::MemoryStorage;
    use crate::chunk::{Fault, Faulty, Operation};

    const PAGE: u64 = 4096;

    fn memory(len: u64) -> Arc<dyn Storage> {
        Arc::new(MemoryStorage::new(len))
    }

    mod over_nothing {
        use super::*;
        crate::chunk::conformance::storage_conformance!(|len| {
            let large = ChunkSize::new(64 << 10).unwrap();
            Arc::new(Cow::new(memory(len), memory(len), large).unwrap()) as _
        });
    }

    /// The overlay has rubbish where nothing was written, as one of an earlier life has.
    mod over_rubbish {
        use super::*;
        crate::chunk::conformance::storage_conformance!(|len| {
            let overlay = memory(len);
            let rubbish = vec![0x55; usize::try_from(len).unwrap()];
            overlay.write_all_at(&rubbish, 0).unwrap();
            Arc::new(Cow::new(memory(len), overlay, ChunkSize::PAGE).unwrap()) as _
        });
    }

    /// A base of ones that fails when it is written.
    fn base(len: u64) -> Arc<Faulty> {
        let base = Faulty::new(memory(len));
        base.write_all_at(&vec![1; in_memory(len)], 0).unwrap();
        let shared = Fault::error(io::ErrorKind::PermissionDenied);
        base.faults().add(shared.clone().on(Operation::Write));
        base.faults().add(shared.on(Operation::Zero));
        Arc::new(base)
    }

    fn read(storage: &dyn Storage, range: Range<u64>) -> Vec<u8> {
        let mut buf = vec![9; in_memory(range.end - range.start)];
        storage.read_exact_at(&mut buf, range.start).unwrap();
        buf
    }

    fn named(set: &ChunkBitmap) -> Vec<u64> {
        set.runs().flat_map(|run| run.range()).collect()
    }

    #[test]
    fn the_base_is_never_written_and_clones_of_it_do_not_see_each_other() {
        let base = base(4 * PAGE + 100);
        let cow = || Cow::new(base.clone(), memory(4 * PAGE + 100), ChunkSize::PAGE).unwrap();
        let (one, other) = (cow(), cow());
        one.write_all_at(&[2; 10], PAGE - 5).unwrap();
        one.zero(4 * PAGE + 50..4 * PAGE + 60).unwrap();
        other.zero(0..PAGE).unwrap();
        let mut expected = vec![1; 4 * 4096 + 100];
        expected[4091..4101].fill(2);
        expected[4 * 4096 + 50..4 * 4096 + 60].fill(0);
        assert_eq!(read(&one, 0..4 * PAGE + 100), expected);
        assert_eq!(read(&other, 0..PAGE + 1), [vec![0; 4096], vec![1]].concat());
        assert_eq!(read(&*base, 0..10), [1; 10]);
        assert_eq!(named(&one.differing()), [0, 1, 4]);
        assert_eq!(named(&other.differing()), [0]);
        assert_eq!(one.marked(100..2 * PAGE + 1), vec![100..2 * PAGE; 1]);
        assert!(one.is_at_hand(0..PAGE) != one.is_at_hand(3 * PAGE..4 * PAGE));
    }

    #[test]
    fn a_chunk_that_is_written_whole_is_not_read_and_a_part_is_copied_once() {
        let base = base(4 * PAGE);
        let faults = base.faults();
        let cow = Cow::new(base, memory(4 * PAGE), ChunkSize::PAGE).unwrap();
        faults.add(Fault::error(io::ErrorKind::TimedOut).on(Operation::Read));
        cow.write_all_at(&[2; 2 * 4096], PAGE).unwrap();
        cow.write_all_at(&[3], PAGE + 7).unwrap();
        assert_eq!(faults.struck(), 0);
        // A chunk that cannot be copied is neither changed nor taken over.
        assert!(cow.write_all_at(&[3; 2], PAGE - 1).is_err());
        assert_eq!(named(&cow.differing()), [1, 2]);
        faults.clear();
        assert_eq!(read(&cow, 0..1), [1]);
        cow.write_all_at(&[3; 2], PAGE - 1).unwrap();
        assert_eq!(read(&cow, PAGE - 2..PAGE + 2), [1, 3, 3, 2]);
    }

    #[test]
    fn a_write_that_fails_leaves_the_rest_of_its_chunk_as_it_was() {
        let overlay = Faulty::new(memory(4 * PAGE));
        let faults = overlay.faults();
        let cow = Cow::new(base(4 * PAGE), Arc::new(overlay), ChunkSize::PAGE).unwrap();
        let full = Fault::partly(100, io::ErrorKind::StorageFull).on(Operation::Write);
        faults.add(full.clone().times(1));
        assert!(
            cow.write_all_at(&[2; 10], 50).is_err(),
            "while it is copied"
        );
        assert_eq!(read(&cow, 0..PAGE), [1; 4096]);
        faults.add(full.after(1).times(1));
        assert!(
            cow.write_all_at(&[2; 200], 50).is_err(),
            "after it was copied"
        );
        let found = read(&cow, 0..PAGE);
        assert_eq!((found[49], found[50], found[149], found[150]), (1, 2, 2, 1));
        assert_eq!(named(&cow.differing()), [0]);
    }

    #[test]
    fn two_first_writes_of_one_chunk_do_not_undo_each_other() {
        let base = base(PAGE);
        let faults = base.faults();
        let cow = Cow::new(base, memory(PAGE), ChunkSize::PAGE).unwrap();
        faults.add(
            Fault::stall(Duration::from_secs(60))
                .on(Operation::Read)
                .times(1),
        );
        std::thread::scope(|scope| {
            let slow = scope.spawn(|| cow.write_all_at(&[2; 10], 0));
            faults.await_stalled(1, Duration::from_secs(60));
            let other = scope.spawn(|| cow.write_all_at(&[3; 10], 10));
            faults.release();
            slow.join().unwrap().unwrap();
            other.join().unwrap().unwrap();
        });
        let expected = [vec![2; 10], vec![3; 10], vec![1]].concat();
        assert_eq!(read(&cow, 0..21), expected);
    }

    #[test]
    fn the_map_is_kept_by_a_flush_and_only_for_what_the_overlay_has_flushed() {
        const LEN: u64 = 1000 * PAGE - 1;
        let (base, overlay) = (base(LEN), Arc::new(Faulty::new(memory(LEN))));
        let map = Arc::new(Faulty::new(memory(Cow::map_len(LEN, ChunkSize::PAGE))));
        let open = || {
            let (overlay, map) = (overlay.clone(), map.clone());
            Cow::with_map(base.clone(), overlay, ChunkSize::PAGE, map)
        };
        let cow = open().unwrap();
        cow.write_all_at(&[2; 10], 999 * PAGE).unwrap();
        cow.write_all_at(&[2; 10], 0).unwrap();
        cow.flush().unwrap();
        cow.write_all_at(&[3; 10], 500 * PAGE).unwrap();
        overlay
            .faults()
            .add(Fault::error(io::ErrorKind::Other).on(Operation::Flush));
        assert!(cow.flush().is_err());
        // A crash here: what was not flushed is as the base has it.
        assert_eq!(named(&open().unwrap().differing()), [0, 999]);
        overlay.faults().clear();
        // A flush that has failed once means nothing for what it was for, if it succeeds: so that is written again.
        overlay
            .faults()
            .add(Fault::error(io::ErrorKind::StorageFull).on(Operation::Write));
        assert_eq!(cow.flush().unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert_eq!(overlay.faults().struck(), 2);
        overlay.faults().clear();
        map.faults().add(
            Fault::error(io::ErrorKind::Other)
                .on(Operation::Flush)
                .times(1),
        );
        assert!(cow.flush().is_err(), "the map is not durable");
        cow.flush().unwrap();
        drop(cow);
        let cow = open().unwrap();
        assert_eq!(named(&cow.differing()), [0, 500, 999]);
        assert_eq!(
            read(&cow, 500 * PAGE..500 * PAGE + 11),
            [vec![3; 10], vec![1]].concat()
        );
    }

    #[test]
    fn a_map_of_something_else_is_refused() {
        let large = ChunkSize::new(8192).unwrap();
        let map = memory(Cow::map_len(100 * PAGE, ChunkSize::PAGE));
        let with = |len, size, map: &Arc<dyn Storage>| {
            let cow = Cow::with_map(memory(len), memory(len), size, map.clone());
            cow.map(drop).map_err(|error| error.kind())
        };
        with(100 * PAGE, ChunkSize::PAGE, &map).unwrap();
        with(100 * PAGE, ChunkSize::PAGE, &map).unwrap();
        let refused = Err(io::ErrorKind::InvalidInput);
        assert_eq!(with(100 * PAGE, large, &map), refused);
        assert_eq!(with(100 * PAGE - 1, ChunkSize::PAGE, &map), refused);
        map.write_all_at(b"letter", 0).unwrap();
        let damaged = with(100 * PAGE, ChunkSize::PAGE, &map);
        assert_eq!(damaged, Err(io::ErrorKind::InvalidData));
        let lengths = Cow::new(memory(1), memory(2), ChunkSize::PAGE);
        assert_eq!(lengths.unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
