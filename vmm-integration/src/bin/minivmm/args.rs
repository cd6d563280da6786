//! The arguments.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use memferry::migrate::{PostCopy, Verify};

/// A small virtual machine monitor that live-migrates its guests: the reference for embedding memferry.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXIT_CODES: &str = "\
Exit codes: 0 the machine was told to quit, or the guest asked for its end with 0; the guest's own code, if it asked with another; \
1 the machine could not be made; 2 wrong arguments; 3 the guest ended otherwise.";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Boot a guest
    #[command(after_help = EXIT_CODES)]
    Boot(Boot),
    /// Make a machine like another one and wait for its guest (tell it to `receive`)
    #[command(after_help = EXIT_CODES)]
    Await(Await),
    /// Tell a machine what to do, by its control socket; answers are lines of JSON
    #[command(
        after_help = "Exit codes: 0 it was done, 1 it failed and the answer says why, 2 wrong arguments."
    )]
    Control(Control),
}

#[derive(Debug, Args)]
pub(crate) struct MachineArguments {
    /// The guest's memory: bytes, or with K, M or G
    #[arg(long, value_name = "SIZE", default_value = "64M", value_parser = size)]
    pub(crate) memory: u64,
    /// How many processors
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=16))]
    pub(crate) cpus: u8,
    /// Where the serial console goes: a file, or - for the terminal
    #[arg(long, value_name = "FILE", default_value = "-")]
    pub(crate) console: PathBuf,
    /// A Unix socket to be told what to do
    #[arg(long, value_name = "SOCKET")]
    pub(crate) control: Option<PathBuf>,
    /// How it is found out what the guest writes while it is migrated
    #[arg(long, value_enum, default_value = "log")]
    pub(crate) tracker: Tracking,
}

#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("program").required(true)))]
pub(crate) struct Boot {
    /// A bare program: loaded at 1 MiB, entered in long mode on every processor
    #[arg(long, value_name = "FILE", group = "program")]
    pub(crate) flat: Option<PathBuf>,
    /// What the bare program is told: 64-bit words
    #[arg(long, value_name = "N,...", value_delimiter = ',', requires = "flat")]
    pub(crate) words: Vec<u64>,
    /// A Linux kernel: a bzImage, or an ELF file
    #[arg(long, value_name = "FILE", group = "program")]
    pub(crate) kernel: Option<PathBuf>,
    /// The kernel's command line
    #[arg(
        long,
        value_name = "TEXT",
        requires = "kernel",
        default_value = "console=ttyS0 reboot=k panic=-1 acpi=off"
    )]
    pub(crate) command_line: String,
    /// What the kernel unpacks into its first file system
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub(crate) initramfs: Option<PathBuf>,
    /// Do not run until told to `resume`
    #[arg(long, requires = "control")]
    pub(crate) paused: bool,
    #[command(flatten)]
    pub(crate) machine: MachineArguments,
}

#[derive(Debug, Args)]
pub(crate) struct Await {
    #[command(flatten)]
    pub(crate) machine: MachineArguments,
}

/// How writes are tracked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Tracking {
    /// KVM's dirty log
    Log,
    /// KVM's dirty rings, one a processor
    Ring,
}

