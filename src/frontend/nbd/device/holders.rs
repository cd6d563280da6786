//! Who uses a block device.

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::RawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{major, minor};

/// Something that uses a block device.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Holder {
    /// A file system on it is mounted there.
    Mount(PathBuf),
    /// It is swapped to.
    Swap,
    /// Another block device is made of it.
    Device(String),
    /// A process has it open, or mapped.
    Process {
        /// The number of the process.
        pid: u32,
        /// Its name.
        name: String,
    },
    /// Somebody has it to himself who cannot be seen from here: in another mount or PID namespace, or the kernel.
    Unknown,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mount(path) => write!(f, "mounted at {}", path.display()),
            Self::Swap => f.write_str("used as swap"),
            Self::Device(name) => write!(f, "used by the device {name}"),
            Self::Process { pid, name } => write!(f, "used by process {pid} ({name})"),
            Self::Unknown => f.write_str("used by somebody who cannot be seen from here"),
        }
    }
}

/// Finds who uses the block device of this number, but for the descriptors `ours` of this process.
///
/// Looks at all descriptors and mappings of all processes that this one may look at, so it takes some milliseconds.
pub(super) fn holders(number: (u32, u32), node: &Path, ours: &[RawFd]) -> Vec<Holder> {
    let mut holders = mounts(number);
    if is_swap(node) {
        holders.push(Holder::Swap);
    }
    let myself = std::process::id();
    let Ok(processes) = fs::read_dir("/proc") else {
        return holders;
    };
    for process in processes.flatten() {
        let name = process.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let excepted: &[RawFd] = if pid == myself { ours } else { &[] };
        if has_open(&process.path(), number, excepted) || has_mapped(&process.path(), number, node)
        {
            let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            holders.push(Holder::Process {
                pid,
                name: name.trim().to_owned(),
            });
        }
    }
    holders
}

fn mounts((major, minor): (u32, u32)) -> Vec<Holder> {
    let number = format!("{major}:{minor}");
    let mounted = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mounted
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ').skip(2);
            let found = words.next()?;
            let place = words.nth(1)?;
            (found == number).then(|| Holder::Mount(unescaped(place)))
        })
        .collect()
}

/// The kernel writes spaces and the like as three octal digits.
fn unescaped(path: &str) -> PathBuf {
    let mut plain = path.to_owned();
    for (escaped, letter) in [
        ("\\040", " "),
        ("\\011", "\t"),
        ("\\012", "\n"),
        ("\\134", "\\"),
    ] {
        plain = plain.replace(escaped, letter);
    }
    PathBuf::from(plain)
}

fn is_swap(node: &Path) -> bool {
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    let node = node.to_string_lossy();
    swaps
        .lines()
        .any(|line| line.split_whitespace().next() == Some(&node))
}

fn has_open(process: &Path, number: (u32, u32), except: &[RawFd]) -> bool {
    let Ok(descriptors) = fs::read_dir(process.join("fd")) else {
        return false;
    };
    descriptors.flatten().any(|descriptor| {
        let name = descriptor.file_name();
        let open = name.to_str().and_then(|name| name.parse().ok());
        if open.is_none_or(|open| except.contains(&open)) {
            return false;
        }
        // The link is read first: to follow those of a network file system may wait.
        let is_node =
            fs::read_link(descriptor.path()).is_ok_and(|target| target.starts_with("/dev"));
        is_node && is_device(&descriptor.path(), number).unwrap_or(false)
    })
}

fn is_device(path: &Path, number: (u32, u32)) -> io::Result<bool> {
    let metadata = fs::metadata(path)?;
    let device = metadata.rdev();
    let is_block = metadata.mode() & 0o170_000 == 0o060_000;
    Ok(is_block && (major(device), minor(device)) == number)
}

/// A mapping of a block device is shown with the name of its node; the number beside it is that of the file system that holds the node.
fn has_mapped(process: &Path, number: (u32, u32), node: &Path) -> bool {
    let node = node.to_string_lossy();
    let mapped = fs::read_to_string(process.join("maps")).unwrap_or_default();
    mapped.lines().any(|line| line.ends_with(&*node))
        && is_device(Path::new(&*node), number).unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_with_spaces_is_read_as_it_is() {
        assert_eq!(
            unescaped("/mnt/a\\040b\\134040"),
            Path::new("/mnt/a b\\040")
        );
    }

    #[test]
    fn nobody_uses_a_device_that_does_not_exist() {
        assert_eq!(holders((43, 1 << 19), Path::new("/dev/nbd-none"), &[]), []);
    }
}
