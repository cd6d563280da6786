//! The lab: a Linux in QEMU that runs one program of ours and has what the host lacks.
//!
//! ```text
//! Lab ── kernel 6.12 or 6.1 ──┐
//! Job ── program, its libraries,├─▶ initramfs ─▶ QEMU ─▶ lab-init ─▶ program ─▶ Ended
//!        tools, modules ──────┘                   └───── what it prints ─────▶ output
//! ```
//!
//! A boot that hangs or panics before the guest reports is repeated, because emulated boots do that now and then; a
//! program that was started is never started again.

mod initramfs;
mod machine;
mod modules;
pub mod targets;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::accel::Accel;
use crate::command;
use crate::image;
use crate::kernel::{self, Kernel};
use crate::packages::{self, Needed};

/// A machine to run programs on; it is started anew for each.
#[derive(Debug, Clone)]
pub struct Lab {
    /// What it boots.
    pub kernel: Kernel,
    /// Its memory in bytes; whole MiB.
    pub memory: u64,
    /// How many processors it has.
    pub processors: u32,
    /// How it runs.
    pub accel: Accel,
    /// How long the program may take.
    pub limit: Duration,
    /// How long one boot may take.
    pub boot_limit: Duration,
}

/// What the lab runs.
#[derive(Debug, Clone)]
pub struct Job {
    /// Where the program is, here and there.
    pub program: PathBuf,
    /// What it is given.
    pub arguments: Vec<String>,
    /// Variables, besides `PATH` and the few that every program has.
    pub environment: Vec<(String, String)>,
    /// Where it runs; made if need be.
    pub directory: PathBuf,
    /// More programs of the host's that it uses; they are at the same places there, and so on the path.
    pub programs: Vec<PathBuf>,
}

/// How the program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// With this exit code.
    Exited(i32),
    /// By this signal.
    Killed(i32),
}

/// What every guest has, and the packages to have it from.
pub const TOOLS: [Needed; 8] = [
    packages::QEMU,
    needed("busybox", "busybox-static"),
    needed("xz", "xz-utils"),
    needed("ip", "iproute2"),
    needed("tc", "iproute2"),
    needed("mkfs.ext4", "e2fsprogs"),
    needed("e2fsck", "e2fsprogs"),
    needed("nbd-client", "nbd-client"),
];
/// Of these, what runs inside.
const INSIDE: [&str; 5] = ["ip", "tc", "mkfs.ext4", "e2fsck", "nbd-client"];
/// The modules that every guest loads, where its kernel has them.
const MODULES: [&str; 9] = [
    "nbd",
    "fuse",
    "veth",
    "sch_netem",
    "sch_tbf",
    "vsock_loopback",
    "ublk_drv",
    "loop",
    "tun",
];
/// An emulated kernel on two processors that do other things as well; one in twenty such boots hangs for ever.
const BOOT_LIMIT: Duration = Duration::from_secs(60);
const LIMIT: Duration = Duration::from_secs(600);
const MEMORY: u64 = 1 << 30;
const PROCESSORS: u32 = 2;

const fn needed(program: &'static str, package: &'static str) -> Needed {
    Needed { program, package }
}

impl Lab {
    /// A lab with the newest kernel of a series as `6.12`; downloads it, once, and installs [`TOOLS`] where this user
    /// may.
    ///
    /// # Errors
    /// If something is missing and not to be had.
    pub fn new(series: &str, accel: Accel) -> Result<Self> {
        packages::ensure(&TOOLS)?;
        let cache = image::cache_directory()?;
        let kernel = {
            let _lock = image::lock(&cache)?;
            kernel::of_series(&cache, series)?
        };
        Ok(Self {
            kernel,
            memory: MEMORY,
            processors: PROCESSORS,
            accel,
            limit: LIMIT,
            boot_limit: BOOT_LIMIT,
        })
    }

    /// Runs a program to its end; what it prints goes to `output` as it comes. Blocks for the boot, some seconds, and
    /// for the program.
    ///
    /// # Errors
    /// If the machine cannot be made or does not boot, its kernel panics, or the deadline passes; tells what its kernel
    /// said. The machine is gone in any case.
    pub fn run(&self, job: &Job, output: impl Write + Send + 'static) -> Result<Ended> {
        machine::run(self, &self.initramfs(job, false)?, Box::new(output))
    }

    /// A shell in the lab, on this program's terminal, until it ends.
    ///
    /// # Errors
    /// As [`Lab::run`]; there is no deadline once it has booted.
    pub fn shell(&self, job: &Job) -> Result<Ended> {
        machine::interact(self, &self.initramfs(job, true)?)
    }

    fn initramfs(&self, job: &Job, terminal: bool) -> Result<initramfs::Initramfs> {
        let mut programs = vec![job.program.clone()];
        programs.extend(job.programs.iter().cloned());
        for program in INSIDE {
            programs.push(command::find(program).with_context(|| format!("{program} is missing"))?);
        }
        let plan = initramfs::Plan {
            modules: modules::load(&self.kernel, &MODULES)?,
            programs,
            terminal,
        };
        plan.build(job)
            .context("cannot make the guest's file system")
    }
}

impl Job {
    /// The shell that every guest has, with a script.
    #[must_use]
    pub fn script(script: &str) -> Self {
        Self {
            program: "/bin/busybox".into(),
            arguments: ["sh", "-c", script].map(str::to_owned).to_vec(),
            environment: Vec::new(),
            directory: Path::new("/").to_owned(),
            programs: Vec::new(),
        }
    }
}
