//! What a user may choose, and what follows from it.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::{Args, ValueEnum};

use super::route::By;

/// How a remote region comes here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// Every request goes to the server
    Direct,
    /// What was read stays here, and what is read next is fetched before
    Managed,
}

/// How a program sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FrontEnd {
    /// A file of a FUSE file system
    Fuse,
    /// Memory of the program's own
    Uffd,
    /// A block device; needs a kernel with the module nbd
    Nbd,
    /// A block device whose requests are served one at a time, to compare with; direct only
    NbdSerial,
}

impl FrontEnd {
    /// Those that this machine has.
    fn here() -> Vec<Self> {
        let device = |path| Path::new(path).exists();
        let mut here = vec![Self::Uffd];
        here.extend(device("/dev/fuse").then_some(Self::Fuse));
        if device("/dev/nbd0") {
            here.extend([Self::Nbd, Self::NbdSerial]);
        }
        here
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Direct => "direct",
            Self::Managed => "managed",
        })
    }
}

impl fmt::Display for FrontEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fuse => "fuse",
            Self::Uffd => "uffd",
            Self::Nbd => "nbd",
            Self::NbdSerial => "nbd-serial",
        })
    }
}

/// What to measure.
#[derive(Debug, Clone, Args)]
pub struct MountOptions {
    /// A smoke test of about a minute: one run, round trips of 0 and 30 ms
    #[arg(long)]
    pub(super) quick: bool,
    /// One JSON line a measurement on standard output; the table goes to standard error
    #[arg(long)]
    pub(super) json: bool,
    /// End with exit code 1 if a goal is not met
    #[arg(long)]
    pub(super) require_goals: bool,
    /// How often everything is measured [default: 3, with --quick 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(super) runs: Option<u32>,
    /// Round trips in milliseconds [default: 0,1,5,10,30,100, with --quick 0,30]
    #[arg(long, value_name = "MS", value_delimiter = ',')]
    pub(super) round_trips: Option<Vec<u64>>,
    /// What the link carries each way, in Mbit a second
    #[arg(long, value_name = "MBIT", default_value_t = 1000)]
    pub(super) rate: u64,
    /// The region's size in MiB
    #[arg(long, value_name = "MIB", default_value_t = 256)]
    pub(super) size: u64,
    /// Have the kernel make the link: netem on the loopback interface, which everybody on this machine then has
    #[arg(long)]
    pub(super) netem: bool,
    /// In a Linux guest that has nbd and netem, with the series of kernel that is named
    #[arg(long, value_name = "6.12|6.1", num_args = 0..=1, default_missing_value = "6.12")]
    pub(super) lab: Option<String>,
    /// Stop reading or writing after so many seconds; the figure is then that of what was done
    #[arg(long, value_name = "SECONDS", default_value_t = 5)]
    pub(super) limit: u64,
    /// How the region comes here
    #[arg(long, value_enum, value_delimiter = ',')]
    pub(super) ways: Option<Vec<Way>>,
    /// How programs see it; without this, all that this machine has
    #[arg(long, value_enum, value_delimiter = ',')]
    pub(super) front_ends: Option<Vec<FrontEnd>>,
}

/// The options after all defaults.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) runs: u32,
    pub(super) round_trips: Vec<u64>,
    /// In bytes a second.
    pub(super) rate: f64,
    /// In bytes.
    pub(super) size: u64,
    pub(super) limit: Duration,
    pub(super) ways: Vec<Way>,
    pub(super) front_ends: Vec<FrontEnd>,
    /// First accesses for their latency, in each run.
    pub(super) touches: u64,
    /// Faults in each comparison with a bare loop.
    pub(super) faults: u64,
    /// Who makes the link.
    pub(super) by: By,
}

impl Plan {
    pub(super) fn new(options: &MountOptions) -> Result<Self> {
        let quick = options.quick;
        let round_trips = options.round_trips.clone().unwrap_or_else(|| {
            if quick {
                vec![0, 30]
            } else {
                vec![0, 1, 5, 10, 30, 100]
            }
        });
        let size = options.size;
        ensure!(
            (8..=1 << 20).contains(&size),
            "a region of {size} MiB tells nothing, or does not fit into memory (--size)"
        );
        ensure!(
            options.rate > 0 && options.limit > 0,
            "--rate and --limit are 1 or more"
        );
        #[expect(clippy::cast_precision_loss, reason = "a rate to aim at")]
        let rate = options.rate as f64 * 1e6 / 8.0;
        Ok(Self {
            runs: options.runs.unwrap_or(if quick { 1 } else { 3 }),
            round_trips,
            rate,
            size: size << 20,
            limit: Duration::from_secs(options.limit),
            ways: options
                .ways
                .clone()
                .unwrap_or_else(|| vec![Way::Direct, Way::Managed]),
            front_ends: options.front_ends.clone().unwrap_or_else(FrontEnd::here),
            touches: if quick { 16 } else { 32 },
            faults: if quick { 500 } else { 4000 },
            by: if options.netem { By::Netem } else { By::Proxy },
        })
    }
}

impl Plan {
    /// What is mounted how. Serving one request at a time is no way to manage anything.
    pub(super) fn mounts(&self) -> Vec<(Way, FrontEnd)> {
        let pairs = self.ways.iter().flat_map(|&way| {
            let front_ends = self.front_ends.iter();
            front_ends.map(move |&front_end| (way, front_end))
        });
        pairs
            .filter(|&pair| pair != (Way::Managed, FrontEnd::NbdSerial))
            .collect()
    }

    pub(super) fn has(&self, way: Way, front_end: FrontEnd) -> bool {
        self.mounts().contains(&(way, front_end))
    }
}
