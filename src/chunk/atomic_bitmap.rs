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

    /// Puts every chunk of `run` into the set, word by word.
    ///
    /// It always stores, even a bit that is set: who takes it out at the same time must come before or after, and a
    /// look first would say neither.
    pub(crate) fn insert_run(&self, run: ChunkRun) {
        self.for_words(run, |word, mask| {
            word.fetch_or(mask, Ordering::AcqRel);
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
        self.collect(0, self.words.len(), |word| {
            // A word that is empty has nothing to be ordered after.
            if word.load(Ordering::Relaxed) == 0 {
                0
            } else {
                word.swap(0, Ordering::AcqRel)
            }
        })
    }

    /// What is in the set of the chunks in `within`; the answer's space is all chunks.
    pub(crate) fn snapshot(&self, within: ChunkRun) -> ChunkBitmap {
        let end = within.start.0.saturating_add(within.count).min(self.chunks);
        if within.start.0 >= end {
            return ChunkBitmap::empty(self.chunks);
        }
        let (first, last) = (word_of(within.start.0), word_of(end - 1));
        self.collect(first, last + 1, |word| word.load(Ordering::Acquire))
    }

    fn collect(&self, first: usize, end: usize, look: impl Fn(&AtomicU64) -> u64) -> ChunkBitmap {
        let mut set = ChunkBitmap::empty(self.chunks);
        for (index, word) in self.words[first..end].iter().enumerate() {
            let bits = look(word);
            if bits != 0 {
                set.set_word(first + index, bits);
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
        assert_eq!(set.snapshot(ChunkRun::new(0, 200)), expected);
        assert_eq!(set.take(), expected);
        assert!(set.take().is_empty());
        set.union_with(&expected);
        assert_eq!(set.take(), expected);
    }

    #[test]
    fn looking_at_a_part_reads_its_words_only() {
        let set = AtomicBitmap::empty(1000);
        set.insert_run(ChunkRun::new(0, 1000));
        let seen = set.snapshot(ChunkRun::new(130, 3));
        assert_eq!(seen.count(), 64);
        assert!(seen.contains(130) && seen.contains(132));
        assert!(set.snapshot(ChunkRun::new(1000, 5)).is_empty());
        assert!(set.snapshot(ChunkRun::new(5, 0)).is_empty());
    }
}
