//! The kernel's own client for network block devices: what turns a socket into `/dev/nbdN`.
//!
//! [`Netlink`] is the way to talk to it; [`ioctl`] is what there was before Linux 4.12, with one thread that lives in the
//! kernel as long as the device. Both hand sockets over that are in the transmission phase already: nothing is negotiated.
//!
//! Whoever talks to it needs `CAP_SYS_ADMIN`.

pub mod ioctl;
mod netlink;

pub use netlink::{Connect, LinkEvents, Netlink, Reconfigure};

use std::ops::BitOr;

/// What the kernel does with a device by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ClientFlags(u64);

impl ClientFlags {
    /// The device node goes away when the device is disconnected.
    pub const DESTROY_ON_DISCONNECT: Self = Self(1 << 0);
    /// The device is disconnected when the last one that has it open closes it.
    pub const DISCONNECT_ON_CLOSE: Self = Self(1 << 1);

    /// The bits, as the kernel numbers them.
    #[must_use]
    pub fn bits(self) -> u64 {
        self.0
    }
}

impl BitOr for ClientFlags {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}
