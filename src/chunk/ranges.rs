//! A set of bytes, as ranges.

use std::collections::BTreeMap;
use std::ops::Range;

/// The most ranges of a set. One that would have more takes in what lies between them, in blocks that grow as they have to.
const MOST: usize = 4096;

/// The smallest block of a set that has grown too fine.
const BLOCK: u64 = 64 << 10;

/// A set of bytes that has bounded size: with too many ranges it takes in more than was added, and never less.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ranges {
    /// Ends by starts; neither empty, nor overlapping, nor touching.
    ends: BTreeMap<u64, u64>,
}

impl Ranges {
    pub(crate) fn add(&mut self, range: Range<u64>) {
        self.join(range);
        let mut block = BLOCK;
        while self.ends.len() > MOST {
            for (start, end) in std::mem::take(&mut self.ends) {
                let start = start - start % block;
                let end = end.checked_next_multiple_of(block).unwrap_or(end);
                self.join(start..end);
            }
            block = block.saturating_mul(4);
        }
    }

    fn join(&mut self, range: Range<u64>) {
        let Range { mut start, mut end } = range;
        if start >= end {
            return;
        }
        // All that overlap or touch begin at or before the end.
        while let Some((&other, &other_end)) = self.ends.range(..=end).next_back() {
            if other_end < start {
                break;
            }
            self.ends.remove(&other);
            start = start.min(other);
            end = end.max(other_end);
        }
        self.ends.insert(start, end);
    }

    pub(crate) fn remove(&mut self, range: Range<u64>) {
        if range.start >= range.end {
            return;
        }
        while let Some((&other, &other_end)) = self.ends.range(..range.end).next_back() {
            if other_end <= range.start {
                break;
            }
            self.ends.remove(&other);
            if other < range.start {
                self.ends.insert(other, range.start);
            }
            if range.end < other_end {
                self.ends.insert(range.end, other_end);
            }
        }
    }

    pub(crate) fn extend(&mut self, other: Self) {
        for (start, end) in other.ends {
            self.add(start..end);
        }
    }

    /// The ranges in order, cut to `len`.
    pub(crate) fn to_vec(&self, len: u64) -> Vec<Range<u64>> {
        self.ends
            .iter()
            .map(|(&start, &end)| start..end.min(len))
            .filter(|range| !range.is_empty())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        /// Against a set of single bytes, too simple to be wrong.
        #[test]
        fn ranges_hold_what_single_bytes_would(steps in proptest::collection::vec((any::<bool>(), 0_u64..64, 0_u64..16), 0..60)) {
            let mut ranges = Ranges::default();
            let mut bytes = BTreeSet::new();
            for (add, start, len) in steps {
                if add {
                    ranges.add(start..start + len);
                    bytes.extend(start..start + len);
                } else {
                    ranges.remove(start..start + len);
                    bytes.retain(|byte| !(start..start + len).contains(byte));
                }
                let found = ranges.to_vec(u64::MAX);
                prop_assert!(found.windows(2).all(|pair| pair[0].end < pair[1].start));
                let found: BTreeSet<u64> = found.into_iter().flatten().collect();
                prop_assert_eq!(&found, &bytes);
            }
        }
    }

    #[test]
    fn a_set_that_has_grown_too_fine_takes_in_more_and_never_less() {
        let mut ranges = Ranges::default();
        for at in 0..100_000_u64 {
            ranges.add(at * (1 << 20)..at * (1 << 20) + 512);
        }
        let found = ranges.to_vec(u64::MAX);
        assert!(found.len() <= MOST, "{}", found.len());
        let mut next = 0;
        for at in 0..100_000_u64 {
            while found[next].end <= at << 20 {
                next += 1;
            }
            assert!(found[next].start <= at << 20 && (at << 20) + 512 <= found[next].end);
        }
        assert_eq!(ranges.to_vec(100).last(), Some(&(0..100)));
    }
}
