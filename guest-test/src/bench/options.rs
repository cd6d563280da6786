//! What a user may choose, and what follows from it.

use anyhow::{Result, ensure};
use clap::{Args, ValueEnum};

use crate::accel::Accel;
use crate::image::Image;
use crate::native;
use crate::qemu::{Backing, GuestConfig, Rate, Writer};

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
    pub(super) fn name(self) -> &'static str {
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
    pub(super) fn backing(self, mode: native::Mode, accel: Accel) -> Backing {
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
    pub(super) quick: bool,
    /// One JSON line a run on standard output; the table goes to standard error
    #[arg(long)]
    pub(super) json: bool,
    /// End with exit code 1 if a goal is not met
    #[arg(long)]
    pub(super) require_goals: bool,
    /// How often each mode is measured [default: 5, with --quick 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(super) runs: Option<u32>,
    /// How fast the guest writes, in MB a second [default: 10,100,1000, with --quick 100]
    #[arg(long, value_name = "MB", value_delimiter = ',')]
    pub(super) rates: Option<Vec<u64>>,
    /// The guest's memory in MiB [default: 1024, with --quick 256]
    #[arg(long, value_name = "MIB")]
    pub(super) memory: Option<u64>,
    /// MiB that the guest fills with data that does not compress [default: 800, with --quick 150]
    #[arg(long, value_name = "MIB")]
    pub(super) fill: Option<u64>,
    /// MiB of these that it goes on writing at random
    #[arg(long, value_name = "MIB", default_value_t = 64)]
    pub(super) set: u64,
    /// What to compare
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Mode::Memferry, Mode::Precopy, Mode::Multifd, Mode::Postcopy])]
    pub(super) modes: Vec<Mode>,
    /// When memferry compares the copies
    #[arg(long, value_enum, default_value_t = Verification::After)]
    pub(super) verify: Verification,
    /// One more option for `memferry qemu send`, for example --send-option=--lanes=4
    #[arg(long, value_name = "OPTION", allow_hyphen_values = true)]
    pub(super) send_option: Vec<String>,
    /// QEMU's downtime limit in milliseconds, for pre-copy and multifd; 300 is QEMU's default
    #[arg(long, value_name = "MS", default_value_t = 300)]
    pub(super) downtime: u64,
    /// What the guests that QEMU migrates have as memory
    #[arg(long, value_enum, default_value_t = QemuMemory::Best)]
    pub(super) qemu_memory: QemuMemory,
    /// Give up on a migration that takes longer, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub(super) limit: u64,
}

/// The options after all defaults.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) runs: u32,
    pub(super) rates: Vec<u64>,
    pub(super) memory: u64,
    pub(super) fill: u64,
    pub(super) modes: usize,
    pub(super) warm_up: u32,
}

impl Plan {
    pub(super) fn new(options: &Options) -> Result<Self> {
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

    pub(super) fn migrations(&self) -> usize {
        (self.rates.len() * self.runs as usize + self.warm_up as usize) * self.modes
    }

    pub(super) fn guest(
        &self,
        options: &Options,
        rate: u64,
        image: &Image,
        accel: Accel,
    ) -> GuestConfig {
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

    pub(super) fn announce(&self, options: &Options, accel: Accel) {
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
