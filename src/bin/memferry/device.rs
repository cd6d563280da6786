//! `memferry device`: block devices that somebody has left behind.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, ensure};
use bytesize::ByteSize;
use clap::{Args, Subcommand};
use memferry::frontend::nbd::{DeviceState, Force, ListedDevice, devices, free};
use serde_json::json;

use crate::output::Output;

/// How long a device may take to become free.
const PATIENCE: Duration = Duration::from_secs(10);

const HELP: &str = "\
Exit codes: 0 done, 1 not done: the message says why, 2 wrong arguments.";

#[derive(Debug, Subcommand)]
pub(crate) enum Device {
    /// List the network block devices of this machine, and who serves them
    List(List),
    /// Free a device that nobody serves any more
    Free(Free),
}

#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(crate) struct List {
    /// Those that are free, too
    #[arg(long)]
    all: bool,
    /// One JSON event a device on standard output
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(crate) struct Free {
    /// The device, for example /dev/nbd0; without it all that were left behind
    #[arg(value_name = "DEVICE", required_unless_present = "abandoned")]
    device: Option<PathBuf>,
    /// All that were left behind by a process that has ended
    #[arg(long, conflicts_with_all = ["device", "force"])]
    abandoned: bool,
    /// Even if somebody serves it: who uses it gets errors, and what is not saved is lost
    #[arg(long)]
    force: bool,
    /// One JSON event a device on standard output
    #[arg(long)]
    json: bool,
}

impl Device {
    pub(crate) fn json(&self) -> bool {
        match self {
            Self::List(list) => list.json,
            Self::Free(free) => free.json,
        }
    }
}

/// Lists or frees devices.
pub(crate) fn run(args: &Device, output: Output) -> anyhow::Result<()> {
    let devices = devices().context("cannot look at the block devices of this machine")?;
    match args {
        Device::List(list) => {
            for device in &devices {
                if list.all || device.state != DeviceState::Free {
                    show(device, output);
                }
            }
            Ok(())
        }
        Device::Free(args) => free_some(args, &devices, output),
    }
}

fn show(device: &ListedDevice, output: Output) {
    let (state, who) = match &device.state {
        DeviceState::Free => ("free", None),
        DeviceState::Served { pid } => ("served", *pid),
        DeviceState::Abandoned { .. } => ("abandoned", None),
        DeviceState::Unattended { pid } => ("unattended", Some(*pid)),
        _ => ("unknown", None),
    };
    output.event(
        "device",
        &json!({
            "path": device.path, "size": device.len, "read_only": device.read_only, "state": state, "pid": who,
            "in_flight": device.in_flight
        }),
    );
    let who = who.map_or_else(String::new, |pid| format!(" (thread {pid})"));
    output.line(&format!(
        "{} {} {state}{who}, {} under way",
        device.path.display(),
        ByteSize(device.len),
        device.in_flight
    ));
}

fn free_some(args: &Free, devices: &[ListedDevice], output: Output) -> anyhow::Result<()> {
    let force = if args.force {
        Force::Whatever
    } else {
        Force::OnlyAbandoned
    };
    let chosen: Vec<&ListedDevice> = match &args.device {
        Some(path) => devices
            .iter()
            .filter(|device| device.path == *path)
            .collect(),
        None => devices
            .iter()
            .filter(|device| matches!(device.state, DeviceState::Abandoned { .. }))
            .collect(),
    };
    if let Some(path) = &args.device {
        ensure!(
            !chosen.is_empty(),
            "{} is no network block device of this machine: `memferry device list --all` shows those there are",
            path.display()
        );
    }
    for device in chosen {
        free(device.index, force, PATIENCE)?;
        output.event("freed", &json!({ "path": device.path }));
        output.line(&format!("{} is free", device.path.display()));
    }
    Ok(())
}
