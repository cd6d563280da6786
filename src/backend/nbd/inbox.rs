//! What has been received and not yet been read.

use std::io;
use std::time::Instant;

use super::wire::{Wire, left};

/// How much is received on the off chance, in bytes: a page and its header come with one system call, and of a large read no more than
/// this is copied.
const ROOM: usize = 8 << 10;

/// Received bytes in front of a connection. It belongs to who has the reading role.
#[derive(Debug)]
pub(super) struct Inbox {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Inbox {
    pub(super) fn new() -> Self {
        Self {
            bytes: vec![0; ROOM].into_boxed_slice(),
            start: 0,
            end: 0,
        }
    }

    /// Whether there is nothing that was received and not read.
    pub(super) fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// The next bytes.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] if the connection ends before they are there; what the socket says.
    pub(super) fn take<const N: usize>(
        &mut self,
        wire: &Wire,
        deadline: Instant,
    ) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.read_exact(wire, &mut bytes, deadline)?;
        Ok(bytes)
    }

    /// Fills `buf` with the next bytes. Those of a large one go where they belong without being copied.
    ///
    /// # Errors
    /// As [`take`](Self::take).
    pub(super) fn read_exact(
        &mut self,
        wire: &Wire,
        buf: &mut [u8],
        deadline: Instant,
    ) -> io::Result<()> {
        let mut filled = 0;
        while filled < buf.len() {
            if self.is_empty() {
                let rest = &mut buf[filled..];
                let wanted = rest.len();
                let direct = wanted >= ROOM;
                let received = if direct {
                    some(wire.receive(rest, true, deadline)?)?
                } else {
                    some(wire.receive(&mut self.bytes, false, deadline)?)?
                };
                if received < wanted {
                    // A server that sends a byte now and then is late like one that sends none.
                    left(deadline)?;
                }
                if direct {
                    filled += received;
                    continue;
                }
                (self.start, self.end) = (0, received);
            }
            let len = (buf.len() - filled).min(self.end - self.start);
            buf[filled..filled + len].copy_from_slice(&self.bytes[self.start..self.start + len]);
            self.start += len;
            filled += len;
        }
        Ok(())
    }
}

fn some(received: usize) -> io::Result<usize> {
    if received == 0 {
        return Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "the server has ended the connection",
        ));
    }
    Ok(received)
}
