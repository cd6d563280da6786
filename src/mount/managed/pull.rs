//! Fetching in the background: a few threads, each with a large piece under way.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::super::options::{Hooks, ManagedOptions, Priority};
use super::schedule::{Next, Schedule, in_order};
use super::streams::Streams;
use super::window::{Sent, WORKERS, Window};
use crate::chunk::{ChunkIndex, ChunkRun, ChunkState, Claim, Listener, Storage, Synced};

/// How long to wait after a failure, at first and at most; it doubles with every further one.
const SOONEST: Duration = Duration::from_millis(50);
const LATEST: Duration = Duration::from_secs(5);
/// So many failures without a success in between are the link's, not those of single chunks.
const OF_THE_LINK: u32 = 3;
/// What is fetched around a place that was read: programs stay near.
const NEARBY: u64 = 1 << 20;
/// How long a thread sleeps that nobody wakes.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// How much of the region is looked through for holes at once.
const LOOK: u64 = 1 << 30;

/// What is fetched in the background, and how it goes.
///
/// It knows no storage, so that a storage may report to it.
#[derive(Debug)]
pub(super) struct Pulls {
    state: Mutex<State>,
    /// There may be something to do, or it has ended.
    work: Condvar,
    /// All is here, or it has ended.
    done: Condvar,
    hooks: Hooks,
    pulls_all: bool,
    reads_ahead: bool,
    priority: Option<Priority>,
}

#[derive(Debug)]
struct State {
    schedule: Schedule,
    streams: Streams,
    window: Window,
    in_flight: u64,
    requests: u64,
    workers: u64,
    idle: u64,
    failures: u32,
    not_before: Option<Instant>,
    last_error: Option<String>,
    /// Goes up with all that comes, for those who wait for progress.
    came: u64,
    /// How much had come when all was gone through the last time.
    came_before: u64,
    complete: bool,
    ended: bool,
}

/// How pulling goes.
#[derive(Debug)]
pub(super) struct PullProgress {
    pub(super) in_flight: u64,
    pub(super) requests: u64,
    pub(super) rate: f64,
    pub(super) window: u64,
    pub(super) last_error: Option<String>,
}

