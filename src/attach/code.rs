//! The target's own code, in which the gadgets are found.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use super::arch::{Gadgets, Search};
use super::mappings::Mapping;
use super::{AttachError, process};

/// How much is read at a time, in bytes.
const PIECE: usize = 1 << 20;

/// The code of one program: of another one that the process executes later, this reads nothing.
#[derive(Debug)]
pub(super) struct Code {
    memory: File,
    pub(super) gadgets: Gadgets,
}

impl Code {
    /// Looks for the gadgets in the code of files, the C library first: nothing writes there, and that library
    /// stays. Where they were the last time is looked at before anything else.
    pub(super) fn find(
        pid: u32,
        mappings: &[Mapping],
        known: Option<Gadgets>,
    ) -> Result<Self, AttachError> {
        let path = PathBuf::from(format!("/proc/{pid}/mem"));
        let memory = File::open(&path).map_err(|source| process::failed(pid, path, source))?;
        if let Some(gadgets) = known {
            let code = Self { memory, gadgets };
            if code.is_in(mappings) && code.is_unchanged() {
                return Ok(code);
            }
            return Self::find(pid, mappings, None);
        }
        let mut files: Vec<_> = mappings.iter().filter(|mapping| is_code(mapping)).collect();
        files.sort_by_key(|mapping| !is_c_library(mapping));
        let mut search = Search::default();
        let mut piece = vec![0; PIECE];
        for mapping in files {
            if look_through(&memory, mapping, &mut piece, &mut search) {
                break;
            }
        }
        let gadgets = search.found().ok_or(AttachError::NoGadget {
            pid,
            names: Gadgets::NAMES,
        })?;
        Ok(Self { memory, gadgets })
    }

    fn is_in(&self, mappings: &[Mapping]) -> bool {
        self.gadgets.patterns().iter().all(|(address, _)| {
            mappings
                .iter()
                .any(|mapping| is_code(mapping) && mapping.address.contains(address))
        })
    }

    /// Whether the gadgets are where they were found.
    pub(super) fn is_unchanged(&self) -> bool {
        self.gadgets.patterns().iter().all(|(address, pattern)| {
            let mut bytes = [0; Gadgets::LONGEST];
            let bytes = &mut bytes[..pattern.len()];
            self.memory.read_exact_at(bytes, *address).is_ok() && bytes == *pattern
        })
    }

    /// Reads 64-bit words of the program's memory.
    pub(super) fn read_words(&self, address: u64, words: &mut [[u8; 8]]) -> std::io::Result<()> {
        self.memory.read_exact_at(words.as_flattened_mut(), address)
    }
}

fn is_code(mapping: &Mapping) -> bool {
    mapping.permissions.execute && mapping.inode != 0 && !mapping.shared
}

fn is_c_library(mapping: &Mapping) -> bool {
    let name = mapping
        .path
        .as_deref()
        .and_then(|path| path.file_name()?.to_str());
    name.is_some_and(|name| name.starts_with("libc") || name.starts_with("ld-musl"))
}

/// Looks through one mapping in overlapping pieces. True when there is nothing better to find.
fn look_through(memory: &File, mapping: &Mapping, piece: &mut [u8], search: &mut Search) -> bool {
    let mut at = mapping.address.start;
    while at < mapping.address.end {
        let left = mapping.address.end - at;
        let length = usize::try_from(left).map_or(piece.len(), |left| left.min(piece.len()));
        // What cannot be read is not looked at: the file may be shorter than its mapping.
        let Ok(read @ 1..) = memory.read_at(&mut piece[..length], at) else {
            break;
        };
        if search.look(at, &piece[..read]) {
            return true;
        }
        let last = read as u64 == left;
        let step = if last {
            read
        } else {
            read.saturating_sub(Gadgets::LONGEST - 1).max(1)
        };
        at += step as u64;
    }
    false
}
