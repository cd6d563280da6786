//! The bandwidth limit.

use crate::converge::Micros;

/// Spreads bytes evenly over time: each frame moves the moment of the next one.
#[derive(Debug)]
pub(super) struct Pace {
    limit: Option<u64>,
    next: Micros,
}

/// How much of the limit may be used at once after a pause.
const BURST: Micros = Micros::from_millis(10);

impl Pace {
    pub(super) fn new(now: Micros, limit: Option<u64>) -> Self {
        Self { limit, next: now }
    }

    /// What of a rate that was measured can be true: a frame that is sent at once, and paid for after the measurement, makes it look higher.
    pub(super) fn at_most(&self, rate: u64) -> u64 {
        self.limit.map_or(rate, |limit| rate.min(limit))
    }

    /// `Err` with the moment before which nothing may be sent.
    pub(super) fn ready(&self, now: Micros) -> Result<(), Micros> {
        if self.limit.is_some() && now < self.next {
            Err(self.next)
        } else {
            Ok(())
        }
    }

    /// `bytes` are about to be sent.
    pub(super) fn spend(&mut self, now: Micros, bytes: u64) {
        let Some(limit) = self.limit else {
            return;
        };
        let span = u128::from(bytes) * 1_000_000 / u128::from(limit.max(1));
        let span = Micros(u64::try_from(span).unwrap_or(u64::MAX));
        let earliest = Micros(now.0.saturating_sub(BURST.0));
        self.next = self.next.max(earliest).plus(span);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_kept_over_a_second_whatever_the_frames() {
        let mut pace = Pace::new(Micros(0), Some(1_000_000));
        let mut now = Micros(0);
        let mut sent = 0;
        while now < Micros(1_000_000) {
            match pace.ready(now) {
                Ok(()) => {
                    pace.spend(now, 30_000);
                    sent += 30_000;
                }
                Err(next) => now = next,
            }
        }
        assert!((1_000_000..=1_060_000).contains(&sent), "{sent}");
    }

    #[test]
    fn no_rate_is_believed_that_the_limit_does_not_allow() {
        let pace = Pace::new(Micros(0), Some(1_000_000));
        assert_eq!(pace.at_most(4_500_000), 1_000_000);
        assert_eq!(pace.at_most(900_000), 900_000);
        assert_eq!(Pace::new(Micros(0), None).at_most(u64::MAX), u64::MAX);
    }
}
