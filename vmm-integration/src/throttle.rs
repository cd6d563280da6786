//! Slowing a guest down that writes faster than its memory can be sent, for plans without post-copy.

/// The share of its time that a vCPU may not run, in percent: 0 to 99.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Hash)]
pub struct Throttle(u8);

impl Throttle {
    /// It runs as it likes.
    pub const NONE: Self = Self(0);
    /// It runs for a hundredth of the time: a guest that stands still altogether would be suspended.
    pub const MOST: Self = Self(99);

    /// So many percent, at most [`MOST`](Self::MOST).
    #[must_use]
    pub fn percent(percent: u8) -> Self {
        Self(percent).min(Self::MOST)
    }

    /// In percent.
    #[must_use]
    pub fn as_percent(self) -> u8 {
        self.0
    }

    /// How long a vCPU has to rest after it has run for `run`.
    ///
    /// ```
    /// # use std::time::Duration;
    /// use vmm_integration::Throttle;
    ///
    /// let rest = Throttle::percent(75).rest_after(Duration::from_millis(10));
    /// assert_eq!(rest, Duration::from_millis(30));
    /// ```
    #[must_use]
    pub fn rest_after(self, run: std::time::Duration) -> std::time::Duration {
        run * u32::from(self.0) / u32::from(100 - self.0)
    }
}

/// What a round of pre-copy has shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Round {
    /// Bytes a second that the guest has dirtied, slowed down as it was.
    pub dirty_rate: u64,
    /// Bytes a second that the link has moved.
    pub bandwidth: u64,
}

/// Decides, round by round, how far a guest has to be slowed down for its migration to end: a pure function of what was seen.
///
/// A dirty set shrinks from round to round by the ratio of what the guest writes to what the link moves. As long as
/// that is at most a half, nothing is done. Otherwise the guest gets the share of its time with which it would write half
/// of what the link moves, taken from what it writes now; then no more than what it takes to keep to that. It is never made faster again before the migration has ended: a
/// guest that is slowed down looks as though it could do with less.
///
/// A guest that writes more than 50 times what the link moves may not converge even so, and its migration is given up.
///
/// QEMU's auto-converge goes from 20 % on in steps of 10 %, and so takes 9 rounds where one may do.
#[derive(Debug, Clone, Default)]
pub struct AutoConverge {
    throttle: Throttle,
}

impl AutoConverge {
    /// Nothing is slowed down yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The same share for all vCPUs.
    #[must_use]
    pub fn throttle(&self) -> Throttle {
        self.throttle
    }

    /// What is to be from now on.
    pub fn after(&mut self, round: Round) -> Throttle {
        let wanted = round.bandwidth / 2;
        if round.dirty_rate > wanted {
            // The rate is that of a guest that runs for `runs` percent of the time, and follows from it in proportion.
            let runs = u64::from(100 - self.throttle.0);
            let may_run = (u128::from(runs) * u128::from(wanted)) / u128::from(round.dirty_rate);
            let may_run = u8::try_from(may_run).unwrap_or(100).min(100);
            // At least a step, should writing not follow in proportion.
            let step = Throttle::percent(self.throttle.0.saturating_add(1));
            self.throttle = Throttle::percent(100 - may_run).max(step);
        }
        self.throttle
    }

    /// The share of each vCPU that brings all of them together to what one share for all would: those that write the most are slowed down, and
    /// those that write little run as they like. `rates` are bytes a second, by vCPU, as they are written now with `now` in force.
    ///
    /// ```
    /// use vmm_integration::{AutoConverge, Round, Throttle};
    ///
    /// let mut policy = AutoConverge::new();
    /// policy.after(Round { dirty_rate: 110, bandwidth: 100 });
    /// // One writes as much as ten others: it alone is slowed down.
    /// let each = policy.by_vcpu(&[(100, Throttle::NONE), (10, Throttle::NONE)]);
    /// assert_eq!(each[1], Throttle::NONE);
    /// assert!(each[0] > Throttle::percent(50));
    /// ```
    #[must_use]
    pub fn by_vcpu(&self, now: &[(u64, Throttle)]) -> Vec<Throttle> {
        // What each would write if nothing held it back.
        let free: Vec<u128> = now
            .iter()
            .map(|(rate, throttle)| u128::from(*rate) * 100 / u128::from(100 - throttle.0))
            .collect();
        let allowed = free.iter().sum::<u128>() * u128::from(100 - self.throttle.0) / 100;
        let cap = water_level(&free, allowed);
        free.iter()
            .map(|&rate| match rate {
                _ if rate <= cap => Throttle::NONE,
                rate => {
                    let runs = u8::try_from(cap * 100 / rate).unwrap_or(100).min(100);
                    Throttle::percent(100 - runs)
                }
            })
            .collect()
    }
}

