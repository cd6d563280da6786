//! How long nothing was heard of the peer.

use crate::converge::Micros;
use crate::error::ProtocolError;

/// Asks the peer for a sign of life in time, and gives up on it in time.
#[derive(Debug)]
pub(crate) struct Silence {
    limit: Micros,
    heard: Micros,
    asked: Micros,
}

impl Silence {
    pub(crate) fn new(now: Micros, limit: Micros) -> Self {
        Self {
            limit,
            heard: now,
            asked: now,
        }
    }

    pub(crate) fn heard(&mut self, now: Micros) {
        self.heard = self.heard.max(now);
    }

    /// A quarter of the limit, so that one lost answer is no verdict.
    fn interval(&self) -> Micros {
        Micros((self.limit.0 / 4).max(1))
    }

    /// Whether to ask now.
    pub(crate) fn check(&mut self, now: Micros) -> Result<bool, ProtocolError> {
        if now.since(self.heard) >= self.limit {
            return Err(ProtocolError::Silent {
                seconds: self.limit.0 / 1_000_000,
            });
        }
        let due = now >= self.asked.plus(self.interval());
        if due {
            self.asked = now;
        }
        Ok(due)
    }

    /// When to check again.
    pub(crate) fn next(&self) -> Micros {
        self.asked
            .plus(self.interval())
            .min(self.heard.plus(self.limit))
    }
}
