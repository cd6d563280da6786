//! How long faults took, as counts by length: bounded, and written by many threads without a lock.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Steps of each doubling: a length is known to a quarter.
const STEPS: u32 = 4;
/// From a microsecond to an hour: 32 doublings.
const BUCKETS: usize = 32 * STEPS as usize;

/// How many faults took how long.
#[derive(Debug)]
pub(super) struct Latencies {
    counts: Box<[AtomicU64]>,
    longest: AtomicU64,
}

/// How long faults took, from when they were read until their page was there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FaultTimes {
    /// How many faults there were.
    pub count: u64,
    /// Half of them took no longer than this, to a quarter.
    pub median: Duration,
    /// 99 of 100 took no longer than this, to a quarter.
    pub tail: Duration,
    /// The longest.
    pub longest: Duration,
}

impl Default for Latencies {
    fn default() -> Self {
        Self {
            counts: (0..BUCKETS).map(|_| AtomicU64::new(0)).collect(),
            longest: AtomicU64::new(0),
        }
    }
}

impl Latencies {
    /// `count` faults took so long.
    pub(super) fn note(&self, took: Duration, count: u64) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.counts[bucket_of(micros)].fetch_add(count, Ordering::Relaxed);
        self.longest.fetch_max(micros, Ordering::Relaxed);
    }

    pub(super) fn times(&self) -> FaultTimes {
        let counts: Vec<u64> = self
            .counts
            .iter()
            .map(|count| count.load(Ordering::Relaxed))
            .collect();
        let count: u64 = counts.iter().sum();
        let longest = self.longest.load(Ordering::Relaxed);
        let part = |parts: u64| {
            let wanted = count.saturating_mul(parts).div_ceil(100).max(1);
            let mut seen = 0;
            let bucket = counts.iter().position(|count| {
                seen += count;
                seen >= wanted
            });
            Duration::from_micros(bucket.map_or(0, last_of).min(longest))
        };
        FaultTimes {
            count,
            median: part(50),
            tail: part(99),
            longest: Duration::from_micros(longest),
        }
    }
}

/// Four buckets a doubling: by the highest bit and the two after it.
fn bucket_of(micros: u64) -> usize {
    let micros = micros.max(1);
    let doubling = micros.ilog2();
    let step = if doubling >= 2 {
        (micros >> (doubling - 2)) & 3
    } else {
        (micros << (2 - doubling)) & 3
    };
    let bucket = u64::from(doubling * STEPS) + step;
    usize::try_from(bucket).map_or(BUCKETS - 1, |bucket| bucket.min(BUCKETS - 1))
}

/// The longest that `bucket` counts, in microseconds.
fn last_of(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    let (doubling, step) = (bucket / u64::from(STEPS), bucket % u64::from(STEPS));
    ((step + 5) << doubling).div_ceil(4) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_length_is_known_to_a_quarter() {
        for micros in (1..5000).chain([123_456, 10_000_000, 3_000_000_000]) {
            let last = last_of(bucket_of(micros));
            assert!(
                last >= micros && last <= micros + micros / 4 + 1,
                "{micros}: {last}"
            );
        }
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn the_median_the_tail_and_the_longest_are_those_of_what_was_noted() {
        let latencies = Latencies::default();
        assert_eq!(latencies.times(), FaultTimes::default());
        latencies.note(Duration::from_micros(100), 60);
        latencies.note(Duration::from_millis(3), 38);
        latencies.note(Duration::from_secs(1), 2);
        let times = latencies.times();
        assert_eq!(times.count, 100);
        let near = |found: Duration, micros: u64| {
            let found = found.as_micros();
            assert!(
                found >= micros.into() && found <= (micros * 5 / 4 + 1).into(),
                "{found}"
            );
        };
        near(times.median, 100);
        near(times.tail, 1_000_000);
        assert_eq!(times.longest, Duration::from_secs(1));
    }
}
