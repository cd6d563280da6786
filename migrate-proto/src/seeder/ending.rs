//! How a session of a seeder ends, and what has to go back to its tracker.

use core::mem;

use super::{Event, Phase, Seeder, Suspended};
use crate::bitmap::ChunkBitmap;
use crate::error::{AbortCode, ProtocolError};
use crate::handover::Ownership;
use crate::message::Message;

impl Seeder {
    pub(super) fn finish(&mut self) {
        self.messages.push_back(Message::Farewell);
        self.events.push_back(Event::Done);
        self.phase = Phase::Closed;
    }

    /// A set that was taken after the session failed is not lost either.
    pub(super) fn keep_for_restore(&mut self, dirty: &ChunkBitmap) {
        if self.ownership == Ownership::Here && !dirty.is_empty() {
            self.events.push_back(Event::Aborted {
                error: ProtocolError::Aborted {
                    code: AbortCode::Failed,
                    reason: "the session had ended before its dirty set was taken".into(),
                },
                restore: dirty.clone(),
            });
        }
    }

    pub(super) fn fail(&mut self, error: ProtocolError) {
        let phase = mem::replace(&mut self.phase, Phase::Closed);
        if let Phase::Closed = phase {
            return;
        }
        if let Phase::Releasing = phase {
            // It was not given away, so the leecher has never seen it.
            self.messages
                .retain(|message| !matches!(message, Message::Release { .. }));
        }
        if !matches!(error, ProtocolError::PeerAborted { .. }) {
            self.messages.push_back(Message::Abort {
                code: error.code(),
                reason: alloc::format!("{error}"),
            });
        }
        let event = match phase {
            Phase::Released { running, .. } => Event::Lost {
                missing: self.missing(),
                running,
                error,
            },
            phase => {
                let mut restore = self.session.as_ref().map_or_else(
                    || {
                        let layout = self.config.hello.layout();
                        ChunkBitmap::empty(layout.map_or(0, |layout| layout.chunks()))
                    },
                    |session| session.outstanding.clone(),
                );
                match phase {
                    Phase::Suspending { unsent, .. } => restore.union_with(&unsent),
                    Phase::Suspended(Suspended {
                        saved: Some((_, _, dirty)),
                        ..
                    }) => restore.union_with(&dirty),
                    _ => {}
                }
                Event::Aborted { error, restore }
            }
        };
        self.events.push_back(event);
    }
}
