//! Which chunks a range touches and covers, and which bytes those are.

use std::ops::Range;

use super::super::residency::{ChunkState, Residency};
use super::super::{ChunkRun, ChunkSize};

/// How one region is cut into chunks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cut {
    pub(super) size: ChunkSize,
    /// Of the region, in bytes; if it is no multiple of the size, the last chunk is short.
    pub(super) len: u64,
}

impl Cut {
    pub(super) fn new(size: ChunkSize, len: u64) -> Self {
        Self { size, len }
    }

    pub(super) fn chunks(self) -> u64 {
        self.size.chunks_in(self.len)
    }

    fn bytes(self) -> u64 {
        u64::from(self.size.bytes())
    }

    pub(super) fn bytes_of(self, run: ChunkRun) -> Range<u64> {
        let at = |chunk: u64| chunk.saturating_mul(self.bytes()).min(self.len);
        at(run.start.0)..at(run.end())
    }

    /// The chunks that have a byte in `range`, which lies in the region.
    pub(super) fn touched(self, range: &Range<u64>) -> ChunkRun {
        let start = range.start / self.bytes();
        if range.is_empty() {
            return ChunkRun::new(start.min(self.chunks()), 0);
        }
        ChunkRun::new(start, range.end.div_ceil(self.bytes()) - start)
    }

    /// The chunks that lie wholly in `range`.
    pub(super) fn covered(self, range: &Range<u64>) -> ChunkRun {
        let start = range.start.div_ceil(self.bytes());
        let end = if range.end == self.len {
            self.chunks()
        } else {
            range.end / self.bytes()
        };
        ChunkRun::new(start.min(self.chunks()), end.saturating_sub(start))
    }

    /// What `run` has more than `whole`, which lies in it: a chunk, two that follow each other, or two apart.
    pub(super) fn edges(self, run: ChunkRun, whole: ChunkRun) -> impl Iterator<Item = ChunkRun> {
        let edges = if whole.count == 0 {
            [run, ChunkRun::new(0, 0)]
        } else {
            [
                ChunkRun::new(run.start.0, whole.start.0 - run.start.0),
                ChunkRun::new(whole.end(), run.end() - whole.end()),
            ]
        };
        edges.into_iter().filter(|edge| edge.count > 0)
    }

    /// The states of `run` as they are now, each as long as it goes.
    pub(super) fn states(
        self,
        residency: &Residency,
        run: ChunkRun,
    ) -> Vec<(ChunkState, ChunkRun)> {
        let mut states = Vec::new();
        let mut left = run;
        while left.count > 0 {
            let state = residency.state(left.start);
            let here = residency
                .find(left, u64::MAX, state)
                .filter(|here| here.start == left.start)
                // It has just changed.
                .unwrap_or_else(|| ChunkRun::new(left.start.0, 1));
            states.push((state, here));
            left = ChunkRun::new(here.end(), left.end() - here.end());
        }
        states
    }

    /// The bytes between two runs.
    pub(super) fn gap(self, first: ChunkRun, second: ChunkRun) -> u64 {
        (second.start.0 - first.end()).saturating_mul(self.bytes())
    }
}

/// The part of `bytes`, which begin at `offset`, that is `range`.
pub(super) fn piece<'a>(bytes: &'a [u8], offset: u64, range: &Range<u64>) -> &'a [u8] {
    &bytes[places(offset, range)]
}

/// As [`piece`].
pub(super) fn piece_mut<'a>(bytes: &'a mut [u8], offset: u64, range: &Range<u64>) -> &'a mut [u8] {
    &mut bytes[places(offset, range)]
}

fn places(offset: u64, range: &Range<u64>) -> Range<usize> {
    let at = |byte: u64| usize::try_from(byte - offset).expect("a place in a buffer");
    at(range.start)..at(range.end)
}

/// Appends those parts of `ranges`, which are in order, that lie in `within`; joined to what is there if they follow it.
pub(super) fn clip_into(into: &mut Vec<Range<u64>>, ranges: &[Range<u64>], within: &Range<u64>) {
    let first = ranges.partition_point(|range| range.end <= within.start);
    for range in ranges[first..]
        .iter()
        .take_while(|range| range.start < within.end)
    {
        let (start, end) = (range.start.max(within.start), range.end.min(within.end));
        match into.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => into.push(start..end),
        }
    }
}
