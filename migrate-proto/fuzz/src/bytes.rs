//! Decisions read off the front of the input; nothing is left when it ends.

use migrate_proto::{ChunkBitmap, ChunkRun, Message};

use super::CHUNKS;

#[derive(Debug)]
pub(crate) struct Bytes<'a>(pub(crate) &'a [u8]);

impl Bytes<'_> {
    pub(crate) fn op(&mut self) -> Option<u8> {
        let (&first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(first)
    }

    pub(crate) fn byte(&mut self) -> u8 {
        self.op().unwrap_or(0)
    }

    pub(crate) fn number(&mut self) -> u64 {
        u64::from(self.byte())
    }

    pub(crate) fn set(&mut self) -> ChunkBitmap {
        let mut set = ChunkBitmap::empty(CHUNKS);
        for _ in 0..self.byte() % 4 {
            set.insert_run(ChunkRun::new(self.number(), self.number()));
        }
        set
    }

    /// Any message that decodes.
    pub(crate) fn message(&mut self) -> Option<Message> {
        let tag = self.byte();
        let len = usize::from(self.byte()).min(self.0.len());
        let (body, rest) = self.0.split_at(len);
        self.0 = rest;
        Message::decode(tag, body).ok()
    }
}
