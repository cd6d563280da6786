//! What has to be reached, as lines that programs read.

use serde::Serialize;

use super::Mode;
use super::figure::{Sample, Spread};
use super::table::Results;

/// The most milliseconds that a guest may stand still, at any dirty rate.
const BLACKOUT_MS: f64 = 100.0;
/// The most MiB that a memferry process may have resident besides the guest's RAM.
const RESIDENT_MIB: f64 = 64.0;
/// What the design aims at where the goal is to be no slower than QEMU.
const DESIGN_RATIO: f64 = 0.6;

/// One goal, what was measured for it, and whether that meets it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Goal {
    goal: String,
    /// Nothing where nothing could be measured: then it is not met.
    value: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    at_most: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    at_least: Option<f64>,
    met: bool,
}

impl Goal {
    /// One that is met by a value of at most `limit`.
    pub fn at_most(goal: impl Into<String>, value: Option<f64>, limit: f64) -> Self {
        Self {
            goal: goal.into(),
            value: value.map(rounded),
            at_most: Some(limit),
            at_least: None,
            met: value.is_some_and(|value| value <= limit),
        }
    }

    /// One that is met by a value of at least `limit`.
    pub fn at_least(goal: impl Into<String>, value: Option<f64>, limit: f64) -> Self {
        Self {
            goal: goal.into(),
            value: value.map(rounded),
            at_most: None,
            at_least: Some(limit),
            met: value.is_some_and(|value| value >= limit),
        }
    }

    /// Whether it is met.
    #[must_use]
    pub fn is_met(&self) -> bool {
        self.met
    }

    /// As a line of JSON.
    #[must_use]
    #[expect(clippy::missing_panics_doc, reason = "numbers and text are JSON")]
    pub fn line(&self) -> String {
        serde_json::to_string(self).expect("numbers and text are JSON")
    }
}

fn rounded(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}

/// The goals that these modes say something about.
pub(super) fn goals(results: &Results, rates: &[u64], modes: &[Mode]) -> Vec<Goal> {
    let mut goals = Vec::new();
    if !modes.contains(&Mode::Memferry) {
        return goals;
    }
    let compared = modes.len() > 1;
    for &rate in rates {
        let median = |mode, of: fn(&Sample) -> f64| {
            Spread::of(results.samples(rate, mode).iter().map(of)).map(|spread| spread.median)
        };
        let versus_best = |of: fn(&Sample) -> f64| {
            let others = modes.iter().filter(|&&mode| mode != Mode::Memferry);
            let best = others
                .filter_map(|&mode| median(mode, of))
                .min_by(f64::total_cmp);
            Some(median(Mode::Memferry, of)? / best?)
        };
        let mut add = |name: &str, value, at_most| {
            goals.push(Goal::at_most(format!("qemu_{name}_{rate}"), value, at_most));
        };
        if compared {
            let ratio = versus_best(|sample| sample.total);
            add("total_vs_best", ratio, 1.0);
            add("total_design", ratio, DESIGN_RATIO);
        }
        let blackout = |sample: &Sample| sample.blackout;
        add("blackout_ms", median(Mode::Memferry, blackout), BLACKOUT_MS);
        if compared {
            add("blackout_vs_best", versus_best(blackout), 1.0);
        }
    }
    let resident = rates
        .iter()
        .flat_map(|&rate| results.samples(rate, Mode::Memferry))
        .flat_map(|sample| [sample.resident_send, sample.resident_receive])
        .flatten();
    let most = Spread::of(resident).map(|spread| spread.most);
    goals.push(Goal::at_most("resident_above_ram_mib", most, RESIDENT_MIB));
    goals
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(total: f64, blackout: f64) -> Option<Sample> {
        Some(Sample {
            total,
            blackout,
            resident_send: Some(3.0),
            resident_receive: Some(65.0),
            ..Sample::default()
        })
    }

    fn line(results: &Results, name: &str) -> String {
        let modes = [Mode::Memferry, Mode::Precopy, Mode::Postcopy];
        let goals = goals(results, &[10], &modes);
        let goal = goals.iter().find(|goal| goal.goal == name);
        goal.map(Goal::line).unwrap_or_default()
    }

    #[test]
    fn the_total_is_compared_with_the_fastest_mode_by_medians() {
        let mut results = Results::default();
        for total in [58.0, 20.0, 900.0] {
            results.add(10, Mode::Memferry, sample(total, 1.0));
        }
        results.add(10, Mode::Precopy, sample(100.0, 1.0));
        results.add(10, Mode::Postcopy, sample(300.0, 1.0));
        assert_eq!(
            line(&results, "qemu_total_design_10"),
            r#"{"goal":"qemu_total_design_10","value":0.58,"at_most":0.6,"met":true}"#
        );
    }

    #[test]
    fn a_goal_may_be_a_lower_limit() {
        let line = Goal::at_least("read", Some(0.85), 0.9).line();
        assert_eq!(
            line,
            r#"{"goal":"read","value":0.85,"at_least":0.9,"met":false}"#
        );
        assert!(Goal::at_least("read", Some(0.9), 0.9).is_met());
    }

    #[test]
    fn a_goal_is_not_met_by_what_could_not_be_measured() {
        let mut results = Results::default();
        results.add(10, Mode::Memferry, None);
        assert_eq!(
            line(&results, "qemu_blackout_ms_10"),
            r#"{"goal":"qemu_blackout_ms_10","value":null,"at_most":100.0,"met":false}"#
        );
    }

    #[test]
    fn the_larger_process_of_the_worst_run_has_to_be_small_enough() {
        let mut results = Results::default();
        results.add(10, Mode::Memferry, sample(1.0, 1.0));
        assert_eq!(
            line(&results, "resident_above_ram_mib"),
            r#"{"goal":"resident_above_ram_mib","value":65.0,"at_most":64.0,"met":false}"#
        );
    }

    #[test]
    fn without_memferry_there_is_no_goal() {
        assert_eq!(goals(&Results::default(), &[10], &[Mode::Precopy]), []);
    }
}
