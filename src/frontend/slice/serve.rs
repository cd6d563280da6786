//! The threads that make pages present: at once for who waits, and ahead of who will.
//!
//! A thread that reads a fault serves it itself, and wakes nobody: it reads the page from the storage and installs it. Only if
//! several pages are waited for, and they are not at hand, others get the rest.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::io::Errno;

use super::ahead::{Ahead, Streams};
use super::latency::Latencies;
use super::pager::{Install, LARGEST, Pager, Problem};
use super::retry::{FIRST_PAUSE, LONGEST_PAUSE, Retries, Retry};
use super::write_back::{WriteBack, cut_by};
use super::{Failure, SliceOptions};
use crate::chunk::Storage;
use crate::sys::uffd::{Event, Uffd};

/// So many threads read ahead: with 1 MiB each, what 1 Gbit/s carries in a round trip of 30 ms.
const AHEAD_THREADS: usize = 4;

/// Most pages that are read ahead, and kept, to be installed when they are accessed, which tells how far the program is.
const MOST_KEPT: usize = 64;

/// Most pieces that wait to be read ahead; more would be old by the time of their turn.
const MOST_JOBS: usize = 256;

/// Most pages that the thread which serves a fault installs besides, if they are at hand: 256 KiB take it some 50 µs.
const MOST_AT_HAND: u64 = 64;

/// What is written to a counter of the kernel's.
#[expect(clippy::host_endian_bytes, reason = "the kernel's own words")]
const ONE: [u8; 8] = 1_u64.to_ne_bytes();

/// Faults of a program, and everything that is needed to serve them.
pub(super) struct Service {
    pub(super) pager: Pager,
    /// `None` if nothing is written back.
    pub(super) writes: Option<WriteBack>,
    failure: Failure,
    threads: usize,
    read_ahead: u64,
    /// Pages that are waited for, and that no thread has begun with.
    queue: Mutex<VecDeque<(Range<u64>, Instant)>>,
    /// Counts what is in `queue`; each count wakes one thread.
    queued: OwnedFd,
    pub(super) retries: Retries,
    pub(super) latencies: Latencies,
    pub(super) on_fault: Option<OnFault>,
    /// Since when those wait whose pages are being read.
    serving: Mutex<Vec<Instant>>,
    streams: Mutex<Streams>,
    jobs: Mutex<VecDeque<Job>>,
    jobs_changed: Condvar,
    /// Pages that were read ahead and are still absent.
    kept: Mutex<BTreeMap<u64, Kept>>,
    kept_count: AtomicUsize,
    stopping: AtomicBool,
    /// Readable once the threads shall end.
    stop: OwnedFd,
}

/// Told of pages that were waited for, once they are there.
pub(super) type OnFault = Box<dyn Fn(&Range<u64>) + Send + Sync>;

/// What an access tells of the next.
#[derive(Debug)]
enum Plan {
    /// What is wanted now and what follows are at hand, up to this page.
    Copy(u64),
    /// These pages, of that area.
    ReadAhead(Ahead, Range<u64>),
}

/// Pages of one area to be read ahead.
#[derive(Debug)]
struct Job {
    pages: Range<u64>,
    /// Whether the first is kept rather than installed.
    keeps_first: bool,
}

#[derive(Debug)]
struct Kept {
    data: Box<[u8]>,
    generation: u64,
}

/// What a thread has of its own.
struct Server {
    epoll: OwnedFd,
    events: Vec<Event>,
    faults: Vec<u64>,
    buffer: Vec<u8>,
}

/// Threads that serve; they end when this is dropped.
#[derive(Debug)]
pub(super) struct Running {
    service: Arc<Service>,
    threads: Vec<JoinHandle<()>>,
}

impl std::fmt::Debug for Service {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Service")
            .field("pager", &self.pager)
            .field("retries", &self.retries)
            .finish_non_exhaustive()
    }
}

