//! What a guest begins with: a program in its memory, and processors at the first instruction.

mod flat;
mod linux;
mod long_mode;
mod mp_table;

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use kvm_bindings::{kvm_regs, kvm_sregs};

use crate::machine::Memory;

/// A program to begin with.
#[derive(Debug, Clone)]
pub(crate) enum Program {
    /// Bytes that are loaded at 1 MiB and entered in long mode on every processor.
    Flat {
        /// The file.
        image: PathBuf,
        /// What it is told.
        words: Vec<u64>,
    },
    /// A kernel that follows Linux' boot protocol: a bzImage, or an ELF file with a 64-bit entry.
    Kernel {
        /// The file.
        image: PathBuf,
        /// Its command line.
        command_line: String,
        /// What it unpacks into its first file system.
        initramfs: Option<PathBuf>,
    },
}

/// Where a processor begins.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Start {
    regs: kvm_regs,
}

/// Why a program cannot be booted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootError {
    /// A file cannot be read.
    #[error("{} cannot be read", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is no kernel that is known here.
    #[error("{} is neither a bzImage nor an ELF file; for a bare program use --flat", .0.display())]
    NoKernel(PathBuf),
    /// The kernel cannot be loaded.
    #[error("{} cannot be loaded", path.display())]
    Kernel {
        /// Which.
        path: PathBuf,
        /// Why.
        source: linux_loader::loader::Error,
    },
    /// The kernel has no 64-bit entry.
    #[error("{} cannot be entered in long mode, which is all that is known here", .0.display())]
    NoLongMode(PathBuf),
    /// It does not fit.
    #[error(
        "{what} of {len} bytes does not fit into the guest's memory: give it more with --memory"
    )]
    NoRoom {
        /// What.
        what: &'static str,
        /// Its size.
        len: u64,
    },
    /// Too many words.
    #[error("a flat program is told {most} words at most, and these are {0}", most = flat::MOST_WORDS)]
    TooManyWords(usize),
}

/// A program in memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Loaded {
    start: Start,
    /// Whether all processors begin with it, each told its number, instead of the first alone.
    all: bool,
}

impl Loaded {
    /// The registers of a processor that begins with the program; none for one that waits for the guest to start it.
    pub(crate) fn registers(&self, cpu: u64, reset: kvm_sregs) -> Option<(kvm_regs, kvm_sregs)> {
        (self.all || cpu == 0).then(|| {
            let regs = kvm_regs {
                rdi: cpu,
                ..self.start.regs
            };
            (regs, long_mode::special_registers(reset))
        })
    }
}

/// Puts `program` into `memory`.
pub(crate) fn load(
    program: &Program,
    memory: &Memory,
    cpus: u64,
    tsc_khz: u32,
) -> Result<Loaded, BootError> {
    long_mode::write_tables(memory)?;
    match program {
        Program::Flat { image, words } => {
            let bytes = read(image)?;
            let entry = flat::load(memory, &bytes, words, cpus, tsc_khz)?;
            Ok(Loaded {
                start: Start { regs: entry },
                all: true,
            })
        }
        Program::Kernel {
            image,
            command_line,
            initramfs,
        } => {
            let initramfs = initramfs.as_deref().map(read).transpose()?;
            let entry = linux::load(memory, image, command_line, initramfs.as_deref(), cpus)?;
            Ok(Loaded {
                start: Start { regs: entry },
                all: false,
            })
        }
    }
}

fn open(path: &Path) -> Result<File, BootError> {
    File::open(path).map_err(|source| BootError::File {
        path: path.to_owned(),
        source,
    })
}

fn read(path: &Path) -> Result<Vec<u8>, BootError> {
    let failed = |source| BootError::File {
        path: path.to_owned(),
        source,
    };
    let mut file = open(path)?;
    file.seek(SeekFrom::Start(0)).map_err(failed)?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes)
}
