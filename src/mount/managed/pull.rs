//! Fetching in the background: a few threads, each with a large piece under way.

use std::fmt::Debug;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::super::options::{Hooks, ManagedOptions, Priority};
use super::schedule::{Next, Schedule, in_order};
use super::streams::Streams;
use super::window::{Sent, WORKERS, Window};
use crate::chunk::{ChunkIndex, ChunkRun, ChunkState, Claim, Listener, Residency, Storage, Synced};

/// How long to wait after a failure, at first and at most; it doubles with every further one.
const SOONEST: Duration = Duration::from_millis(50);
const LATEST: Duration = Duration::from_secs(5);
/// So many failures without a success in between are the link's, not those of single chunks.
const OF_THE_LINK: u32 = 3;
/// What is fetched around a place that was read: programs stay near.
pub(in crate::mount) const NEARBY: u64 = 1 << 20;
/// How long a thread sleeps that nobody wakes.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// How much of the region is looked through for holes at once.
const LOOK: u64 = 1 << 30;

/// What is filled in the background.
pub(in crate::mount) trait Filled: Debug + Send + Sync {
    /// Which of its chunks are there, or being fetched.
    fn residency(&self) -> &Residency;

    /// How many bytes there are.
    fn bytes(&self) -> u64;

    /// The size of a chunk.
    fn chunk_bytes(&self) -> u64;

