//! Dirty sets on the wire: pages of 32 768 chunks, each in the shortest of three forms; empty pages are left out.

use alloc::vec::Vec;

use crate::bitmap::ChunkBitmap;
use crate::chunk::ChunkRun;
use crate::coding::{Reader, Writer};
use crate::error::DecodeError;

/// How many words a page has: 512 words are 32 768 chunks, 128 MiB in 4 KiB chunks.
const WORDS: usize = 512;
/// How many chunks a page has. A chunk's place in it fits a `u16`.
const CHUNKS: u64 = WORDS as u64 * 64;

/// One page of a dirty set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirtyPage {
    index: u32,
    form: Form,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Form {
    /// Every chunk of the page, as far as the space reaches.
    Full,
    /// The words of the page, zeros at its end left out.
    Words(Vec<u64>),
    /// First chunk and number of chunks less one, ascending, with a gap between them.
    Runs(Vec<(u16, u16)>),
}

const TAG_FULL: u8 = 0;
const TAG_WORDS: u8 = 1;
const TAG_RUNS: u8 = 2;

impl DirtyPage {
    /// The pages of `set` that are not empty.
    ///
    /// # Panics
    /// If the set's space has more than [`MAX_CHUNKS`](crate::limits::MAX_CHUNKS) chunks: a session never has.
    pub fn pages_of(set: &ChunkBitmap) -> impl Iterator<Item = Self> + '_ {
        set.words()
            .chunks(WORDS)
            .enumerate()
            .filter(|(_, words)| words.iter().any(|&word| word != 0))
            .map(|(index, words)| {
                let space = set.chunks() - index as u64 * CHUNKS;
                Self {
                    index: u32::try_from(index).expect("a session's chunks are limited"),
                    form: Form::of(words, space.min(CHUNKS)),
                }
            })
    }

    /// Adds this page to `set`.
    ///
    /// # Errors
    /// If it reaches beyond the set's space; the set may have got a part of the page then.
    pub fn add_to(&self, set: &mut ChunkBitmap) -> Result<(), DecodeError> {
        let beyond = DecodeError::InvalidValue {
            field: "dirty page",
        };
        let base = u64::from(self.index) * CHUNKS;
        let space = set
            .chunks()
            .checked_sub(base)
            .filter(|&space| space > 0)
            .ok_or_else(|| beyond.clone())?
            .min(CHUNKS);
        match &self.form {
            Form::Full => set.insert_run(ChunkRun::new(base, space)),
            Form::Words(words) => {
                let first = self.index as usize * WORDS;
                for (n, &bits) in words.iter().enumerate() {
                    let at = n as u64 * 64;
                    let inside = space.saturating_sub(at);
                    if inside < 64 && bits >> inside != 0 {
                        return Err(beyond);
                    }
                    if bits != 0 {
                        let word = set.words()[first + n];
                        set.set_word(first + n, word | bits);
                    }
                }
            }
            Form::Runs(runs) => {
                for &(start, more) in runs {
                    let run = ChunkRun::new(base + u64::from(start), u64::from(more) + 1);
                    if run.end() > base + space {
                        return Err(beyond);
                    }
                    set.insert_run(run);
                }
            }
        }
        Ok(())
    }

    /// How many bytes [`encode`](Self::encode) appends.
    pub(crate) fn encoded_len(&self) -> usize {
        5 + match &self.form {
            Form::Full => 0,
            Form::Words(words) => 2 + words.len() * 8,
            Form::Runs(runs) => 2 + runs.len() * 4,
        }
    }

    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        out.put_u32(self.index);
        match &self.form {
            Form::Full => out.put_u8(TAG_FULL),
            Form::Words(words) => {
                out.put_u8(TAG_WORDS);
                out.put_u16(u16::try_from(words.len()).expect("at most 512"));
                for &word in words {
                    out.put_u64(word);
                }
            }
            Form::Runs(runs) => {
                out.put_u8(TAG_RUNS);
                out.put_u16(u16::try_from(runs.len()).expect("fewer than words would take"));
                for &(start, more) in runs {
                    out.put_u16(start);
                    out.put_u16(more);
                }
            }
        }
    }

    pub(crate) fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let index = reader.u32()?;
        let form = match reader.u8()? {
            TAG_FULL => Form::Full,
            TAG_WORDS => {
                let count = reader.count(8)?;
                if count > WORDS {
                    return Err(DecodeError::InvalidValue {
                        field: "dirty page",
                    });
                }
                Form::Words((0..count).map(|_| reader.u64()).collect::<Result<_, _>>()?)
            }
            TAG_RUNS => {
                let count = reader.count(4)?;
                let mut runs = Vec::with_capacity(count);
                let mut next = 0;
                for _ in 0..count {
                    let (start, more) = (reader.u16()?, reader.u16()?);
                    let end = u32::from(start) + u32::from(more) + 1;
                    if u32::from(start) < next || u64::from(end) > CHUNKS {
                        return Err(DecodeError::InvalidValue {
                            field: "dirty page",
                        });
                    }
                    next = end;
                    runs.push((start, more));
                }
                Form::Runs(runs)
            }
            _ => {
                return Err(DecodeError::InvalidValue {
                    field: "dirty page",
                });
            }
        };
        Ok(Self { index, form })
    }
}

