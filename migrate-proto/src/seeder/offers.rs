//! What the leecher has of an earlier time: how far it has told, and what waits for that.

use alloc::vec::Vec;

use crate::bitmap::ChunkBitmap;
use crate::chunk::ChunkRun;
use crate::error::ProtocolError;

/// The offers of a leecher while they come. Chunks up to the last one that was offered may be sent; the others wait, since
/// they may turn out to be there already.
#[derive(Debug)]
pub(super) struct Offers {
    /// Chunks of the first pass that wait, once it has begun.
    waiting: Option<ChunkBitmap>,
    chunks: u64,
    /// Everything below was offered or will not be.
    told: u64,
    opened: bool,
    ended: bool,
}

impl Offers {
    pub(super) fn new(chunks: u64) -> Self {
        Self {
            waiting: None,
            chunks,
            told: 0,
            opened: false,
            ended: false,
        }
    }

    pub(super) fn open(&mut self) -> Result<(), ProtocolError> {
        if core::mem::replace(&mut self.opened, true) {
            return Err(ProtocolError::Violation {
                reason: "it changes the key of what it offers",
            });
        }
        Ok(())
    }

    /// The first pass is to send `present`; those of it that need not wait.
    pub(super) fn begin(&mut self, present: &ChunkBitmap) -> Vec<ChunkRun> {
        self.waiting = Some(present.clone());
        self.let_go(0)
    }

    /// Chunks were offered; those that need not wait any more.
    pub(super) fn advance(
        &mut self,
        first: u64,
        count: u64,
    ) -> Result<Vec<ChunkRun>, ProtocolError> {
        let end = first
            .checked_add(count)
            .filter(|&end| self.opened && count > 0 && first >= self.told && end <= self.chunks);
        let Some(end) = end else {
            return Err(ProtocolError::Violation {
                reason: "it offers chunks that do not exist, or out of order",
            });
        };
        let before = core::mem::replace(&mut self.told, end);
        Ok(self.let_go(before))
    }

    /// No more is offered; all that need not wait any more.
    pub(super) fn end(&mut self) -> Result<Vec<ChunkRun>, ProtocolError> {
        if !self.opened {
            return Err(ProtocolError::Violation {
                reason: "it offers chunks without a key",
            });
        }
        self.ended = true;
        let before = core::mem::replace(&mut self.told, self.chunks);
        Ok(self.let_go(before))
    }

    /// Whether nothing waits and nothing will.
    pub(super) fn is_over(&self) -> bool {
        self.ended && self.waiting.is_some()
    }

    /// Takes what waits from `before` up to what was told.
    fn let_go(&mut self, before: u64) -> Vec<ChunkRun> {
        let Some(waiting) = &mut self.waiting else {
            return Vec::new();
        };
        let told = ChunkRun::new(before, self.told - before);
        let free = waiting.runs_within(told).collect();
        waiting.remove_run(told);
        free
    }
}
