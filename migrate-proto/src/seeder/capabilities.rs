//! What a seeder hears where more than version 1 was agreed: what the leecher keeps, and when somebody wants to cut over.

use core::mem;

use super::{Phase, Seeder};
use crate::converge::Micros;
use crate::error::ProtocolError;

impl Seeder {
    /// Digests of `count` chunks from `first` on came as the payload of [`Message::Offer`](crate::Message::Offer).
    ///
    /// # Errors
    /// As for [`handle_message`](Self::handle_message).
    pub fn handle_offer(
        &mut self,
        now: Micros,
        first: u64,
        count: u64,
    ) -> Result<(), ProtocolError> {
        self.silence.heard(now);
        let result = match self.phase {
            Phase::Closed => return Ok(()),
            Phase::Starting | Phase::Sending => self.session_mut().offer(first, count),
            _ => Err(ProtocolError::Unexpected {
                message: "Offer",
                phase: self.phase(),
            }),
        };
        match &result {
            Ok(()) => self.advance(now),
            Err(error) => self.fail(error.clone()),
        }
        result
    }

    /// The user wants to cut over: rounds end as the budget says, counted from now.
    pub fn cut_over(&mut self, now: Micros) {
        if mem::replace(&mut self.asked, true) {
            return;
        }
        if let Some(session) = &mut self.session {
            session.first_round = session.round;
            session.stalled = 0;
        }
        self.advance(now);
    }

    /// Whether this side waits to be asked for the cut-over.
    #[must_use]
    pub fn is_held(&self) -> bool {
        let hold = self.config.hold || self.agreement().is_some_and(|agreement| agreement.hold);
        hold && !self.asked
    }
}
