//! Bits of pages, as chunks of a region.

use memferry::chunk::{ChunkBitmap, ChunkRun, ChunkSize};

/// A part of a region for which somebody keeps one bit a page.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pages {
    /// The bytes of the region.
    pub(crate) region_len: u64,
    /// What the region is cut into.
    pub(crate) chunk_size: ChunkSize,
    /// The byte of the region at which the first page begins.
    pub(crate) offset: u64,
    /// Bytes a page.
    pub(crate) page: u64,
    /// How many pages there are.
    pub(crate) count: u64,
}

impl Pages {
    /// The empty set of the chunks of the region.
    pub(crate) fn no_chunks(&self) -> ChunkBitmap {
        ChunkBitmap::empty(self.chunk_size.chunks_in(self.region_len))
    }

    /// The chunks that hold any of `count` pages from `first` on. Pages that do not exist are in none.
    pub(crate) fn chunks(&self, first: u64, count: u64) -> ChunkRun {
        let byte = |page: u64| {
            let offset = page.min(self.count).saturating_mul(self.page);
            self.offset.saturating_add(offset).min(self.region_len)
        };
        let (start, end) = (byte(first), byte(first.saturating_add(count)));
        if start >= end {
            return ChunkRun::new(0, 0);
        }
        let start = start / u64::from(self.chunk_size.bytes());
        ChunkRun::new(start, self.chunk_size.chunks_in(end) - start)
    }

    /// Puts the chunks of the pages whose bits are set into `chunks`: 64 pages a word, the lowest page in the lowest bit.
    /// Bits of pages that do not exist are nothing.
    pub(crate) fn insert(&self, words: impl IntoIterator<Item = u64>, chunks: &mut ChunkBitmap) {
        let first_chunk = self.offset / self.page;
        let same = u64::from(self.chunk_size.bytes()) == self.page
            && self.offset.is_multiple_of(self.page)
            && first_chunk.is_multiple_of(64);
        let first_word = usize::try_from(first_chunk / 64).unwrap_or(usize::MAX);
        for (index, mut word) in words.into_iter().enumerate() {
            let first = index as u64 * 64;
            if first >= self.count {
                return;
            }
            if self.count - first < 64 {
                word &= (1 << (self.count - first)) - 1;
            }
            if word == 0 {
                continue;
            }
            if same {
                let index = first_word.saturating_add(index);
                if let Some(&there) = chunks.words().get(index) {
                    chunks.set_word(index, there | word);
                }
                continue;
            }
            let mut page = first;
            while word != 0 {
                let skipped = word.trailing_zeros();
                word >>= skipped;
                page += u64::from(skipped);
                let count = word.trailing_ones();
                chunks.insert_run(self.chunks(page, u64::from(count)));
                word = word.checked_shr(count).unwrap_or(0);
                page += u64::from(count);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const PAGE: u64 = 4096;

    fn pages(region: u64, chunk: u32, offset: u64, count: u64) -> Pages {
        Pages {
            region_len: region * PAGE,
            chunk_size: ChunkSize::new(chunk).unwrap(),
            offset: offset * PAGE,
            page: PAGE,
            count,
        }
    }

    fn named(pages: &Pages, words: &[u64]) -> BTreeSet<u64> {
        let mut chunks = pages.no_chunks();
        pages.insert(words.iter().copied(), &mut chunks);
        chunks.runs().flat_map(|run| run.range()).collect()
    }

    #[test]
    fn pages_that_do_not_exist_are_in_no_chunk() {
        let pages = pages(100, 4096, 0, 70);
        assert_eq!(
            named(&pages, &[1 << 63, u64::MAX, u64::MAX]),
            (63..70).collect()
        );
        assert_eq!(pages.chunks(69, u64::MAX), ChunkRun::new(69, 1));
        assert_eq!(pages.chunks(70, 1).count, 0);
        assert_eq!(pages.chunks(u64::MAX, u64::MAX).count, 0);
    }

    #[test]
    fn what_is_in_the_set_already_stays_there() {
        let pages = pages(64, 4096, 0, 64);
        let mut chunks = pages.no_chunks();
        chunks.insert(5);
        pages.insert([1 << 7], &mut chunks);
        assert!(chunks.contains(5) && chunks.contains(7));
    }

    #[test]
    fn pages_larger_than_a_chunk_stand_for_all_of_its_chunks() {
        let pages = Pages {
            page: 16384,
            ..pages(10, 4096, 0, 3)
        };
        assert_eq!(named(&pages, &[0b101]), [0, 1, 2, 3, 8, 9].into());
    }

    proptest! {
        #[test]
        fn a_chunk_is_named_if_a_page_of_it_is_and_else_not(
            words in prop::collection::vec(
                prop_oneof![Just(0), Just(u64::MAX), any::<u64>(), (0..64).prop_map(|bit| 1_u64 << bit)],
                0..8,
            ),
            pages_a_chunk in prop_oneof![Just(1_u32), Just(2), Just(16)],
            offset in prop_oneof![Just(0_u64), Just(64), Just(128), 0..200_u64],
            count in 0..500_u64,
            beyond in 0..100_u64,
        ) {
            let pages = pages(offset + count + beyond, pages_a_chunk * 4096, offset, count);
            let expected: BTreeSet<u64> = (0..count.min(words.len() as u64 * 64))
                .filter(|page| words[usize::try_from(page / 64).unwrap()] >> (page % 64) & 1 == 1)
                .map(|page| (offset + page) / u64::from(pages_a_chunk))
                .collect();
            prop_assert_eq!(named(&pages, &words), expected);
        }
    }
}
