//! Writing back: what is dirty goes to the remote end, and is clean when it is durable there.
//!
//! Take the marks, push, flush. What is written meanwhile is marked again. If anything fails, everything that was taken since the last
//! flush that went well is marked again: nothing that may have been lost is ever called saved.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::super::options::Push;
use crate::chunk::{ChunkBitmap, ChunkRun, Marks, Storage, Synced};
use crate::dirty::{DirtyTracker, Tracked};

/// What is written by one request.
const BATCH: u64 = 1 << 20;
/// So many requests at once: with batches of 1 MiB they fill 1 Gbit/s at 100 ms.
const AT_ONCE: usize = 16;
/// How long to wait after a failure, at first; it doubles with every further one up to the interval.
const SOONEST: Duration = Duration::from_millis(250);

/// Pushes what is dirty, by one at a time.
#[derive(Debug)]
pub(super) struct Pushes {
    synced: Arc<Synced>,
    tracked: Arc<Tracked>,
    push: Push,
    patience: Duration,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// Somebody pushes.
    running: bool,
    /// What was taken and is not known to be durable.
    taken: ChunkBitmap,
    /// Goes up with everything that was pushed, for those who wait for progress.
    pushed: u64,
    failures: u32,
    last_error: Option<String>,
    ended: bool,
}

/// What is done to a range of the remote end.
enum Job {
    Write(Range<u64>),
    Zero(Range<u64>),
}

impl Pushes {
    pub(super) fn new(
        synced: Arc<Synced>,
        tracked: Arc<Tracked>,
        push: Push,
        patience: Duration,
    ) -> Arc<Self> {
        let chunks = synced.residency().chunks();
        Arc::new(Self {
            synced,
            tracked,
            push,
            patience,
            state: Mutex::new(State {
                running: false,
                taken: ChunkBitmap::empty(chunks),
                pushed: 0,
                failures: 0,
                last_error: None,
                ended: false,
            }),
            changed: Condvar::new(),
        })
    }

    /// Begins to push at intervals, if that is asked for. The thread ends by itself after [`end`](Self::end).
    pub(super) fn start(self: &Arc<Self>) -> io::Result<()> {
        if let Push::Every(interval) = self.push {
            let pushes = Arc::clone(self);
            thread::Builder::new()
                .name("memferry-push".to_owned())
                .spawn(move || pushes.at_intervals(interval))?;
        }
        Ok(())
    }

    pub(super) fn end(&self) {
        self.state().ended = true;
        self.changed.notify_all();
    }

    fn at_intervals(&self, interval: Duration) {
        let mut state = self.state();
        loop {
            let wait = match state.failures {
                0 => interval,
                failures => SOONEST.saturating_mul(1 << failures.min(10)).min(interval),
            };
            let until = Instant::now() + wait;
            while !state.ended && Instant::now() < until {
                let left = until.saturating_duration_since(Instant::now());
                state = self.wait(state, left);
            }
            if state.ended {
                return;
            }
            drop(state);
            // Kept for the progress; whoever flushes pushes again and learns how that goes.
            let _ = self.flush();
            state = self.state();
        }
    }

    /// Returns when everything that was written before is durable: at the remote end, or here if nothing is pushed.
    ///
    /// Waits for others who push, as long as they make progress.
    pub(super) fn flush(&self) -> io::Result<()> {
        if self.push == Push::Never {
            return self.synced.local().flush();
        }
        let turn = self.turn()?;
        let pushed = self.push_all();
        let mut state = self.state();
        match &pushed {
            Ok(()) => (state.failures, state.last_error) = (0, None),
            Err(error) => {
                state.failures = state.failures.saturating_add(1);
                state.last_error = Some(error.to_string());
            }
        }
        drop(state);
        drop(turn);
        pushed
    }