#[derive(Debug, Args)]
pub(crate) struct Control {
    /// The machine's control socket
    #[arg(value_name = "SOCKET")]
    pub(crate) socket: PathBuf,
    #[command(subcommand)]
    pub(crate) command: ControlCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ControlCommand {
    /// What the machine does
    Status,
    /// Stop the guest
    Pause {
        /// How long it may take
        #[arg(long, value_name = "MILLISECONDS", default_value_t = 5000)]
        deadline: u64,
    },
    /// Let the guest run
    Resume,
    /// Wait for a guest of another machine; the first answer has the string that `migrate` needs
    Receive {
        /// Where to listen
        #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0")]
        listen: SocketAddr,
        /// Take no guest that runs before all of its memory is here: that needs no privilege
        #[arg(long)]
        without_post_copy: bool,
    },
    /// Migrate the guest to the machine that printed the string
    Migrate {
        /// What `receive` printed
        #[arg(value_name = "PAIRING")]
        pairing: String,
        #[command(flatten)]
        plan: Plan,
    },
    /// Give up a migration
    Cancel,
    /// Type on the guest's serial console
    Type {
        /// What
        text: String,
    },
    /// End the machine
    Quit,
}

/// How a guest is migrated.
#[derive(Debug, Clone, Args, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Plan {
    /// Whether the guest may run at the destination before all of its memory is there
    #[arg(long, value_enum, default_value = "auto")]
    pub(crate) post_copy: PostCopyChoice,
    /// The longest blackout that is aimed at
    #[arg(long, value_name = "MILLISECONDS", default_value_t = 60)]
    pub(crate) downtime: u64,
    /// After so many rounds pre-copy has had its chance
    #[arg(long, value_name = "N", default_value_t = 30)]
    pub(crate) rounds: u32,
    /// Slow the guest down if it writes faster than its memory can be sent, where there is no post-copy
    #[arg(long)]
    pub(crate) throttle: bool,
    /// When the copies are compared
    #[arg(long, value_enum, default_value = "after")]
    pub(crate) verify: VerifyChoice,
    /// The most bytes a second
    #[arg(long, value_name = "BYTES")]
    pub(crate) bandwidth: Option<u64>,
    /// Connections for bulk data
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub(crate) lanes: u8,
    /// The longest time that the guest may take to stop, or to save its state
    #[arg(long, value_name = "MILLISECONDS", default_value_t = 5000)]
    pub(crate) deadline: u64,
    /// The longest time that the other side may be silent
    #[arg(long, value_name = "MILLISECONDS", default_value_t = 10_000)]
    pub(crate) silence: u64,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            post_copy: PostCopyChoice::Auto,
            downtime: 60,
            rounds: 30,
            throttle: false,
            verify: VerifyChoice::After,
            bandwidth: None,
            lanes: 2,
            deadline: 5000,
            silence: 10_000,
        }
    }
}

/// Whether post-copy may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum PostCopyChoice {
    /// Never: pre-copy has to converge
    Never,
    /// If pre-copy does not converge
    Auto,
    /// After one pass over all memory (hybrid)
    AfterOnePass,
    /// At once: nothing is copied before the guest runs at the destination
    AtOnce,
}

impl From<PostCopyChoice> for PostCopy {
    fn from(choice: PostCopyChoice) -> Self {
        match choice {
            PostCopyChoice::Never => Self::Never,
            PostCopyChoice::Auto => Self::Auto,
            PostCopyChoice::AfterOnePass | PostCopyChoice::AtOnce => Self::Always,
        }
    }
}

/// When the copies are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum VerifyChoice {
    /// Not at all
    Off,
    /// Before the guest runs at the destination
    Before,
    /// While it runs there
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

/// The least memory: what is below the programs, and a program.
const LEAST: u64 = 2 << 20;
const PAGE: u64 = 4096;

/// `64M` as bytes.
fn size(text: &str) -> Result<u64, String> {
    let (number, unit) = match text.char_indices().last() {
        Some((at, 'K' | 'k')) => (&text[..at], 1 << 10),
        Some((at, 'M' | 'm')) => (&text[..at], 1 << 20),
        Some((at, 'G' | 'g')) => (&text[..at], 1 << 30),
        _ => (text, 1),
    };
    let number: u64 = number
        .parse()
        .map_err(|_| "a number, and K, M or G if you like".to_owned())?;
    let bytes = number.checked_mul(unit).ok_or("that is too much")?;
    if bytes < LEAST || !bytes.is_multiple_of(PAGE) {
        return Err("2M or more, and whole pages of 4K".into());
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_arguments_fit_together() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn a_size_is_a_number_of_pages() {
        assert_eq!(size("64M"), Ok(64 << 20));
        assert_eq!(size("5g"), Ok(5 << 30));
        assert_eq!(size("2097152"), Ok(2 << 20));
        for wrong in ["", "M", "1M", "2097153", "99999999999G", "2T"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }
}
