//! A process's address space, as `/proc/PID/maps` has it.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use super::{AttachError, process};

/// What code in the process may do with a mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Permissions {
    /// Read it.
    pub read: bool,
    /// Write it.
    pub write: bool,
    /// Execute it.
    pub execute: bool,
}

/// One mapping of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    /// Where it is in the process's address space.
    pub address: Range<u64>,
    /// Where its first byte is in the file, in bytes; 0 without a file.
    pub offset: u64,
    /// What the process may do with it.
    pub permissions: Permissions,
    /// Whether writes reach the file and the others who map it (`MAP_SHARED`).
    pub shared: bool,
    /// Major and minor number of the file's device, as the kernel shows them here. On some file systems (btrfs,
    /// overlays) they are not the ones that stat(2) gives.
    pub device: (u32, u32),
    /// The file's inode; 0 without a file.
    pub inode: u64,
    /// The file's name or the kernel's name for the mapping (`[stack]`), with what the kernel adds: ` (deleted)`.
    pub path: Option<PathBuf>,
}

impl Mapping {
    /// One line of `maps`.
    fn parse(line: &[u8]) -> Option<Self> {
        // The path begins behind spaces and may hold spaces itself.
        let mut rest = line;
        let mut next = || {
            let start = rest.iter().position(|&byte| byte != b' ')?;
            let field = &rest[start..];
            let length = field
                .iter()
                .position(|&byte| byte == b' ')
                .unwrap_or(field.len());
            rest = &field[length..];
            std::str::from_utf8(&field[..length]).ok()
        };
        let (start, end) = next()?.split_once('-')?;
        let flags = next()?.as_bytes();
        let offset = next()?;
        let (major, minor) = next()?.split_once(':')?;
        let inode = next()?;
        let path = rest.trim_ascii_start();
        let hex = |text| u64::from_str_radix(text, 16).ok();
        Some(Self {
            address: hex(start)?..hex(end)?,
            offset: hex(offset)?,
            permissions: Permissions {
                read: flags.first() == Some(&b'r'),
                write: flags.get(1) == Some(&b'w'),
                execute: flags.get(2) == Some(&b'x'),
            },
            shared: flags.get(3) == Some(&b's'),
            device: (
                u32::from_str_radix(major, 16).ok()?,
                u32::from_str_radix(minor, 16).ok()?,
            ),
            inode: inode.parse().ok()?,
            path: (!path.is_empty()).then(|| PathBuf::from(OsStr::from_bytes(path))),
        })
    }
}

/// All mappings of a process, by address.
pub(super) fn of_process(pid: u32) -> Result<Vec<Mapping>, AttachError> {
    let bytes = process::read(pid, format!("/proc/{pid}/maps"))?;
    Ok(bytes
        .split(|&byte| byte == b'\n')
        .filter_map(Mapping::parse)
        .collect())
}

/// The mappings of one file, by address, whatever its name is in that process.
pub(super) fn of_file(pid: u32, file: &File) -> Result<Vec<Mapping>, AttachError> {
    let wanted = file.metadata().map_err(|source| AttachError::Proc {
        path: PathBuf::from("the file whose mappings were asked for"),
        source,
    })?;
    let device = (
        rustix::fs::major(wanted.dev()),
        rustix::fs::minor(wanted.dev()),
    );
    let (mut exact, others): (Vec<_>, Vec<_>) = of_process(pid)?
        .into_iter()
        .filter(|mapping| mapping.inode != 0)
        .partition(|mapping| (mapping.device, mapping.inode) == (device, wanted.ino()));
    if exact.is_empty() {
        // The kernel shows another device here than stat does: ask stat about each.
        exact = others
            .into_iter()
            .filter(|mapping| {
                let Range { start, end } = mapping.address;
                fs::metadata(format!("/proc/{pid}/map_files/{start:x}-{end:x}"))
                    .is_ok_and(|found| (found.dev(), found.ino()) == (wanted.dev(), wanted.ino()))
            })
            .collect();
    }
    Ok(exact)
}

/// The room below a stack pointer that certainly belongs to its stack: down to the end of the main stack's
/// mapping, or to a guard. `None` if the pointer may be anywhere else, such as on a goroutine's stack among other
/// memory, where what lies below may be in use.
pub(super) fn stack_below(mappings: &[Mapping], pointer: u64) -> Option<Range<u64>> {
    let position = mappings
        .iter()
        .position(|mapping| mapping.address.contains(&pointer.saturating_sub(1)))?;
    let stack = &mappings[position];
    if !stack.permissions.write || stack.shared || stack.inode != 0 {
        return None;
    }
    let guarded = || {
        let below = &mappings[position.checked_sub(1)?];
        let closed = below.permissions == Permissions::default();
        (closed && below.address.end == stack.address.start).then_some(())
    };
    let main = stack
        .path
        .as_deref()
        .is_some_and(|path| path.as_os_str() == "[stack]");
    (main || guarded().is_some()).then_some(stack.address.start..pointer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_may_have_spaces_and_the_device_is_hexadecimal() {
        let line = b"7f45f93db000-7f45f9531000 rw-s 00026000 fe:1a 326279                     /dev/shm/a b (deleted)";
        let mapping = Mapping::parse(line).unwrap();
        assert_eq!(mapping.address, 0x7f45_f93d_b000..0x7f45_f953_1000);
        assert_eq!(mapping.device, (0xfe, 0x1a));
        assert_eq!((mapping.offset, mapping.inode), (0x26000, 326_279));
        assert!(mapping.shared && mapping.permissions.write && !mapping.permissions.execute);
        assert_eq!(
            mapping.path.unwrap(),
            PathBuf::from("/dev/shm/a b (deleted)")
        );
    }

    #[test]
    fn a_mapping_without_a_file_has_no_path() {
        let mapping = Mapping::parse(b"7f45f958a000-7f45f9597000 rw-p 00000000 00:00 0 ").unwrap();
        assert_eq!((mapping.inode, mapping.path), (0, None));
    }

    fn maps(text: &str) -> Vec<Mapping> {
        text.lines()
            .filter_map(|line| Mapping::parse(line.as_bytes()))
            .collect()
    }

    #[test]
    fn a_stack_needs_a_guard_below() {
        let guarded = maps("1000-2000 ---p 0 00:00 0\n2000-9000 rw-p 0 00:00 0\n");
        assert_eq!(stack_below(&guarded, 0x5000), Some(0x2000..0x5000));
        let bare = maps("1000-2000 rw-p 0 00:00 0 [heap]\n2000-9000 rw-p 0 00:00 0\n");
        assert_eq!(stack_below(&bare, 0x5000), None);
    }

    #[test]
    fn the_main_stack_needs_no_guard() {
        let main = maps("2000-9000 rw-p 0 00:00 0 [stack]\n");
        assert_eq!(stack_below(&main, 0x5000), Some(0x2000..0x5000));
    }
}
