//! A remote storage with a local one in front of it, which fills while it is used.
//!
//! ```text
//!            read, write                       pull: what is not here, in the background
//!  front end ───────────► Tracked ─► Synced ◄───────────────────────────────┐
//!                            │          │ ▲                                 │
//!                            │          ▼ │ read of what is not here, urgent│
//!                            │        local ◄────────────────────────── remote
//!                            │ marks    │                                   ▲
//!                            └──────────┴───────────────────────────────────┘
//!                                 push: what is dirty, then a flush
//! ```
//!
//! `pull.rs` decides what is fetched, with `schedule.rs`, `streams.rs` and `window.rs`; `push.rs` writes back.

pub(super) mod pull;
mod push;
mod schedule;
mod streams;
mod window;

use std::io;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use super::options::{Hooks, ManagedOptions, Push};
use crate::chunk::{ChunkState, Marks, Residency, Storage, Synced};
use crate::dirty::{DirtyTracker, Tracked};
use pull::{Filled, Pulls};
use push::Pushes;

/// A remote storage with a local one in front of it.
///
/// What is read comes from here if it is here, and else from the remote end at once; meanwhile everything is fetched in the background. What is
/// written is written here, and goes to the remote end at intervals, when somebody flushes, and at [`close`](Self::close).
///
/// [`flush`](Storage::flush) returns when all that was written before is durable at the remote end, and fails if it is not; a later flush tries all of
/// it again. A read of what is not here fails when the remote end does, and works again when that does; pulling goes on by itself then. Dropping it
/// ends the threads and **saves nothing**: [`close`](Self::close) does, or says what is lost.
#[derive(Debug)]
pub struct Managed {
    synced: Arc<Synced>,
    tracked: Arc<Tracked>,
    pulls: Arc<Pulls>,
    pushes: Arc<Pushes>,
    hooks: Hooks,
    read_only: bool,
    push: Push,
    writers: Mutex<Writers>,
    drained: Condvar,
}

/// Those who write at this moment.
#[derive(Debug, Default)]
struct Writers {
    count: u64,
    closed: bool,
    before_close_called: bool,
}

/// How a mount goes.
#[derive(Debug, Clone, PartialEq)]
pub struct MountProgress {
    /// The length of the region.
    pub bytes: u64,
    /// Of which are here.
    pub resident: u64,
    /// Of which are written here, and not known to be durable at the remote end. Whole chunks count.
    pub dirty: u64,
    /// Bytes a second that come in the background at best, of late.
    pub pull_rate: f64,
    /// Bytes that are being fetched in the background, and by how many requests.
    pub pulling: (u64, u64),
    /// How many bytes may be fetched at once.
    pub window: u64,
    /// Why the last fetch in the background that failed did so.
    pub last_pull_error: Option<String>,
    /// Why the last push failed, if none went well since.
    pub last_push_error: Option<String>,
}

/// What was lost when a mount was closed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CloseError {
    /// The hook before the first sync, or before closing, failed. Nothing was closed.
    #[error("the mount was not closed, because its user could not let go of it: {0}")]
    Hook(#[source] io::Error),
    /// Not everything could be made durable. A managed mount's local storage still has it.
    #[error(
        "{} bytes in {} ranges were written and may not be saved at the remote end ({source})",
        bytes(ranges),
        ranges.len()
    )]
    Lost {
        /// Which bytes, in order.
        ranges: Vec<Range<u64>>,
        /// Why.
        source: io::Error,
    },
}

fn bytes(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|range| range.end - range.start).sum()
}

