//! What a server that has died may have taken with it.
//!
//! A server acknowledges a write before it is durable; a flush makes it so. If the server dies in between, and another is there when the flush
//! comes, that one knows nothing of the write, and its success means nothing for it. So every write that was acknowledged is remembered until a
//! flush has covered it: one that went over a connection which had been there *before* the write was acknowledged, and was still there when
//! the flush was answered, so that the server has been alive from the one to the other. Any such connection will do, since a flush covers what was
//! written over the others (and where it does not, there is only one).

use std::fmt;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::chunk::Ranges;

/// The most generations of writes that are kept apart.
const GENERATIONS: usize = 32;

/// A flush that cannot speak for everything: the inner error of what [`flush`](crate::chunk::Storage::flush) returns.
///
/// These bytes had been written, and the server had said so; then the connection was lost before they were known to be durable, or the
/// server could not make them so. They may be there, or be what they were before. Each loss is told once: the next flush speaks for what
/// was written after it. Whoever still has the bytes writes them again and flushes; whoever has not, tells its user that the flush has
/// failed, as an operating system does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DoubtfulWrites {
    /// Which bytes, in order; perhaps some more.
    pub ranges: Vec<Range<u64>>,
}

impl fmt::Display for DoubtfulWrites {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes: u64 = self
            .ranges
            .iter()
            .map(|range| range.end - range.start)
            .sum();
        let first = self.ranges.first().map_or(0, |range| range.start);
        write!(
            f,
            "up to {bytes} bytes in {} ranges, the first at {first}, were written and may be lost: the server or the connection to it was lost \
             before they were durable",
            self.ranges.len()
        )
    }
}

impl std::error::Error for DoubtfulWrites {}

/// Writes that were acknowledged and not flushed, and those that may be lost.
#[derive(Debug)]
pub(super) struct Doubt {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// How many connections there have been.
    connections: u64,
    /// How many flushes have begun.
    flushes: u64,
    /// How often writes became doubtful.
    losses: u64,
    /// In the order of the flushes, not always in that of the connections.
    unflushed: Vec<Generation>,
    doubtful: Ranges,
}

/// Writes that were told of between two flushes, and acknowledged after the same number of connections.
#[derive(Debug)]
struct Generation {
    /// How many connections there had been before the first was acknowledged, at least.
    connections: u64,
    /// How many flushes had begun when the last was told of, at least.
    flushes: u64,
    written: Ranges,
}

/// A flush that has begun.
#[derive(Debug, Clone, Copy)]
pub(super) struct FlushBegun {
    flushes: u64,
    losses: u64,
}

impl Doubt {
    pub(super) fn new() -> Self {
        Self {
            state: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing under the lock panics half-way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection is there. Returns its number.
    pub(super) fn connected(&self) -> u64 {
        let mut state = self.lock();
        state.connections += 1;
        state.connections
    }

    /// How many connections there have been: to be asked before what may be acknowledged.
    pub(super) fn connections(&self) -> u64 {
        self.lock().connections
    }

    /// A write was acknowledged, all parts of it after there had been so many `connections`. More may have come since; that they are there
    /// says nothing of this write.
    pub(super) fn wrote(&self, range: Range<u64>, connections: u64) {
        let mut state = self.lock();
        state.doubtful.remove(range.clone());
        let flushes = state.flushes;
        let connections = connections.min(state.connections);
        let same = |one: &&mut Generation| (one.connections, one.flushes) == (connections, flushes);
        match state.unflushed.iter_mut().rev().find(same) {
            Some(generation) => generation.written.add(range),
            None => {
                let mut written = Ranges::default();
                written.add(range);
                state.unflushed.push(Generation {
                    connections,
                    flushes,
                    written,
                });
            }
        }
        if state.unflushed.len() > GENERATIONS {
            // To be older than one is, and flushed later than one was, is to err on the safe side.
            let first = state.unflushed.remove(0);
            let next = &mut state.unflushed[0];
            next.connections = next.connections.min(first.connections);
            next.written.extend(first.written);
        }
    }

    /// Begins a flush; `None` if there is nothing to be flushed.
    pub(super) fn begin_flush(&self) -> Option<FlushBegun> {
        let mut state = self.lock();
        if state.unflushed.is_empty() {
            return None;
        }
        let begun = FlushBegun {
            flushes: state.flushes,
            losses: state.losses,
        };
        state.flushes += 1;
        Some(begun)
    }

    /// A flush was answered with success over the connection of this number.
    ///
    /// # Errors
    /// If it says nothing about some writes, or has become doubtful what another flush at the same time was to cover.
    pub(super) fn flushed(
        &self,
        begun: FlushBegun,
        connection: u64,
        len: u64,
    ) -> Result<(), DoubtfulWrites> {
        self.end_flush(begun, len, |written| written.connections < connection)
    }

    /// A flush was answered with failure: what it was to make durable is not there, however often one asks again.
    pub(super) fn failed(&self, begun: FlushBegun, len: u64) -> DoubtfulWrites {
        match self.end_flush(begun, len, |_| true) {
            Err(doubtful) => doubtful,
            // All of it was flushed by others meanwhile, or written anew.
            Ok(()) => DoubtfulWrites { ranges: Vec::new() },
        }
    }

    fn end_flush(
        &self,
        begun: FlushBegun,
        len: u64,
        is_doubtful: impl Fn(&Generation) -> bool,
    ) -> Result<(), DoubtfulWrites> {
        let mut state = self.lock();
        let mut lost = false;
        for generation in std::mem::take(&mut state.unflushed) {
            if generation.flushes > begun.flushes {
                state.unflushed.push(generation);
            } else if is_doubtful(&generation) {
                state.doubtful.extend(generation.written);
                lost = true;
            }
        }
        if lost {
            state.losses += 1;
        }
        if state.losses > begun.losses {
            let ranges = state.doubtful.to_vec(len);
            return Err(DoubtfulWrites { ranges });
        }
        Ok(())
    }

    /// What may be lost and was not written again. Taken, it is forgotten.
    pub(super) fn take(&self, len: u64) -> Vec<Range<u64>> {
        std::mem::take(&mut self.lock().doubtful).to_vec(len)
    }
}

#[cfg(test)]
mod tests {
    #![expect(
        clippy::single_range_in_vec_init,
        reason = "one range is what is expected"
    )]

