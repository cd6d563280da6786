//! How the memory of a session is cut into chunks: the only place with that arithmetic.
//!
//! All regions of a session share one chunk size and one space of chunk numbers: region 0 first, then
//! region 1, and so on; each region starts at a chunk of its own. So a set of chunks is one bitmap, whatever
//! the number of regions.

use alloc::string::String;
use alloc::vec::Vec;
use core::ops::Range;

/// The number of a chunk in a session's chunk space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkIndex(pub u64);

/// Chunks that follow each other: `start`, `start + 1`, … `start + count - 1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ChunkRun {
    /// The first chunk.
    pub start: ChunkIndex,
    /// How many there are; a run may be empty.
    pub count: u64,
}

impl ChunkRun {
    /// The run of `count` chunks from `start`.
    #[must_use]
    pub const fn new(start: u64, count: u64) -> Self {
        Self {
            start: ChunkIndex(start),
            count,
        }
    }

    /// One past the last chunk.
    ///
    /// # Panics
    /// If the run goes beyond `u64`: a run that was decoded or taken from a bitmap never does.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.start.0 + self.count
    }

    /// The chunk numbers as a range.
    #[must_use]
    pub const fn range(&self) -> Range<u64> {
        self.start.0..self.end()
    }
}

/// The size of a chunk: a power of two from 4 KiB to 4 MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ChunkSize(u32);

impl ChunkSize {
    /// 4 KiB: the page, and so the unit in which the kernel reports writes.
    pub const PAGE: Self = Self(4096);
    /// The largest size that a session may use.
    pub const MAX: Self = Self(4 << 20);

    /// `bytes` as a chunk size, or `None` if it is no power of two from 4 KiB to 4 MiB.
    #[must_use]
    pub const fn new(bytes: u32) -> Option<Self> {
        if bytes.is_power_of_two() && bytes >= Self::PAGE.0 && bytes <= Self::MAX.0 {
            Some(Self(bytes))
        } else {
            None
        }
    }

    /// The size in bytes.
    #[must_use]
    pub const fn bytes(self) -> u32 {
        self.0
    }

    /// How many chunks cover `len` bytes.
    #[must_use]
    pub const fn chunks_in(self, len: u64) -> u64 {
        len.div_ceil(self.0 as u64)
    }
}

/// A named span of memory that is being moved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegionDescriptor {
    /// What both sides call it; for a QEMU guest the id of the memory backend.
    pub name: String,
    /// Its length in bytes; need not be a multiple of the chunk size.
    pub len: u64,
}

/// Where a chunk run lies: within one region, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Index of the region in [`Layout::regions`].
    pub region: usize,
    /// Byte offset in the region.
    pub offset: u64,
    /// Length in bytes; the last chunk of a region may make it short.
    pub len: u64,
    /// The chunks that the span covers.
    pub run: ChunkRun,
}

/// The regions of a session and their place in the chunk space.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    chunk_size: ChunkSize,
    regions: Vec<RegionDescriptor>,
    /// `first[i]` is the first chunk of region `i`; one more entry holds the total.
    first: Vec<u64>,
}

impl Layout {
    /// Lays the regions out one after the other; `None` if their lengths overflow.
    #[must_use]
    pub fn new(chunk_size: ChunkSize, regions: Vec<RegionDescriptor>) -> Option<Self> {
        let mut first = Vec::with_capacity(regions.len() + 1);
        let mut next = 0_u64;
        let mut bytes = 0_u64;
        for region in &regions {
            first.push(next);
            next = next.checked_add(chunk_size.chunks_in(region.len))?;
            bytes = bytes.checked_add(region.len)?;
        }
        first.push(next);
        Some(Self {
            chunk_size,
            regions,
            first,
        })
    }

    /// The chunk size of the session.
    #[must_use]
    pub fn chunk_size(&self) -> ChunkSize {
        self.chunk_size
    }

    /// The regions, in the order of their chunks.
    #[must_use]
    pub fn regions(&self) -> &[RegionDescriptor] {
        &self.regions
    }

