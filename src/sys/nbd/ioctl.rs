//! The first way to talk to the kernel's client, by a descriptor of the device.
//!
//! The order is: [`set_socket`] for each socket and the settings, all by one thread; then [`run`] by a thread that has
//! nothing else to do; [`disconnect`] by any; and [`clear_socket`] when `run` has returned. The first `set_socket` is what claims the
//! device: the kernel refuses it to everybody else until the sockets are cleared.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use rustix::io::Errno;
use rustix::ioctl::{IntegerSetter, NoArg, opcode};

/// All requests are numbered under this letter.
const GROUP: u8 = 0xab;
const SET_SOCK: rustix::ioctl::Opcode = opcode::none(GROUP, 0);
const SET_BLKSIZE: rustix::ioctl::Opcode = opcode::none(GROUP, 1);
const DO_IT: rustix::ioctl::Opcode = opcode::none(GROUP, 3);
const CLEAR_SOCK: rustix::ioctl::Opcode = opcode::none(GROUP, 4);
const CLEAR_QUE: rustix::ioctl::Opcode = opcode::none(GROUP, 5);
const SET_SIZE_BLOCKS: rustix::ioctl::Opcode = opcode::none(GROUP, 7);
const DISCONNECT: rustix::ioctl::Opcode = opcode::none(GROUP, 8);
const SET_TIMEOUT: rustix::ioctl::Opcode = opcode::none(GROUP, 9);
const SET_FLAGS: rustix::ioctl::Opcode = opcode::none(GROUP, 10);

/// Gives the device a socket, in the transmission phase. Claims the device for the calling thread.
///
/// # Errors
/// [`io::ErrorKind::ResourceBusy`] if the device belongs to somebody else.
pub fn set_socket(device: impl AsFd, socket: impl AsFd) -> io::Result<()> {
    let socket = socket.as_fd().as_raw_fd();
    set::<SET_SOCK>(
        device,
        usize::try_from(socket).expect("a descriptor is not negative"),
    )
}

/// Sets the size of a block, a power of two from 512 to the size of a page, and how many there are.
///
/// # Errors
/// `EINVAL` for another size of a block or for more bytes than the kernel can count.
pub fn set_blocks(device: impl AsFd, block_size: u32, blocks: u64) -> io::Result<()> {
    let too_many = |_| io::Error::from(io::ErrorKind::InvalidInput);
    set::<SET_BLKSIZE>(&device, usize::try_from(block_size).map_err(too_many)?)?;
    set::<SET_SIZE_BLOCKS>(&device, usize::try_from(blocks).map_err(too_many)?)
}

/// Says what the server can, as the transmission flags of the protocol.
///
/// # Errors
/// If the device belongs to somebody else.
pub fn set_flags(device: impl AsFd, transmission_flags: u16) -> io::Result<()> {
    set::<SET_FLAGS>(device, usize::from(transmission_flags))
}

/// Sets after how many seconds a request has failed; zero is never.
///
/// # Errors
/// If the device belongs to somebody else.
pub fn set_timeout(device: impl AsFd, seconds: u32) -> io::Result<()> {
    let seconds =
        usize::try_from(seconds).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    set::<SET_TIMEOUT>(device, seconds)
}

/// Runs the device. **Blocks** until it is disconnected or its sockets are dead; ends also when a signal comes for the
/// calling thread.
///
/// # Errors
/// `EINVAL` for several sockets whose server did not say that it can have several connections; else how the device ended.
pub fn run(device: impl AsFd) -> io::Result<()> {
    call::<DO_IT>(device)
}

/// Asks for the device to be disconnected: tells the server, and makes [`run`] return.
///
/// # Errors
/// If there is nothing to disconnect.
pub fn disconnect(device: impl AsFd) -> io::Result<()> {
    call::<DISCONNECT>(device)
}

/// Fails the requests that nobody will answer any more. Newer kernels do it by themselves.
///
/// # Errors
/// If the device is not set up.
pub fn clear_queue(device: impl AsFd) -> io::Result<()> {
    call::<CLEAR_QUE>(device)
}

/// Takes the sockets away from the device, which can be claimed again then. Frees a device whose owner has gone, too.
///
/// # Errors
/// If the device is not set up.
pub fn clear_socket(device: impl AsFd) -> io::Result<()> {
    call::<CLEAR_SOCK>(device)
}

fn set<const OPCODE: rustix::ioctl::Opcode>(device: impl AsFd, value: usize) -> io::Result<()> {
    // SAFETY: each of these requests takes a number and touches no memory of the caller's.
    let request = unsafe { IntegerSetter::<OPCODE>::new_usize(value) };
    // SAFETY: as above; on a descriptor that is no such device the kernel answers with an error.
    unsafe { rustix::ioctl::ioctl(device, request) }.map_err(explain)
}

fn call<const OPCODE: rustix::ioctl::Opcode>(device: impl AsFd) -> io::Result<()> {
    // SAFETY: each of these requests takes no argument and touches no memory of the caller's.
    let request = unsafe { NoArg::<OPCODE>::new() };
    // SAFETY: as above; on a descriptor that is no such device the kernel answers with an error.
    unsafe { rustix::ioctl::ioctl(device, request) }.map_err(explain)
}

fn explain(errno: Errno) -> io::Error {
    match errno {
        Errno::PERM => io::Error::new(
            io::ErrorKind::PermissionDenied,
            "setting up a network block device needs CAP_SYS_ADMIN: run as root",
        ),
        errno => errno.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_numbered_as_the_kernel_numbers_them() {
        // From the kernel's <linux/nbd.h>: `_IO(0xab, n)`.
        let numbers = [
            SET_SOCK,
            SET_BLKSIZE,
            DO_IT,
            CLEAR_SOCK,
            CLEAR_QUE,
            SET_SIZE_BLOCKS,
            DISCONNECT,
            SET_TIMEOUT,
            SET_FLAGS,
        ];
        let expected = [
            0xab00, 0xab01, 0xab03, 0xab04, 0xab05, 0xab07, 0xab08, 0xab09, 0xab0a,
        ];
        assert_eq!(numbers, expected);
    }

    #[test]
    fn what_is_no_such_device_is_refused() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(set_socket(&file, &socket).is_err());
        assert!(set_blocks(&file, 4096, 1).is_err());
        assert!(run(&file).is_err());
        assert!(disconnect(&file).is_err());
        assert!(clear_queue(&file).is_err());
        assert!(clear_socket(&file).is_err());
    }
}
