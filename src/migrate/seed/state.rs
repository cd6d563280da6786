//! Device state on its way out.

use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use migrate_proto::Message;
use xxhash_rust::xxh3::Xxh3Default;

use crate::migrate::cancel::Cancel;
use crate::migrate::progress::Counters;
use crate::transport::LaneWriter;

/// How many bytes of device state go into a frame.
const PIECE: usize = 256 << 10;

/// Sends device state as it is written.
#[derive(Debug)]
pub(super) struct StateSink<'a> {
    writer: &'a Mutex<LaneWriter>,
    counters: &'a Counters,
    end: Instant,
    cancel: &'a Cancel,
    buffer: Vec<u8>,
    sent: u64,
    digest: Xxh3Box,
}

/// The hasher is 576 bytes and has no `Debug`.
struct Xxh3Box(Box<Xxh3Default>);

impl std::fmt::Debug for Xxh3Box {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Xxh3")
    }
}

impl<'a> StateSink<'a> {
    /// Sends over `writer` until `end`, and for as long as nobody cancels: the subject stands still meanwhile.
    pub(super) fn new(
        writer: &'a Mutex<LaneWriter>,
        counters: &'a Counters,
        end: Instant,
        cancel: &'a Cancel,
    ) -> Self {
        Self {
            writer,
            counters,
            end,
            cancel,
            buffer: Vec::with_capacity(PIECE),
            sent: 0,
            digest: Xxh3Box(Box::new(Xxh3Default::new())),
        }
    }

    fn send(&mut self) -> io::Result<()> {
        if self.cancel.is_cancelled() {
            return Err(io::Error::other("cancelled by the user"));
        }
        if Instant::now() > self.end {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "the link is too slow for the device state",
            ));
        }
        let message = Message::State { offset: self.sent };
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let sent = writer.send(&message, &[&self.buffer]);
        drop(writer);
        self.counters.frame(sent?);
        self.digest.0.update(&self.buffer);
        self.sent += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    /// Sends the rest; the length of the state and its digest.
    pub(super) fn finish(mut self) -> io::Result<(u64, u64)> {
        if !self.buffer.is_empty() {
            self.send()?;
        }
        Ok((self.sent, self.digest.0.digest()))
    }
}

impl Write for StateSink<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let part = bytes.len().min(PIECE - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..part]);
        if self.buffer.len() == PIECE {
            self.send()?;
        }
        Ok(part)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