    /// How many chunks there are in all.
    #[must_use]
    pub fn chunks(&self) -> u64 {
        self.first.last().copied().unwrap_or(0)
    }

    /// How many bytes there are in all.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.len).sum()
    }

    /// The chunks of region `region`.
    ///
    /// # Panics
    /// If there is no such region.
    #[must_use]
    pub fn chunks_of(&self, region: usize) -> ChunkRun {
        ChunkRun::new(
            self.first[region],
            self.first[region + 1] - self.first[region],
        )
    }

    /// The chunk that holds byte `offset` of region `region`.
    ///
    /// # Panics
    /// If there is no such region.
    #[must_use]
    pub fn chunk_at(&self, region: usize, offset: u64) -> ChunkIndex {
        ChunkIndex(self.first[region] + offset / u64::from(self.chunk_size.bytes()))
    }

    /// The chunks that bytes `offset .. offset + len` of region `region` touch.
    ///
    /// # Panics
    /// If there is no such region.
    #[must_use]
    pub fn chunks_touched(&self, region: usize, offset: u64, len: u64) -> ChunkRun {
        let size = u64::from(self.chunk_size.bytes());
        let start = offset / size;
        let end = self.chunk_size.chunks_in(offset + len);
        ChunkRun::new(self.first[region] + start, end.saturating_sub(start))
    }

    /// How many bytes `run` covers; chunks outside of the space count nothing.
    #[must_use]
    pub fn bytes_in(&self, run: ChunkRun) -> u64 {
        self.spans(run).map(|span| span.len).sum()
    }

    /// Cuts `run` at region borders and says where the pieces lie, in order.
    ///
    /// Chunks outside of the space are left out.
    pub fn spans(&self, run: ChunkRun) -> impl Iterator<Item = Span> + '_ {
        let end = run.end().min(self.chunks());
        let mut next = run.start.0;
        let mut region = self
            .first
            .partition_point(|&first| first <= next)
            .saturating_sub(1);
        core::iter::from_fn(move || {
            while next < end && self.first[region + 1] <= next {
                region += 1;
            }
            if next >= end {
                return None;
            }
            let size = u64::from(self.chunk_size.bytes());
            let stop = end.min(self.first[region + 1]);
            let offset = (next - self.first[region]) * size;
            let len = ((stop - next) * size).min(self.regions[region].len - offset);
            let span = Span {
                region,
                offset,
                len,
                run: ChunkRun::new(next, stop - next),
            };
            next = stop;
            Some(span)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    fn layout(lens: &[u64]) -> Layout {
        let regions = lens
            .iter()
            .map(|&len| RegionDescriptor {
                name: String::new(),
                len,
            })
            .collect();
        Layout::new(ChunkSize::PAGE, regions).unwrap()
    }

    #[test]
    fn a_region_starts_at_a_chunk_of_its_own_and_its_last_chunk_may_be_short() {
        let layout = layout(&[5000, 100, 0, 4096]);
        assert_eq!(layout.chunks(), 4);
        let spans: Vec<_> = layout.spans(ChunkRun::new(0, 4)).collect();
        assert_eq!(
            spans
                .iter()
                .map(|s| (s.region, s.offset, s.len))
                .collect::<Vec<_>>(),
            vec![(0, 0, 5000), (1, 0, 100), (3, 0, 4096)]
        );
    }

    #[test]
    fn a_run_beyond_the_last_chunk_is_cut() {
        let layout = layout(&[4096]);
        assert_eq!(layout.bytes_in(ChunkRun::new(0, 10)), 4096);
        assert_eq!(layout.bytes_in(ChunkRun::new(7, 10)), 0);
    }

    #[test]
    fn bytes_touch_whole_chunks() {
        let layout = layout(&[4096, 16384]);
        assert_eq!(layout.chunks_touched(1, 4095, 2), ChunkRun::new(1, 2));
        assert_eq!(layout.chunk_at(1, 8192), ChunkIndex(3));
    }
}
