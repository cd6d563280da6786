//! The second way to talk to the kernel's client, by messages of generic netlink.

mod links;
mod words;

pub use links::LinkEvents;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use neli::attr::Attribute as _;
use neli::consts::socket::NlFamily;
use neli::nl::NlPayload;
use neli::socket::synchronous::NlSocketHandle;
use neli::types::Buffer;
use neli::utils::Groups;
use rustix::io::Errno;

use super::ClientFlags;
use words::{
    Attribute, Message, all, attribute, await_readable, envelope, explain, find, from_encoding,
    from_neli, invalid, long, message, nested, number, unsigned,
};

/// The name of the kernel's client among the families of generic netlink, and of its group of listeners.
const FAMILY: &str = "nbd";
const GROUP: &str = "nbd_mc_group";
const VERSION: u8 = 1;

/// The family that knows all families; its number is fixed.
const CONTROL: u16 = 0x10;
const CONTROL_VERSION: u8 = 2;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;
const FAMILY_GROUPS: u16 = 7;
const GROUP_NAME: u16 = 1;
const GROUP_ID: u16 = 2;

const CONNECT: u8 = 1;
const DISCONNECT: u8 = 2;
const RECONFIGURE: u8 = 3;
const LINK_DEAD: u8 = 4;
const STATUS: u8 = 5;

const INDEX: u16 = 1;
const SIZE_BYTES: u16 = 2;
const BLOCK_SIZE_BYTES: u16 = 3;
const TIMEOUT: u16 = 4;
const SERVER_FLAGS: u16 = 5;
const CLIENT_FLAGS: u16 = 6;
const SOCKETS: u16 = 7;
const DEAD_CONNECTION_TIMEOUT: u16 = 8;
const DEVICE_LIST: u16 = 9;
const BACKEND_IDENTIFIER: u16 = 10;

/// In a list of sockets, and in one item of it.
const SOCKET_ITEM: u16 = 1;
const SOCKET_DESCRIPTOR: u16 = 1;
/// In an item of a list of devices.
const DEVICE_INDEX: u16 = 1;
const DEVICE_CONNECTED: u16 = 2;

/// A socket to the kernel's client. One thread uses it at a time.
pub struct Netlink {
    socket: NlSocketHandle,
    family: Family,
    sequence: u32,
}

/// A device that is wanted.
#[derive(Debug, Clone, Copy)]
pub struct Connect<'a> {
    /// The number in its name; `None` takes any that is free, and makes one where none is.
    pub index: Option<u32>,
    /// Its size in bytes, whole blocks.
    pub size: u64,
    /// The size of a block in bytes, a power of two from 512 to the size of a page.
    pub block_size: u32,
    /// The transmission flags of the protocol: what the server can.
    pub server_flags: u16,
    /// What the kernel does by itself.
    pub client_flags: ClientFlags,
    /// After how long without an answer a connection is taken for dead, to the second; zero is never.
    pub timeout: Duration,
    /// How long requests wait for a new connection after the last one has died, to the second, before they fail.
    pub dead_connection_timeout: Duration,
    /// Whose device it is: whoever changes it later has to say the same. Shown in `/sys/block/nbdN/backend`.
    pub identifier: &'a str,
    /// The connections. The kernel keeps a reference of its own to each.
    pub sockets: &'a [BorrowedFd<'a>],
}

/// A change to a device that is connected.
#[derive(Debug, Clone, Copy)]
pub struct Reconfigure<'a> {
    /// The number in its name.
    pub index: u32,
    /// What was said when it was connected.
    pub identifier: &'a str,
    /// A new size in bytes, if it is to change.
    pub size: Option<u64>,
    /// What the kernel does by itself, if that is to change.
    pub client_flags: Option<ClientFlags>,
    /// Connections to put in place of those that have died, one each.
    pub sockets: &'a [BorrowedFd<'a>],
}

impl std::fmt::Debug for Netlink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Netlink")
            .field("family", &self.family)
            .finish_non_exhaustive()
    }
}

