//! Sets of chunks.

use alloc::vec;
use alloc::vec::Vec;

use crate::chunk::ChunkRun;

/// A set of chunks out of a space whose size is fixed when the set is made: one bit a chunk.
///
/// Runs that reach beyond the space are cut there.
#[derive(Clone, PartialEq, Eq)]
pub struct ChunkBitmap {
    words: Vec<u64>,
    chunks: u64,
}

impl ChunkBitmap {
    /// The empty set, out of `chunks` chunks.
    ///
    /// # Panics
    /// If a bit a chunk does not fit the address space.
    #[must_use]
    pub fn empty(chunks: u64) -> Self {
        let words = usize::try_from(chunks.div_ceil(64)).expect("a bit a chunk fits memory");
        Self {
            words: vec![0; words],
            chunks,
        }
    }

    /// The set of all `chunks` chunks.
    #[must_use]
    pub fn full(chunks: u64) -> Self {
        let mut set = Self::empty(chunks);
        set.insert_run(ChunkRun::new(0, chunks));
        set
    }

    /// How many chunks the space has, in the set or not.
    #[must_use]
    pub fn chunks(&self) -> u64 {
        self.chunks
    }

    /// How many chunks are in the set. Takes time in proportion to the space.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.words
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum()
    }

    /// Whether no chunk is in the set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }

    /// Whether `chunk` is in the set; one beyond the space never is.
    #[must_use]
    pub fn contains(&self, chunk: u64) -> bool {
        chunk < self.chunks && self.words[word_of(chunk)] & bit_of(chunk) != 0
    }

    /// Puts `chunk` into the set; says whether it is new there.
    pub fn insert(&mut self, chunk: u64) -> bool {
        if chunk >= self.chunks {
            return false;
        }
        let word = &mut self.words[word_of(chunk)];
        let new = *word & bit_of(chunk) == 0;
        *word |= bit_of(chunk);
        new
    }

    /// Takes `chunk` out of the set; says whether it was there.
    pub fn remove(&mut self, chunk: u64) -> bool {
        if chunk >= self.chunks {
            return false;
        }
        let word = &mut self.words[word_of(chunk)];
        let was = *word & bit_of(chunk) != 0;
        *word &= !bit_of(chunk);
        was
    }

    /// Puts every chunk of `run` into the set.
    pub fn insert_run(&mut self, run: ChunkRun) {
        self.for_words(run, |word, mask| *word |= mask);
    }

    /// Takes every chunk of `run` out of the set.
    pub fn remove_run(&mut self, run: ChunkRun) {
        self.for_words(run, |word, mask| *word &= !mask);
    }

    /// Adds what is in `other`, of the same space.
    ///
    /// # Panics
    /// If the spaces differ.
    pub fn union_with(&mut self, other: &Self) {
        self.zip(other, |word, theirs| *word |= theirs);
    }

    /// Takes out what is in `other`, of the same space.
    ///
    /// # Panics
    /// If the spaces differ.
    pub fn subtract(&mut self, other: &Self) {
        self.zip(other, |word, theirs| *word &= !theirs);
    }

    /// Keeps only what is in `other` too, of the same space.
    ///
    /// # Panics
    /// If the spaces differ.
    pub fn intersect_with(&mut self, other: &Self) {
        self.zip(other, |word, theirs| *word &= theirs);
    }

    /// Takes every chunk out.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// The first run in the set at or after `from`, at most `longest` chunks long.
    #[must_use]
    pub fn run_from(&self, from: u64, longest: u64) -> Option<ChunkRun> {
        let start = self.seek(from, self.chunks, true)?;
        let limit = start.saturating_add(longest).min(self.chunks);
        let end = self.seek(start, limit, false).unwrap_or(limit);
        Some(ChunkRun::new(start, end - start))
    }

    /// The runs in the set, in order, each as long as it can be.
    pub fn runs(&self) -> impl Iterator<Item = ChunkRun> + '_ {
        let mut next = 0;
        core::iter::from_fn(move || {
            let run = self.run_from(next, u64::MAX)?;
            next = run.end();
            Some(run)
        })
    }

    /// The runs of the set that lie in `run`, in order. Looks at no chunk beyond it.
    pub fn runs_within(&self, run: ChunkRun) -> impl Iterator<Item = ChunkRun> + '_ {
        let end = run.start.0.saturating_add(run.count).min(self.chunks);
        let mut next = run.start.0;
        core::iter::from_fn(move || {
            let start = self.seek(next, end, true)?;
            next = self.seek(start, end, false).unwrap_or(end);
            Some(ChunkRun::new(start, next - start))
        })
    }

    /// The bits, 64 chunks a word, the lowest chunk in the lowest bit; bits beyond the space are zero.
    #[must_use]
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Replaces word `index` of [`words`](Self::words); bits beyond the space are dropped.
    ///
    /// # Panics
    /// If there is no such word.
    pub fn set_word(&mut self, index: usize, bits: u64) {
        let tail = self.chunks % 64;
        let last = index + 1 == self.words.len() && tail != 0;
        let mask = if last { (1 << tail) - 1 } else { u64::MAX };
        self.words[index] = bits & mask;
    }

    /// The first chunk in `from .. limit` that is in the set (`present`), or that is not.
    ///
    /// `limit` is not beyond the space. No word beyond it is read: a frame asks for a few chunks at a time out of
    /// a set that may be one run of millions.
    fn seek(&self, from: u64, limit: u64, present: bool) -> Option<u64> {
        if from >= limit {
            return None;
        }
        let flip = if present { 0 } else { u64::MAX };
        let last = word_of(limit - 1);
        let mut index = word_of(from);
        let mut word = (self.words[index] ^ flip) & (u64::MAX << (from % 64));
        while word == 0 {
            if index == last {
                return None;
            }
            index += 1;
            word = self.words[index] ^ flip;
        }
        let found = index as u64 * 64 + u64::from(word.trailing_zeros());
        (found < limit).then_some(found)
    }

    fn for_words(&mut self, run: ChunkRun, mut change: impl FnMut(&mut u64, u64)) {
        let end = run.start.0.saturating_add(run.count).min(self.chunks);
        let mut next = run.start.0;
        while next < end {
            let stop = end.min((next / 64 + 1) * 64);
            let width = stop - next;
            let mask = if width == 64 {
                u64::MAX
            } else {
                ((1 << width) - 1) << (next % 64)
            };
            change(&mut self.words[word_of(next)], mask);
            next = stop;
        }
    }

    fn zip(&mut self, other: &Self, mut change: impl FnMut(&mut u64, u64)) {
        assert_eq!(
            self.chunks, other.chunks,
            "sets of different spaces do not combine"
        );
        for (word, &theirs) in self.words.iter_mut().zip(&other.words) {
            change(word, theirs);
        }
    }
}