impl Pulls {
    pub(super) fn new(options: &ManagedOptions) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                schedule: Schedule::new(),
                streams: Streams::default(),
                window: Window::new(options.window),
                in_flight: 0,
                requests: 0,
                workers: 0,
                idle: 0,
                failures: 0,
                not_before: None,
                last_error: None,
                came: 0,
                came_before: 0,
                complete: false,
                ended: false,
            }),
            work: Condvar::new(),
            done: Condvar::new(),
            hooks: options.hooks.clone(),
            pulls_all: options.pull || options.pull_first,
            reads_ahead: options.read_ahead,
            priority: options.pull_priority.clone(),
        })
    }

    /// Begins, if there is anything to do. The threads end by themselves after [`end`](Self::end).
    pub(super) fn start(self: &Arc<Self>, synced: &Arc<Synced>) -> io::Result<()> {
        if self.pulls_all {
            let (pulls, scouted) = (Arc::clone(self), Arc::clone(synced));
            spawn("memferry-holes", move || pulls.skip_holes(&scouted))?;
        }
        if self.pulls_all || self.reads_ahead {
            self.state().workers = 1;
            let (pulls, synced) = (Arc::clone(self), Arc::clone(synced));
            spawn("memferry-pull", move || pulls.begin(&synced)).inspect_err(|_| self.end())?;
        }
        Ok(())
    }

    /// Nothing more is fetched in the background; what is under way ends by itself.
    pub(super) fn end(&self) {
        self.state().ended = true;
        self.work.notify_all();
        self.done.notify_all();
    }

    /// Waits until all is here, as long as something comes.
    pub(super) fn wait_for_all(&self, patience: Duration) -> io::Result<()> {
        let mut state = self.state();
        let (mut came, mut since) = (state.came, Instant::now());
        while !state.complete {
            if state.came != came {
                (came, since) = (state.came, Instant::now());
            }
            let left = patience.saturating_sub(since.elapsed());
            if left.is_zero() || state.ended {
                let why = state.last_error.as_deref().unwrap_or("nothing came");
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("not everything could be pulled: {why}"),
                ));
            }
            state = wait(&self.done, state, Some(left));
        }
        Ok(())
    }

    /// Somebody reads `range`; `missed` if not all of it was here.
    pub(super) fn read(&self, synced: &Synced, range: &Range<u64>, missed: bool) {
        let near = missed && self.pulls_all;
        if !self.reads_ahead && !near {
            return;
        }
        // A hint is not worth waiting for.
        let Ok(mut state) = self.state.try_lock() else {
            return;
        };
        if state.complete || state.ended {
            return;
        }
        let end = synced.len();
        let mut fetch = Vec::new();
        if self.reads_ahead {
            state.streams.read(range, end, &mut fetch);
        }
        let near = fetch.is_empty() && near;
        if near {
            let start = range.start - range.start % NEARBY;
            let around = start.min(end)..start.saturating_add(NEARBY).min(end);
            state.schedule.come_near(synced.chunks_touched(&around));
        }
        for range in &fetch {
            let run = synced.chunks_touched(&(range.start.min(end)..range.end.min(end)));
            state.schedule.expect(run);
        }
        if (near || !fetch.is_empty()) && state.idle > 0 {
            self.work.notify_one();
        }
    }

    pub(super) fn progress(&self) -> PullProgress {
        let state = self.state();
        PullProgress {
            in_flight: state.in_flight,
            requests: state.requests,
            rate: if state.complete {
                0.0
            } else {
                state.window.rate()
            },
            window: state.window.bytes(),
            last_error: state.last_error.clone(),
        }
    }

    fn begin(self: &Arc<Self>, synced: &Arc<Synced>) {
        if self.pulls_all {
            let order = in_order(synced.residency().chunks(), self.priority.as_ref());
            self.state().schedule.pull_all(order);
        }
        self.work(synced);
    }

    /// One of the threads.
    fn work(self: &Arc<Self>, synced: &Arc<Synced>) {
        let mut buf = Vec::new();
        let mut state = self.state();
        loop {
            if state.ended || state.complete {
                break;
            }
            let now = Instant::now();
            if let Some(not_before) = state.not_before.filter(|&not_before| not_before > now) {
                state = self.rest(state, Some(not_before - now));
                continue;
            }
            let batch = state.window.batch();
            if state.in_flight > 0 && state.in_flight + batch > state.window.bytes() {
                // Whoever ends next goes on; if there is room for more, it says so.
                state = self.rest(state, None);
                continue;
            }
            let longest = (batch / u64::from(synced.chunk_size().bytes())).max(1);
            match state.schedule.next(synced.residency(), longest) {
                Next::Fetch(claim) => {
                    state = self.fetch(state, synced, claim, &mut buf);
                }
                Next::Again => {
                    let single = state.came != state.came_before;
                    state.schedule.again(single);
                    state.came_before = state.came;
                    let wait = backoff(state.failures);
                    state.not_before = Some(now + wait);
                }
                // A reader's fetch may fail, and tells nobody here.
                Next::Wait => state = self.rest(state, Some(Duration::from_millis(100))),
                Next::Nothing => {
                    if self.pulls_all {
                        state.complete = true;
                        self.done.notify_all();
                        self.work.notify_all();
                        break;
                    }
                    state = self.rest(state, None);
                }
            }
        }
        state.workers -= 1;
    }

    fn fetch<'a>(
        self: &'a Arc<Self>,
        mut state: MutexGuard<'a, State>,
        synced: &Arc<Synced>,
        claim: Claim<'_>,
        buf: &mut Vec<u8>,
    ) -> MutexGuard<'a, State> {
        let range = synced.bytes_of(claim.run());
        let bytes = range.end - range.start;
        state.in_flight += bytes;
        state.requests += 1;
        let sent = state.window.sent(Instant::now());
        let help = state.in_flight + state.window.batch() <= state.window.bytes();
        let help = help && self.call_help(&mut state, synced);
        drop(state);
        if help {
            self.work.notify_one();
        }
        let fetched = synced.fetch(claim, buf);
        let mut state = self.state();
        state.in_flight -= bytes;
        state.requests -= 1;
        state.ended_with(fetched, sent, bytes);
        state
    }

    /// There is room for another request: makes one more thread if none is idle, or says that one is to be woken.
    fn call_help(self: &Arc<Self>, state: &mut State, synced: &Arc<Synced>) -> bool {
        if state.idle > 0 {
            return true;
        }
        if state.workers < WORKERS && !state.complete {
            let (pulls, synced) = (Arc::clone(self), Arc::clone(synced));
            // Without it there is less under way, and that is all.
            if spawn("memferry-pull", move || pulls.work(&synced)).is_ok() {
                state.workers += 1;
            }
        }
        false
    }

    fn rest<'a>(
        &self,
        mut state: MutexGuard<'a, State>,
        at_most: Option<Duration>,
    ) -> MutexGuard<'a, State> {
        state.idle += 1;
        let mut state = wait(&self.work, state, at_most);
        state.idle -= 1;
        state
    }

    /// Makes what is a hole at the remote end a hole here, instead of fetching zeros.
    fn skip_holes(&self, synced: &Synced) {
        let residency = synced.residency();
        let len = synced.len();
        let mut next = 0;
        while next < len && !self.state().ended {
            let within = next..len.min(next + LOOK);
            // Whatever is wrong there, those who fetch will find it.
            let Ok(data) = synced.remote().data_ranges(within.clone()) else {
                return;
            };
            let ends = data.iter().map(|range| range.end);
            let starts = data.iter().map(|range| range.start);
            let holes = std::iter::once(within.start)
                .chain(ends)
                .zip(starts.chain([within.end]));
            for (start, end) in holes.filter(|(start, end)| start < end) {
                let size = u64::from(synced.chunk_size().bytes());
                let (first, last) = (
                    start.div_ceil(size),
                    if end == len {
                        residency.chunks()
                    } else {
                        end / size
                    },
                );
                let hole = ChunkRun::new(first, last.saturating_sub(first));
                while hole.count > 0 && residency.find(hole, 1, ChunkState::Remote).is_some() {
                    let Some(claim) = residency.claim(hole, u64::MAX) else {
                        break;
                    };
                    if synced.fetch_zeros(claim).is_err() {
                        return;
                    }
                    self.state().came += 1;
                }
            }
            next = within.end;
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Counters and queues, right between any two statements that can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn ended_with(&mut self, fetched: io::Result<()>, sent: Sent, bytes: u64) {
        let now = Instant::now();
        match fetched {
            Ok(()) => {
                self.window.landed(sent, bytes, now);
                self.came += 1;
                self.failures = 0;
                self.not_before = None;
            }
            Err(error) => {
                self.last_error = Some(error.to_string());
                self.failures = self.failures.saturating_add(1);
                if self.failures >= OF_THE_LINK {
                    self.not_before = Some(now + backoff(self.failures - OF_THE_LINK));
                }
            }
        }
    }
}

fn wait<'a>(
    changed: &Condvar,
    state: MutexGuard<'a, State>,
    at_most: Option<Duration>,
) -> MutexGuard<'a, State> {
    // Without a limit of its own it looks again now and then: nothing depends on a wake-up alone.
    let at_most = at_most.map_or(LOOK_AGAIN, |at_most| at_most.min(LOOK_AGAIN));
    changed
        .wait_timeout(state, at_most)
        .unwrap_or_else(PoisonError::into_inner)
        .0
}

fn backoff(failures: u32) -> Duration {
    SOONEST.saturating_mul(1 << failures.min(10)).min(LATEST)
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name(name.to_owned()).spawn(run)?;
    Ok(())
}

impl Listener for Pulls {
    fn arrived(&self, run: ChunkRun) {
        if let Some(hook) = &self.hooks.chunk_is_local {
            for chunk in run.range() {
                hook(ChunkIndex(chunk));
            }
        }
    }

    fn wanted(&self, run: ChunkRun) {
        if !self.pulls_all && !self.reads_ahead {
            return;
        }
        let mut state = self.state();
        state.schedule.want(run);
        if state.idle > 0 {
            self.work.notify_one();
        }
    }
}