impl Netlink {
    /// Finds the kernel's client.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] if the kernel has none, or none that knows netlink; what the kernel says else.
    pub fn open() -> io::Result<Self> {
        let socket =
            NlSocketHandle::connect(NlFamily::Generic, None, Groups::empty()).map_err(from_neli)?;
        let mut netlink = Self {
            socket,
            family: Family::default(),
            sequence: 0,
        };
        netlink.family = netlink.find_family()?;
        Ok(netlink)
    }

    /// Connects a device, and returns its number. When this returns the device has its size and takes requests.
    ///
    /// The kernel notes the calling *thread* as the owner, in `/sys/block/nbdN/pid`.
    ///
    /// # Errors
    /// [`io::ErrorKind::ResourceBusy`] if the device of the wanted number is in use;
    /// [`io::ErrorKind::PermissionDenied`] without `CAP_SYS_ADMIN`; what the kernel says else: the device was not connected then.
    pub fn connect(&mut self, device: &Connect<'_>, deadline: Instant) -> io::Result<u32> {
        let mut index = None;
        self.call(CONNECT, device.attributes()?, deadline, |message| {
            index = number(message.attrs(), INDEX);
            Ok(())
        })?;
        index.ok_or_else(|| invalid("the kernel connected a device and did not say which"))
    }

    /// Changes a device that is connected.
    ///
    /// # Errors
    /// `EINVAL` if it is not connected or belongs to somebody else; [`io::ErrorKind::StorageFull`] if none of its connections is dead
    /// and so none can be replaced.
    pub fn reconfigure(&mut self, change: &Reconfigure<'_>, deadline: Instant) -> io::Result<()> {
        self.call(RECONFIGURE, change.attributes()?, deadline, |_| Ok(()))
    }

    /// Disconnects a device: tells the server, drops the connections, and fails what is still asked of it. Also one that was connected by
    /// the old way.
    ///
    /// # Errors
    /// `EINVAL` if there is none of this number; not being connected is no error.
    pub fn disconnect(&mut self, index: u32, deadline: Instant) -> io::Result<()> {
        self.call(DISCONNECT, vec![unsigned(INDEX, index)?], deadline, |_| {
            Ok(())
        })
    }

    /// The numbers of the devices that are connected or open.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn in_use(&mut self, deadline: Instant) -> io::Result<Vec<u32>> {
        let mut indices = Vec::new();
        self.call(STATUS, Vec::new(), deadline, |message| {
            for list in all(message.attrs(), DEVICE_LIST) {
                for device in nested(list)?.iter() {
                    let device = nested(device)?;
                    let connected = find(&device, DEVICE_CONNECTED)
                        .and_then(|connected| connected.get_payload_as::<u8>().ok());
                    if connected == Some(1) {
                        indices.extend(number(&device, DEVICE_INDEX));
                    }
                }
            }
            Ok(())
        })?;
        Ok(indices)
    }

    fn find_family(&mut self) -> io::Result<Family> {
        let mut family = Family::default();
        let name = vec![attribute(FAMILY_NAME, FAMILY)?];
        let deadline = Instant::now() + FIND_LIMIT;
        let request = message(GET_FAMILY, CONTROL_VERSION, name)?;
        self.exchange(CONTROL, request, deadline, |message| {
            family.id = find(message.attrs(), FAMILY_ID).and_then(|id| id.get_payload_as().ok()).unwrap_or(0);
            for groups in all(message.attrs(), FAMILY_GROUPS) {
                for group in nested(groups)?.iter() {
                    let group = nested(group)?;
                    let name = find(&group, GROUP_NAME).map(|name| name.payload().as_ref());
                    if name.and_then(|name| name.strip_suffix(b"\0")) == Some(GROUP.as_bytes()) {
                        family.group = number(&group, GROUP_ID);
                    }
                }
            }
            Ok(())
        })
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => io::Error::new(
                io::ErrorKind::Unsupported,
                "the kernel has no client for network block devices that knows netlink: `modprobe nbd`, on Linux 4.12 or \
                 later",
            ),
            _ => error,
        })?;
        if family.id == 0 {
            return Err(invalid(
                "the kernel did not say how its client for network block devices is called",
            ));
        }
        Ok(family)
    }

    fn call(
        &mut self,
        command: u8,
        attributes: Vec<Attribute>,
        deadline: Instant,
        answer: impl FnMut(&Message) -> io::Result<()>,
    ) -> io::Result<()> {
        let request = message(command, VERSION, attributes)?;
        self.exchange(self.family.id, request, deadline, answer)
    }

    /// Sends a request and gives what comes back to `answer`, until the kernel says that it is done. The kernel carries it
    /// out before sending returns, so waiting for the answer is no wait.
    fn exchange(
        &mut self,
        family: u16,
        request: Message,
        deadline: Instant,
        mut answer: impl FnMut(&Message) -> io::Result<()>,
    ) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let request = envelope(family, self.sequence, request)?;
        self.socket.send(&request).map_err(from_neli)?;
        loop {
            await_readable(&self.socket, deadline)?;
            let (messages, _) = self.socket.recv::<u16, Message>().map_err(from_neli)?;
            for received in messages {
                let mut received = received.map_err(from_neli)?;
                // What came too late for an earlier request.
                if *received.nl_seq() != self.sequence {
                    continue;
                }
                if let Some(error) = received.get_err() {
                    return Err(explain(Errno::from_raw_os_error(-error.error())));
                }
                match received.nl_payload() {
                    NlPayload::Ack(_) => return Ok(()),
                    NlPayload::Payload(message) => answer(message)?,
                    _ => {}
                }
            }
        }
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Family {
    id: u16,
    group: Option<u32>,
}

