//! What the kernel announces about devices.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recvfrom, socket_with};

/// What the kernel announces, from when this was made.
#[derive(Debug)]
pub struct Uevents {
    socket: OwnedFd,
}

/// One announcement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uevent {
    /// What happened: `add`, `change`, `remove` and others.
    pub action: String,
    /// The kind of device, such as `block`.
    pub subsystem: String,
    /// The device below `/sys`.
    pub device_path: String,
    /// The node below `/dev`; empty if it has none.
    pub device_name: String,
}

/// The kernel sends its own announcements to this group; what udev makes of them goes to another.
const KERNEL_GROUP: u32 = 1;
/// The kernel limits an announcement to 2 KiB of variables and one path.
const LONGEST: usize = 8 << 10;

impl Uevents {
    /// Listens from now on. Needs no privilege.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn listen() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(
            AddressFamily::NETLINK,
            SocketType::DGRAM,
            flags,
            Some(netlink::KOBJECT_UEVENT),
        )?;
        bind(&socket, &SocketAddrNetlink::new(0, KERNEL_GROUP))?;
        Ok(Self { socket })
    }

    /// Waits for the next announcement; `None` if there is none by the deadline.
    ///
    /// # Errors
    /// What the kernel says; `ENOBUFS` if announcements were lost.
    pub fn next(&self, deadline: Instant) -> io::Result<Option<Uevent>> {
        let mut buffer = [MaybeUninit::uninit(); LONGEST];
        loop {
            let timeout = Timespec::try_from(deadline.saturating_duration_since(Instant::now()))
                .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
            let mut polled = [PollFd::new(&self.socket, PollFlags::IN)];
            match poll(&mut polled, Some(&timeout)) {
                Ok(0) => return Ok(None),
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            let received = recvfrom(&self.socket, &mut buffer, RecvFlags::empty());
            let (message, sender) = match received {
                Ok(((message, _), _, sender)) => (message, sender),
                Err(Errno::AGAIN | Errno::INTR) => continue,
                Err(errno) => return Err(errno.into()),
            };
            // Another process may send to the group, too.
            let sender = sender.and_then(|sender| SocketAddrNetlink::try_from(sender).ok());
            if sender.is_none_or(|sender| sender.pid() != 0) {
                continue;
            }
            if let Some(event) = Uevent::parse(message) {
                return Ok(Some(event));
            }
        }
    }
}

impl AsFd for Uevents {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Uevent {
    /// A summary, and behind it variables, each ended by a zero byte. `None` if there is no action in it.
    fn parse(message: &[u8]) -> Option<Self> {
        let variable = |name: &str| {
            message
                .split(|&byte| byte == 0)
                .find_map(|line| line.strip_prefix(name.as_bytes())?.strip_prefix(b"="))
                .map(|value| String::from_utf8_lossy(value).into_owned())
        };
        Some(Self {
            action: variable("ACTION")?,
            subsystem: variable("SUBSYSTEM").unwrap_or_default(),
            device_path: variable("DEVPATH").unwrap_or_default(),
            device_name: variable("DEVNAME").unwrap_or_default(),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn an_announcement_is_read() {
        let message = b"change@/devices/virtual/block/nbd3\0ACTION=change\0DEVPATH=/devices/virtual/block/nbd3\0\
            SUBSYSTEM=block\0MAJOR=43\0MINOR=96\0DEVNAME=nbd3\0DEVTYPE=disk\0SEQNUM=812\0";
        let event = Uevent {
            action: "change".to_owned(),
            subsystem: "block".to_owned(),
            device_path: "/devices/virtual/block/nbd3".to_owned(),
            device_name: "nbd3".to_owned(),
        };
        assert_eq!(Uevent::parse(message), Some(event));
        assert_eq!(Uevent::parse(b"libudev\0\xfe\xed\xca\xfe"), None);
        assert_eq!(Uevent::parse(b""), None);
    }

    #[test]
    fn nothing_comes_by_the_deadline_where_nothing_happens() {
        let events = Uevents::listen().unwrap();
        // Devices of this machine may come and go; they are read through.
        let deadline = Instant::now() + Duration::from_millis(20);
        while events.next(deadline).unwrap().is_some() {}
        assert!(Instant::now() >= deadline);
    }
}
