//! `memferry bench qemu`: Memferry side by side with QEMU's own ways to migrate, on the same kind of guest.
//!
//! A round is one migration in each mode, each between a fresh pair of QEMUs, so that what drifts on the machine
//! hits all modes alike. Every migration is proved to have moved the guest whole before its figures count.

mod figure;
mod goal;
mod measure;
pub mod mount;
mod options;
mod progress;
mod table;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, bail};
use serde_json::json;

use crate::accel::accel;
use crate::image::Image;
use crate::{ferry, interrupt, packages};
use figure::Sample;
pub use goal::Goal;
use measure::{Failure, Setup};
use options::Plan;
pub use options::{Mode, Options, QemuMemory, Verification};
use progress::Progress;
use table::Results;

/// How a suite ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Everything was measured.
    Measured,
    /// So it was, and a goal is not met that had to be.
    GoalsMissed,
    /// A migration by Memferry failed or damaged the guest.
    Failed,
}

/// QEMU 7.2 loses pages of an emulated guest in one pre-copy of three; such a run is measured again so often.
const ATTEMPTS: usize = 4;

/// Measures, and prints the table and the goals. Blocks for minutes; says on standard error how it gets on.
///
/// `memferry` is the command to measure; without one it is built from this source.
///
/// # Errors
/// If the options contradict each other, nothing can be measured on this machine, or it was interrupted.
pub fn run(options: &Options, memferry: Option<PathBuf>) -> Result<Outcome> {
    let plan = Plan::new(options)?;
    packages::ensure(&[packages::QEMU])?;
    let memferry = match memferry {
        Some(path) => path,
        None => ferry::build()?,
    };
    let image = Image::prepare()?;
    let accel = accel()?;
    plan.announce(options, accel);

    let mut results = Results::default();
    let mut progress = Progress::new(plan.migrations());
    for (index, &rate) in plan.rates.iter().enumerate() {
        let setup = Setup {
            memferry: memferry.clone(),
            config: plan.guest(options, rate, &image, accel),
            memory: options.qemu_memory,
            verify: options.verify,
            send_options: options.send_option.clone(),
            downtime: Duration::from_millis(options.downtime),
            limit: Duration::from_secs(options.limit),
        };
        let warm_up = if index == 0 { plan.warm_up } else { 0 };
        for run in 0..warm_up + plan.runs {
            let counted = (run + 1).checked_sub(warm_up).filter(|&run| run > 0);
            for &mode in &options.modes {
                progress.begin(mode, rate, counted);
                measure_whole(&setup, mode, |measured| {
                    Progress::told(mode, &measured);
                    if options.json {
                        println!("{}", record(mode, rate, counted, &measured));
                    }
                    // Of the round to warm up nothing counts but damage.
                    if counted.is_some() || mode == Mode::Memferry && measured.is_err() {
                        results.add(rate, mode, measured.ok());
                    }
                })?;
            }
        }
    }
    Ok(conclude(options, &plan, &results))
}

/// Measures until a guest has arrived whole: QEMU gets several attempts, Memferry one.
fn measure_whole(
    setup: &Setup,
    mode: Mode,
    mut note: impl FnMut(Result<Sample, Failure>),
) -> Result<()> {
    let attempts = if mode == Mode::Memferry { 1 } else { ATTEMPTS };
    for _ in 0..attempts {
        let measured = measure::measure(setup, mode);
        if interrupt::requested() {
            bail!("interrupted; every guest was ended");
        }
        let again = matches!(&measured, Err(failure) if !failure.is_final());
        note(measured);
        if !again {
            break;
        }
    }
    Ok(())
}

fn conclude(options: &Options, plan: &Plan, results: &Results) -> Outcome {
    let table = table::render(results, &plan.rates, &options.modes);
    if options.json {
        eprint!("{table}");
    } else {
        print!("{table}");
    }
    let goals = goal::goals(results, &plan.rates, &options.modes);
    for goal in &goals {
        println!("{}", goal.line());
    }
    if results.failures_of(Mode::Memferry) > 0 {
        Outcome::Failed
    } else if options.require_goals && !goals.iter().all(Goal::is_met) {
        Outcome::GoalsMissed
    } else {
        Outcome::Measured
    }
}

/// A line for programs.
fn record(
    mode: Mode,
    rate: u64,
    run: Option<u32>,
    measured: &Result<Sample, Failure>,
) -> serde_json::Value {
    let run = run.unwrap_or(0); // 0 is the round to warm up
    match measured {
        Ok(sample) => {
            let figures: BTreeMap<_, _> = figure::ALL
                .iter()
                .filter_map(|figure| Some((figure.key, (figure.of)(sample)?)))
                .collect();
            json!({ "run": run, "rate": rate, "mode": mode, "verified": true, "figures": figures })
        }
        Err(failure) => {
            json!({ "run": run, "rate": rate, "mode": mode, "failed": failure.to_string() })
        }
    }
}