impl Connect<'_> {
    fn attributes(&self) -> io::Result<Vec<Attribute>> {
        let mut attributes = Vec::new();
        if let Some(index) = self.index {
            attributes.push(unsigned(INDEX, index)?);
        }
        attributes.extend([
            long(SIZE_BYTES, self.size)?,
            long(BLOCK_SIZE_BYTES, u64::from(self.block_size))?,
            long(TIMEOUT, whole_seconds(self.timeout))?,
            long(SERVER_FLAGS, u64::from(self.server_flags))?,
            long(CLIENT_FLAGS, self.client_flags.bits())?,
            long(
                DEAD_CONNECTION_TIMEOUT,
                whole_seconds(self.dead_connection_timeout),
            )?,
            attribute(BACKEND_IDENTIFIER, self.identifier)?,
            sockets(self.sockets)?,
        ]);
        Ok(attributes)
    }
}

impl Reconfigure<'_> {
    fn attributes(&self) -> io::Result<Vec<Attribute>> {
        let mut attributes = vec![
            unsigned(INDEX, self.index)?,
            attribute(BACKEND_IDENTIFIER, self.identifier)?,
        ];
        if let Some(size) = self.size {
            attributes.push(long(SIZE_BYTES, size)?);
        }
        if let Some(flags) = self.client_flags {
            attributes.push(long(CLIENT_FLAGS, flags.bits())?);
        }
        if !self.sockets.is_empty() {
            attributes.push(sockets(self.sockets)?);
        }
        Ok(attributes)
    }
}

/// The kernel counts in seconds. Less than one is one: zero would be never.
fn whole_seconds(time: Duration) -> u64 {
    time.as_secs() + u64::from(time.subsec_nanos() > 0)
}

fn sockets(sockets: &[BorrowedFd<'_>]) -> io::Result<Attribute> {
    let mut list = attribute(SOCKETS, Buffer::new())?;
    for socket in sockets {
        let descriptor = u32::try_from(socket.as_raw_fd()).expect("a descriptor is not negative");
        let item = attribute(SOCKET_ITEM, Buffer::new())?
            .nest(&unsigned(SOCKET_DESCRIPTOR, descriptor)?)
            .map_err(from_encoding)?;
        list = list.nest(&item).map_err(from_encoding)?;
    }
    Ok(list)
}

/// Finding the family may make the kernel load a module.
const FIND_LIMIT: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests;