    /// Waits for the turn of the caller.
    fn turn(&self) -> io::Result<Turn<'_>> {
        let mut state = self.state();
        let (mut pushed, mut since) = (state.pushed, Instant::now());
        while state.running {
            if state.pushed != pushed {
                (pushed, since) = (state.pushed, Instant::now());
            }
            let left = self.patience.saturating_sub(since.elapsed());
            if left.is_zero() {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "what is dirty is being pushed already, and that makes no progress",
                ));
            }
            state = self.wait(state, left);
        }
        state.running = true;
        Ok(Turn(self))
    }

    fn push_all(&self) -> io::Result<()> {
        let dirty = {
            let mut state = self.state();
            // What is taken is remembered at the same time: it is never in neither set.
            let dirty = self.tracked.take()?;
            state.taken.union_with(&dirty);
            dirty
        };
        if dirty.is_empty() {
            // The last flush went well, or what it was about would be dirty.
            return Ok(());
        }
        let jobs = Jobs::new(&self.synced, &dirty);
        let failed = Mutex::new(None);
        let work = || {
            let mut buf = Vec::new();
            while lock(&failed).is_none()
                && let Some(job) = jobs.next()
            {
                if let Err(error) = self.push_one(&job, &mut buf) {
                    lock(&failed).get_or_insert(error);
                }
                self.state().pushed += 1;
            }
        };
        thread::scope(|scope| {
            for _ in 1..AT_ONCE.min(jobs.at_most()) {
                // With fewer threads it is slower, and that is all.
                let _ = thread::Builder::new()
                    .name("memferry-push".to_owned())
                    .spawn_scoped(scope, work);
            }
            work();
        });
        if let Some(error) = lock(&failed).take() {
            return Err(error);
        }
        self.synced.remote().flush()?;
        self.state().taken.clear();
        Ok(())
    }

    fn push_one(&self, job: &Job, buf: &mut Vec<u8>) -> io::Result<()> {
        match job {
            Job::Write(range) => {
                let len = usize::try_from(range.end - range.start).expect("a batch");
                buf.resize(len, 0);
                self.synced.local().read_exact_at(buf, range.start)?;
                self.synced.remote().write_all_at(buf, range.start)
            }
            Job::Zero(range) => self.synced.remote().zero(range.clone()),
        }
    }

    /// What is not known to be durable.
    pub(super) fn dirty(&self) -> Vec<Range<u64>> {
        let mut set = {
            let state = self.state();
            let len = self.synced.len();
            let mut set = state.taken.clone();
            for range in self.tracked.marked(0..len) {
                set.insert_run(self.synced.chunks_touched(&range));
            }
            set
        };
        let chunks = set.chunks();
        let mut ranges = Vec::new();
        while let Some(run) = set.run_from(0, chunks) {
            ranges.push(self.synced.bytes_of(run));
            set.remove_run(run);
        }
        ranges
    }

    pub(super) fn last_error(&self) -> Option<String> {
        self.state().last_error.clone()
    }

    fn wait<'a>(
        &'a self,
        state: MutexGuard<'a, State>,
        at_most: Duration,
    ) -> MutexGuard<'a, State> {
        // Looks at the progress of others now and then, which wakes nobody.
        let at_most = at_most.min(Duration::from_secs(1));
        self.changed
            .wait_timeout(state, at_most)
            .unwrap_or_else(PoisonError::into_inner)
            .0
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Sets and counters, right between any two statements that can panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The right to push. What was taken and did not become durable is dirty again when it is dropped, whatever happened.
struct Turn<'a>(&'a Pushes);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        if !state.taken.is_empty() && self.0.tracked.restore(&state.taken).is_ok() {
            state.taken.clear();
        }
        state.running = false;
        drop(state);
        self.0.changed.notify_all();
    }
}

/// What is to be pushed, cut into batches; several take from it.
struct Jobs<'a> {
    synced: &'a Synced,
    dirty: &'a ChunkBitmap,
    state: Mutex<JobsState>,
}

struct JobsState {
    next_chunk: u64,
    /// Of the part that was looked at last: data and holes, in order.
    parts: std::collections::VecDeque<Job>,
}

/// So much is looked at for holes at once.
const LOOK: u64 = 256 << 20;

impl<'a> Jobs<'a> {
    fn new(synced: &'a Synced, dirty: &'a ChunkBitmap) -> Self {
        Self {
            synced,
            dirty,
            state: Mutex::new(JobsState {
                next_chunk: 0,
                parts: std::collections::VecDeque::new(),
            }),
        }
    }

    /// No more jobs than these, if they are few.
    fn at_most(&self) -> usize {
        let size = u64::from(self.synced.chunk_size().bytes());
        let runs = self.dirty.runs().take(AT_ONCE);
        let jobs: u64 = runs.map(|run| (run.count * size).div_ceil(BATCH)).sum();
        usize::try_from(jobs).unwrap_or(usize::MAX).max(1)
    }

    fn next(&self) -> Option<Job> {
        let mut state = lock(&self.state);
        loop {
            if let Some(job) = state.parts.pop_front() {
                return Some(job);
            }
            let size = u64::from(self.synced.chunk_size().bytes());
            let run = self.dirty.run_from(state.next_chunk, LOOK / size)?;
            state.next_chunk = run.end();
            self.cut(run, &mut state.parts);
        }
    }

    fn cut(&self, run: ChunkRun, parts: &mut std::collections::VecDeque<Job>) {
        let residency = self.synced.residency();
        let mut left = run;
        // A write of a chunk that was not here may have failed: the remote end's bytes are still the right ones then.
        while let Some(here) = residency.find(left, u64::MAX, crate::chunk::ChunkState::Resident) {
            let range = self.synced.bytes_of(here);
            // Where that cannot be told, everything counts as data.
            let data = self.synced.local().data_ranges(range.clone());
            let data = data.unwrap_or_else(|_| vec![range.clone()]);
            let mut next = range.start;
            for data in data {
                if next < data.start {
                    parts.push_back(Job::Zero(next..data.start));
                }
                let mut start = data.start;
                while start < data.end {
                    let end = data.end.min(start + BATCH);
                    parts.push_back(Job::Write(start..end));
                    start = end;
                }
                next = data.end;
            }
            if next < range.end {
                parts.push_back(Job::Zero(next..range.end));
            }
            left = ChunkRun::new(here.end(), left.end() - here.end());
        }
    }
}
