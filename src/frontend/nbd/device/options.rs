//! How a device is to be.

use std::time::Duration;

/// How a region becomes a block device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceOptions {
    /// Over how many sockets the kernel talks to this process. Each has a queue of its own in the kernel and a thread of its own here.
    pub connections: u16,
    /// The size of a block in bytes, a power of two from 512 to the size of a page. The device is as long as the region,
    /// rounded up to a whole number of blocks.
    pub block_size: u32,
    /// Whether the kernel refuses writes.
    pub read_only: bool,
    /// How long the storage may take for a request. Then whoever asked gets an error, and the device works on. Zero waits for ever. To the
    /// second: the kernel has a limit of its own, a little longer, for the case that this process does not run at all.
    pub timeout: Duration,
    /// How long requests wait for a new connection when the last one has died, to the second, before they fail.
    pub dead_connection_timeout: Duration,
    /// How to find out that the device is there.
    pub readiness: Readiness,
    /// How the kernel is talked to.
    pub control: Control,
    /// How far the kernel reads ahead where it is read in order, in bytes; `None` leaves what it is. A storage that is far away wants as
    /// much as is under way on the link.
    pub read_ahead: Option<u64>,
    /// Whether [`Device::file`](super::Device::file) goes round the page cache (`O_DIRECT`): its offsets, lengths and addresses are whole
    /// blocks then.
    pub direct: bool,
    /// Whether the node `/dev/nbdN` goes away on detaching. It is made anew when it is wanted, which takes longer than to use
    /// one that is there.
    pub remove_node: bool,
    /// How long attaching may take.
    pub attach_limit: Duration,
}

/// How to find out that a device is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Readiness {
    /// Look, again and again.
    #[default]
    Poll,
    /// Have the kernel say so.
    Uevent,
}

/// How the kernel is talked to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Control {
    /// By netlink if the kernel knows it, else by ioctl.
    #[default]
    Auto,
    /// By netlink: a device is made if none is free, and connections that die are replaced.
    Netlink,
    /// By ioctl, as before Linux 4.12: the device has to be there, and ends with its last connection.
    Ioctl,
}

impl Default for DeviceOptions {
    fn default() -> Self {
        Self {
            connections: 2,
            // What the page cache asks for; smaller ones only cost requests.
            block_size: 4096,
            read_only: false,
            // Longer than a storage waits for a peer that is away for a moment, shorter than people wait for a program that hangs.
            timeout: Duration::from_secs(30),
            // Connections are replaced within milliseconds. If this process was killed, readers get their EIO after this time.
            dead_connection_timeout: Duration::from_secs(5),
            readiness: Readiness::Poll,
            control: Control::Auto,
            read_ahead: None,
            direct: false,
            remove_node: false,
            attach_limit: Duration::from_secs(10),
        }
    }
}

/// More would have the kernel make more queues than machines have processors.
const MOST_CONNECTIONS: u16 = 64;

impl DeviceOptions {
    /// After how long without an answer the kernel takes a connection for dead and asks on another one.
    pub(super) fn kernels_timeout(&self) -> Duration {
        if self.timeout.is_zero() {
            return Duration::ZERO;
        }
        // Ours is noticed up to an eighth late. What was under way on a connection that died is asked again only after the kernel's, so that is not
        // longer than it has to be.
        self.timeout
            .saturating_add(self.timeout / 4)
            .saturating_add(Duration::from_secs(1))
    }

    /// What is left to the storage itself if there is no limit.
    pub(super) fn limit(&self) -> Option<Duration> {
        Some(self.timeout).filter(|limit| !limit.is_zero())
    }

    /// What is wrong with them, in words.
    pub(super) fn complaint(&self) -> Option<String> {
        let page = crate::sys::mapping::page_size();
        if self.connections == 0 || self.connections > MOST_CONNECTIONS {
            return Some(format!(
                "a device has from 1 to {MOST_CONNECTIONS} connections, not {}",
                self.connections
            ));
        }
        if !self.block_size.is_power_of_two()
            || self.block_size < 512
            || u64::from(self.block_size) > page
        {
            return Some(format!(
                "a block is a power of two from 512 to {page} bytes, not {}",
                self.block_size
            ));
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_that_no_kernel_takes_are_told() {
        let fine = DeviceOptions::default();
        assert_eq!(fine.complaint(), None);
        for block_size in [0, 511, 1000, 8192, 1 << 30] {
            let options = DeviceOptions {
                block_size,
                ..fine.clone()
            };
            assert!(options.complaint().is_some(), "{block_size}");
        }
        for connections in [0, 65] {
            let options = DeviceOptions {
                connections,
                ..fine.clone()
            };
            assert!(options.complaint().is_some(), "{connections}");
        }
    }
}
