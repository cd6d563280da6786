//! One connection of a session: frames in, frames out.

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use migrate_proto::{DecodeError, FrameHeader, HEADER_LEN, Message, encode_frame};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// A connection that has shaken hands.
#[derive(Debug)]
pub struct Lane {
    stream: TcpStream,
    silence: Duration,
}

/// Why a lane does not go on.
#[derive(Debug, thiserror::Error)]
pub enum LaneError {
    /// The peer closed it between two frames.
    #[error("the other side closed the connection")]
    Closed,
    /// The peer's bytes are no frame.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// The network.
    #[error("the connection broke")]
    Io(#[from] io::Error),
}

impl Lane {
    pub(super) fn new(stream: TcpStream, silence: Duration) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        // Reads end when the session is shut down; who is silent too long is found out by the protocol. A peer that
        // does not take what is sent is given up here.
        stream.set_read_timeout(None)?;
        stream.set_write_timeout(Some(silence))?;
        let millis = u32::try_from(silence.as_millis()).unwrap_or(u32::MAX);
        rustix::net::sockopt::set_tcp_user_timeout(&stream, millis)?;
        Ok(Self { stream, silence })
    }

    /// The two directions, to be used on two threads.
    ///
    /// # Errors
    /// If there is no file descriptor left.
    pub fn split(&self) -> io::Result<(LaneReader, LaneWriter)> {
        let reader = LaneReader {
            stream: self.stream.try_clone()?,
            body: Vec::new(),
            frame_len: 0,
        };
        let writer = LaneWriter {
            stream: self.stream.try_clone()?,
            silence: self.silence,
            frame: Vec::new(),
        };
        Ok((reader, writer))
    }

    /// Ends both directions: readers see the end, also on the other side once they have read what was sent.
    pub fn shut_down(&self) {
        // It may be closed already, which is as good.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Says that nothing more will be sent; what was sent arrives.
    pub fn finish_sending(&self) {
        let _ = self.stream.shutdown(Shutdown::Write);
    }
}

/// The receiving half of a lane.
#[derive(Debug)]
pub struct LaneReader {
    stream: TcpStream,
    body: Vec<u8>,
    frame_len: u64,
}

impl LaneReader {
    /// The next message and the length of its payload in bytes, which the caller must read before the next call. Blocks.
    ///
    /// # Errors
    /// [`LaneError::Closed`] at the end; any error is final.
    pub fn receive(&mut self) -> Result<(Message, usize), LaneError> {
        let mut header = [0; HEADER_LEN];
        let mut filled = 0;
        while filled < HEADER_LEN {
            match self.stream.read(&mut header[filled..]) {
                Ok(0) if filled == 0 => return Err(LaneError::Closed),
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        let header = FrameHeader::decode(&header)?;
        self.body.resize(header.body_len(), 0);
        self.stream.read_exact(&mut self.body)?;
        let message = header.message(&self.body)?;
        self.frame_len = (HEADER_LEN + header.body_len() + header.payload_len()) as u64;
        Ok((message, header.payload_len()))
    }

    /// Whether bytes wait to be read. Does not block.
    #[must_use]
    pub fn has_more(&self) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(self.stream.as_fd(), PollFlags::IN)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        matches!(poll(&mut fds, Some(&now)), Ok(1..)) && fds[0].revents() == PollFlags::IN
    }

    /// The length of the last frame in bytes, header and payload included.
    #[must_use]
    pub fn frame_len(&self) -> u64 {
        self.frame_len
    }

    /// Fills `buf` with payload. Blocks.
    ///
    /// # Errors
    /// What the network says.
    pub fn read_exact(&mut self, buf: &mut [u8]) -> io::Result<()> {
        self.stream.read_exact(buf)
    }

    /// Reads and forgets `len` bytes of payload. Blocks.
    ///
    /// # Errors
    /// What the network says.
    pub fn skip(&mut self, mut len: usize) -> io::Result<()> {
        let mut scratch = [0; 16 << 10];
        while len > 0 {
            let part = len.min(scratch.len());
            self.stream.read_exact(&mut scratch[..part])?;
            len -= part;
        }
        Ok(())
    }
}

impl AsFd for LaneReader {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// The sending half of a lane.
#[derive(Debug)]
pub struct LaneWriter {
    stream: TcpStream,
    silence: Duration,
    frame: Vec<u8>,
}

impl LaneWriter {
    /// Sends a message with the payload `parts`, one after the other, without copying them. Blocks while the peer does
    /// not take it, for twice the session's silence at most. Returns the bytes that went out.
    ///
    /// # Errors
    /// What the network says; any error is final.
    pub fn send(&mut self, message: &Message, parts: &[&[u8]]) -> io::Result<u64> {
        self.frame.clear();
        let payload = parts.iter().map(|part| part.len()).sum();
        encode_frame(message, payload, &mut self.frame);
        let mut slices = Vec::with_capacity(parts.len() + 1);
        slices.push(IoSlice::new(&self.frame));
        slices.extend(parts.iter().map(|part| IoSlice::new(part)));
        let end = Instant::now() + self.silence;
        write_all_vectored(&mut self.stream, &mut slices, end)?;
        Ok((self.frame.len() + payload) as u64)
    }
}

/// Each write has the socket's time-out; a peer that takes a byte now and then does not move `end`.
fn write_all_vectored(
    stream: &mut TcpStream,
    mut slices: &mut [IoSlice<'_>],
    end: Instant,
) -> io::Result<()> {
    let late = || {
        io::Error::new(
            io::ErrorKind::TimedOut,
            "the other side does not take what is sent",
        )
    };
    while !slices.is_empty() {
        match stream.write_vectored(slices) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => {
                IoSlice::advance_slices(&mut slices, written);
                if !slices.is_empty() && Instant::now() > end {
                    return Err(late());
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(late()),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