impl Managed {
    /// Opens `remote` with `local` in front of it, nothing of which is taken to be here yet.
    ///
    /// Returns at once, or when everything is here if that is asked for.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] if `local` is too short; what the system says if it gives us no threads;
    /// [`io::ErrorKind::TimedOut`] if everything was to be pulled first and nothing comes any more.
    pub fn open(
        remote: Arc<dyn Storage>,
        local: Arc<dyn Storage>,
        options: &ManagedOptions,
    ) -> io::Result<Self> {
        let pulls = Pulls::new(options);
        let synced = Arc::new(Synced::new(
            remote,
            local,
            options.chunk_size,
            options.deadline,
            Arc::clone(&pulls) as _,
        )?);
        let tracked = Arc::new(Tracked::new(Arc::clone(&synced) as _, options.chunk_size));
        tracked.start()?;
        let push = if options.read_only {
            Push::Never
        } else {
            options.push
        };
        let pushes = Pushes::new(
            Arc::clone(&synced),
            Arc::clone(&tracked),
            push,
            options.deadline,
        );
        let managed = Self {
            synced,
            tracked,
            pulls,
            pushes,
            hooks: options.hooks.clone(),
            read_only: options.read_only,
            push,
            writers: Mutex::default(),
            drained: Condvar::new(),
        };
        let filled: Arc<dyn Filled> = Arc::clone(&managed.synced) as _;
        managed.pulls.start(&filled)?;
        managed.pushes.start()?;
        if options.pull_first {
            managed.wait_for_all(options.deadline)?;
        }
        Ok(managed)
    }

    /// Returns when everything is here.
    ///
    /// # Errors
    /// [`io::ErrorKind::TimedOut`] if nothing came for as long as `patience`, or nothing is pulled.
    pub fn wait_for_all(&self, patience: Duration) -> io::Result<()> {
        self.pulls.wait_for_all(patience)
    }

    /// Which chunks are here.
    #[must_use]
    pub fn residency(&self) -> &Arc<Residency> {
        self.synced.residency()
    }

    /// Calls the hook before a sync, and [flushes](Storage::flush).
    ///
    /// # Errors
    /// What the hook says; what flushing says.
    pub fn sync(&self) -> io::Result<()> {
        Hooks::call(self.hooks.before_sync.as_ref())?;
        self.flush()
    }

    /// How it goes. Takes time that grows with the region: a few milliseconds for a tebibyte.
    #[must_use]
    pub fn progress(&self) -> MountProgress {
        let pulls = self.pulls.progress();
        let residency = self.synced.residency();
        let all = residency.all_chunks();
        let size = u64::from(self.synced.chunk_size().bytes());
        let len = self.len();
        let here = residency.count(all, ChunkState::Resident);
        let dirty = match self.push {
            Push::Never => 0,
            _ => bytes(&self.pushes.dirty()),
        };
        MountProgress {
            bytes: len,
            // The last chunk may be short.
            resident: (here * size).min(len),
            dirty,
            pull_rate: pulls.rate,
            pulling: (pulls.in_flight, pulls.requests),
            window: pulls.window,
            last_pull_error: pulls.last_error,
            last_push_error: self.pushes.last_error(),
        }
    }

    /// The bytes that were written and are not known to be durable at the remote end, by whole chunks.
    #[must_use]
    pub fn dirty(&self) -> Vec<Range<u64>> {
        self.pushes.dirty()
    }

