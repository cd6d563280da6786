//! One connection to a server: bytes there and back, plain or over TLS.

use std::io::{self, IoSlice};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown, SocketAddrUnix,
    SocketFlags, SocketType,
};

use super::NbdPlace;
use super::tls::{Tls, TlsConfig};

/// How often a thread that waits for bytes looks whether its deadline has passed. The kernel keeps this time, so a deadline costs
/// no system call of its own.
const TICK: Duration = Duration::from_millis(100);

/// After how long a silent peer is asked by the kernel whether it is still there, and how often.
const KEEPALIVE: Duration = Duration::from_secs(10);
const PROBES: u32 = 3;

/// A connection. One thread may send while another receives.
#[derive(Debug)]
pub(super) struct Wire {
    socket: OwnedFd,
    tls: Option<Box<Tls>>,
}

impl Wire {
    /// Connects.
    ///
    /// Buffers are left to the kernel, which sizes those of TCP by what bandwidth and round trip need; a size set by hand would be
    /// capped far below.
    pub(super) fn dial(place: &NbdPlace, deadline: Instant) -> io::Result<Self> {
        let socket = match place {
            NbdPlace::Tcp { host, port } => {
                let stream = dial_any((host.as_str(), *port).to_socket_addrs()?, deadline)?;
                stream.set_nodelay(true)?;
                sockopt::set_socket_keepalive(&stream, true)?;
                sockopt::set_tcp_keepidle(&stream, KEEPALIVE)?;
                sockopt::set_tcp_keepintvl(&stream, KEEPALIVE)?;
                sockopt::set_tcp_keepcnt(&stream, PROBES)?;
                OwnedFd::from(stream)
            }
            NbdPlace::Unix(path) => {
                let socket = rustix::net::socket_with(
                    AddressFamily::UNIX,
                    SocketType::STREAM,
                    SocketFlags::CLOEXEC,
                    None,
                )?;
                // A server that accepts nobody lets those wait who come when its queue is full.
                let patience = left(deadline)?;
                sockopt::set_socket_timeout(&socket, Timeout::Send, Some(patience))?;
                rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
                socket
            }
        };
        sockopt::set_socket_timeout(&socket, Timeout::Recv, Some(TICK))?;
        Ok(Self { socket, tls: None })
    }

    /// Speaks TLS from here on; nothing may have been received that belongs to it.
    pub(super) fn start_tls(self, config: &TlsConfig, deadline: Instant) -> io::Result<Self> {
        let tls = Tls::handshake(&self, config, deadline)?;
        Ok(Self {
            socket: self.socket,
            tls: Some(Box::new(tls)),
        })
    }

    /// Receives what there is, at least a byte; all of `buf` if it is `whole` and no deadline passes. 0 is the end.
    pub(super) fn receive(
        &self,
        buf: &mut [u8],
        whole: bool,
        deadline: Instant,
    ) -> io::Result<usize> {
        match &self.tls {
            Some(tls) => tls.receive(self, buf, deadline),
            None => self.receive_raw(buf, whole, deadline),
        }
    }

    /// As [`receive`](Self::receive), beneath TLS.
    pub(super) fn receive_raw(
        &self,
        buf: &mut [u8],
        whole: bool,
        deadline: Instant,
    ) -> io::Result<usize> {
        let flags = if whole {
            RecvFlags::WAITALL
        } else {
            RecvFlags::empty()
        };
        loop {
            match rustix::net::recv(&self.socket, &mut *buf, flags) {
                Ok((received, _)) => return Ok(received),
                Err(Errno::AGAIN) => {
                    left(deadline)?;
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Sends all of `parts`. Where the peer does not take more, calls `stuck` with the number of bytes that it took, which waits until it
    /// may take more, or does something useful.
    pub(super) fn send(
        &self,
        mut parts: &mut [IoSlice<'_>],
        mut stuck: impl FnMut(&Self, usize) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut total = 0;
        loop {
            let sent = match (&self.tls, parts.is_empty()) {
                (Some(tls), true) => tls.try_flush(self).map(|()| 0),
                (Some(tls), false) => tls.try_send(self, parts),
                (None, true) => Ok(0),
                (None, false) => self.send_raw(parts),
            };
            match sent {
                Ok(_) if parts.is_empty() => return Ok(()),
                Ok(sent) => {
                    total += sent;
                    IoSlice::advance_slices(&mut parts, sent);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => stuck(self, total)?,
                Err(error) => return Err(error),
            }
        }
    }

    /// Sends what the peer takes at once, beneath TLS.
    pub(super) fn send_raw(&self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        // More than the kernel takes in one call would be refused.
        let parts = &parts[..parts.len().min(512)];
        loop {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            let sent = match parts {
                [part] => rustix::net::send(&self.socket, part, flags),
                parts => {
                    let mut control = SendAncillaryBuffer::default();
                    rustix::net::sendmsg(&self.socket, parts, &mut control, flags)
                }
            };
            match sent {
                Err(Errno::INTR) => {}
                sent => return Ok(sent?),
            }
        }
    }

    /// Waits until more can be sent, or until something has come if that is `also` waited for; not longer than a tick, and an
    /// error once `deadline` has passed.
    pub(super) fn wait_to_send(&self, also: Also, deadline: Instant) -> io::Result<()> {
        let patience = left(deadline)?.min(TICK);
        let flags = match also {
            Also::Nothing => PollFlags::OUT,
            Also::Receive => PollFlags::OUT | PollFlags::IN,
        };
        let mut fds = [PollFd::from_borrowed_fd(self.socket.as_fd(), flags)];
        match poll(&mut fds, Some(&timespec(patience))) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Whether something has come, or the end. Only for who may receive.
    pub(super) fn has_something(&self) -> bool {
        if self.tls.as_ref().is_some_and(|tls| tls.has_something()) {
            return true;
        }
        let mut fds = [PollFd::from_borrowed_fd(self.socket.as_fd(), PollFlags::IN)];
        poll(&mut fds, Some(&timespec(Duration::ZERO))).is_ok_and(|ready| ready > 0)
    }

    /// Ends the connection, also for threads that wait on it.
    pub(super) fn shut_down(&self) {
        // An error says that it has ended already.
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Both);
    }
}

/// What else a thread that waits to send waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Also {
    Nothing,
    Receive,
}

/// The time until `deadline`; an error if it has passed.
pub(super) fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "the server did not answer in time",
        ));
    }
    Ok(left)
}

fn timespec(time: Duration) -> Timespec {
    Timespec::try_from(time).unwrap_or(Timespec {
        tv_sec: 1,
        tv_nsec: 0,
    })
}

fn dial_any(
    addresses: impl Iterator<Item = SocketAddr>,
    deadline: Instant,
) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in addresses {
        match TcpStream::connect_timeout(&address, left(deadline)?) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}
