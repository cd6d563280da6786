//! `memferry bench mount`: remote memory as a file, a device or a slice of this machine, over links of several lengths.
//!
//! ```text
//! server, memory ──▶ link: round trip, rate ──▶ direct or managed ──▶ front end ──▶ reads, writes, first accesses
//!                         │
//!                         └──▶ plain TCP, to compare with
//! ```

mod goals;
mod link;
mod measure;
mod options;
mod pattern;
mod plain;
mod results;
mod rig;

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::Outcome;
use super::goal::Goal;
use crate::interrupt;
use measure::{Bench, Sample};
use options::Plan;
pub use options::{FrontEnd, MountOptions, Way};
use results::{Cell, Distance, Results};

/// Measures, and prints the table and the goals. Blocks for minutes; says on standard error how it gets on.
///
/// # Errors
/// If the options contradict each other, something cannot be mounted, or bytes are wrong.
pub fn run(options: &MountOptions) -> Result<Outcome> {
    let plan = Plan::new(options)?;
    let mut results = Results::default();
    let mut bench = Bench::new(plan.size, plan.limit, plan.touches)?;
    let distances = [Distance::NextDoor].into_iter();
    let distances: Vec<_> = distances
        .chain(plan.round_trips.iter().map(|&ms| Distance::RoundTrip(ms)))
        .collect();
    for run in 1..=plan.runs {
        for &distance in &distances {
            let shape = distance.shape(plan.rate);
            if let Some(shape) = shape {
                let rate = plain::stream(plan.size, shape).context("plain TCP")?;
                eprintln!("run {run}, {distance}: plain TCP {rate:.0} MB/s");
                results.add_plain(distance, rate);
            }
            for &way in &plan.ways {
                for &front_end in &plan.front_ends {
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
    }
    Ok(conclude(options, &plan, &results))
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