    /// Syncs, lets the user let go, refuses writes and reads of what is not here from then on, and saves what was written last; tries again, if that fails, until `deadline` has
    /// passed. If something is lost, closing again tries to save it again.
    ///
    /// # Errors
    /// [`CloseError::Hook`] if a hook fails: nothing is closed then. [`CloseError::Lost`] with what is not known to be saved; it is closed.
    pub fn close(&self, deadline: Duration) -> Result<(), CloseError> {
        let until = Instant::now() + deadline;
        if !self.writers().closed {
            self.let_go()?;
        }
        self.pulls.end();
        let drained = self.refuse(until);
        let saved = match drained {
            true => self.save(until),
            false => Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "writes were under way that did not end",
            )),
        };
        self.pushes.end();
        saved.map_err(|source| CloseError::Lost {
            ranges: self.pushes.dirty(),
            source,
        })
    }

    /// Calls the hooks of closing.
    fn let_go(&self) -> Result<(), CloseError> {
        Hooks::call(self.hooks.before_sync.as_ref()).map_err(CloseError::Hook)?;
        if !std::mem::replace(&mut self.writers().before_close_called, true) {
            Hooks::call(self.hooks.before_close.as_ref())
                .inspect_err(|_| self.writers().before_close_called = false)
                .map_err(CloseError::Hook)?;
        }
        Ok(())
    }

    /// Refuses what begins from now on, and waits for writes that are under way. Says whether they have ended.
    fn refuse(&self, until: Instant) -> bool {
        let mut writers = self.writers();
        writers.closed = true;
        while writers.count > 0 {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            writers = self
                .drained
                .wait_timeout(writers, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        true
    }

    /// Flushes, again and again until it goes well or the time is over; by a thread of its own, because one flush may take longer than that.
    fn save(&self, until: Instant) -> io::Result<()> {
        let (sender, results) = mpsc::channel();
        let pushes = Arc::clone(&self.pushes);
        std::thread::Builder::new()
            .name("memferry-save".to_owned())
            .spawn(move || {
                let mut wait = Duration::from_millis(50);
                loop {
                    let result = pushes.flush();
                    let ended = result.is_ok() || Instant::now() + wait >= until;
                    if sender.send(result).is_err() || ended {
                        return;
                    }
                    std::thread::park_timeout(wait);
                    wait *= 2;
                }
            })?;
        let mut last = Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "the remote end did not answer in time",
        ));
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match results.recv_timeout(left) {
                Ok(Ok(())) => return Ok(()),
                Ok(failed) => last = failed,
                Err(_) => return last,
            }
        }
    }

    fn writers(&self) -> MutexGuard<'_, Writers> {
        // A counter and flags.
        self.writers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds closing up until it is dropped.
    fn writing(&self) -> io::Result<WritingNow<'_>> {
        if self.read_only {
            return Err(io::Error::new(
                io::ErrorKind::ReadOnlyFilesystem,
                "the mount is read-only",
            ));
        }
        let mut writers = self.writers();
        if writers.closed {
            return Err(closed());
        }
        writers.count += 1;
        Ok(WritingNow(self))
    }

    fn read(
        &self,
        len: usize,
        offset: u64,
        read: impl FnOnce(&Tracked) -> io::Result<()>,
    ) -> io::Result<()> {
        let range = offset..offset.saturating_add(len as u64);
        let touched = range.start.min(self.len())..range.end.min(self.len());
        let run = self.synced.chunks_touched(&touched);
        let missed = !self.synced.residency().is_resident(run);
        // Asked for before it is waited for, so that what follows comes at the same time.
        self.pulls.read(&*self.synced, &touched, missed);
        if missed && self.writers().closed {
            return Err(closed());
        }
        read(&self.tracked)
    }
}

fn closed() -> io::Error {
    io::Error::new(io::ErrorKind::NotConnected, "the mount is closed")
}

struct WritingNow<'a>(&'a Managed);

impl Drop for WritingNow<'_> {
    fn drop(&mut self) {
        let mut writers = self.0.writers();
        writers.count -= 1;
        if writers.count == 0 && writers.closed {
            self.0.drained.notify_all();
        }
    }
}

impl Storage for Managed {
    fn len(&self) -> u64 {
        self.tracked.len()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.read(buf.len(), offset, |tracked| {
            tracked.read_exact_at(buf, offset)
        })
    }

    fn read_ahead_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.read(buf.len(), offset, |tracked| {
            tracked.read_ahead_at(buf, offset)
        })
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let _writing = self.writing()?;
        self.tracked.write_all_at(buf, offset)
    }

    fn zero(&self, range: Range<u64>) -> io::Result<()> {
        let _writing = self.writing()?;
        self.tracked.zero(range)
    }

    fn flush(&self) -> io::Result<()> {
        self.pushes.flush()
    }

    fn data_ranges(&self, within: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        self.tracked.data_ranges(within)
    }

    fn is_at_hand(&self, range: Range<u64>) -> bool {
        self.tracked.is_at_hand(range)
    }
}

impl Marks for Managed {
    fn marked(&self, within: Range<u64>) -> Vec<Range<u64>> {
        self.tracked.marked(within)
    }
}

/// Ends the threads, as soon as what they do at the moment has ended. What is not saved is lost.
impl Drop for Managed {
    fn drop(&mut self) {
        self.pulls.end();
        self.pushes.end();
    }
}

#[cfg(not(loom))]
#[cfg(test)]
mod tests;
