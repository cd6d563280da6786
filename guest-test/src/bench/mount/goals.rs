//! What has to be reached.

use super::faults::Processors;
use super::options::{Plan, Way};
use super::results::{Cell, Distance, Results};
use crate::bench::goal::Goal;

/// The part of the link that a managed mount has to read at, with default settings.
const READ_OF_LINK: f64 = 0.9;
/// How much a first access through a slice may cost, in units of what it costs a bare loop.
const FAULT_OF_BARE: f64 = 1.5;
/// Where that is asked for, in milliseconds.
const FAR: u64 = 30;

pub(super) fn goals(results: &Results, plan: &Plan) -> Vec<Goal> {
    let mut goals = Vec::new();
    let distance = Distance::RoundTrip(FAR);
    let managed = plan.ways.contains(&Way::Managed);
    if managed && plan.round_trips.contains(&FAR) {
        for &front_end in &plan.front_ends {
            let cell = Cell {
                way: Way::Managed,
                front_end,
                distance,
            };
            let read = results.median(cell, |sample| sample.read);
            let link = plan.rate / 1e6;
            goals.push(Goal::at_least(
                format!("mount_managed_{front_end}_read_of_link_{FAR}ms"),
                read.map(|read| read / link),
                READ_OF_LINK,
            ));
        }
    }
    for processors in [Processors::One, Processors::All] {
        goals.push(Goal::at_most(
            format!("mount_uffd_first_access_vs_bare_{processors}"),
            results.fault_ratio(processors, 50.0),
            FAULT_OF_BARE,
        ));
    }
    goals
}
