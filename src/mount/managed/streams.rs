//! What is likely to be read next.

use std::ops::Range;

/// So many readers in sequence are told apart.
const STREAMS: usize = 8;
/// Requests of one reader may overtake each other by so much: that of a kernel that reads ahead itself.
const SLACK: u64 = 256 << 10;
/// How far ahead of a reader in sequence to be, at first and at most. It doubles with every read.
const NEAREST: u64 = 128 << 10;
const FARTHEST: u64 = 16 << 20;
/// How many reads ahead of a reader at equal distances to be at most, if those are no more bytes than [`FARTHEST`].
const STRIDES: u64 = 64;

/// Recognises who reads in sequence, or at equal distances.
#[derive(Debug, Default)]
pub(super) struct Streams {
    streams: Vec<Stream>,
    strides: Strides,
}

/// Somebody who reads in sequence; the one who read last is the first.
#[derive(Debug, Clone)]
struct Stream {
    end: u64,
    reads: u32,
    /// What was asked for ahead.
    ahead: u64,
}

/// Somebody who reads at equal distances.
#[derive(Debug, Default)]
struct Strides {
    start: u64,
    distance: i128,
    reads: u32,
    /// How many reads further was asked for ahead.
    ahead: u64,
}

impl Streams {
    /// Somebody reads `range` of `len` bytes. Appends what is worth fetching.
    pub(super) fn read(&mut self, range: &Range<u64>, len: u64, fetch: &mut Vec<Range<u64>>) {
        if self.sequence(range, len, fetch) {
            return;
        }
        self.strides.read(range, len, fetch);
        self.streams.truncate(STREAMS - 1);
        self.streams.insert(
            0,
            Stream {
                end: range.end,
                reads: 0,
                ahead: range.end,
            },
        );
    }

    fn sequence(&mut self, range: &Range<u64>, len: u64, fetch: &mut Vec<Range<u64>>) -> bool {
        let slack = SLACK.min(4 * (range.end - range.start));
        let follows = |stream: &Stream| {
            range.end > stream.end.saturating_sub(slack)
                && range.start <= stream.end.saturating_add(slack)
                // One that goes back is another.
                && (range.end > stream.end || stream.reads > 1)
        };
        let Some(index) = self.streams.iter().position(follows) else {
            return false;
        };
        self.streams[..=index].rotate_right(1);
        let stream = &mut self.streams[0];
        stream.end = stream.end.max(range.end);
        stream.reads = stream.reads.saturating_add(1);
        let depth = (NEAREST << stream.reads.min(16)).min(FARTHEST);
        let from = stream.ahead.max(stream.end);
        let to = stream.end.saturating_add(depth).min(len);
        // In pieces worth a request.
        if to > from && (to - from >= depth / 4 || to == len) {
            fetch.push(from..to);
            stream.ahead = to;
        }
        true
    }
}

impl Strides {
    fn read(&mut self, range: &Range<u64>, len: u64, fetch: &mut Vec<Range<u64>>) {
        let distance = i128::from(range.start) - i128::from(self.start);
        self.start = range.start;
        if distance != self.distance || distance == 0 {
            (self.distance, self.reads, self.ahead) = (distance, 1, 0);
            return;
        }
        self.reads = self.reads.saturating_add(1);
        self.ahead = self.ahead.saturating_sub(1);
        let count = range.end - range.start;
        let most = (FARTHEST / count.max(1)).min(STRIDES);
        let depth = (1 << self.reads.min(16)).min(most);
        for step in self.ahead + 1..=depth {
            let start = i128::from(range.start) + distance * i128::from(step);
            match u64::try_from(start) {
                Ok(start) if start < len => fetch.push(start..start.saturating_add(count).min(len)),
                _ => break,
            }
        }
        self.ahead = self.ahead.max(depth);
    }
}

#[cfg(not(loom))]
#[cfg(test)]
mod tests {
    use super::*;

    const LEN: u64 = 1 << 40;

    fn fetched(reads: impl IntoIterator<Item = Range<u64>>, len: u64) -> Vec<Range<u64>> {
        let mut streams = Streams::default();
        let mut fetch = Vec::new();
        for range in reads {
            streams.read(&range, len, &mut fetch);
        }
        fetch
    }

    #[test]
    fn who_reads_in_sequence_finds_what_follows_fetched_once_and_far_ahead() {
        let ahead = fetched((0..1000).map(|n| n * 4096..(n + 1) * 4096), LEN);
        for pair in ahead.windows(2) {
            assert_eq!(pair[0].end, pair[1].start);
        }
        let end = ahead.last().unwrap().end;
        assert!(end > 1000 * 4096 + FARTHEST * 3 / 4 && end <= 1000 * 4096 + FARTHEST);
        assert!(ahead.len() < 40, "{} requests", ahead.len());
    }

    #[test]
    fn several_who_read_in_sequence_are_told_apart() {
        let reads = (0..100).flat_map(|n| {
            [0, 1 << 30, 1 << 35].map(|base| base + n * 65_536..base + (n + 1) * 65_536)
        });
        let ahead = fetched(reads, LEN);
        for base in [0, 1 << 30, 1 << 35] {
            let last = ahead
                .iter()
                .rfind(|range| (base..base + (1 << 29)).contains(&range.start));
            assert!(last.unwrap().end > base + 100 * 65_536 + FARTHEST / 2);
        }
    }

    #[test]
    fn requests_of_one_reader_may_overtake_each_other() {
        let mut order: Vec<u64> = (0..64).collect();
        for pair in order.chunks_mut(2) {
            pair.swap(0, 1);
        }
        let ahead = fetched(order.into_iter().map(|n| n * 65_536..(n + 1) * 65_536), LEN);
        assert!(
            ahead.last().unwrap().end > 64 * 65_536 + FARTHEST / 2,
            "{ahead:?}"
        );
    }

    #[test]
    fn who_reads_at_equal_distances_finds_the_next_ones_fetched_also_backwards() {
        let ahead = fetched((0..100).map(|n| n * 1_000_000..n * 1_000_000 + 4096), LEN);
        assert!(
            ahead
                .iter()
                .all(|range| range.start % 1_000_000 == 0 && range.end == range.start + 4096)
        );
        let last = ahead
            .iter()
            .map(|range| range.start / 1_000_000)
            .max()
            .unwrap();
        assert_eq!(last, 99 + STRIDES);
        let mut places: Vec<u64> = ahead.iter().map(|range| range.start).collect();
        let all = places.len();
        places.sort_unstable();
        places.dedup();
        assert_eq!(places.len(), all, "nothing is fetched twice");
        let ahead = fetched(
            (0..50).rev().map(|n| n * 1_000_000..n * 1_000_000 + 4096),
            LEN,
        );
        assert!(ahead.iter().any(|range| range.start == 0));
    }

    #[test]
    fn who_reads_here_and_there_makes_nothing_be_fetched() {
        let mut place = 1_u64;
        let reads = (0..1000).map(|_| {
            place = place
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let at = place % LEN / 4096 * 4096;
            at..at + 4096
        });
        assert_eq!(fetched(reads.collect::<Vec<_>>(), LEN), []);
    }

    #[test]
    fn nothing_is_fetched_beyond_the_end() {
        let len = 1_000_003;
        let ahead = fetched((0..200).map(|n| n * 5000..(n + 1) * 5000), len);
        assert!(
            ahead
                .iter()
                .all(|range| range.end <= len && range.start < range.end)
        );
        let ahead = fetched((0..10).map(|n| n * 100_000..n * 100_000 + 4096), len);
        assert!(ahead.iter().all(|range| range.end <= len));
    }
}
