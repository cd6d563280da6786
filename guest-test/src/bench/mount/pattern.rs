//! Bytes that say where they belong.

use std::fmt;

/// Data of which every byte follows from its position and a seed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Pattern {
    seed: u64,
}

/// Bytes that are not what they have to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mismatch {
    /// Where the first of them are.
    pub(super) offset: u64,
    expected: u64,
    found: u64,
}

/// The length of a word, which what is filled and checked is made of.
const WORD: usize = 8;

impl Pattern {
    pub(super) fn new(seed: u64) -> Self {
        Self { seed }
    }

    /// Fills whole words; `offset` is one of a word.
    pub(super) fn fill(self, buf: &mut [u8], offset: u64) {
        let first = offset / WORD as u64;
        for (index, word) in (first..).zip(buf.as_chunks_mut::<WORD>().0) {
            *word = self.word(index).to_le_bytes();
        }
    }

    /// Whether these are the bytes from `offset` on.
    pub(super) fn check(self, buf: &[u8], offset: u64) -> Result<(), Mismatch> {
        let first = offset / WORD as u64;
        for (index, word) in (first..).zip(buf.as_chunks::<WORD>().0) {
            let (expected, found) = (self.word(index), u64::from_le_bytes(*word));
            if expected != found {
                return Err(Mismatch {
                    offset: index * WORD as u64,
                    expected,
                    found,
                });
            }
        }
        Ok(())
    }

    fn word(self, index: u64) -> u64 {
        // Odd, so that no two positions have the same word.
        let product = (index ^ self.seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        product ^ (product >> 32)
    }
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            offset,
            expected,
            found,
        } = self;
        write!(
            f,
            "wrong bytes at {offset}: {found:#x} where {expected:#x} belongs"
        )
    }
}

impl std::error::Error for Mismatch {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_another_place_or_seed_are_found() {
        let pattern = Pattern::new(7);
        let mut page = [0; 4096];
        pattern.fill(&mut page, 8192);
        assert_eq!(pattern.check(&page, 8192), Ok(()));
        assert_eq!(pattern.check(&page[1024..], 9216), Ok(()));
        assert!(pattern.check(&page, 4096).is_err());
        assert!(Pattern::new(8).check(&page, 8192).is_err());
        page[100] ^= 1;
        let wrong = pattern.check(&page, 8192).unwrap_err();
        assert_eq!(wrong.offset, 8192 + 96);
    }
}
