//! Memory of this process as storage.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::chunk::{Storage, check_range};

/// What is allocated at once.
const PIECE: u64 = 64 << 10;
/// The unit of what is known to hold data; a piece has 16.
const PAGE: u64 = 4 << 10;
/// So many locks: neighbouring pieces have different ones, and two of few threads rarely meet.
const SHARDS: usize = 64;

/// Bytes in the memory of this process; room is taken by the first write to it and given back by
/// [`zero`](Storage::zero).
///
/// A read or a write copies and makes no system call. Memory that another process or the kernel shall see is a
/// [memfd](super::memfd_storage).
pub struct MemoryStorage {
    len: u64,
    shards: [RwLock<BTreeMap<u64, Piece>>; SHARDS],
}

struct Piece {
    /// Bit `n` is set if page `n` was written; the others are zeros.
    pages: u16,
    bytes: Box<[u8]>,
}

impl MemoryStorage {
    /// `len` bytes, all zeros, that take up nothing yet.
    #[must_use]
    pub fn new(len: u64) -> Self {
        Self {
            len,
            shards: [const { RwLock::new(BTreeMap::new()) }; SHARDS],
        }
    }

    /// How many bytes of memory the data takes up.
    #[must_use]
    pub fn allocated(&self) -> u64 {
        let pieces: usize = (0..SHARDS as u64)
            .map(|piece| self.shard(piece).len())
            .sum();
        pieces as u64 * PIECE
    }

    fn shard(&self, piece: u64) -> RwLockReadGuard<'_, BTreeMap<u64, Piece>> {
        self.lock_of(piece)
            .read()
            // A write that panicked half-way has left bytes old or new, as one that failed may.
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn shard_mut(&self, piece: u64) -> RwLockWriteGuard<'_, BTreeMap<u64, Piece>> {
        self.lock_of(piece)
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_of(&self, piece: u64) -> &RwLock<BTreeMap<u64, Piece>> {
        &self.shards[in_memory(piece % SHARDS as u64)]
    }
}

impl Piece {
    fn new() -> Self {
        Self {
            pages: 0,
            bytes: vec![0; in_memory(PIECE)].into_boxed_slice(),
        }
    }

    fn write(&mut self, at: Range<usize>, bytes: &[u8]) {
        self.pages |= pages(at.start as u64 / PAGE..(at.end as u64).div_ceil(PAGE));
        self.bytes[at].copy_from_slice(bytes);
    }
}

