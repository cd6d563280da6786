//! How attaching and detaching can fail.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::holders::Holder;

/// Why a region did not become a device. Nothing is left of the attempt, but for what is said.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AttachError {
    /// The options cannot be.
    #[error("{0}")]
    Options(String),
    /// The region has no bytes, or more than a device can have.
    #[error(
        "a region of {0} bytes cannot be a block device: it takes from one byte to 8 EiB less one block"
    )]
    Length(u64),
    /// The kernel has no client for network block devices.
    #[error("{0}")]
    Unsupported(#[source] io::Error),
    /// The kernel refused.
    #[error("the kernel does not connect a network block device: {0}")]
    Connect(#[source] io::Error),
    /// By ioctl: all devices are in use.
    #[error(
        "none of the {0} network block devices of this machine is free: detach one, or `modprobe nbd nbds_max=N` with a larger number"
    )]
    NoneFree(usize),
    /// It took too long.
    #[error(
        "{what} took longer than {limit:?}: the kernel's client for network block devices may be stuck, `dmesg` tells"
    )]
    TimedOut {
        /// What was waited for.
        what: &'static str,
        /// For how long.
        limit: Duration,
    },
    /// The device was connected and there is no node for it.
    #[error("{} cannot be opened: {source}", path.display())]
    Open {
        /// The node.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Somebody else took the device meanwhile.
    #[error("{} belongs to somebody else: {found}", path.display())]
    NotOurs {
        /// The node.
        path: PathBuf,
        /// What was found in place of ours.
        found: String,
    },
    /// There was no descriptor, no thread or no memory for it.
    #[error("cannot set up what a device needs: {0}")]
    Resources(#[source] io::Error),
}

/// Why a device was not detached.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DetachError {
    /// Somebody uses it. It is attached as before.
    #[error("{} is in use, {}: end that first", path.display(), list(holders))]
    Busy {
        /// The node.
        path: PathBuf,
        /// Who.
        holders: Vec<Holder>,
    },
    /// What was written to the device is not all in the storage, now or at an earlier attempt. It is attached as before, and detaching will
    /// fail again: write anew what matters through another device, and drop this one.
    #[error("not everything that was written to {} could be saved: {source}", path.display())]
    Unsaved {
        /// The node.
        path: PathBuf,
        /// What the first failure was.
        source: io::Error,
    },
    /// The kernel did not disconnect the device.
    #[error("the kernel does not disconnect {}: {source}", path.display())]
    Disconnect {
        /// The node.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// It was disconnected, and the kernel is not done with it.
    #[error("{} is disconnected, and not free after {limit:?}, {}", path.display(), list(holders))]
    Lingers {
        /// The node.
        path: PathBuf,
        /// For how long was waited.
        limit: Duration,
        /// Who still uses it.
        holders: Vec<Holder>,
    },
    /// It was detached before.
    #[error("{} is detached already", path.display())]
    Detached {
        /// The node.
        path: PathBuf,
    },
}

fn list(holders: &[Holder]) -> String {
    if holders.is_empty() {
        return "by nobody who can be seen".to_owned();
    }
    let holders: Vec<String> = holders.iter().map(ToString::to_string).collect();
    holders.join(", ")
}
