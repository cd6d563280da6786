//! What a leecher says where more than version 1 was agreed: what it keeps, and when it wants to cut over.

use super::{Leecher, Phase};
use crate::chunk::ChunkRun;
use crate::hello::Verify;
use crate::message::Message;

/// The user's wish to cut over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CutOver {
    Unwanted,
    Wanted,
    Said,
}

impl Leecher {
    /// Whether copies are compared, so that digests are kept.
    #[must_use]
    pub fn is_verified(&self) -> bool {
        self.verify() != Verify::Off
    }

    /// Digests of `run` are about to be sent as [`Message::Offer`], after all messages that wait: those chunks may be kept from now
    /// on. Ascending. `false` if nothing is to be offered any more.
    pub fn handle_offering(&mut self, run: ChunkRun) -> bool {
        match (self.phase, &mut self.offered) {
            (Phase::Prefetching, Some(offered)) => {
                offered.insert_run(run);
                true
            }
            _ => false,
        }
    }

    /// Everything that is worth it was offered.
    pub fn handle_offered(&mut self) {
        if self.phase == Phase::Prefetching && self.offered.is_some() {
            self.messages.push_back(Message::OfferEnd);
        }
    }

    /// The digests of chunks that were kept, as [`digests`](Self::digests) gives them. To be called after [`handle_installed`](Self::handle_installed) of
    /// their frame, if copies are compared; what is not told counts as unknown.
    pub fn handle_kept(&mut self, run: ChunkRun, digests: &[u64]) {
        self.residency.note(run, digests);
    }

    /// The user wants to cut over. Has no effect with a seeder that cannot be asked, and none when it has decided already.
    pub fn cut_over(&mut self) {
        if self.cut_over == CutOver::Unwanted {
            self.cut_over = CutOver::Wanted;
        }
        self.say_cut_over();
    }

    /// Says it once, when it may be said.
    pub(super) fn say_cut_over(&mut self) {
        let agreed = self
            .agreement
            .as_ref()
            .is_some_and(|agreed| agreed.cut_over);
        if self.phase == Phase::Prefetching && agreed && self.cut_over == CutOver::Wanted {
            self.cut_over = CutOver::Said;
            self.messages.push_back(Message::CutOver);
        }
    }
}
