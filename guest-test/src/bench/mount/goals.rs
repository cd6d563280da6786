//! What has to be reached.

use super::options::Plan;
use super::results::{Cell, Distance, Results};
use crate::bench::goal::Goal;

/// The part of the link that a managed mount has to read at, with default settings.
const READ_OF_LINK: f64 = 0.9;
/// Where that is asked for, in milliseconds.
const FAR: u64 = 30;

pub(super) fn goals(results: &Results, plan: &Plan) -> Vec<Goal> {
    let mut goals = Vec::new();
    let distance = Distance::RoundTrip(FAR);
    if plan.round_trips.contains(&FAR) {
        for &way in &plan.ways {
            for &front_end in &plan.front_ends {
                let cell = Cell {
                    way,
                    front_end,
                    distance,
                };
                let read = results.median(cell, |sample| sample.read);
                // An emulated machine may not fill the link by any means.
                let plain = results.plain(distance).unwrap_or(f64::INFINITY);
                let link = (plan.rate / 1e6).min(plain);
                goals.push(Goal::at_least(
                    format!("mount_{way}_{front_end}_read_of_link_{FAR}ms"),
                    read.map(|read| read / link),
                    READ_OF_LINK,
                ));
            }
        }
    }
    goals
}