    /// Fetches what was claimed, for nobody who waits. `buf` may be any.
    ///
    /// # Errors
    /// What those say from whom it comes, and to whom; the chunks are remote again then.
    fn fetch(&self, claim: Claim<'_>, buf: &mut Vec<u8>) -> io::Result<()>;

    /// Makes what was claimed zeros without fetching it.
    ///
    /// # Errors
    /// As [`fetch`](Self::fetch).
    fn fetch_zeros(&self, claim: Claim<'_>) -> io::Result<()>;

    /// The ranges of `within` that may be anything but zeros, in order.
    ///
    /// # Errors
    /// What those say from whom it comes.
    fn data_ranges(&self, within: Range<u64>) -> io::Result<Vec<Range<u64>>>;

    /// The bytes of a run of chunks; the last chunk may be short.
    fn bytes_of(&self, run: ChunkRun) -> Range<u64> {
        let size = self.chunk_bytes();
        run.start.0 * size..(run.end() * size).min(self.bytes())
    }

    /// The chunks that `range` touches.
    fn touched(&self, range: &Range<u64>) -> ChunkRun {
        if range.is_empty() {
            return ChunkRun::new(0, 0);
        }
        let size = self.chunk_bytes();
        let first = range.start / size;
        ChunkRun::new(first, range.end.div_ceil(size) - first)
    }
}

impl Filled for Synced {
    fn residency(&self) -> &Residency {
        self.residency()
    }

    fn bytes(&self) -> u64 {
        self.len()
    }

    fn chunk_bytes(&self) -> u64 {
        self.chunk_size().bytes().into()
    }

    fn fetch(&self, claim: Claim<'_>, buf: &mut Vec<u8>) -> io::Result<()> {
        self.fetch(claim, buf)
    }

    fn fetch_zeros(&self, claim: Claim<'_>) -> io::Result<()> {
        self.fetch_zeros(claim)
    }

    fn data_ranges(&self, within: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        self.remote().data_ranges(within)
    }
}

/// What is fetched in the background, and how it goes.
///
/// It knows no storage, so that a storage may report to it.
#[derive(Debug)]
pub(in crate::mount) struct Pulls {
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
pub(in crate::mount) struct PullProgress {
    pub(in crate::mount) in_flight: u64,
    pub(in crate::mount) requests: u64,
    pub(in crate::mount) rate: f64,
    pub(in crate::mount) window: u64,
    pub(in crate::mount) last_error: Option<String>,
}

impl Pulls {
    pub(in crate::mount) fn new(options: &ManagedOptions) -> Arc<Self> {
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
    pub(in crate::mount) fn start(self: &Arc<Self>, filled: &Arc<dyn Filled>) -> io::Result<()> {
        if self.pulls_all {
            let (pulls, scouted) = (Arc::clone(self), Arc::clone(filled));
            spawn("memferry-holes", move || pulls.skip_holes(&*scouted))?;
        }
        if self.pulls_all || self.reads_ahead {
            self.state().workers = 1;
            let (pulls, filled) = (Arc::clone(self), Arc::clone(filled));
            spawn("memferry-pull", move || pulls.begin(&filled)).inspect_err(|_| self.end())?;
        }
        Ok(())
    }

    /// Whether everything is to be fetched.
    pub(in crate::mount) fn pulls_all(&self) -> bool {
        self.pulls_all
    }

    /// Nothing more is fetched in the background; what is under way ends by itself.
    pub(in crate::mount) fn end(&self) {
        self.state().ended = true;
        self.work.notify_all();
        self.done.notify_all();
    }

    /// Waits until all is here, as long as something comes.
    pub(in crate::mount) fn wait_for_all(&self, patience: Duration) -> io::Result<()> {
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
    pub(in crate::mount) fn read(&self, filled: &dyn Filled, range: &Range<u64>, missed: bool) {
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
        let end = filled.bytes();
        let mut fetch = Vec::new();
        if self.reads_ahead {
            state.streams.read(range, end, &mut fetch);
        }
        let near = fetch.is_empty() && near;
        if near {
            let start = range.start - range.start % NEARBY;
            let around = start.min(end)..start.saturating_add(NEARBY).min(end);
            state.schedule.come_near(filled.touched(&around));
        }
        for range in &fetch {
            let run = filled.touched(&(range.start.min(end)..range.end.min(end)));
            state.schedule.expect(run);
        }
        if (near || !fetch.is_empty()) && state.idle > 0 {
            self.work.notify_one();
        }
    }

    /// Somebody waited for a chunk among these, and may want the others.
    pub(in crate::mount) fn come_near(&self, around: ChunkRun) {
        // A hint is not worth waiting for.
        let Ok(mut state) = self.state.try_lock() else {
            return;
        };
        if !self.pulls_all || state.complete || state.ended {
            return;
        }
        state.schedule.come_near(around);
        if state.idle > 0 {
            self.work.notify_one();
        }
    }

    pub(in crate::mount) fn progress(&self) -> PullProgress {
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

    fn begin(self: &Arc<Self>, filled: &Arc<dyn Filled>) {
        if self.pulls_all {
            let order = in_order(filled.residency().chunks(), self.priority.as_ref());
            self.state().schedule.pull_all(order);
        }
        self.work(filled);
    }

    /// One of the threads.
    fn work(self: &Arc<Self>, filled: &Arc<dyn Filled>) {
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
            let longest = (batch / filled.chunk_bytes()).max(1);
            match state.schedule.next(filled.residency(), longest) {
                Next::Fetch(claim) => {
                    state = self.fetch(state, filled, claim, &mut buf);
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
        filled: &Arc<dyn Filled>,
        claim: Claim<'_>,
        buf: &mut Vec<u8>,
    ) -> MutexGuard<'a, State> {
        let range = filled.bytes_of(claim.run());
        let bytes = range.end - range.start;
        state.in_flight += bytes;
        state.requests += 1;
        let sent = state.window.sent(Instant::now());
        let help = state.in_flight + state.window.batch() <= state.window.bytes();
        let help = help && self.call_help(&mut state, filled);
        drop(state);
        if help {
            self.work.notify_one();
        }
        let fetched = filled.fetch(claim, buf);
        let mut state = self.state();
        state.in_flight -= bytes;
        state.requests -= 1;
        state.ended_with(fetched, sent, bytes);
        state
    }

    /// There is room for another request: makes one more thread if none is idle, or says that one is to be woken.
    fn call_help(self: &Arc<Self>, state: &mut State, filled: &Arc<dyn Filled>) -> bool {
        if state.idle > 0 {
            return true;
        }
        if state.workers < WORKERS && !state.complete {
            let (pulls, filled) = (Arc::clone(self), Arc::clone(filled));
            // Without it there is less under way, and that is all.
            if spawn("memferry-pull", move || pulls.work(&filled)).is_ok() {
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
    fn skip_holes(&self, filled: &dyn Filled) {
        let residency = filled.residency();
        let len = filled.bytes();
        let mut next = 0;
        while next < len && !self.state().ended {
            let within = next..len.min(next + LOOK);
            // Whatever is wrong there, those who fetch will find it.
            let Ok(data) = filled.data_ranges(within.clone()) else {
                return;
            };
            let ends = data.iter().map(|range| range.end);
            let starts = data.iter().map(|range| range.start);
            let holes = std::iter::once(within.start)
                .chain(ends)
                .zip(starts.chain([within.end]));
            for (start, end) in holes.filter(|(start, end)| start < end) {
                let size = filled.chunk_bytes();
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
                    if filled.fetch_zeros(claim).is_err() {
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
