//! What a guest says on its serial ports, with the time at which each line arrived here.

use std::collections::HashMap;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use anyhow::{Result, bail};

/// One number counted by the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tick {
    /// Grows by one with each tick; the guest aims at one a millisecond.
    pub number: u64,
    /// When it arrived at this process.
    pub at: Instant,
}

/// One line of the guest's first serial port.
#[derive(Debug, Clone)]
pub struct Report {
    /// When it arrived at this process.
    pub at: Instant,
    /// What it says.
    pub content: Content,
}

/// What a line of the guest's first serial port says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// Memory is filled; writing, verifying and ticking begin.
    Ready(Ready),
    /// How things stand, several times a second.
    Status(Status),
    /// A page is not what was written to it; the whole line.
    Mismatch(String),
    /// The guest gives up; the reason.
    Failed(String),
    /// Something else: the kernel, or the rest of a line that began before the guest moved.
    Other(String),
}

/// The facts of a guest that has started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ready {
    /// The kernel's identity: a new one with every boot.
    pub boot_id: String,
    /// Bytes filled.
    pub fill: u64,
}

/// How a guest gets on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// The kernel's identity, asked of it just now.
    pub boot_id: String,
    /// The last tick sent.
    pub tick: u64,
    /// Pages written since the start.
    pub writes: u64,
    /// Bytes written a second, by the guest's clock, since the status before.
    pub rate: u64,
    /// Pages verified since the start.
    pub checked: u64,
    /// How often all pages have been verified.
    pub passes: u64,
    /// Pages found wrong since the start.
    pub errors: u64,
    /// A number that follows from all pages' versions.
    pub checksum: String,
    /// The longest time between two ticks by the guest's own clock, in microseconds, since the status before.
    pub gap_us: u64,
}

/// Lines as they arrive; a clone shows the same lines.
#[derive(Debug)]
pub struct Log<T> {
    shared: Arc<(Mutex<Lines<T>>, Condvar)>,
}

#[derive(Debug)]
struct Lines<T> {
    lines: Vec<T>,
    ended: bool,
}

impl<T> Clone for Log<T> {
    fn clone(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
        }
    }
}

