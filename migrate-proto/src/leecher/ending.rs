//! How a session of a leecher ends, and what that means for the subject.

use core::mem;

use super::{Event, Leecher, Phase};
use crate::error::ProtocolError;
use crate::message::Message;

impl Leecher {
    pub(super) fn close(&mut self, event: Event) {
        self.phase = Phase::Closed;
        self.events.push_back(event);
    }

    pub(super) fn fail(&mut self, error: ProtocolError) {
        let phase = mem::replace(&mut self.phase, Phase::Closed);
        if phase == Phase::Closed {
            return;
        }
        // A Ready that was not given away must not be sent now: the seeder would release to nobody.
        let waiting = self.messages.len();
        self.messages
            .retain(|message| !matches!(message, Message::Ready));
        let ready_was_sent = self.messages.len() == waiting;
        if !matches!(error, ProtocolError::PeerAborted { .. }) {
            self.messages.push_back(Message::Abort {
                code: error.code(),
                reason: alloc::format!("{error}"),
            });
        }
        let event = match phase {
            // The seeder has not released if it says itself that it ended the session, nor if it does not know yet
            // that this side is ready.
            Phase::Ready
                if ready_was_sent && !matches!(error, ProtocolError::PeerAborted { .. }) =>
            {
                Event::Undecided { error }
            }
            Phase::Owning { .. } => Event::Lost {
                missing: self.residency.missing(),
                error,
            },
            _ => Event::Aborted { error },
        };
        self.events.push_back(event);
    }
}
