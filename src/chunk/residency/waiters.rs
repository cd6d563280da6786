//! Who waits for which chunk.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::PoisonError;
use std::time::Instant;

use rustix::event::EventfdFlags;

use super::super::sync::{Condvar, Mutex, MutexGuard};
use super::super::{ChunkIndex, ChunkRun};
use super::table::{ChunkState, LANES};

/// Few threads wait at once, and a batch of chunks that come touches few stripes.
const STRIPES: u64 = if cfg!(loom) { 1 } else { 64 };

/// A small table of those who wait, and what they wait for.
///
/// A waiter looks at the state of its chunk with the lock of the chunk's stripe held; who changes a state does so first and takes
/// that lock afterwards, to wake. So none sleeps through a change.
#[derive(Debug)]
pub(super) struct Waiters {
    stripes: Box<[Stripe]>,
    refused: Mutex<Option<io::Error>>,
    faults: Option<Faults>,
}

#[derive(Debug, Default)]
struct Stripe {
    awaited: Mutex<Vec<Awaited>>,
    changed: Condvar,
}

/// A chunk that somebody waits for.
#[derive(Debug)]
struct Awaited {
    chunk: u64,
    waiters: usize,
    /// Whether the fault was reported and the chunk's state has not changed since.
    reported: bool,
    /// How often it failed to come while somebody waited, so that nobody is told of a failure before its time.
    failures: u64,
    failure: Option<io::Error>,
}

/// The chunks that somebody began to wait for, until they are taken.
#[derive(Debug)]
struct Faults {
    chunks: Mutex<VecDeque<ChunkIndex>>,
    event: OwnedFd,
}

/// What a waiter does next.
pub(super) enum Next<T> {
    Return(T),
    /// It waits; if the fault was not reported yet, it is.
    Wait {
        fault: bool,
    },
}

impl Waiters {
    pub(super) fn new() -> Self {
        Self {
            stripes: (0..STRIPES).map(|_| Stripe::default()).collect(),
            refused: Mutex::new(None),
            faults: None,
        }
    }

    pub(super) fn report_faults(&mut self) -> io::Result<()> {
        let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        self.faults = Some(Faults {
            chunks: Mutex::default(),
            event,
        });
        Ok(())
    }

