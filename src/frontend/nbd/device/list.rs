//! All network block devices of this machine, and how to free one that nobody serves any more.

use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::holders::{Holder, holders};
use super::sysfs::{Shown, Sysfs, node};
use super::{liveness, wait};
use crate::sys::nbd::{Netlink, ioctl};

/// A network block device of this machine's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedDevice {
    /// The number in its name.
    pub index: u32,
    /// The node: `/dev/nbdN`.
    pub path: PathBuf,
    /// Its length in bytes; zero if it is not connected.
    pub len: u64,
    /// Whether the kernel refuses writes.
    pub read_only: bool,
    /// Who serves it.
    pub state: DeviceState,
    /// How many reads and writes are under way. Some that do not become fewer, on a device that nobody serves, wait for a timeout.
    pub in_flight: u64,
}

/// Who serves a network block device.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeviceState {
    /// Nobody: it can be connected.
    Free,
    /// Whoever connected it is alive.
    Served {
        /// The thread that did, if it can be seen from here.
        pid: Option<u32>,
    },
    /// A process that served it has ended and left it behind: nobody will answer.
    Abandoned {
        /// What it is called in `/sys/block/nbdN/backend`.
        identifier: String,
    },
    /// Whoever connected it has ended. It may well work: clients of a server elsewhere do so and leave the rest to the kernel.
    Unattended {
        /// The thread that did.
        pid: u32,
    },
}

/// What may be freed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Force {
    /// Only what is known to be served by nobody.
    OnlyAbandoned,
    /// Whatever it is. Who uses it gets errors from then on, and unsaved data are lost.
    Whatever,
}

/// Why a device was not freed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FreeError {
    /// There is none.
    #[error("there is no {}: `memferry device list` shows those there are", path.display())]
    None {
        /// Where it would be.
        path: PathBuf,
    },
    /// Somebody serves it, or may.
    #[error("{} is not abandoned ({state:?}): end whoever serves it, or free it by force", path.display())]
    NotAbandoned {
        /// The node.
        path: PathBuf,
        /// Who serves it.
        state: DeviceState,
    },
    /// It is disconnected, and will be free when nobody uses it any more.
    #[error("{} is disconnected, and in use by {holders:?}: end that, and it is free", path.display())]
    InUse {
        /// The node.
        path: PathBuf,
        /// Who uses it.
        holders: Vec<Holder>,
    },
    /// The kernel refused, or does not tell.
    #[error("{} cannot be freed: {source}", path.display())]
    Kernel {
        /// The node.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
}

/// All network block devices of this machine, by number. None if the kernel has no client for them.
///
/// # Errors
/// What the kernel says of its files.
pub fn devices() -> io::Result<Vec<ListedDevice>> {
    Sysfs::default().devices()?.iter().map(listed).collect()
}

/// Disconnects a device that was left behind, and waits until it is free.
///
/// Needs `CAP_SYS_ADMIN`, and for [`Force::OnlyAbandoned`] the first PID namespace, where it can be seen who is alive.
///
/// # Errors
/// [`FreeError`].
pub fn free(index: u32, force: Force, limit: Duration) -> Result<(), FreeError> {
    let shown = Sysfs::default().device(index);
    let path = node(index);
    let kernel = |source| FreeError::Kernel {
        path: path.clone(),
        source,
    };
    if !shown.exists() {
        return Err(FreeError::None { path });
    }
    let state = listed(&shown).map_err(kernel)?.state;
    match (&state, force) {
        (DeviceState::Free, _) => return Ok(()),
        (DeviceState::Abandoned { .. }, _) | (_, Force::Whatever) => {}
        _ => return Err(FreeError::NotAbandoned { path, state }),
    }
    let deadline = wait::within(limit);
    disconnect(index, deadline).map_err(kernel)?;
    let is_free = || (shown.size().ok()? == 0 && shown.pid().ok()?.is_none()).then_some(());
    wait::until(deadline, is_free).ok_or_else(|| FreeError::InUse {
        holders: shown
            .number()
            .ok()
            .flatten()
            .map_or_else(Vec::new, |number| holders(number, &path, &[])),
        path: path.clone(),
    })
}

fn disconnect(index: u32, deadline: Instant) -> io::Result<()> {
    match Netlink::open() {
        Ok(mut netlink) => netlink.disconnect(index, deadline),
        Err(error) if error.kind() == io::ErrorKind::Unsupported => {
            let device = std::fs::File::options()
                .read(true)
                .write(true)
                .open(node(index))?;
            let _told = ioctl::disconnect(&device);
            ioctl::clear_socket(&device)
        }
        Err(error) => Err(error),
    }
}

fn listed(shown: &Shown) -> io::Result<ListedDevice> {
    let len = shown.size()?;
    Ok(ListedDevice {
        index: shown.index,
        path: node(shown.index),
        len,
        read_only: len > 0 && shown.is_read_only()?,
        state: state(shown, len)?,
        in_flight: shown.in_flight()?,
    })
}

fn state(shown: &Shown, len: u64) -> io::Result<DeviceState> {
    let pid = shown.pid()?;
    let identifier = shown.backend()?;
    let Some(pid) = pid else {
        // Some size and nobody: one that was disconnected while somebody has it open, and that no one can connect until he closes it.
        return Ok(match (len, identifier) {
            (0, _) => DeviceState::Free,
            (_, identifier) => DeviceState::Abandoned {
                identifier: identifier.unwrap_or_default(),
            },
        });
    };
    if !liveness::sees_all_processes() {
        return Ok(DeviceState::Served { pid: None });
    }
    if let Some(identifier) = identifier
        && let Some(alive) = liveness::is_alive(&identifier)
    {
        return Ok(if alive {
            DeviceState::Served { pid: Some(pid) }
        } else {
            DeviceState::Abandoned { identifier }
        });
    }
    Ok(if liveness::exists(pid) {
        DeviceState::Served { pid: Some(pid) }
    } else {
        DeviceState::Unattended { pid }
    })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    fn device(root: &Path, files: &[(&str, &str)]) -> ListedDevice {
        let folder = root.join("nbd0");
        fs::create_dir_all(&folder).unwrap();
        for (name, text) in files {
            fs::write(folder.join(name), text).unwrap();
        }
        listed(&Sysfs::at(root).device(0)).unwrap()
    }

    #[test]
    fn a_device_that_is_not_connected_is_free() {
        let root = tempfile::tempdir().unwrap();
        let listed = device(root.path(), &[("size", "0\n"), ("inflight", "0 0\n")]);
        assert_eq!(listed.state, DeviceState::Free);
        assert_eq!(listed.len, 0);
    }

    #[test]
    fn one_that_was_disconnected_and_has_a_size_is_abandoned() {
        let root = tempfile::tempdir().unwrap();
        let listed = device(root.path(), &[("size", "16\n")]);
        assert!(
            matches!(listed.state, DeviceState::Abandoned { .. }),
            "{listed:?}"
        );
        assert_eq!(listed.len, 8192);
    }

    #[test]
    fn freeing_what_does_not_exist_says_so() {
        let error = free(1 << 19, Force::Whatever, Duration::ZERO).unwrap_err();
        assert!(matches!(error, FreeError::None { .. }), "{error}");
    }
}
