//! `memferry bench mount`: remote memory as a file, a device or a slice of this machine, over links of several lengths.
//!
//! ```text
//! server, memory ──▶ link: round trip, rate ──▶ direct or managed ──▶ front end ──▶ reads, writes, first accesses
//!                         │
//!                         └──▶ plain TCP, to compare with
//! ```

mod faults;
mod goals;
mod in_lab;
mod link;
mod measure;
mod options;
mod pattern;
mod plain;
mod residency;
mod results;
mod rig;
mod route;
mod serial;

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::Outcome;
use super::goal::Goal;
use crate::interrupt;
use faults::{Faults, Processors};
use measure::{Bench, Sample};
use options::Plan;
pub use options::{FrontEnd, MountOptions, Way};
use results::{Cell, Distance, Results};
use serial::Attaching;

/// Measures, and prints the table and the goals. Blocks for minutes; says on standard error how it gets on.
///
/// # Errors
/// If the options contradict each other, something cannot be mounted, or bytes are wrong.
pub fn run(options: &MountOptions) -> Result<Outcome> {
    if let Some(series) = &options.lab {
        return in_lab::run(series);
    }
    let plan = Plan::new(options)?;
    let mut results = Results::default();
    // First, while this process has nothing that it could use again.
    results.add_residency(residency::bits_a_chunk()?);
    let mut bench = Bench::new(&plan)?;
    let distances = [Distance::NextDoor].into_iter();
    let distances: Vec<_> = distances
        .chain(plan.round_trips.iter().map(|&ms| Distance::RoundTrip(ms)))
        .collect();
    for run in 1..=plan.runs {
        for &distance in &distances {
            let shape = distance.shape(plan.rate);
            if let Some(shape) = shape {
                let rate = plain::stream(plan.size, shape, plan.by).context("plain TCP")?;
                eprintln!("run {run}, {distance}: plain TCP {rate:.0} MB/s");
                results.add_plain(distance, rate);
            }
            for (way, front_end) in plan.mounts() {
                if interrupt::requested() {
                    bail!("interrupted");
                }
                let cell = Cell {
                    distance,
                    way,
                    front_end,
                };
                let sample = bench
                    .measure(shape, way, front_end)
                    .with_context(|| cell.to_string())?;
                told(run, cell, &sample, options.json);
                results.add(cell, sample);
            }
        }
    }
    if plan.has(Way::Direct, FrontEnd::NbdSerial) {
        let attaching = serial::attaching().context("attaching")?;
        told_attaching(&attaching, options.json);
        results.add_attaching(attaching);
    }
    for processors in [Processors::One, Processors::All] {
        let faults = bench.faults(plan.faults, processors).context("faults")?;
        told_faults(processors, &faults, options.json);
        results.add_faults(processors, faults);
    }
    Ok(conclude(options, &plan, &results))
}

fn told_attaching(attaching: &Attaching, json: bool) {
    let of = |values: &[f64]| results::percentile(values, 50.0).unwrap_or_default();
    let (ours, least) = (of(&attaching.ours), of(&attaching.least));
    eprintln!("attaching a device: {ours:.1} ms, the least {least:.1} ms");
    if json {
        println!(
            "{}",
            json!({ "attach_ms": attaching.ours, "attach_least_ms": attaching.least })
        );
    }
}

fn told_faults(processors: Processors, faults: &Faults, json: bool) {
    let of =
        |values: &[f64], percent| results::percentile(values, percent).unwrap_or_default() * 1e3;
    let (bare, slice) = (&faults.bare, &faults.slice);
    eprintln!(
        "a fault, {processors}: bare loop p50 {:.1} µs, p99 {:.1} µs; slice p50 {:.1} µs, p99 {:.1} µs",
        of(bare, 50.0),
        of(bare, 99.0),
        of(slice, 50.0),
        of(slice, 99.0)
    );
    if json {
        let line = json!({
            "faults": processors.to_string(), "verified": true,
            "bare_us": { "p50": of(bare, 50.0), "p99": of(bare, 99.0) },
            "slice_us": { "p50": of(slice, 50.0), "p99": of(slice, 99.0) },
        });
        println!("{line}");
    }
}

fn told(run: u32, cell: Cell, sample: &Sample, json: bool) {
    let Sample {
        open,
        touches,
        read,
        write,
    } = sample;
    let first = results::percentile(touches, 50.0).unwrap_or_default();
    eprintln!(
        "run {run}, {cell}: open {open:.1} ms, first access {first:.2} ms, read {read:.0} MB/s, write {write:.0} MB/s"
    );
    if json {
        let line = json!({
            "run": run, "way": cell.way, "front_end": cell.front_end, "round_trip_ms": cell.distance.round_trip(),
            "verified": true, "open_ms": open, "first_access_ms": touches, "read_mb_s": read, "write_mb_s": write,
        });
        println!("{line}");
    }
}

fn conclude(options: &MountOptions, plan: &Plan, results: &Results) -> Outcome {
    let table = results.render();
    if options.json {
        eprint!("{table}");
    } else {
        print!("{table}");
    }
    let goals = goals::goals(results, plan);
    for goal in &goals {
        println!("{}", goal.line());
    }
    if options.require_goals && !goals.iter().all(Goal::is_met) {
        Outcome::GoalsMissed
    } else {
        Outcome::Measured
    }
}
