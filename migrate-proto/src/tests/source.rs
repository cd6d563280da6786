//! The memory, the tracker and the guest at the source.

use alloc::vec::Vec;

use super::chance::Chance;
use crate::bitmap::ChunkBitmap;

/// A number a chunk; 0 is a chunk of zeros.
#[derive(Debug, Clone)]
pub(super) struct Source {
    pub(super) contents: Vec<u64>,
    pub(super) dirty: ChunkBitmap,
    pub(super) running: bool,
    /// Chunks that the guest writes most of the time, as guests do.
    hot: u64,
    version: u64,
}

impl Source {
    pub(super) fn new(chance: &mut Chance, chunks: u64) -> Self {
        let empty = chance.pick(&[2, 3, 100]);
        Self {
            contents: (0..chunks)
                .map(|chunk| if chance.one_in(empty) { 0 } else { chunk + 1 })
                .collect(),
            dirty: ChunkBitmap::empty(chunks),
            running: true,
            hot: chance.between(1, chunks),
            version: 1000,
        }
    }

    pub(super) fn chunks(&self) -> u64 {
        self.contents.len() as u64
    }

    /// Chunks that may hold anything but zeros: all that do, and some that do not.
    pub(super) fn present(&self, chance: &mut Chance) -> ChunkBitmap {
        let mut present = ChunkBitmap::empty(self.chunks());
        for (chunk, &content) in (0..).zip(&self.contents) {
            if content != 0 || chance.one_in(8) {
                present.insert(chunk);
            }
        }
        present
    }

    /// The guest or its devices write somewhere: the write, then the mark.
    pub(super) fn write_somewhere(&mut self, chance: &mut Chance) {
        let end = if chance.one_in(4) {
            self.chunks()
        } else {
            self.hot
        };
        let chunk = chance.below(end);
        self.version += 1;
        self.contents[usize::try_from(chunk).unwrap()] =
            if chance.one_in(6) { 0 } else { self.version };
        self.dirty.insert(chunk);
    }

    pub(super) fn take(&mut self) -> ChunkBitmap {
        let taken = self.dirty.clone();
        self.dirty.clear();
        taken
    }

    pub(super) fn content(&self, chunk: u64) -> u64 {
        self.contents[usize::try_from(chunk).unwrap()]
    }
}
