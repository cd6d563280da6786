//! How fast each vCPU writes.

use std::time::Instant;

/// Pages a second that each vCPU writes for the first time since the last take: what throttling goes by.
///
/// Fed with the counters of [`DirtyRing::pages_written`](super::DirtyRing::pages_written). A page that several vCPUs write
/// counts for the first of them, and one that is written again before it was taken does not count.
#[derive(Debug, Clone, Default)]
pub struct DirtyRates {
    last: Option<(Instant, Vec<u64>)>,
}

impl DirtyRates {
    /// Without a past: the first question has no answer.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The rates since the last question, by vCPU, when the counters are these `now`. `None` the first time, and if no
    /// time has passed. A vCPU that is new counts from zero.
    pub fn since_last(&mut self, now: Instant, pages_written: &[u64]) -> Option<Vec<u64>> {
        let micros = match &self.last {
            None => 0,
            Some((then, _)) => now.saturating_duration_since(*then).as_micros(),
        };
        let first = self.last.is_none();
        if micros == 0 && !first {
            return None;
        }
        let (_, then) = self.last.replace((now, pages_written.to_vec()))?;
        let counters = pages_written.iter().enumerate();
        let rates = counters.map(|(vcpu, &count)| {
            let more = count.saturating_sub(then.get(vcpu).copied().unwrap_or(0));
            u64::try_from(u128::from(more) * 1_000_000 / micros).unwrap_or(u64::MAX)
        });
        Some(rates.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_rate_is_what_was_written_since_the_last_question_in_a_second() {
        let mut rates = DirtyRates::new();
        let start = Instant::now();
        assert_eq!(rates.since_last(start, &[100, 0]), None);
        let later = start + Duration::from_millis(500);
        assert_eq!(rates.since_last(later, &[150, 7]), Some(vec![100, 14]));
        let later = later + Duration::from_secs(10);
        assert_eq!(rates.since_last(later, &[150, 107]), Some(vec![0, 10]));
    }

    #[test]
    fn a_question_at_the_same_moment_takes_nothing_from_the_next() {
        let mut rates = DirtyRates::new();
        let start = Instant::now();
        rates.since_last(start, &[0]);
        assert_eq!(rates.since_last(start, &[50]), None);
        let later = start + Duration::from_secs(1);
        assert_eq!(rates.since_last(later, &[80]), Some(vec![80]));
    }

    #[test]
    fn a_vcpu_that_is_new_counts_from_zero_and_a_counter_that_went_back_is_no_rate() {
        let mut rates = DirtyRates::new();
        let start = Instant::now();
        rates.since_last(start, &[10]);
        let later = start + Duration::from_secs(2);
        assert_eq!(rates.since_last(later, &[4, 20]), Some(vec![0, 10]));
    }
}