    pub(super) fn fault_fd(&self) -> Option<BorrowedFd<'_>> {
        self.faults.as_ref().map(|faults| faults.event.as_fd())
    }

    pub(super) fn take_faults(&self, into: &mut Vec<ChunkIndex>) {
        let Some(faults) = &self.faults else { return };
        // Emptied before the queue is, so that what comes in between is signalled again. There may be nothing to read.
        let _ = rustix::io::read(&faults.event, &mut [0; 8]);
        into.extend(lock(&faults.chunks).drain(..));
    }

    /// Waits until `look`, which is asked whenever the chunk may have changed, returns something. Who `needs` the chunk is told if it
    /// fails to come; to others that is a change like any other.
    pub(super) fn wait<T>(
        &self,
        chunk: ChunkIndex,
        deadline: Instant,
        needs: bool,
        look: impl Fn() -> Next<T>,
    ) -> io::Result<T> {
        let stripe = self.stripe(chunk.0);
        let mut awaited = lock(&stripe.awaited);
        let known = match awaited.iter_mut().find(|entry| entry.chunk == chunk.0) {
            Some(entry) => {
                entry.waiters += 1;
                entry.failures
            }
            None => {
                awaited.push(Awaited {
                    chunk: chunk.0,
                    waiters: 1,
                    reported: false,
                    failures: 0,
                    failure: None,
                });
                0
            }
        };
        let result = loop {
            let fault = match look() {
                Next::Return(value) => break Ok(value),
                Next::Wait { fault } => fault,
            };
            let entry = entry_of(&mut awaited, chunk.0);
            if needs
                && let Some(failure) = &entry.failure
                && entry.failures != known
            {
                break Err(copy_of(failure));
            }
            if fault {
                if let Some(refusal) = &*lock(&self.refused) {
                    break Err(copy_of(refusal));
                }
                if !std::mem::replace(&mut entry.reported, true) {
                    self.report(chunk);
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("chunk {} did not come in time", chunk.0),
                ));
            }
            awaited = stripe
                .changed
                .wait_timeout(awaited, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        };
        let entry = entry_of(&mut awaited, chunk.0);
        entry.waiters -= 1;
        if entry.waiters == 0 {
            awaited.retain(|entry| entry.chunk != chunk.0);
        }
        result
    }

    /// Lets those look again who wait for chunks of `run`, whose state has changed; `failure` is why they did not come.
    pub(super) fn wake(&self, run: ChunkRun, failure: Option<&io::Error>) {
        let mut next = run.start.0;
        while next < run.end() {
            let upto = run.end().min(next - next % LANES + LANES);
            let stripe = self.stripe(next);
            let mut awaited = lock(&stripe.awaited);
            let mut any = false;
            for entry in awaited
                .iter_mut()
                .filter(|entry| (next..upto).contains(&entry.chunk))
            {
                any = true;
                entry.reported = false;
                if let Some(failure) = failure {
                    entry.failures += 1;
                    entry.failure = Some(copy_of(failure));
                }
            }
            drop(awaited);
            if any {
                stripe.changed.notify_all();
            }
            next = upto;
        }
    }

    /// Lets all look again.
    pub(super) fn wake_all(&self) {
        for stripe in &self.stripes {
            for entry in lock(&stripe.awaited).iter_mut() {
                entry.reported = false;
            }
            stripe.changed.notify_all();
        }
    }

    /// Who waits for a chunk that is remote is told `error`, now and from now on; `None` takes it back.
    pub(super) fn refuse(&self, error: Option<io::Error>) {
        let refuses = error.is_some();
        *lock(&self.refused) = error;
        if refuses {
            // Nobody brings what was asked for.
            self.take_faults(&mut Vec::new());
        }
        self.wake_all();
    }

    pub(super) fn waiting(&self) -> usize {
        let in_stripe = |stripe: &Stripe| -> usize {
            lock(&stripe.awaited)
                .iter()
                .map(|entry| entry.waiters)
                .sum()
        };
        self.stripes.iter().map(in_stripe).sum()
    }

    /// Reports all of `chunks` at once.
    pub(super) fn request(&self, chunks: &[ChunkIndex]) {
        if let Some(faults) = &self.faults
            && !chunks.is_empty()
            && lock(&self.refused).is_none()
        {
            lock(&faults.chunks).extend(chunks);
            // Fails only if it is signalled more often than it can count, and so is signalled.
            #[allow(
                clippy::host_endian_bytes,
                reason = "the kernel of this machine counts them"
            )]
            let _ = rustix::io::write(&faults.event, &1_u64.to_ne_bytes());
        }
    }

    fn report(&self, chunk: ChunkIndex) {
        self.request(&[chunk]);
    }

    fn stripe(&self, chunk: u64) -> &Stripe {
        let index = usize::try_from(chunk / LANES % STRIPES).expect("there are few stripes");
        &self.stripes[index]
    }
}

fn entry_of(awaited: &mut [Awaited], chunk: u64) -> &mut Awaited {
    awaited
        .iter_mut()
        .find(|entry| entry.chunk == chunk)
        .expect("what is waited for is in the table")
}

/// The error once more, for another who asked: errors of the system cannot be cloned.
fn copy_of(error: &io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(code) => io::Error::from_raw_os_error(code),
        None => io::Error::new(error.kind(), error.to_string()),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while it is held, and every value in it is whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A chunk that is neither asked for nor written.
pub(super) fn is_settled(state: ChunkState) -> bool {
    matches!(state, ChunkState::Remote | ChunkState::Resident)
}
