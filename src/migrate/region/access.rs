//! What programs do with a region.

use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::{Region, UNIT};
use crate::chunk::{ChunkIndex, ChunkRun, ChunkState, Storage, check_range};

const SIZE: u64 = UNIT.bytes() as u64;

/// How many chunks are asked for at once by an operation that needs many: a frame's worth.
const AHEAD: u64 = 128;

/// The units that `range` touches.
pub(super) fn touched(range: &Range<u64>) -> ChunkRun {
    let start = range.start / SIZE;
    ChunkRun::new(start, UNIT.chunks_in(range.end).saturating_sub(start))
}

impl Region {
    /// The units that lie in `range` whole; the last one of the region may be short.
    fn covered(&self, range: &Range<u64>) -> ChunkRun {
        let start = range.start.div_ceil(SIZE);
        let end = if range.end == self.local.len() {
            UNIT.chunks_in(range.end)
        } else {
            range.end / SIZE
        };
        ChunkRun::new(start, end.saturating_sub(start))
    }

    fn is_complete(&self) -> bool {
        self.complete.load(Ordering::Acquire)
    }

    /// Waits until all of `run` is here.
    fn await_units(&self, run: ChunkRun, deadline: Instant) -> io::Result<()> {
        let mut next = run.start.0;
        let mut asked = next;
        while next < run.end() {
            if next >= asked {
                asked = run.end().min(next + AHEAD);
                let part = ChunkRun::new(next, asked - next);
                // What is here costs one look.
                if self.residency.is_resident(part) {
                    next = asked;
                    continue;
                }
                // The first is reported by who waits for it.
                self.residency
                    .request(ChunkRun::new(next + 1, part.count - 1));
            }
            self.residency.wait(ChunkIndex(next), deadline)?;
            next += 1;
        }
        Ok(())
    }

    /// Changes `range` of the local storage by `change`: what it covers whole need not come, the rest is waited for.
    fn overwrite(
        &self,
        range: &Range<u64>,
        deadline: Instant,
        change: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        if self.is_complete() || range.is_empty() {
            return change();
        }
        let (touched, covered) = (touched(range), self.covered(range));
        if covered.count == 0 {
            self.await_units(touched, deadline)?;
            return change();
        }
        let before = ChunkRun::new(touched.start.0, covered.start.0 - touched.start.0);
        let behind = ChunkRun::new(covered.end(), touched.end() - covered.end());
        self.await_units(before, deadline)?;
        self.await_units(behind, deadline)?;
        let writing = self.residency.overwrite(covered, deadline)?;
        match change() {
            Ok(()) => {
                writing.done();
                Ok(())
            }
            Err(error) => {
                writing.fail(&error);
                Err(error)
            }
        }
    }
}

impl Storage for Region {
    fn len(&self) -> u64 {
        self.local.len()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        check_range(self.len(), offset, buf.len() as u64)?;
        let deadline = Instant::now() + self.patience;
        let _inside = self.door.enter(deadline)?;
        if !self.is_complete() {
            self.await_units(touched(&(offset..offset + buf.len() as u64)), deadline)?;
        }
        self.local.read_exact_at(buf, offset)
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        check_range(self.len(), offset, buf.len() as u64)?;
        let deadline = Instant::now() + self.patience;
        let _inside = self.door.enter(deadline)?;
        let range = offset..offset + buf.len() as u64;
        self.overwrite(&range, deadline, || self.tracked.write_all_at(buf, offset))
    }

    fn zero(&self, range: Range<u64>) -> io::Result<()> {
        if range.start > range.end {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        check_range(self.len(), range.start, range.end - range.start)?;
        let deadline = Instant::now() + self.patience;
        let _inside = self.door.enter(deadline)?;
        self.overwrite(&range, deadline, || self.tracked.zero(range.clone()))
    }

    fn flush(&self) -> io::Result<()> {
        let _inside = self.door.enter(Instant::now() + self.patience)?;
        self.tracked.flush()
    }

    /// What is remote may hold anything.
    fn data_ranges(&self, within: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let _inside = self.door.enter(Instant::now() + self.patience)?;
        let local = self.local.data_ranges(within.clone())?;
        let end = within.end.min(self.len());
        if self.is_complete() || within.start >= end {
            return Ok(local);
        }
        let run = touched(&(within.start..end));
        let mut ranges = local;
        for state in [
            ChunkState::Remote,
            ChunkState::Fetching,
            ChunkState::Writing,
        ] {
            let mut next = run.start.0;
            while next < run.end()
                && let Some(found) =
                    self.residency
                        .find(ChunkRun::new(next, run.end() - next), u64::MAX, state)
            {
                next = found.end();
                ranges.push(within.start.max(found.start.0 * SIZE)..end.min(found.end() * SIZE));
            }
        }
        Ok(merged(ranges))
    }

    fn read_ahead_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        // Whatever it is read for, the chunks come as fast as they can; nothing is gained by asking for them.
        self.read_exact_at(buf, offset)
    }

    fn is_at_hand(&self, range: Range<u64>) -> bool {
        let Some(_inside) = self.door.try_enter() else {
            return false;
        };
        let here = self.is_complete()
            || range.end <= self.len() && self.residency.is_resident(touched(&range));
        here && self.local.is_at_hand(range)
    }
}

/// The same bytes in as few ranges, in order.
fn merged(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}