impl core::fmt::Debug for ChunkBitmap {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "ChunkBitmap({} of {}:", self.count(), self.chunks)?;
        for run in self.runs().take(8) {
            write!(f, " {}+{}", run.start.0, run.count)?;
        }
        f.write_str(")")
    }
}

const fn word_of(chunk: u64) -> usize {
    (chunk / 64) as usize
}

const fn bit_of(chunk: u64) -> u64 {
    1 << (chunk % 64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::collections::BTreeSet;
    use proptest::prelude::*;

    #[derive(Debug, Clone)]
    enum Operation {
        InsertRun(u64, u64),
        RemoveRun(u64, u64),
        Insert(u64),
        Remove(u64),
    }

    fn operation() -> impl Strategy<Value = Operation> {
        prop_oneof![
            (0..300_u64, 0..200_u64).prop_map(|(s, c)| Operation::InsertRun(s, c)),
            (0..300_u64, 0..200_u64).prop_map(|(s, c)| Operation::RemoveRun(s, c)),
            (0..300_u64).prop_map(Operation::Insert),
            (0..300_u64).prop_map(Operation::Remove),
        ]
    }

    proptest! {
        #[test]
        fn a_bitmap_behaves_like_a_set_of_numbers(
            chunks in 0..260_u64,
            operations in prop::collection::vec(operation(), 0..40),
        ) {
            let mut bitmap = ChunkBitmap::empty(chunks);
            let mut naive = BTreeSet::new();
            for operation in operations {
                match operation {
                    Operation::InsertRun(s, c) => {
                        bitmap.insert_run(ChunkRun::new(s, c));
                        naive.extend((s..s + c).filter(|&n| n < chunks));
                    }
                    Operation::RemoveRun(s, c) => {
                        bitmap.remove_run(ChunkRun::new(s, c));
                        naive.retain(|n| !(s..s + c).contains(n));
                    }
                    Operation::Insert(n) => {
                        prop_assert_eq!(bitmap.insert(n), n < chunks && naive.insert(n));
                    }
                    Operation::Remove(n) => {
                        prop_assert_eq!(bitmap.remove(n), naive.remove(&n));
                    }
                }
                prop_assert_eq!(bitmap.count(), naive.len() as u64);
            }
            let from_runs: BTreeSet<u64> = bitmap.runs().flat_map(|run| run.range()).collect();
            prop_assert_eq!(&from_runs, &naive);
            let runs: Vec<_> = bitmap.runs().collect();
            prop_assert!(runs.windows(2).all(|pair| pair[0].end() < pair[1].start.0));
        }

        #[test]
        fn a_search_stays_within_its_bounds(
            chunks in 1..260_u64,
            members in prop::collection::btree_set(0..260_u64, 0..200),
            from in 0..300_u64,
            longest in 1..150_u64,
        ) {
            let mut bitmap = ChunkBitmap::empty(chunks);
            for &member in &members {
                bitmap.insert(member);
            }
            let naive = |limit: u64| {
                let start = (from..limit).find(|&n| bitmap.contains(n))?;
                let count = (start..limit).take_while(|&n| bitmap.contains(n)).count();
                Some((start, count as u64))
            };
            prop_assert_eq!(
                bitmap.run_from(from, longest).map(|run| (run.start.0, run.count)),
                naive(chunks).map(|(start, count)| (start, count.min(longest)))
            );
            prop_assert_eq!(
                bitmap.runs_within(ChunkRun::new(from, longest)).next().map(|run| (run.start.0, run.count)),
                naive((from + longest).min(chunks))
            );
        }
    }
}
