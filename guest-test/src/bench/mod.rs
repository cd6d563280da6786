//! `memferry bench qemu`: Memferry side by side with QEMU's own ways to migrate, on the same kind of guest.
//!
//! A round is one migration in each mode, each between a fresh pair of QEMUs, so that what drifts on the machine
//! hits all modes alike. Every migration is proved to have moved the guest whole before its figures count.

mod figure;
mod goal;
mod measure;
mod table;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use clap::{Args, ValueEnum};
use serde_json::json;

use crate::accel::{Accel, accel};
use crate::image::Image;
use crate::qemu::{Backing, GuestConfig, Rate, Writer};
use crate::{ferry, interrupt, native, packages};
use figure::Sample;
use goal::Goal;
use measure::{Failure, Setup};
use table::Results;

/// A way to migrate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Memferry's two commands
    Memferry,
    /// QEMU's pre-copy
    Precopy,
    /// QEMU's pre-copy over four connections
    Multifd,
    /// QEMU's post-copy
    Postcopy,
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Self::Memferry => "memferry",
            Self::Precopy => "QEMU pre-copy",
            Self::Multifd => "QEMU multifd",
            Self::Postcopy => "QEMU post-copy",
        }
    }
}

/// When Memferry compares the copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Verification {
    /// Not at all
    Off,
    /// Before hand-over
    Before,
    /// Once the guest runs at the destination
    After,
}

/// What the guests that QEMU migrates have as memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum QemuMemory {
    /// What QEMU is fastest with; of uneven size for post-copy of emulated guests, which it damages otherwise
    Best,
    /// QEMU's own, of uneven size: QEMU before 9.0 loses pages of emulated guests with any other
    Uneven,
    /// A shared file, as memferry needs it
    Shared,
}

impl QemuMemory {
    fn of(self, mode: native::Mode, accel: Accel) -> Backing {
        match self {
            Self::Shared => Backing::SharedFile,
            Self::Uneven => Backing::PrivateUneven,
            // Nearly no guest survives that; of pre-copy two in three do.
            Self::Best if mode == native::Mode::Postcopy && accel == Accel::Tcg => {
                Backing::PrivateUneven
            }
            Self::Best => Backing::Private,
        }
    }
}

/// What to measure.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// A smoke test of about a minute: one run on a guest of 256 MiB at one rate, without a round to warm up
    #[arg(long)]
    quick: bool,
    /// One JSON line a run on standard output; the table goes to standard error
    #[arg(long)]
    json: bool,
    /// End with exit code 1 if a goal is not met
    #[arg(long)]
    require_goals: bool,
    /// How often each mode is measured [default: 5, with --quick 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: Option<u32>,
    /// How fast the guest writes, in MB a second [default: 10,100,1000, with --quick 100]
    #[arg(long, value_name = "MB", value_delimiter = ',')]
    rates: Option<Vec<u64>>,
    /// The guest's memory in MiB [default: 1024, with --quick 256]
    #[arg(long, value_name = "MIB")]
    memory: Option<u64>,
    /// MiB that the guest fills with data that does not compress [default: 800, with --quick 150]
    #[arg(long, value_name = "MIB")]
    fill: Option<u64>,
    /// MiB of these that it goes on writing at random
    #[arg(long, value_name = "MIB", default_value_t = 64)]
    set: u64,
    /// What to compare
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Mode::Memferry, Mode::Precopy, Mode::Multifd, Mode::Postcopy])]
    modes: Vec<Mode>,
    /// When memferry compares the copies
    #[arg(long, value_enum, default_value_t = Verification::After)]
    verify: Verification,
    /// One more option for `memferry qemu send`, for example --send-option=--lanes=4
    #[arg(long, value_name = "OPTION", allow_hyphen_values = true)]
    send_option: Vec<String>,
    /// QEMU's downtime limit in milliseconds, for pre-copy and multifd; 300 is QEMU's default
    #[arg(long, value_name = "MS", default_value_t = 300)]
    downtime: u64,
    /// What the guests that QEMU migrates have as memory
    #[arg(long, value_enum, default_value_t = QemuMemory::Best)]
    qemu_memory: QemuMemory,
    /// Give up on a migration that takes longer, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    limit: u64,
}

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
        let warm_up = u32::from(index == 0 && !options.quick);
        for run in 0..warm_up + plan.runs {
            let counted = (run + 1).checked_sub(warm_up).filter(|&run| run > 0);
            for &mode in &options.modes {
                progress.begin(mode, rate, counted);
                let attempts = if mode == Mode::Memferry { 1 } else { ATTEMPTS };
                for _ in 0..attempts {
                    let measured = measure::measure(&setup, mode);
                    if interrupt::requested() {
                        bail!("interrupted; every guest was ended");
                    }
                    Progress::told(mode, &measured);
                    if options.json {
                        println!("{}", record(mode, rate, counted, &measured));
                    }
                    let again = matches!(&measured, Err(failure) if !failure.is_final());
                    // Of the round to warm up nothing counts but damage.
                    if counted.is_some() || mode == Mode::Memferry && measured.is_err() {
                        results.add(rate, mode, measured.ok());
                    }
                    if !again {
                        break;
                    }
                }
            }
        }
    }
    Ok(conclude(options, &plan, &results))
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

