//! Announcements of the kernel's client.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use neli::consts::socket::NlFamily;
use neli::socket::synchronous::NlSocketHandle;
use neli::utils::Groups;

use super::words::{Message, await_readable, borrow, from_neli, invalid, number};
use super::{INDEX, LINK_DEAD, Netlink};

/// What the kernel tells of connections that have died.
pub struct LinkEvents {
    socket: NlSocketHandle,
    family: u16,
}

impl std::fmt::Debug for LinkEvents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LinkEvents").finish_non_exhaustive()
    }
}

impl LinkEvents {
    /// Listens from now on.
    ///
    /// # Errors
    /// As [`Netlink::open`].
    pub fn listen() -> io::Result<Self> {
        let family = Netlink::open()?.family;
        let group = family.group.ok_or_else(|| {
            invalid("the kernel's client for network block devices has no group to listen to")
        })?;
        let socket =
            NlSocketHandle::connect(NlFamily::Generic, None, Groups::empty()).map_err(from_neli)?;
        socket
            .add_mcast_membership(Groups::new_groups(&[group]))
            .map_err(from_neli)?;
        Ok(Self {
            socket,
            family: family.id,
        })
    }

    /// Waits for a connection to die and returns the number of its device; `None` if none has by the deadline.
    ///
    /// # Errors
    /// What the kernel says; `ENOBUFS` if events were lost.
    pub fn next(&self, deadline: Instant) -> io::Result<Option<u32>> {
        loop {
            match await_readable(&self.socket, deadline) {
                Err(error) if error.kind() == io::ErrorKind::TimedOut => return Ok(None),
                readable => readable?,
            }
            let (messages, _) = self.socket.recv::<u16, Message>().map_err(from_neli)?;
            for received in messages {
                let received = received.map_err(from_neli)?;
                let of_client = *received.nl_type() == self.family;
                if let Some(message) = received.get_payload().filter(|_| of_client)
                    && *message.cmd() == LINK_DEAD
                    && let Some(index) = number(message.attrs(), INDEX)
                {
                    return Ok(Some(index));
                }
            }
        }
    }
}

impl AsFd for LinkEvents {
    fn as_fd(&self) -> BorrowedFd<'_> {
        borrow(&self.socket)
    }
}