impl Service {
    /// Faults of `pager`'s memory, to be served as `options` say.
    ///
    /// # Errors
    /// If there are no descriptors to be had.
    pub(super) fn new(
        pager: Pager,
        writes: Option<WriteBack>,
        options: &SliceOptions,
    ) -> io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Self {
            pager,
            writes,
            failure: options.failure,
            threads: options.threads.max(1),
            read_ahead: options.read_ahead,
            queue: Mutex::default(),
            queued: eventfd(0, flags | EventfdFlags::SEMAPHORE)?,
            retries: Retries::default(),
            latencies: Latencies::default(),
            on_fault: None,
            serving: Mutex::default(),
            streams: Mutex::default(),
            jobs: Mutex::default(),
            jobs_changed: Condvar::new(),
            kept: Mutex::default(),
            kept_count: AtomicUsize::new(0),
            stopping: AtomicBool::new(false),
            stop: eventfd(0, flags)?,
        })
    }

    /// Starts the threads.
    ///
    /// # Errors
    /// If there are none to be had, or no descriptors.
    pub(super) fn start(self: &Arc<Self>) -> io::Result<Running> {
        let mut running = Running {
            service: Arc::clone(self),
            threads: Vec::new(),
        };
        let ahead = if self.read_ahead > 0 {
            AHEAD_THREADS
        } else {
            0
        };
        for _ in 0..self.threads {
            let mut server = self.server()?;
            let service = Arc::clone(self);
            running.spawn("slice-faults", move || service.serve(&mut server))?;
        }
        for _ in 0..ahead {
            let service = Arc::clone(self);
            running.spawn("slice-ahead", move || service.read_ahead())?;
        }
        Ok(running)
    }

    fn server(&self) -> io::Result<Server> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let add = |fd, flags| epoll::add(&epoll, fd, epoll::EventData::new_u64(0), flags);
        // Exclusive: a fault wakes one thread that is idle, not all of them.
        let one = epoll::EventFlags::IN | epoll::EventFlags::EXCLUSIVE;
        add(self.pager.uffd.as_fd(), one)?;
        add(self.queued.as_fd(), one)?;
        add(self.stop.as_fd(), epoll::EventFlags::IN)?;
        Ok(Server {
            epoll,
            events: Vec::new(),
            faults: Vec::new(),
            buffer: Vec::new(),
        })
    }

    /// Serves faults until the service stops.
    fn serve(&self, server: &mut Server) {
        loop {
            let timeout = self.retries.until_next();
            let mut ready = [const { MaybeUninit::uninit() }; 4];
            let woken = epoll::wait(&server.epoll, &mut ready, timeout.as_ref());
            if self.stopping.load(Ordering::Acquire) {
                return;
            }
            match woken {
                Ok(_) | Err(Errno::INTR) => {}
                // The descriptors are ours and open: this does not happen, and spinning would help nobody.
                Err(_) => return,
            }
            // Whatever it was woken for, no other thread was: so before it takes the time of a read, it has read all faults, and has
            // passed on what else waits.
            self.read_faults(server);
            self.serve_faults(server);
            while let Some((pages, since)) = self.take_queued() {
                self.resolve(&pages, since, &mut server.buffer);
            }
            self.try_again(&mut server.buffer);
        }
    }

    /// Reads all faults that there are.
    fn read_faults(&self, server: &mut Server) {
        let Server { events, faults, .. } = server;
        faults.clear();
        let reading = self.pager.reading();
        loop {
            events.clear();
            match self.pager.uffd.read_events(events) {
                // It fails only once the program has exited, and then nobody waits.
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
            for event in events.iter() {
                match event {
                    Event::Fault {
                        address, wp: true, ..
                    } => self.let_write(*address),
                    Event::Fault { address, .. } => faults.extend(self.pager.page_at(*address)),
                    Event::Remove { range } => reading.give_back(range),
                    _ => {}
                }
            }
            if events.len() < Uffd::MOST_EVENTS {
                return;
            }
        }
    }

    /// Serves the faults that were read. Neighbours are one read; of several that take time, others get all but one.
    fn serve_faults(&self, server: &mut Server) {
        let Server { faults, buffer, .. } = server;
        let now = Instant::now();
        let mut mine = match faults[..] {
            [] => self.take_queued(),
            [page] => Some((page..page + 1, now)),
            _ => None,
        };
        if faults.len() > 1 {
            faults.sort_unstable();
            faults.dedup();
            let mut at_hand = Vec::new();
            for pages in runs_of(faults, self.pager.batch()) {
                if self.is_at_hand(&pages) {
                    at_hand.push(pages);
                } else if mine.is_none() {
                    mine = Some((pages, now));
                } else {
                    self.queue_up(pages, now);
                }
            }
            for pages in at_hand {
                self.resolve(&pages, now, buffer);
            }
        }
        if let Some((pages, since)) = mine {
            self.pass_on();
            self.resolve(&pages, since, buffer);
        }
    }

    /// Wakes another thread if pages are queued: the one that was woken for them may be this one.
    fn pass_on(&self) {
        let some = !locked(&self.queue).is_empty();
        if some && rustix::io::read(&self.queued, &mut [0; 8]).is_ok() {
            let _ = rustix::io::write(&self.queued, &ONE);
        }
    }

    /// Leaves pages to another thread.
    fn queue_up(&self, pages: Range<u64>, since: Instant) {
        // First what is counted, then the count: who takes a count finds something.
        locked(&self.queue).push_back((pages, since));
        // One count wakes one thread. It cannot fail: the counter holds more than there is memory for pages.
        let _ = rustix::io::write(&self.queued, &ONE);
    }

    /// Takes a count, and what it counts.
    fn take_queued(&self) -> Option<(Range<u64>, Instant)> {
        // Without a system call where there is nothing: a program on this processor runs on only when this thread waits.
        if locked(&self.queue).is_empty() {
            return None;
        }
        rustix::io::read(&self.queued, &mut [0; 8]).ok()?;
        locked(&self.queue).pop_front()
    }

    fn let_write(&self, address: u64) {
        if let (Some(page), Some(writes)) = (self.pager.page_at(address), &self.writes) {
            // It fails if there is no such page any more: who writes there looks again.
            let _ = writes.write_fault(&self.pager, page);
        }
    }

    fn is_at_hand(&self, pages: &Range<u64>) -> bool {
        self.pager.storage.is_at_hand(self.pager.bytes(pages))
    }

    /// Makes pages present that somebody waits for, `since` then.
    fn resolve(&self, pages: &Range<u64>, since: Instant, buffer: &mut Vec<u8>) {
        locked(&self.serving).push(since);
        self.resolve_each(pages, since, buffer);
        let mut serving = locked(&self.serving);
        if let Some(this) = serving.iter().position(|&begun| begun == since) {
            serving.swap_remove(this);
        }
    }

    fn resolve_each(&self, pages: &Range<u64>, since: Instant, buffer: &mut Vec<u8>) {
        let mut rest = pages.clone();
        while let Some(part) = self.pager.within_area(&rest) {
            rest.start = part.end;
            let plan = self.plan(&part);
            let now = match plan {
                // One copy of more is quicker than two, and nobody is overtaken by the second.
                // Memory that was given back is not filled again before it is accessed.
                Some(Plan::Copy(end)) => part.start..self.pager.until_zeros(part.end..end),
                _ => part.clone(),
            };
            match self.fetch_now(&now, buffer) {
                Ok(()) => self.is_there(&part, since),
                Err(why) => {
                    if let Some(retry) = self.retry(part, why, since, FIRST_PAUSE) {
                        self.retries.add(retry);
                    }
                }
            }
            if let Some(Plan::ReadAhead(ahead, area)) = plan {
                self.have_read(ahead, &area);
            }
        }
    }

    /// Pages are there that somebody has waited for, `since` then.
    fn is_there(&self, pages: &Range<u64>, since: Instant) {
        self.latencies
            .note(since.elapsed(), pages.end - pages.start);
        if let Some(on_fault) = &self.on_fault {
            on_fault(pages);
        }
    }

    /// Takes note of an access to `pages` of one area; says what will be accessed next.
    fn plan(&self, pages: &Range<u64>) -> Option<Plan> {
        if self.read_ahead == 0 {
            return None;
        }
        let area = self.pager.area_of(pages.start)?;
        let next = pages.end..pages.end + 1;
        let at_hand = area.contains(&next.start) && self.is_at_hand(&next);
        let most = self.read_ahead / self.pager.page;
        let most = if at_hand {
            most.min(MOST_AT_HAND)
        } else {
            most
        };
        let ahead = {
            let mut streams = locked(&self.streams);
            pages
                .clone()
                .filter_map(|page| streams.access(page, most))
                .last()?
        };
        if !at_hand {
            Some(Plan::ReadAhead(ahead, area))
        } else if ahead.stride == 1 && ahead.first <= pages.end {
            Some(Plan::Copy((ahead.first + ahead.count).min(area.end)))
        } else {
            // What is at hand is as quick when somebody asks for it.
            None
        }
    }

    /// Makes `pages` of one area present.
    fn fetch_now(&self, pages: &Range<u64>, buffer: &mut Vec<u8>) -> Result<(), Problem> {
        if pages.end - pages.start == 1 && self.install_kept(pages)? {
            return Ok(());
        }
        self.pager
            .fetch(pages, buffer, <dyn Storage>::read_exact_at)
    }

    /// Installs a page that was kept; says whether it was.
    fn install_kept(&self, page: &Range<u64>) -> Result<bool, Problem> {
        if self.kept_count.load(Ordering::Acquire) == 0 {
            return Ok(false);
        }
        let Some(kept) = self.take_kept(page.start) else {
            return Ok(false);
        };
        let installed =
            self.pager
                .install(page, &kept.data, Install::Clean, Some(kept.generation))?;
        Ok(installed.is_some())
    }

    fn take_kept(&self, page: u64) -> Option<Kept> {
        let mut kept = locked(&self.kept);
        let found = kept.remove(&page);
        self.kept_count.store(kept.len(), Ordering::Release);
        found
    }

    /// Has pages of `area` read that will be accessed next.
    fn have_read(&self, ahead: Ahead, area: &Range<u64>) {
        let sequential = ahead.stride == 1;
        let mut jobs = locked(&self.jobs);
        let mut keeps_first = sequential;
        let cut = |pages| cut_by(pages, self.pager.batch());
        for pages in joined(ahead.pages(area)).flat_map(cut) {
            if jobs.len() >= MOST_JOBS {
                break;
            }
            jobs.push_back(Job { pages, keeps_first });
            keeps_first = false;
        }
        drop(jobs);
        self.jobs_changed.notify_all();
    }

    /// Reads ahead until the service stops.
    fn read_ahead(&self) {
        let mut buffer = Vec::new();
        while let Some(job) = self.next_job() {
            // Whoever accesses what could not be read is told, and nobody else needs to know.
            let _ = self.do_job(&job, &mut buffer);
        }
    }

    fn next_job(&self) -> Option<Job> {
        let mut jobs = locked(&self.jobs);
        loop {
            if self.stopping.load(Ordering::Acquire) {
                return None;
            }
            if let Some(job) = jobs.pop_front() {
                return Some(job);
            }
            jobs = self
                .jobs_changed
                .wait(jobs)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn do_job(&self, job: &Job, buffer: &mut Vec<u8>) -> Result<(), Problem> {
        let mut rest = job.pages.clone();
        while let Some(mut pages) = self.pager.next_absent(rest.clone()) {
            rest.start = pages.end;
            let generation = self.pager.generation();
            let mut data = self
                .pager
                .read(&pages, buffer, <dyn Storage>::read_ahead_at)?;
            if job.keeps_first && pages.start == job.pages.start {
                let (first, others) =
                    data.split_at(usize::try_from(self.pager.page).expect("a page is little"));
                if self.keep(pages.start, first, generation) {
                    data = others;
                    pages.start += 1;
                }
            }
            if !pages.is_empty() {
                let _ = self
                    .pager
                    .install(&pages, data, Install::Clean, Some(generation))?;
            }
        }
        Ok(())
    }

    /// Keeps a page that was read ahead and nobody waits for; says whether it could.
    fn keep(&self, page: u64, data: &[u8], generation: u64) -> bool {
        let mut kept = locked(&self.kept);
        if kept.len() >= MOST_KEPT || self.pager.is_resident(page) {
            kept.retain(|&page, _| !self.pager.is_resident(page));
            self.kept_count.store(kept.len(), Ordering::Release);
            return false;
        }
        let data = data.into();
        kept.insert(page, Kept { data, generation });
        self.kept_count.store(kept.len(), Ordering::Release);
        true
    }

    /// Pages could not be had: they are to be tried again, or whoever waits for them is told in the only way there is.
    fn retry(
        &self,
        pages: Range<u64>,
        why: Problem,
        since: Instant,
        pause: Duration,
    ) -> Option<Retry> {
        let error = match why {
            Problem::Gone => {
                // Nothing is to be served there any more: the kernel knows better what there is.
                self.pager.wake(&pages);
                return None;
            }
            Problem::Changing => return Some(Retry::soon(pages, since)),
            Problem::Storage(error) => error,
        };
        let now = Instant::now();
        let gives_up = match self.failure {
            Failure::Wait => false,
            Failure::Poison { after } => now.saturating_duration_since(since) >= after,
        };
        // A kernel that cannot poison leaves them waiting: no bytes are better than wrong ones.
        if gives_up && self.pager.poison(&pages).unwrap_or(false) {
            return None;
        }
        Some(Retry {
            pages,
            at: now + pause,
            pause,
            since,
            error: Some(error.to_string()),
        })
    }

    fn try_again(&self, buffer: &mut Vec<u8>) {
        while let Some((number, retry)) = self.retries.take_due() {
            let again = match self.fetch_now(&retry.pages, buffer) {
                Ok(()) => {
                    self.is_there(&retry.pages, retry.since);
                    None
                }
                Err(why) => {
                    let pause = (retry.pause * 2).min(LONGEST_PAUSE);
                    self.retry(retry.pages, why, retry.since, pause)
                }
            };
            self.retries.tried(number, again);
        }
    }

    /// Since when the one waits that has waited for the longest time.
    pub(super) fn oldest(&self) -> Option<Instant> {
        let queued = locked(&self.queue).front().map(|&(_, since)| since);
        let served = locked(&self.serving).iter().copied().min();
        let retried = self.retries.waiting().map(|waiting| waiting.since);
        [queued, served, retried].into_iter().flatten().min()
    }

    fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        let _ = rustix::io::write(&self.stop, &ONE);
        // Under the lock, so that no thread is between looking and waiting.
        let jobs = locked(&self.jobs);
        self.jobs_changed.notify_all();
        drop(jobs);
    }
}

impl Running {
    fn spawn(&mut self, name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let thread = thread::Builder::new().name(name.to_owned()).spawn(work)?;
        self.threads.push(thread);
        Ok(())
    }
}

/// Waits for the threads, which may wait for the storage, which has deadlines.
impl Drop for Running {
    fn drop(&mut self) {
        self.service.stop();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Ahead {
    /// Its pages as far as they lie in `area`, in the order of their accesses.
    fn pages(self, area: &Range<u64>) -> impl Iterator<Item = u64> {
        let area = area.clone();
        (0..self.count)
            .map_while(move |step| {
                let steps = i64::try_from(step).ok()?.checked_mul(self.stride)?;
                self.first.checked_add_signed(steps)
            })
            .take_while(move |page| area.contains(page))
    }
}

/// Runs of neighbours of sorted pages, none longer than one read.
fn runs_of(pages: &[u64], longest: u64) -> impl Iterator<Item = Range<u64>> {
    joined(pages.iter().copied()).flat_map(move |pages| cut_by(pages, longest))
}

/// Joins pages that follow each other.
fn joined(pages: impl Iterator<Item = u64>) -> impl Iterator<Item = Range<u64>> {
    let mut pages = pages.peekable();
    std::iter::from_fn(move || {
        let start = pages.next()?;
        let mut end = start + 1;
        while pages.next_if_eq(&end).is_some() {
            end += 1;
        }
        Some(start..end)
    })
}

/// No lock here guards what a panic could leave half done.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

const _: () = assert!(LARGEST >= MOST_AT_HAND * 4096);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_one_run_and_long_runs_are_cut() {
        let runs = |pages: &[u64]| runs_of(pages, 256).collect::<Vec<_>>();
        assert_eq!(runs(&[]), []);
        assert_eq!(runs(&[3, 4, 5, 7, 9, 10]), [3..6, 7..8, 9..11]);
        let pages: Vec<u64> = (0..300).collect();
        assert_eq!(runs(&pages), [0..256, 256..300]);
    }

    #[test]
    fn what_is_ahead_stays_in_its_area() {
        let pages = |first, stride, count| -> Vec<u64> {
            let ahead = Ahead {
                first,
                stride,
                count,
            };
            ahead.pages(&(10..20)).collect()
        };
        assert_eq!(pages(18, 1, 5), [18, 19]);
        assert_eq!(pages(12, -2, 9), [12, 10]);
        assert_eq!(pages(9, 1, 3), [0; 0]);
        assert_eq!(pages(10, i64::MAX, u64::MAX), [10]);
    }
}
