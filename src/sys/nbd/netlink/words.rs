//! Messages and attributes, written and read through neli.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Instant;

use neli::attr::Attribute as _;
use neli::consts::nl::NlmF;
use neli::err::{DeError, SerError, SocketError};
use neli::genl::{AttrTypeBuilder, Genlmsghdr, GenlmsghdrBuilder, Nlattr, NlattrBuilder};
use neli::nl::{NlPayload, Nlmsghdr, NlmsghdrBuilder};
use neli::socket::synchronous::NlSocketHandle;
use neli::types::{Buffer, GenlBuffer};
use neli::{Size, ToBytes};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

pub(super) type Attribute = Nlattr<u16, Buffer>;
pub(super) type Attributes = GenlBuffer<u16, Buffer>;
pub(super) type Message = Genlmsghdr<u8, u16>;

pub(super) fn unsigned(kind: u16, value: u32) -> io::Result<Attribute> {
    attribute(kind, value)
}

pub(super) fn long(kind: u16, value: u64) -> io::Result<Attribute> {
    attribute(kind, value)
}

pub(super) fn attribute(kind: u16, payload: impl Size + ToBytes) -> io::Result<Attribute> {
    let kind = AttrTypeBuilder::default()
        .nla_type(kind)
        .build()
        .map_err(invalid)?;
    NlattrBuilder::default()
        .nla_type(kind)
        .nla_payload(payload)
        .build()
        .map_err(invalid)
}

pub(super) fn message(command: u8, version: u8, attributes: Vec<Attribute>) -> io::Result<Message> {
    GenlmsghdrBuilder::default()
        .cmd(command)
        .version(version)
        .attrs(attributes.into_iter().collect::<GenlBuffer<_, _>>())
        .build()
        .map_err(invalid)
}

pub(super) fn envelope(
    family: u16,
    sequence: u32,
    message: Message,
) -> io::Result<Nlmsghdr<u16, Message>> {
    NlmsghdrBuilder::default()
        .nl_type(family)
        .nl_flags(NlmF::REQUEST | NlmF::ACK)
        .nl_seq(sequence)
        .nl_payload(NlPayload::Payload(message))
        .build()
        .map_err(invalid)
}

pub(super) fn all(attributes: &Attributes, kind: u16) -> impl Iterator<Item = &Attribute> {
    attributes
        .iter()
        .filter(move |attribute| *attribute.nla_type().nla_type() == kind)
}

pub(super) fn find(attributes: &Attributes, kind: u16) -> Option<&Attribute> {
    all(attributes, kind).next()
}

pub(super) fn number(attributes: &Attributes, kind: u16) -> Option<u32> {
    find(attributes, kind)?.get_payload_as().ok()
}

pub(super) fn nested(attribute: &Attribute) -> io::Result<Attributes> {
    attribute
        .get_payload_as_with_len()
        .map_err(|error: DeError| invalid(error))
}

pub(super) fn await_readable(socket: &NlSocketHandle, deadline: Instant) -> io::Result<()> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).map_err(invalid)?;
        let mut polled = [PollFd::from_borrowed_fd(borrow(socket), PollFlags::IN)];
        match poll(&mut polled, Some(&timeout)) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

pub(super) fn borrow(socket: &NlSocketHandle) -> BorrowedFd<'_> {
    // SAFETY: the handle owns its descriptor and keeps it open as long as it is borrowed here.
    unsafe { BorrowedFd::borrow_raw(socket.as_raw_fd()) }
}

pub(super) fn explain(errno: Errno) -> io::Error {
    match errno {
        Errno::PERM | Errno::ACCESS => io::Error::new(
            io::ErrorKind::PermissionDenied,
            "connecting a network block device needs CAP_SYS_ADMIN: run as root",
        ),
        errno => errno.into(),
    }
}

pub(super) fn from_neli(error: SocketError) -> io::Error {
    match error {
        // The copy that the crate shares cannot be taken out; the number says the same.
        SocketError::Io(error) => match error.raw_os_error() {
            Some(number) => io::Error::from_raw_os_error(number),
            None => io::Error::new(error.kind(), error),
        },
        error => invalid(error),
    }
}

pub(super) fn from_encoding(error: SerError) -> io::Error {
    invalid(error)
}

pub(super) fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