impl<T: Clone + Send + 'static> Log<T> {
    /// Reads lines from a port in a thread of its own until the port closes, so that a guest never waits for a
    /// reader. `parse` makes nothing of lines that are to be left out.
    pub(crate) fn read(
        port: UnixStream,
        parse: impl Fn(&str, Instant) -> Option<T> + Send + 'static,
    ) -> (Self, JoinHandle<()>) {
        let log = Self {
            shared: Arc::new((
                Mutex::new(Lines {
                    lines: Vec::new(),
                    ended: false,
                }),
                Condvar::new(),
            )),
        };
        let written = log.clone();
        let reader = thread::spawn(move || written.fill(port, parse));
        (log, reader)
    }

    /// All lines so far.
    #[must_use]
    pub fn all(&self) -> Vec<T> {
        self.lock().lines.clone()
    }

    /// The last line so far.
    #[must_use]
    pub fn last(&self) -> Option<T> {
        self.lock().lines.last().cloned()
    }

    /// Waits until `found` finds what it looks for in the lines so far; it is asked again with every new line.
    ///
    /// # Errors
    /// If the deadline passes or the guest ends before.
    pub fn wait<R>(
        &self,
        deadline: Instant,
        mut found: impl FnMut(&[T]) -> Option<R>,
    ) -> Result<R> {
        let mut lines = self.lock();
        loop {
            if let Some(result) = found(&lines.lines) {
                return Ok(result);
            }
            if lines.ended {
                bail!("the guest's serial port was closed");
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("the guest did not say it in time");
            }
            lines = self
                .shared
                .1
                .wait_timeout(lines, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn fill(&self, mut port: UnixStream, parse: impl Fn(&str, Instant) -> Option<T>) {
        // A reader that waits for a processor blames its own delay on the guest. Only root may ask for this; for
        // others the figures are as good as the machine is quiet.
        let _not_permitted = rustix::process::nice(-20);
        let mut unfinished = Vec::new();
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = port.read(&mut buffer) {
            let at = Instant::now();
            let mut new = Vec::new();
            for &byte in &buffer[..count] {
                match byte {
                    b'\n' => {
                        new.extend(parse(&String::from_utf8_lossy(&unfinished), at));
                        unfinished.clear();
                    }
                    b'\r' => {}
                    byte => unfinished.push(byte),
                }
            }
            if !new.is_empty() {
                self.lock().lines.append(&mut new);
                self.shared.1.notify_all();
            }
        }
        self.lock().ended = true;
        self.shared.1.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Lines<T>> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tick {
    /// Reads one line of the second port; the rest of a line that began before the guest moved is no tick.
    pub(crate) fn parse(line: &str, at: Instant) -> Option<Self> {
        let number = line.strip_prefix('t')?.parse().ok()?;
        Some(Self { number, at })
    }
}

impl Report {
    /// Reads one line of the first port.
    #[expect(
        clippy::unnecessary_wraps,
        reason = "a line parser as `Log::read` takes it"
    )]
    pub(crate) fn parse(line: &str, at: Instant) -> Option<Self> {
        let (kind, rest) = line.split_once(' ').unwrap_or((line, ""));
        let other = || Content::Other(line.to_owned());
        let content = match kind {
            "ready" => Fields::of(rest).ready().map_or_else(other, Content::Ready),
            "status" => Fields::of(rest)
                .status()
                .map_or_else(other, Content::Status),
            "mismatch" => Content::Mismatch(line.to_owned()),
            "failed" => Content::Failed(rest.to_owned()),
            _ => other(),
        };
        Some(Self { at, content })
    }

    /// The status, if this is one.
    #[must_use]
    pub fn status(&self) -> Option<&Status> {
        match &self.content {
            Content::Status(status) => Some(status),
            _ => None,
        }
    }
}

struct Fields<'a>(HashMap<&'a str, &'a str>);

impl<'a> Fields<'a> {
    fn of(line: &'a str) -> Self {
        Self(
            line.split_whitespace()
                .filter_map(|word| word.split_once('='))
                .collect(),
        )
    }

    fn text(&self, name: &str) -> Option<String> {
        self.0.get(name).map(|&text| text.to_owned())
    }

    fn number(&self, name: &str) -> Option<u64> {
        self.0.get(name)?.parse().ok()
    }

    fn ready(&self) -> Option<Ready> {
        Some(Ready {
            boot_id: self.text("boot_id")?,
            fill: self.number("fill")?,
        })
    }

    fn status(&self) -> Option<Status> {
        Some(Status {
            boot_id: self.text("boot_id")?,
            tick: self.number("tick")?,
            writes: self.number("writes")?,
            rate: self.number("rate")?,
            checked: self.number("checked")?,
            passes: self.number("passes")?,
            errors: self.number("errors")?,
            checksum: self.text("checksum")?,
            gap_us: self.number("gap_us")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_rest_of_a_line_that_began_elsewhere_is_no_tick() {
        let (mut guest, port) = UnixStream::pair().unwrap();
        let (log, reader) = Log::read(port, Tick::parse);
        guest.write_all(b"345\nt12346\nt12347\nt123").unwrap();
        drop(guest);
        reader.join().unwrap();
        let numbers: Vec<u64> = log.all().iter().map(|tick| tick.number).collect();
        assert_eq!(numbers, [12346, 12347]);
    }

    #[test]
    fn waiting_on_a_guest_that_ended_is_an_error() {
        let (guest, port) = UnixStream::pair().unwrap();
        let (log, _reader) = Log::read(port, Tick::parse);
        drop(guest);
        let deadline = Instant::now() + Duration::from_secs(60);
        assert!(log.wait(deadline, |ticks| ticks.first().copied()).is_err());
    }

    #[test]
    fn a_status_is_read_whole_or_not_at_all() {
        let line = "status boot_id=b tick=1 writes=2 rate=3 checked=4 passes=5 errors=6 checksum=0x7 gap_us=8";
        let whole = Report::parse(line, Instant::now()).unwrap();
        assert_eq!(whole.status().map(|status| status.errors), Some(6));
        let torn = Report::parse(&line[..line.len() - 2], Instant::now()).unwrap();
        assert!(torn.status().is_none());
    }
}
