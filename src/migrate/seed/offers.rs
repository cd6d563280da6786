//! What the destination says it has of an earlier time, until the first pass has compared it.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use migrate_proto::ChunkRun;

/// The first bytes of a keyed hash of a chunk.
type Digest = [u8; 16];

/// Digests that were offered and not yet compared.
#[derive(Debug, Default)]
pub(super) struct Offers(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    key: Option<[u8; 32]>,
    /// By their first chunks.
    blocks: BTreeMap<u64, Block>,
}

#[derive(Debug)]
struct Block {
    digests: Vec<Digest>,
    /// How many of them were not looked at. Each chunk of the first pass is sent once.
    left: usize,
}

impl Offers {
    /// The digests are made with this key.
    pub(super) fn begin(&self, key: [u8; 32]) {
        self.lock().key = Some(key);
    }

    /// Keeps the digests of the chunks from `first` on; how many there are. The machine is told of them afterwards, and
    /// lets nobody send those chunks before.
    pub(super) fn put(&self, first: u64, bytes: &[u8]) -> Result<u64, &'static str> {
        let (digests, rest) = bytes.as_chunks::<16>();
        if !rest.is_empty() {
            return Err("half a digest is offered");
        }
        let block = Block {
            digests: digests.to_vec(),
            left: digests.len(),
        };
        if !digests.is_empty() {
            self.lock().blocks.insert(first, block);
        }
        Ok(digests.len() as u64)
    }

    /// What was offered for the chunks of `run`, which are sent now, put into `into` in their place from the beginning; the key.
    pub(super) fn take(&self, run: ChunkRun, into: &mut Vec<Option<Digest>>) -> Option<[u8; 32]> {
        into.clear();
        into.extend(run.range().map(|_| None));
        let mut state = self.lock();
        let key = state.key?;
        let mut spent = Vec::new();
        // The last block that begins before the run reaches into it, if any does.
        let before = state.blocks.range(..run.start.0).next_back();
        let from = before.map_or(run.start.0, |(&first, _)| first);
        for (&first, block) in state.blocks.range_mut(from..run.end()) {
            let offered = (first..).zip(&block.digests);
            let wanted = offered.filter(|(chunk, _)| run.range().contains(chunk));
            let mut looked_at = 0;
            for (chunk, digest) in wanted {
                let place = usize::try_from(chunk - run.start.0).unwrap_or(usize::MAX);
                if let Some(place) = into.get_mut(place) {
                    *place = Some(*digest);
                }
                looked_at += 1;
            }
            block.left = block.left.saturating_sub(looked_at);
            if block.left == 0 {
                spent.push(first);
            }
        }
        for first in spent {
            state.blocks.remove(&first);
        }
        Some(key)
    }

    /// The first pass is over: nothing is kept any more.
    pub(super) fn forget(&self) {
        let mut state = self.lock();
        state.key = None;
        state.blocks.clear();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        // Nothing in here panics half-way.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The digest of a chunk that is offered.
pub(in crate::migrate) fn digest(key: &[u8; 32], chunk: &[u8]) -> Digest {
    let hash = blake3::keyed_hash(key, chunk);
    *hash.as_bytes().first_chunk().expect("a hash has 32 bytes")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_found_at_their_chunks_and_forgotten_once_they_were_looked_at() {
        let offers = Offers::default();
        let mut found = Vec::new();
        assert_eq!(offers.take(ChunkRun::new(0, 3), &mut found), None);
        offers.begin([1; 32]);
        assert_eq!(offers.put(2, &[7; 48]), Ok(3));
        assert_eq!(offers.put(8, &[9; 16]), Ok(1));
        assert!(offers.put(9, &[9; 17]).is_err());
        let key = offers.take(ChunkRun::new(3, 6), &mut found);
        assert_eq!(key, Some([1; 32]));
        let (seven, nine) = (Some([7; 16]), Some([9; 16]));
        assert_eq!(found, [seven, seven, None, None, None, nine]);
        assert_eq!(offers.lock().blocks.len(), 1);
        offers.take(ChunkRun::new(2, 1), &mut found);
        assert_eq!(found, [seven]);
        assert!(offers.lock().blocks.is_empty());
    }
}