/// The options after all defaults.
#[derive(Debug)]
struct Plan {
    runs: u32,
    rates: Vec<u64>,
    memory: u64,
    fill: u64,
    modes: usize,
    warm_up: u32,
}

impl Plan {
    fn new(options: &Options) -> Result<Self> {
        let quick = options.quick;
        let choose =
            |given: Option<u64>, small, large| given.unwrap_or(if quick { small } else { large });
        let rates = options.rates.clone();
        let plan = Self {
            runs: options.runs.unwrap_or(if quick { 1 } else { 5 }),
            rates: rates.unwrap_or_else(|| {
                if quick {
                    vec![100]
                } else {
                    vec![10, 100, 1000]
                }
            }),
            memory: choose(options.memory, 256, 1024),
            fill: choose(options.fill, 150, 800),
            modes: options.modes.len(),
            warm_up: u32::from(!quick),
        };
        let room = plan.memory.saturating_sub(plan.fill);
        ensure!(
            room >= 64 && plan.fill > 0,
            "a guest of {} MiB cannot fill {} of them: it needs 64 MiB for itself (--memory, --fill)",
            plan.memory,
            plan.fill
        );
        Ok(plan)
    }

    fn migrations(&self) -> usize {
        (self.rates.len() * self.runs as usize + self.warm_up as usize) * self.modes
    }

    fn guest(&self, options: &Options, rate: u64, image: &Image, accel: Accel) -> GuestConfig {
        GuestConfig {
            memory: self.memory << 20,
            writer: Writer {
                fill: self.fill << 20,
                set: options.set << 20,
                rate: Rate::Limit(rate * 1_000_000),
                check: Rate::Limit(400 << 20),
            },
            backing: Backing::SharedFile,
            ..GuestConfig::new(image.clone(), accel)
        }
    }

    fn announce(&self, options: &Options, accel: Accel) {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        eprintln!(
            "{} migrations of {accel} guests of {} MiB, {} MiB filled, which write {} MiB of it at random; {processors} \
             processors; QEMU's downtime limit {} ms, its bandwidth without limit, its guests' memory {}",
            self.migrations(),
            self.memory,
            self.fill,
            options.set,
            options.downtime,
            match options.qemu_memory {
                QemuMemory::Best => "its own",
                QemuMemory::Uneven => "its own, of uneven size",
                QemuMemory::Shared => "a shared file",
            },
        );
        let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
        let load = load
            .split(' ')
            .next()
            .and_then(|load| load.parse::<f64>().ok());
        if let Some(load) = load.filter(|&load| load > 0.5) {
            eprintln!(
                "this machine does other things as well (load {load}): take the figures with a grain of salt"
            );
        }
    }
}

/// How far it is, on standard error.
#[derive(Debug)]
struct Progress {
    began: Instant,
    done: usize,
    all: usize,
}

impl Progress {
    fn new(all: usize) -> Self {
        Self {
            began: Instant::now(),
            done: 0,
            all,
        }
    }

    fn begin(&mut self, mode: Mode, rate: u64, run: Option<u32>) {
        let left = self
            .began
            .elapsed()
            .checked_div(u32::try_from(self.done).unwrap_or(u32::MAX))
            .map(|each| each * u32::try_from(self.all - self.done).unwrap_or(u32::MAX))
            .map_or(String::new(), |left| format!(", {} s left", left.as_secs()));
        self.done += 1;
        let run = run.map_or("to warm up".to_owned(), |run| format!("run {run}"));
        eprintln!(
            "[{}/{}{left}] {rate} MB/s, {}, {run}",
            self.done,
            self.all,
            mode.name()
        );
    }

    fn told(mode: Mode, measured: &Result<Sample, Failure>) {
        match measured {
            Ok(sample) => eprintln!(
                "    total {:.0} ms, blackout {:.1} ms, {:.2} s of processor time",
                sample.total, sample.blackout, sample.cpu
            ),
            Err(failure) if mode == Mode::Memferry => eprintln!("    failed: {failure:#}"),
            Err(failure) => eprintln!("    failed: {failure}"),
        }
    }
}