impl Storage for MemoryStorage {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        check_range(self.len, offset, buf.len() as u64)?;
        let mut left = buf;
        for (piece, at) in pieces(offset..offset + left.len() as u64) {
            let (part, rest) = left.split_at_mut(at.len());
            match self.shard(piece).get(&piece) {
                Some(piece) => part.copy_from_slice(&piece.bytes[at]),
                None => part.fill(0),
            }
            left = rest;
        }
        Ok(())
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        check_range(self.len, offset, buf.len() as u64)?;
        let mut left = buf;
        for (piece, at) in pieces(offset..offset + left.len() as u64) {
            let (part, rest) = left.split_at(at.len());
            self.shard_mut(piece)
                .entry(piece)
                .or_insert_with(Piece::new)
                .write(at, part);
            left = rest;
        }
        Ok(())
    }

    fn zero(&self, range: Range<u64>) -> io::Result<()> {
        let count = range
            .end
            .checked_sub(range.start)
            .ok_or(io::ErrorKind::InvalidInput)?;
        check_range(self.len, range.start, count)?;
        // The bytes beyond the end are zeros, so the last page is zeroed whole if its part is.
        let end = if range.end == self.len {
            range.end.saturating_add(PAGE - 1) / PAGE * PAGE
        } else {
            range.end
        };
        if count == 0 {
            return Ok(());
        }
        // A range of terabytes with nothing in it is no loop over its pieces.
        for shard in 0..SHARDS as u64 {
            let mut shard = self.shard_mut(shard);
            let span = range.start / PIECE..end.div_ceil(PIECE);
            let mut empty = Vec::new();
            for (&index, piece) in shard.range_mut(span) {
                let start = range.start.max(index * PIECE) - index * PIECE;
                let end = (end - index * PIECE).min(PIECE);
                piece.bytes[in_memory(start)..in_memory(end)].fill(0);
                piece.pages &= !pages(start.div_ceil(PAGE)..end / PAGE);
                if piece.pages == 0 {
                    empty.push(index);
                }
            }
            for index in empty {
                shard.remove(&index);
            }
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn data_ranges(&self, within: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let end = within.end.min(self.len);
        if within.start >= end {
            return Ok(Vec::new());
        }
        let mut found = Vec::new();
        for shard in 0..SHARDS as u64 {
            let span = within.start / PIECE..end.div_ceil(PIECE);
            let shard = self.shard(shard);
            found.extend(
                shard
                    .range(span)
                    .map(|(&index, piece)| (index, piece.pages)),
            );
        }
        found.sort_unstable();
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for (index, pages) in found {
            for page in (0..16).filter(|page| pages & (1 << page) != 0) {
                let page = index * PIECE + page * PAGE;
                let data = page.max(within.start)..(page + PAGE).min(end);
                match ranges.last_mut() {
                    _ if data.is_empty() => {}
                    Some(last) if last.end == data.start => last.end = data.end,
                    _ => ranges.push(data),
                }
            }
        }
        Ok(ranges)
    }

    fn is_at_hand(&self, _range: Range<u64>) -> bool {
        true
    }
}

impl fmt::Debug for MemoryStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryStorage")
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

/// The pieces that `range` touches, and which bytes of each.
fn pieces(range: Range<u64>) -> impl Iterator<Item = (u64, Range<usize>)> {
    let mut next = range.start;
    std::iter::from_fn(move || {
        if next >= range.end {
            return None;
        }
        let piece = next / PIECE;
        let start = next % PIECE;
        let len = (PIECE - start).min(range.end - next);
        next += len;
        Some((piece, in_memory(start)..in_memory(start + len)))
    })
}

/// The bits of pages, of the 16 of a piece.
fn pages(range: Range<u64>) -> u16 {
    range.fold(0, |bits, page| bits | 1 << page)
}

fn in_memory(at: u64) -> usize {
    usize::try_from(at).expect("a place in a piece fits the address space")
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    crate::chunk::conformance::storage_conformance!(|len| Arc::new(MemoryStorage::new(len)) as _);

    #[test]
    fn nothing_is_allocated_before_it_is_written_and_zeroing_gives_it_back() {
        let storage = MemoryStorage::new((1 << 50) + 1);
        assert_eq!(storage.allocated(), 0);
        storage.zero(0..storage.len()).unwrap();
        storage.write_all_at(&[1, 2], PIECE - 1).unwrap();
        storage.write_all_at(&[3], 1 << 50).unwrap();
        assert_eq!(storage.allocated(), 3 * PIECE);
        assert_eq!(
            storage.data_ranges(0..u64::MAX).unwrap(),
            [PIECE - PAGE..PIECE + PAGE, 1 << 50..(1 << 50) + 1]
        );
        // A part of a page is zeros then, and still allocated.
        storage.zero(PIECE - 1..PIECE).unwrap();
        assert_eq!(storage.allocated(), 3 * PIECE);
        storage.zero(PIECE - PAGE..PIECE + PAGE).unwrap();
        assert_eq!(storage.allocated(), PIECE);
        storage.zero(1..storage.len()).unwrap();
        assert_eq!(storage.allocated(), 0);
    }

    #[test]
    fn reading_allocates_nothing() {
        let storage = MemoryStorage::new(1 << 20);
        let mut buf = vec![1; 1 << 20];
        storage.read_exact_at(&mut buf, 0).unwrap();
        assert!(buf.iter().all(|&byte| byte == 0));
        assert_eq!(storage.allocated(), 0);
        assert!(storage.is_at_hand(0..1));
    }
}