impl Form {
    fn of(words: &[u64], space: u64) -> Self {
        let used = words
            .iter()
            .rposition(|&word| word != 0)
            .map_or(0, |last| last + 1);
        let mut page = ChunkBitmap::empty(CHUNKS);
        for (index, &word) in words[..used].iter().enumerate() {
            page.set_word(index, word);
        }
        // A run takes four bytes, a word eight: more than twice as many runs as words never pay.
        let mut runs = Vec::new();
        for run in page.runs() {
            if run.count == space && run.start.0 == 0 {
                return Self::Full;
            }
            if runs.len() >= used * 2 {
                return Self::Words(words[..used].to_vec());
            }
            runs.push((
                u16::try_from(run.start.0).expect("within the page"),
                u16::try_from(run.count - 1).expect("within the page"),
            ));
        }
        Self::Runs(runs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn round_trip(set: &ChunkBitmap) -> ChunkBitmap {
        let mut back = ChunkBitmap::empty(set.chunks());
        for page in DirtyPage::pages_of(set) {
            let mut bytes = Vec::new();
            page.encode(&mut bytes);
            assert_eq!(bytes.len(), page.encoded_len());
            let mut reader = Reader::new(&bytes);
            DirtyPage::decode(&mut reader)
                .unwrap()
                .add_to(&mut back)
                .unwrap();
            reader.finish().unwrap();
        }
        back
    }

    proptest! {
        #[test]
        fn a_dirty_set_arrives_as_it_was_sent(
            chunks in 1..100_000_u64,
            runs in prop::collection::vec((0..100_000_u64, 1..9_000_u64), 0..20),
            single in prop::collection::vec(0..100_000_u64, 0..2_000),
        ) {
            let mut set = ChunkBitmap::empty(chunks);
            for (start, count) in runs {
                set.insert_run(ChunkRun::new(start, count));
            }
            for chunk in single {
                set.insert(chunk);
            }
            prop_assert_eq!(round_trip(&set), set);
        }
    }

    #[test]
    fn a_full_set_takes_five_bytes_a_page() {
        let set = ChunkBitmap::full(CHUNKS + 70);
        let lens: Vec<_> = DirtyPage::pages_of(&set)
            .map(|page| page.encoded_len())
            .collect();
        assert_eq!(lens, [5, 5]);
        assert_eq!(round_trip(&set), set);
    }

    #[test]
    fn a_page_beyond_the_space_is_refused() {
        let full = ChunkBitmap::full(CHUNKS);
        let page = DirtyPage::pages_of(&full).next().unwrap();
        assert!(page.add_to(&mut ChunkBitmap::empty(0)).is_err());
        let mut far = ChunkBitmap::empty(CHUNKS);
        far.insert(CHUNKS - 1);
        let page = DirtyPage::pages_of(&far).next().unwrap();
        assert!(page.add_to(&mut ChunkBitmap::empty(CHUNKS - 1)).is_err());
        let words = DirtyPage {
            index: 0,
            form: Form::Words(alloc::vec![0, 2]),
        };
        assert!(words.add_to(&mut ChunkBitmap::empty(65)).is_err());
        assert!(words.add_to(&mut ChunkBitmap::empty(66)).is_ok());
    }
}
