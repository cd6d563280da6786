//! The arguments.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use bytesize::ByteSize;
use clap::{Args, Parser, Subcommand, ValueEnum};
use memferry::migrate::{PostCopy, Verify};
use memferry::transport::{Pairing, PairingError};

#[cfg(feature = "nbd-device")]
use crate::device::Device;
use crate::list::List;
use crate::mount::Mount;
use crate::serve::Serve;
use crate::uffd_handler::UffdHandler;

/// Ferries the memory of running virtual machines between Linux hosts while they run.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Live-migrate a QEMU guest whose RAM is a memory-backend-file with share=on
    #[command(subcommand)]
    Qemu(QemuCommand),
    /// Serve a file, a folder or memory as a network block device
    Serve(Serve),
    /// Mount a region of a server of network block devices as a file or a block device
    Mount(Box<Mount>),
    /// Serve the memory of a Firecracker snapshot to a microVM that is restored from it
    UffdHandler(Box<UffdHandler>),
    /// Ends a VMM whose handler has died; started by that
    #[command(hide = true)]
    UffdWatch,
    /// Look at the network block devices of this machine, and free those that were left behind
    #[cfg(feature = "nbd-device")]
    #[command(subcommand)]
    Device(Device),
    /// List what a server of network block devices has
    List(List),
    /// Measure memferry side by side with what it has to beat, for example `memferry bench qemu`
    #[command(disable_help_flag = true)]
    Bench {
        /// The suite, and its options
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum QemuCommand {
    /// On the destination: wait for a guest, and print the string that the source needs
    Receive(Receive),
    /// On the source: send the running guest to the receiver that printed the string
    Send(Send),
    /// Gives the guest back if the sender dies; started by it
    #[command(hide = true)]
    Watch(Watch),
}

#[derive(Debug, Args)]
pub(crate) struct Watch {
    /// QMP socket of the source QEMU
    #[arg(long, value_name = "SOCKET")]
    pub(crate) qmp: PathBuf,
}

const RECEIVE_HELP: &str = "\
The destination QEMU is started with the source's command line plus `-incoming defer -S`, and with RAM files of the \
same sizes.

Exit codes: 0 the guest runs here (or a dry run ended), 1 nothing was migrated and the source runs on, 2 wrong arguments, \
3 somebody has to act: the message says what to do, 4 the copies differ.";

#[derive(Debug, Args)]
#[command(after_help = RECEIVE_HELP)]
pub(crate) struct Receive {
    /// QMP socket of the destination QEMU
    #[arg(long, value_name = "SOCKET")]
    pub(crate) qmp: PathBuf,
    /// Process of that QEMU, where the socket does not tell: libvirt opens it for QEMU, and other PID namespaces hide it
    #[arg(long, value_name = "PID")]
    pub(crate) pid: Option<u32>,
    /// Address to listen on; port 0 takes any free one
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0")]
    pub(crate) listen: SocketAddr,
    /// Host name or address that the pairing string names, if it is not the one listened on
    #[arg(long, value_name = "HOST")]
    pub(crate) advertise: Option<String>,
    /// Give up if no source has come after so long
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub(crate) wait: Option<Duration>,
    /// Allow an address that is not loopback: memory then crosses the network unencrypted
    #[arg(long)]
    pub(crate) insecure: bool,
    /// One JSON event a line on standard output
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) patience: Patience,
}

fn pairing(text: &str) -> Result<Pairing, String> {
    if text != "-" {
        return text
            .parse()
            .map_err(|error: PairingError| error.to_string());
    }
    let mut line = String::new();
    std::io::stdin()
        .read_line(&mut line)
        .map_err(|error| format!("cannot read standard input: {error}"))?;
    line.parse()
        .map_err(|error: PairingError| error.to_string())
}

const SEND_HELP: &str = "\
The guest keeps running until the last moment; whatever fails before hand-over, it runs on here.

Exit codes: 0 the guest runs at the destination and all of its memory is there (or a dry run ended), 1 nothing was migrated \
and the guest runs on here, 2 wrong arguments, 3 the connection was lost after hand-over, or the guest could not be made to run \
on here: the message says what to do, 4 the copies differ.";

#[derive(Debug, Args)]
#[command(after_help = SEND_HELP)]
pub(crate) struct Send {
    /// QMP socket of the source QEMU
    #[arg(long, value_name = "SOCKET")]
    pub(crate) qmp: PathBuf,
    /// Process of that QEMU, where the socket does not tell: libvirt opens it for QEMU, and other PID namespaces hide it
    #[arg(long, value_name = "PID")]
    pub(crate) pid: Option<u32>,
    /// The string that `memferry qemu receive` printed, or `-` to read it from standard input, where other users of
    /// this host do not see it
    #[arg(value_name = "STRING", value_parser = pairing)]
    pub(crate) pairing: Pairing,
    /// The longest standstill to aim at; with post-copy it is met whatever the guest writes
    #[arg(long, value_name = "TIME", default_value = "60ms", value_parser = humantime::parse_duration)]
    pub(crate) downtime_limit: Duration,
    /// Let the guest run at the destination before all of its memory is there
    #[arg(long, value_enum, default_value_t = PostCopyChoice::Auto)]
    pub(crate) post_copy: PostCopyChoice,
    /// The most bytes a second, for example 100MB or 1GiB; page faults are not limited
    #[arg(long, value_name = "SIZE")]
    pub(crate) max_bandwidth: Option<ByteSize>,
    /// How many connections carry bulk data
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub(crate) lanes: u8,
    /// Compare both copies of the memory, besides the checksum that every chunk carries anyway
    #[arg(long, value_enum, default_value_t = VerifyChoice::After)]
    pub(crate) verify: VerifyChoice,
    /// Only check that it would work, measure, and predict
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Allow an address that is not loopback: memory then crosses the network unencrypted
    #[arg(long)]
    pub(crate) insecure: bool,
    /// One JSON event a line on standard output
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) patience: Patience,
}

#[derive(Debug, Args)]
pub(crate) struct Patience {
    /// Give up on a peer that was silent for so long
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = humantime::parse_duration)]
    pub(crate) peer_timeout: Duration,
    /// Give up on a QEMU that takes so long to suspend, save, load or resume
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = humantime::parse_duration)]
    pub(crate) guest_timeout: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PostCopyChoice {
    /// If the last dirty pages do not fit the downtime limit
    Auto,
    /// Never: give up if the guest writes faster than the link
    Never,
    /// As soon as all memory was sent once
    Always,
}

impl From<PostCopyChoice> for PostCopy {
    fn from(choice: PostCopyChoice) -> Self {
        match choice {
            PostCopyChoice::Auto => Self::Auto,
            PostCopyChoice::Never => Self::Never,
            PostCopyChoice::Always => Self::Always,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum VerifyChoice {
    /// Not at all
    Off,
    /// Before hand-over: lengthens the standstill, and a difference rolls back
    Before,
    /// Once the guest runs at the destination: costs no standstill, and a difference is reported
    After,
}

impl From<VerifyChoice> for Verify {
    fn from(choice: VerifyChoice) -> Self {
        match choice {
            VerifyChoice::Off => Self::Off,
            VerifyChoice::Before => Self::Before,
            VerifyChoice::After => Self::After,
        }
    }
}
