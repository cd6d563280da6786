//! A set of chunks that many threads change at once.

use super::sync::atomic::{AtomicU64, Ordering};
use super::{ChunkBitmap, ChunkRun};

/// A [`ChunkBitmap`] that is changed without a lock, one bit a chunk.
///
/// Putting a chunk in and taking it out order the memory around them: who took a chunk out, or saw it in, sees
/// everything that was done before it was put in.
pub(crate) struct AtomicBitmap {
    words: Box<[AtomicU64]>,
    chunks: u64,
}

impl AtomicBitmap {
    /// The empty set, out of `chunks` chunks.
    ///
    /// # Panics
    /// If a bit a chunk does not fit the address space.
    pub(crate) fn empty(chunks: u64) -> Self {
        let words = usize::try_from(chunks.div_ceil(64)).expect("a bit a chunk fits the memory");
        Self {
            words: (0..words).map(|_| AtomicU64::new(0)).collect(),
            chunks,
        }
    }

    /// Whether `chunk` is in the set; one beyond the space never is.
    pub(crate) fn contains(&self, chunk: u64) -> bool {
        let bit = 1 << (chunk % 64);
        chunk < self.chunks && self.words[word_of(chunk)].load(Ordering::Acquire) & bit != 0
    }

    /// Puts every chunk of `run` into the set, word by word.
    ///
    /// It always stores, even a bit that is set: who takes it out at the same time must come before or after, and a
    /// look first would say neither.
    pub(crate) fn insert_run(&self, run: ChunkRun) {
        self.for_words(run, |word, mask| {
            word.fetch_or(mask, Ordering::AcqRel);
        });
    }

    /// Takes every chunk of `run` out of the set, word by word.
    pub(crate) fn remove_run(&self, run: ChunkRun) {
        self.for_words(run, |word, mask| {
            word.fetch_and(!mask, Ordering::AcqRel);
        });
    }

    /// Adds what is in `other`, as far as this space goes.
    pub(crate) fn union_with(&self, other: &ChunkBitmap) {
        for run in other.runs_within(ChunkRun::new(0, self.chunks)) {
            self.insert_run(run);
        }
    }

    /// Empties the set, word by word, and returns what was in it. What is put in meanwhile is in the answer or stays.
    pub(crate) fn take(&self) -> ChunkBitmap {
        self.collect(|word| {
            // A word that is empty has nothing to be ordered after.
            if word.load(Ordering::Relaxed) == 0 {
                0
            } else {
                word.swap(0, Ordering::AcqRel)
            }
        })
    }

    /// What is in the set now.
    pub(crate) fn snapshot(&self) -> ChunkBitmap {
        self.collect(|word| word.load(Ordering::Acquire))
    }

    /// The runs of the set that lie in `run`, in order. Looks at no chunk beyond it, and takes no room for those.
    pub(crate) fn runs_within(&self, run: ChunkRun) -> Vec<ChunkRun> {
        let end = run.start.0.saturating_add(run.count).min(self.chunks);
        let mut runs: Vec<ChunkRun> = Vec::new();
        let mut next = run.start.0;
        while next < end {
            let stop = end.min((next / 64 + 1) * 64);
            let mut bits = self.words[word_of(next)].load(Ordering::Acquire) >> (next % 64);
            while bits != 0 && next < stop {
                let skipped = bits.trailing_zeros();
                bits >>= skipped;
                next += u64::from(skipped);
                let count = u64::from(bits.trailing_ones()).min(stop.saturating_sub(next));
                match runs.last_mut() {
                    _ if count == 0 => {}
                    Some(last) if last.end() == next => last.count += count,
                    _ => runs.push(ChunkRun::new(next, count)),
                }
                next += count;
                bits = bits.checked_shr(bits.trailing_ones()).unwrap_or(0);
            }
            next = stop;
        }
        runs
    }

    fn collect(&self, look: impl Fn(&AtomicU64) -> u64) -> ChunkBitmap {
        let mut set = ChunkBitmap::empty(self.chunks);
        for (index, word) in self.words.iter().enumerate() {
            let bits = look(word);
            if bits != 0 {
                set.set_word(index, bits);
            }
        }
        set
    }

    fn for_words(&self, run: ChunkRun, change: impl Fn(&AtomicU64, u64)) {
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
            change(&self.words[word_of(next)], mask);
            next = stop;
        }
    }
}

impl std::fmt::Debug for AtomicBitmap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AtomicBitmap({} chunks)", self.chunks)
    }
}

fn word_of(chunk: u64) -> usize {
    usize::try_from(chunk / 64).expect("a chunk of the space has a word")
}

#[cfg(not(loom))]
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_put_in_and_taken_out_across_words_and_the_end() {
        let set = AtomicBitmap::empty(200);
        set.insert_run(ChunkRun::new(60, 70));
        set.insert_run(ChunkRun::new(199, u64::MAX));
        let mut expected = ChunkBitmap::empty(200);
        expected.insert_run(ChunkRun::new(60, 70));
        expected.insert_run(ChunkRun::new(199, 1));
        assert_eq!(set.snapshot(), expected);
        assert_eq!(set.take(), expected);
        assert!(set.take().is_empty());
        set.insert_run(ChunkRun::new(0, 200));
        set.remove_run(ChunkRun::new(0, 60));
        set.remove_run(ChunkRun::new(130, 69));
        assert!(set.contains(60) && !set.contains(59) && !set.contains(200));
        assert_eq!(set.take(), expected);
        set.union_with(&expected);
        assert_eq!(set.take(), expected);
    }

    #[test]
    fn the_runs_of_a_part_are_those_of_the_whole_cut_to_it() {
        let mut random = crate::chunk::random::Random::new(7);
        let set = AtomicBitmap::empty(300);
        for _ in 0..12 {
            set.insert_run(ChunkRun::new(random.below(300), random.below(40)));
        }
        let whole = set.snapshot();
        for _ in 0..500 {
            let run = ChunkRun::new(random.below(310), random.below(310));
            let expected: Vec<ChunkRun> = whole.runs_within(run).collect();
            assert_eq!(set.runs_within(run), expected, "{run:?}");
        }
        set.insert_run(ChunkRun::new(0, 300));
        assert_eq!(
            set.runs_within(ChunkRun::new(1, u64::MAX)),
            [ChunkRun::new(1, 299)]
        );
    }
}
