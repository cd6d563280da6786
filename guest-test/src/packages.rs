//! Installing what the guests need from Debian, where that may be done.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::command;

/// A program, and the Debian package that it comes in.
#[derive(Debug, Clone, Copy)]
pub struct Needed {
    /// The name of the program.
    pub program: &'static str,
    /// The name of the package.
    pub package: &'static str,
}

/// Runs the guests.
pub const QEMU: Needed = Needed {
    program: "qemu-system-x86_64",
    package: "qemu-system-x86",
};

/// Speak what we speak: network block devices.
pub const FOREIGN: [Needed; 6] = [
    Needed {
        program: "nbdkit",
        package: "nbdkit",
    },
    Needed {
        program: "nbdinfo",
        package: "libnbd-bin",
    },
    Needed {
        program: "nbdsh",
        package: "python3-libnbd",
    },
    Needed {
        program: "qemu-img",
        package: "qemu-utils",
    },
    Needed {
        program: "fio",
        package: "fio",
    },
    Needed {
        program: "nbd-client",
        package: "nbd-client",
    },
];

/// Slow mirrors exist; ones that take longer do not finish.
const DOWNLOAD_LIMIT: Duration = Duration::from_secs(600);

/// Installs those that are missing with apt-get, and says so on standard error.
///
/// # Errors
/// If something is missing and this user may not install it, or apt-get is not there or fails: names the packages.
pub fn ensure(needed: &[Needed]) -> Result<()> {
    let missing: Vec<&str> = needed
        .iter()
        .filter(|needed| command::find(needed.program).is_none())
        .map(|needed| needed.package)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let list = missing.join(" ");
    if command::find("apt-get").is_none() {
        bail!(
            "missing: {list} (names as in Debian). This system has no apt-get: install them by hand"
        );
    }
    let Some(prefix) = as_root() else {
        bail!("missing: {list}. Run as root, or: sudo apt-get install {list}");
    };
    eprintln!("installing {list} with apt-get");
    update(&prefix)?;
    command::output(
        apt_get(&prefix)
            .args(["install", "--yes", "--no-install-recommends"])
            .args(&missing),
        DOWNLOAD_LIMIT,
    )
    .with_context(|| format!("cannot install {list}"))?;
    for needed in needed {
        if command::find(needed.program).is_none() {
            bail!(
                "the package {} has no program {}",
                needed.package,
                needed.program
            );
        }
    }
    Ok(())
}

/// Refreshes the lists of packages, where this user may.
///
/// # Errors
/// If apt-get fails.
pub fn refresh() -> Result<()> {
    let Some(prefix) = as_root() else {
        bail!("only root may refresh the lists of packages: sudo apt-get update");
    };
    update(&prefix)
}

fn update(prefix: &[&'static str]) -> Result<()> {
    command::output(apt_get(prefix).arg("update"), DOWNLOAD_LIMIT)
        .context("cannot refresh the lists of packages")?;
    Ok(())
}

/// What to put before a command so that it runs as root; nothing where it does anyway, `None` where it cannot.
fn as_root() -> Option<Vec<&'static str>> {
    if rustix::process::geteuid().is_root() {
        return Some(Vec::new());
    }
    command::output(
        Command::new("sudo").args(["-n", "true"]),
        Duration::from_secs(10),
    )
    .ok()
    .map(|_| vec!["sudo", "-n"])
}

fn apt_get(prefix: &[&'static str]) -> Command {
    // By `env`, because sudo drops the caller's variables.
    let words = [
        prefix,
        &["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q"],
    ]
    .concat();
    let mut command = Command::new(words[0]);
    command.args(&words[1..]);
    command
}
