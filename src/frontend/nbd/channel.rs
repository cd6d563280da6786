//! A connected socket, with TLS over it or without.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown, recv, sendmsg, shutdown};

#[cfg(feature = "tls")]
use super::tls::TlsStream;

/// So many bytes of replies may wait in a socket that is not TCP's, which sizes itself.
const SEND_BUFFER: usize = 4 << 20;

/// A connected socket. One thread reads, another may write at the same time.
#[derive(Debug)]
pub(super) struct Channel {
    socket: OwnedFd,
    #[cfg(feature = "tls")]
    tls: Option<TlsStream>,
}

impl Channel {
    /// Speaks over `socket`, TCP's or another's.
    pub(super) fn new(socket: OwnedFd) -> io::Result<Self> {
        use rustix::net::sockopt;
        // Replies are sent when they are complete; and a peer whose host is gone is found out by probes.
        if sockopt::set_tcp_nodelay(&socket, true).is_ok() {
            sockopt::set_socket_keepalive(&socket, true)?;
            sockopt::set_tcp_keepidle(&socket, Duration::from_secs(30))?;
            sockopt::set_tcp_keepintvl(&socket, Duration::from_secs(10))?;
            sockopt::set_tcp_keepcnt(&socket, 3)?;
        } else {
            // Any other socket holds what it is made with, and each time it is full somebody has to be woken. The kernel cuts
            // this to what it allows, which is more than what it begins with.
            sockopt::set_socket_send_buffer_size(&socket, SEND_BUFFER)?;
        }
        // Deadlines are kept by polling; a socket that is given may have been used otherwise before.
        rustix::io::ioctl_fionbio(&socket, false)?;
        Ok(Self {
            socket,
            #[cfg(feature = "tls")]
            tls: None,
        })
    }

    /// Reads some bytes, at least one; none at the end. Waits until `deadline`, or for as long as it takes.
    pub(super) fn recv(&self, buf: &mut [u8], deadline: Option<Instant>) -> io::Result<usize> {
        #[cfg(feature = "tls")]
        if let Some(tls) = &self.tls {
            return tls.recv(buf, |cipher| recv_plain(&self.socket, cipher, deadline));
        }
        recv_plain(&self.socket, buf, deadline)
    }

    /// Fills `buf`.
    pub(super) fn recv_exact(&self, buf: &mut [u8], deadline: Instant) -> io::Result<()> {
        let mut filled = 0;
        while filled < buf.len() {
            match self.recv(&mut buf[filled..], Some(deadline))? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => filled += read,
            }
        }
        Ok(())
    }

    /// Sends some of the bytes, without waiting: [`io::ErrorKind::WouldBlock`] if none are taken now.
    pub(super) fn send(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        #[cfg(feature = "tls")]
        if let Some(tls) = &self.tls {
            return tls.send(slices, |cipher| {
                send_plain(&self.socket, &[IoSlice::new(cipher)])
            });
        }
        send_plain(&self.socket, slices)
    }

    /// Sends what [`send`](Self::send) took and has not sent, without waiting.
    pub(super) fn push(&self) -> io::Result<()> {
        #[cfg(feature = "tls")]
        if let Some(tls) = &self.tls {
            return tls.push(|cipher| send_plain(&self.socket, &[IoSlice::new(cipher)]));
        }
        Ok(())
    }

    /// Sends all of `bytes`.
    pub(super) fn send_all(&self, mut bytes: &[u8], deadline: Instant) -> io::Result<()> {
        loop {
            let sent = match bytes {
                [] => self.push().map(|()| 0),
                _ => self.send(&[IoSlice::new(bytes)]),
            };
            match sent {
                Ok(0) if bytes.is_empty() => return Ok(()),
                Ok(sent) => bytes = &bytes[sent..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if !self.wait_writable(deadline)? {
                        return Err(too_slow());
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Waits until `deadline` for the peer to take what it was sent; tells whether it did.
    pub(super) fn wait_writable(&self, deadline: Instant) -> io::Result<bool> {
        wait(&self.socket, PollFlags::OUT, deadline)
    }

    /// Has reads find the end, also of a thread that waits in one.
    pub(super) fn end_reading(&self) {
        // It may have ended already, which is as good; the same below.
        let _ = shutdown(&self.socket, Shutdown::Read);
    }

    /// Ends both directions, also for threads that wait.
    pub(super) fn end(&self) {
        let _ = shutdown(&self.socket, Shutdown::Both);
    }

    /// Says that nothing more will be sent.
    pub(super) fn end_sending(&self) {
        #[cfg(feature = "tls")]
        if let Some(tls) = &self.tls {
            let _ = tls.end(|cipher| send_plain(&self.socket, &[IoSlice::new(cipher)]));
        }
        let _ = shutdown(&self.socket, Shutdown::Write);
    }

    /// Speaks TLS from here on, once hands were shaken.
    #[cfg(feature = "tls")]
    pub(super) fn start_tls(
        &mut self,
        config: std::sync::Arc<rustls::ServerConfig>,
        deadline: Instant,
    ) -> io::Result<()> {
        let tls = TlsStream::shake_hands(
            config,
            |cipher| recv_plain(&self.socket, cipher, Some(deadline)),
            |cipher| {
                let mut rest = cipher;
                while !rest.is_empty() {
                    match send_plain(&self.socket, &[IoSlice::new(rest)]) {
                        Ok(sent) => rest = &rest[sent..],
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                            if !wait(&self.socket, PollFlags::OUT, deadline)? {
                                return Err(too_slow());
                            }
                        }
                        Err(error) => return Err(error),
                    }
                }
                Ok(())
            },
        )?;
        self.tls = Some(tls);
        Ok(())
    }
}

/// An error for a peer that does not keep up.
pub(super) fn too_slow() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "the other side is too slow")
}

fn recv_plain(socket: &OwnedFd, buf: &mut [u8], deadline: Option<Instant>) -> io::Result<usize> {
    let flags = match deadline {
        Some(_) => RecvFlags::DONTWAIT,
        None => RecvFlags::empty(),
    };
    loop {
        match recv(socket, &mut *buf, flags) {
            Ok((read, _)) => return Ok(read),
            Err(Errno::INTR) => {}
            Err(errno @ Errno::AGAIN) => {
                let Some(deadline) = deadline else {
                    return Err(errno.into());
                };
                if !wait(socket, PollFlags::IN, deadline)? {
                    return Err(too_slow());
                }
            }
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn send_plain(socket: &OwnedFd, slices: &[IoSlice<'_>]) -> io::Result<usize> {
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    loop {
        match sendmsg(socket, slices, &mut SendAncillaryBuffer::default(), flags) {
            Ok(sent) => return Ok(sent),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn wait(socket: &OwnedFd, flags: PollFlags, deadline: Instant) -> io::Result<bool> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        let left = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        let mut fds = [PollFd::from_borrowed_fd(socket.as_fd(), flags)];
        match poll(&mut fds, Some(&left)) {
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => return Ok(true),
            Err(errno) => return Err(errno.into()),
        }
    }
}
