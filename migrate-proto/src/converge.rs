//! When to suspend: a pure function of what was measured.

/// Microseconds: a span of time, or a moment since some start of the caller's choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Hash)]
pub struct Micros(pub u64);

impl Micros {
    /// So many milliseconds.
    #[must_use]
    pub const fn from_millis(millis: u64) -> Self {
        Self(millis * 1000)
    }

    /// From `earlier` to this moment; zero if it is not earlier.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Self {
        Self(self.0.saturating_sub(earlier.0))
    }

    /// This moment and `span` more.
    #[must_use]
    pub const fn plus(self, span: Self) -> Self {
        Self(self.0.saturating_add(span.0))
    }
}

/// Whether the guest may run at the destination before all of its memory is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PostCopy {
    /// If the last dirty set cannot be sent within the downtime limit.
    #[default]
    Auto,
    /// Never: pre-copy must converge.
    Never,
    /// As soon as the first pass is done.
    Always,
}

/// What the user allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// The longest blackout that is aimed at.
    pub downtime: Micros,
    /// Whether post-copy is allowed.
    pub post_copy: PostCopy,
    /// After so many rounds pre-copy has had its chance.
    pub rounds: u32,
}

impl Default for Budget {
    /// 60 ms, post-copy if it is needed, 30 rounds.
    ///
    /// 60 ms because it is below what people and TCP time-outs notice, and above what suspending, device state
    /// and resuming take by themselves.
    fn default() -> Self {
        Self {
            downtime: Micros::from_millis(60),
            post_copy: PostCopy::Auto,
            rounds: 30,
        }
    }
}

/// What was measured when a dirty set was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Observation {
    /// The round that just ended.
    pub round: u32,
    /// Bytes in the dirty set that was just taken.
    pub dirty: u64,
    /// Bytes that the round which just ended had to send.
    pub sent: u64,
    /// How long that round took.
    pub took: Micros,
    /// Bytes a second that the link moved.
    pub bandwidth: u64,
    /// The part of the blackout that does not depend on memory: suspending, state, resuming.
    pub fixed: Micros,
    /// For how many rounds the dirty set has not become smaller.
    pub stalled: u32,
    /// Whether both sides can work with post-copy.
    pub post_copy: bool,
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Send the dirty set while the guest runs.
    Continue,
    /// Suspend, send the dirty set, then hand over.
    StopAndCopy,
    /// Suspend, send the offsets only, hand over; the rest follows on demand.
    PostCopy,
    /// It will never end and post-copy is not allowed.
    GiveUp,
}

/// After so many rounds without progress a plan without post-copy is hopeless.
const HOPELESS: u32 = 8;

impl Observation {
    /// How long the guest would stand still if it were suspended now and the dirty set sent.
    #[must_use]
    pub fn predicted_blackout(&self) -> Micros {
        let transfer = u128::from(self.dirty) * 1_000_000 / u128::from(self.bandwidth.max(1));
        self.fixed
            .plus(Micros(u64::try_from(transfer).unwrap_or(u64::MAX)))
    }

    /// Bytes a second that the guest dirties, counting a chunk once however often it is written.
    #[must_use]
    pub fn dirty_rate(&self) -> u64 {
        let rate = u128::from(self.dirty) * 1_000_000 / u128::from(self.took.0.max(1));
        u64::try_from(rate).unwrap_or(u64::MAX)
    }
}

/// Decides what to do with a dirty set that was just taken.
///
/// * What fits the downtime limit, or is nothing, is sent while the guest is suspended: no page is left to fault on.
/// * Otherwise a round goes on while rounds pay: while the set shrinks to half from one round to the next.
/// * When it does not, post-copy ends the migration at once, whatever the dirty rate.
/// * Without post-copy, rounds go on while there is hope.
#[must_use]
pub fn decide(budget: &Budget, seen: &Observation) -> Decision {
    let post_copy = seen.post_copy && budget.post_copy != PostCopy::Never;
    if post_copy && budget.post_copy == PostCopy::Always {
        return Decision::PostCopy;
    }
    // With nothing left to send the blackout cannot become any shorter.
    if seen.dirty == 0 || seen.predicted_blackout() <= budget.downtime {
        return Decision::StopAndCopy;
    }
    let exhausted = seen.round.saturating_add(1) >= budget.rounds;
    if post_copy {
        let shrinks = seen.dirty <= seen.sent / 2;
        return if shrinks && !exhausted {
            Decision::Continue
        } else {
            Decision::PostCopy
        };
    }
    if exhausted || seen.stalled >= HOPELESS {
        Decision::GiveUp
    } else {
        Decision::Continue
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn observation(round: u32, dirty: u64, sent: u64) -> Observation {
        Observation {
            round,
            dirty,
            sent,
            took: Micros::from_millis(100),
            bandwidth: 1000 * MIB,
            fixed: Micros::from_millis(20),
            stalled: 0,
            post_copy: true,
        }
    }

    fn check(post_copy: PostCopy, seen: Observation, expected: Decision) {
        let budget = Budget {
            post_copy,
            ..Budget::default()
        };
        assert_eq!(decide(&budget, &seen), expected, "{seen:?}");
    }

    #[test]
    fn a_set_that_fits_the_limit_is_sent_while_the_guest_stands_still() {
        check(
            PostCopy::Auto,
            observation(0, 30 * MIB, 800 * MIB),
            Decision::StopAndCopy,
        );
        check(
            PostCopy::Never,
            observation(0, 30 * MIB, 800 * MIB),
            Decision::StopAndCopy,
        );
    }

    #[test]
    fn rounds_go_on_while_they_pay_and_post_copy_ends_them() {
        check(
            PostCopy::Auto,
            observation(0, 300 * MIB, 800 * MIB),
            Decision::Continue,
        );
        check(
            PostCopy::Auto,
            observation(1, 200 * MIB, 300 * MIB),
            Decision::PostCopy,
        );
    }

    #[test]
    fn always_means_after_the_first_pass() {
        check(
            PostCopy::Always,
            observation(0, 0, 800 * MIB),
            Decision::PostCopy,
        );
    }

    #[test]
    fn without_post_copy_hope_ends_after_eight_rounds_without_progress() {
        let mut seen = observation(9, 200 * MIB, 200 * MIB);
        check(PostCopy::Never, seen, Decision::Continue);
        seen.stalled = HOPELESS;
        check(PostCopy::Never, seen, Decision::GiveUp);
        seen.post_copy = false;
        check(PostCopy::Auto, seen, Decision::GiveUp);
    }

    #[test]
    fn a_set_that_is_empty_ends_it_though_the_limit_is_shorter_than_all_the_rest() {
        let seen = Observation {
            post_copy: false,
            ..observation(3, 0, 0)
        };
        let budget = Budget {
            downtime: Micros::from_millis(1),
            ..Budget::default()
        };
        assert_eq!(decide(&budget, &seen), Decision::StopAndCopy);
    }

    #[test]
    fn nothing_measured_overflows() {
        let seen = Observation {
            dirty: u64::MAX,
            bandwidth: 0,
            took: Micros(0),
            ..observation(0, 0, 0)
        };
        assert_eq!(seen.predicted_blackout(), Micros(u64::MAX));
        assert_eq!(seen.dirty_rate(), u64::MAX);
    }
}