/// The level at which all rates, cut off there, add up to `allowed`.
fn water_level(rates: &[u128], allowed: u128) -> u128 {
    let mut sorted = rates.to_vec();
    sorted.sort_unstable();
    let (mut left, mut count) = (allowed, sorted.len() as u128);
    for rate in sorted {
        if rate * count >= left {
            return left / count;
        }
        left -= rate;
        count -= 1;
    }
    u128::MAX
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    use memferry::migrate::{Budget, Decision, Micros, Observation, PostCopy, decide};

    const LINK: u64 = 125_000_000;

    /// Rounds of a guest of `memory` bytes that would write `free` bytes a second, until it is suspended; by the engine's own
    /// judgement, without post-copy. Virtual time.
    fn simulate(memory: u64, free: u64) -> (u32, Throttle) {
        let budget = Budget {
            post_copy: PostCopy::Never,
            ..Budget::default()
        };
        let micros = |bytes: u64, rate: u64| bytes * 1_000_000 / rate;
        let mut policy = AutoConverge::new();
        let (mut sent, mut stalled) = (memory, 0);
        for round in 0..budget.rounds {
            let took = micros(sent, LINK).max(1);
            let rate = free * u64::from(100 - policy.throttle().0) / 100;
            let dirty = (rate * took / 1_000_000).min(memory);
            stalled = if dirty < sent { 0 } else { stalled + 1 };
            let seen = Observation {
                round,
                dirty,
                sent,
                took: Micros(took),
                bandwidth: LINK,
                fixed: Micros::from_millis(5),
                stalled,
                post_copy: false,
            };
            match decide(&budget, &seen) {
                Decision::StopAndCopy => return (round, policy.throttle()),
                Decision::Continue => {}
                other => panic!("{other:?} in round {round}"),
            }
            policy.after(Round {
                dirty_rate: seen.dirty_rate(),
                bandwidth: LINK,
            });
            sent = dirty;
        }
        panic!("it does not end");
    }

    #[test]
    fn a_guest_that_writes_faster_than_the_link_moves_converges_in_few_rounds() {
        for percent_of_link in [60, 100, 300, 2000, 4900] {
            let (rounds, throttle) = simulate(4 << 30, LINK / 100 * percent_of_link);
            assert!(rounds <= 16, "{percent_of_link} %: {rounds} rounds");
            assert!(throttle > Throttle::NONE);
        }
    }

    #[test]
    fn a_guest_that_converges_by_itself_is_not_slowed_down() {
        assert_eq!(simulate(1 << 30, LINK / 100 * 40).1, Throttle::NONE);
    }

    #[test]
    fn it_is_never_made_faster_and_never_stopped() {
        let mut policy = AutoConverge::new();
        let mut before = Throttle::NONE;
        for (dirty_rate, bandwidth) in [
            (100, 100),
            (1, 100),
            (500, 10),
            (u64::MAX, 1),
            (0, 0),
            (9, 0),
        ] {
            let now = policy.after(Round {
                dirty_rate,
                bandwidth,
            });
            assert!(now >= before && now <= Throttle::MOST);
            before = now;
        }
        assert_eq!(before, Throttle::MOST);
    }

    proptest! {
        #[test]
        fn together_vcpus_write_what_is_allowed_and_no_more(
            rates in prop::collection::vec(0_u64..1 << 40, 1..16),
            percent in 0_u8..=99,
        ) {
            let policy = AutoConverge { throttle: Throttle::percent(percent) };
            let now: Vec<_> = rates.iter().map(|&rate| (rate, Throttle::NONE)).collect();
            let each = policy.by_vcpu(&now);
            let all: u128 = rates.iter().map(|&rate| u128::from(rate)).sum();
            let written: u128 = rates
                .iter()
                .zip(&each)
                .map(|(&rate, throttle)| u128::from(rate) * u128::from(100 - throttle.0) / 100)
                .sum();
            // A hundredth of each is the least that a share can say.
            let slack = all / 50 + rates.len() as u128 + 1;
            let allowed = all * u128::from(100 - percent) / 100;
            prop_assert!(written <= allowed + slack, "{written} of {allowed}");
            prop_assert!(written + slack >= allowed, "{written} of {allowed}");
        }
    }
}