    use super::*;

    const LEN: u64 = 1000;

    fn doubtful(ranges: impl IntoIterator<Item = Range<u64>>) -> Result<(), DoubtfulWrites> {
        let ranges = ranges.into_iter().collect();
        Err(DoubtfulWrites { ranges })
    }

    /// A write that was acknowledged after all connections so far.
    fn wrote(doubt: &Doubt, range: Range<u64>) {
        doubt.wrote(range, doubt.connections());
    }

    #[test]
    fn a_flush_over_a_connection_that_was_there_before_covers_a_write() {
        let doubt = Doubt::new();
        let first = doubt.connected();
        wrote(&doubt, 0..10);
        let second = doubt.connected();
        wrote(&doubt, 20..30);
        let begun = doubt.begin_flush().unwrap();
        assert_eq!(doubt.flushed(begun, first, LEN), Ok(()));
        assert!(doubt.begin_flush().is_none());
        assert!(second > first);
    }

    #[test]
    fn what_was_written_before_the_connection_of_the_flush_is_doubtful_once() {
        let doubt = Doubt::new();
        doubt.connected();
        wrote(&doubt, 0..10);
        wrote(&doubt, 50..60);
        let second = doubt.connected();
        wrote(&doubt, 8..20);
        let begun = doubt.begin_flush().unwrap();
        assert_eq!(doubt.flushed(begun, second, LEN), doubtful([0..10, 50..60]));
        wrote(&doubt, 100..110);
        let begun = doubt.begin_flush().unwrap();
        assert_eq!(doubt.flushed(begun, second, LEN), Ok(()));
        // Who writes anew what is doubtful need not take it.
        wrote(&doubt, 0..10);
        assert_eq!(doubt.take(LEN), [50..60]);
        assert_eq!(doubt.take(LEN), []);
    }

    #[test]
    fn what_is_written_during_a_flush_is_left_to_the_next() {
        let doubt = Doubt::new();
        let first = doubt.connected();
        wrote(&doubt, 0..10);
        let begun = doubt.begin_flush().unwrap();
        wrote(&doubt, 20..30);
        assert_eq!(doubt.flushed(begun, first, LEN), Ok(()));
        let second = doubt.connected();
        let begun = doubt.begin_flush().unwrap();
        assert_eq!(doubt.flushed(begun, second, LEN), doubtful([20..30]));
    }

    #[test]
    fn two_flushes_at_the_same_time_both_tell_of_a_loss() {
        // The second found nothing left to be covered, and returned success for bytes that were lost.
        let doubt = Doubt::new();
        doubt.connected();
        wrote(&doubt, 0..10);
        let (one, two) = (doubt.begin_flush().unwrap(), doubt.begin_flush().unwrap());
        let second = doubt.connected();
        assert_eq!(doubt.flushed(one, second, LEN), doubtful([0..10]));
        assert_eq!(doubt.flushed(two, second, LEN), doubtful([0..10]));
    }

    #[test]
    fn a_flush_that_the_server_failed_is_not_made_good_by_the_next() {
        let doubt = Doubt::new();
        let first = doubt.connected();
        wrote(&doubt, 0..10);
        let begun = doubt.begin_flush().unwrap();
        assert_eq!(Err(doubt.failed(begun, LEN)), doubtful([0..10]));
        assert!(doubt.begin_flush().is_none());
        wrote(&doubt, 20..30);
        let begun = doubt.begin_flush().unwrap();
        assert_eq!(doubt.flushed(begun, first, LEN), Ok(()));
        assert_eq!(doubt.take(LEN), [0..10]);
    }

    #[test]
    fn a_write_is_as_old_as_its_first_part_however_late_it_is_told_of() {
        let doubt = Doubt::new();
        let first = doubt.connected();
        let second = doubt.connected();
        wrote(&doubt, 0..10);
        doubt.wrote(20..30, first);
        wrote(&doubt, 40..50);
        let begun = doubt.begin_flush().unwrap();
        assert_eq!(doubt.flushed(begun, second, LEN), doubtful([20..30]));
    }

    #[test]
    fn generations_that_come_out_of_order_are_joined_on_the_safe_side() {
        let doubt = Doubt::new();
        for _ in 0..200 {
            doubt.connected();
        }
        for at in 0..200 {
            doubt.wrote(at * 2..at * 2 + 1, 200 - at);
        }
        let begun = doubt.begin_flush().unwrap();
        let Err(told) = doubt.flushed(begun, 199, LEN) else {
            panic!("bytes of 198 connections were taken for durable")
        };
        assert!(told.ranges.len() >= 198);
    }

    #[test]
    fn generations_without_end_are_joined_on_the_safe_side() {
        let doubt = Doubt::new();
        for at in 0..200 {
            doubt.connected();
            wrote(&doubt, at * 2..at * 2 + 1);
        }
        let begun = doubt.begin_flush().unwrap();
        let Err(told) = doubt.flushed(begun, 199, LEN) else {
            panic!("bytes of 198 connections were taken for durable")
        };
        assert_eq!(told.ranges.len(), 198);
    }
}
