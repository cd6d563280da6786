//! Memory whose right content is known without keeping a copy of it.
//!
//! Every page holds its own number, its version and a body that follows from both, so a lost, torn, stale or
//! misplaced page is found by looking at that page alone. No page compresses, and no two are the same.

/// What a guest page holds, in words.
const WORDS: usize = 4096 / 8;

/// Pages, and the version that each must have.
pub(crate) struct Memory {
    words: Vec<u64>,
    /// Where the first whole page begins: an allocation is not aligned to pages.
    first: usize,
    versions: Vec<u32>,
    checksum: u64,
}

/// A page that is not what was written.
pub(crate) struct Mismatch {
    pub(crate) word: usize,
    pub(crate) expected: u64,
    pub(crate) found: u64,
}

impl Memory {
    /// Fills `pages` pages with version 1.
    pub(crate) fn fill(pages: usize) -> Self {
        let words = vec![0u64; (pages + 1) * WORDS];
        let first = words.as_ptr().align_offset(4096);
        let mut memory = Self {
            words,
            first,
            versions: vec![0; pages],
            checksum: 0,
        };
        for page in 0..pages {
            memory.rewrite(page);
        }
        memory
    }

    pub(crate) fn pages(&self) -> usize {
        self.versions.len()
    }

    /// The sum over all pages of a number that follows from page and version: of two runs of this guest, those
    /// that wrote the same have the same.
    pub(crate) fn checksum(&self) -> u64 {
        self.checksum
    }

    /// Writes the next version of a page, all of it.
    pub(crate) fn rewrite(&mut self, page: usize) {
        let old = self.versions[page];
        let new = old.wrapping_add(1);
        if old != 0 {
            self.checksum = self.checksum.wrapping_sub(seed(page, old));
        }
        self.checksum = self.checksum.wrapping_add(seed(page, new));
        // The table first: a page that is half written when the table already says so is caught as well.
        self.versions[page] = new;
        let start = self.first + page * WORDS;
        let words = &mut self.words[start..start + WORDS];
        words[0] = page as u64;
        words[1] = u64::from(new);
        let mut state = seed(page, new);
        for word in &mut words[2..] {
            state = next(state);
            *word = state;
        }
    }

    /// Compares a page with what was last written there.
    pub(crate) fn verify(&self, page: usize) -> Result<(), Mismatch> {
        let version = self.versions[page];
        let start = self.first + page * WORDS;
        let words = &self.words[start..start + WORDS];
        let mut state = seed(page, version);
        let mut difference = (words[0] ^ page as u64) | (words[1] ^ u64::from(version));
        for word in &words[2..] {
            state = next(state);
            difference |= word ^ state;
        }
        if difference == 0 {
            return Ok(());
        }
        let mut state = seed(page, version);
        let body = std::iter::repeat_with(move || {
            state = next(state);
            state
        });
        let expected = [page as u64, u64::from(version)].into_iter().chain(body);
        let (word, (&found, expected)) = words
            .iter()
            .zip(expected)
            .enumerate()
            .find(|(_, (found, expected))| **found != *expected)
            .unwrap_or((0, (&0, 0))); // it differed a moment ago and does not now
        Err(Mismatch {
            word,
            expected,
            found,
        })
    }
}

/// Where the body of a page starts; differs in all bits for neighbouring pages and versions.
fn seed(page: usize, version: u32) -> u64 {
    let mut x = (page as u64) << 32 | u64::from(version);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// One multiplication and one addition a word: emulated processors have to keep up too.
pub(crate) fn next(state: u64) -> u64 {
    state
        .wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1_442_695_040_888_963_407)
}
