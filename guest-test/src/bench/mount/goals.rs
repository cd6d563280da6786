//! What has to be reached.

use super::faults::Processors;
use super::options::{FrontEnd, Plan, Way};
use super::results::{Cell, Distance, Results};
use crate::bench::goal::Goal;

/// The part of the link that a managed mount has to read at, with default settings.
const READ_OF_LINK: f64 = 0.9;
/// How much a first access through a slice may cost, in units of what it costs a bare loop.
const FAULT_OF_BARE: f64 = 1.5;
/// How fast a direct mount is read as a device, in units of one that serves a request at a time.
const READ_OF_SERIAL: f64 = 2.0;
/// Until a device that was attached gives its first page.
const ATTACH_MS: f64 = 12.0;
/// The same, in units of what the kernel and a plain loop take.
const ATTACH_OF_LEAST: f64 = 1.5;
/// Two, and what finds them.
const RESIDENCY_BITS: f64 = 2.05;
/// Where that is asked for, in milliseconds.
const FAR: u64 = 30;

pub(super) fn goals(results: &Results, plan: &Plan) -> Vec<Goal> {
    let mut goals = Vec::new();
    let distance = Distance::RoundTrip(FAR);
    let managed = plan.ways.contains(&Way::Managed);
    if managed && plan.round_trips.contains(&FAR) {
        for (_, front_end) in plan
            .mounts()
            .into_iter()
            .filter(|(way, _)| *way == Way::Managed)
        {
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
    if plan.has(Way::Direct, FrontEnd::NbdSerial) {
        let round_trips = plan.round_trips.iter().map(|&ms| Distance::RoundTrip(ms));
        for distance in [Distance::NextDoor].into_iter().chain(round_trips) {
            let read = |front_end| {
                let cell = Cell {
                    way: Way::Direct,
                    front_end,
                    distance,
                };
                results.median(cell, |sample| sample.read)
            };
            let ratio = read(FrontEnd::Nbd).zip(read(FrontEnd::NbdSerial));
            goals.push(Goal::at_least(
                format!("mount_direct_nbd_read_vs_serial_{}", distance.name()),
                ratio.map(|(ours, serial)| ours / serial),
                READ_OF_SERIAL,
            ));
        }
        let attaching = results.attaching();
        goals.push(Goal::at_most(
            "mount_nbd_attach_ms",
            attaching.map(|(ours, _)| ours),
            ATTACH_MS,
        ));
        // Where the kernel itself takes longer, this shows it.
        goals.push(Goal::at_most(
            "mount_nbd_attach_vs_least",
            attaching.map(|(ours, least)| ours / least),
            ATTACH_OF_LEAST,
        ));
    }
    goals.push(Goal::at_most(
        "mount_residency_bits_a_chunk",
        results.residency(),
        RESIDENCY_BITS,
    ));
    for processors in [Processors::One, Processors::All] {
        goals.push(Goal::at_most(
            format!("mount_uffd_first_access_vs_bare_{processors}"),
            results.fault_ratio(processors, 50.0),
            FAULT_OF_BARE,
        ));
    }
    goals
}
