//! Threads that carry out what may have to wait, and the memory that is used for it; shared by connections.

use std::collections::VecDeque;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, PoisonError};
use std::thread;
use std::time::Duration;

use super::budget::{Budget, Buffers};
use super::overdue::Watch;
use crate::chunk::sync::{Condvar, Mutex, MutexGuard};
use crate::nbd::limits;

/// How many threads, and how much memory.
#[derive(Clone)]
pub struct WorkerOptions {
    /// The most threads. They are started when there is work for them, and end when there was none for a while. A storage far away wants as many as
    /// requests are to be under way.
    pub threads: usize,
    /// The most bytes of requests that are held at once, for all connections together. At least 32 MiB.
    pub in_flight: u64,
    /// The same for one connection.
    pub in_flight_each: u64,
    /// How long a client may take to send what it has announced, and not to take any of what it is sent.
    pub patience: Duration,
    /// How long a storage may take for a request. After that the client is told that it failed; a write to the same bytes is refused until the
    /// storage has come back. `None` leaves it to the storage.
    pub limit: Option<Duration>,
    /// Called by each thread that is started, before it does anything else.
    pub on_start: Option<Arc<dyn Fn() + Send + Sync>>,
}

impl Default for WorkerOptions {
    fn default() -> Self {
        Self {
            // Enough to keep a disk, or a link with a long way, busy; an idle one costs a stack.
            threads: 32,
            in_flight: 256 << 20,
            in_flight_each: 64 << 20,
            // A peer whose network was away for shorter goes on as if nothing had been.
            patience: Duration::from_secs(30),
            limit: None,
            on_start: None,
        }
    }
}

impl fmt::Debug for WorkerOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkerOptions")
            .field("threads", &self.threads)
            .field("in_flight", &self.in_flight)
            .field("in_flight_each", &self.in_flight_each)
            .field("patience", &self.patience)
            .field("limit", &self.limit)
            .finish_non_exhaustive()
    }
}

/// How long a thread without work stays.
const IDLE: Duration = Duration::from_secs(10);
/// What is kept of buffers that are not in use.
const KEPT: usize = 64 << 20;

/// Threads and memory for any number of connections. Clones share them; the threads end when the last is gone.
#[derive(Debug, Clone)]
pub struct Workers {
    pool: Arc<Pool>,
    pub(super) budget: Arc<Budget>,
    pub(super) buffers: Arc<Buffers>,
    pub(super) in_flight_each: u64,
    pub(super) patience: Duration,
    pub(super) watch: Option<Arc<Watch>>,
}

impl Workers {
    /// Takes numbers that are too small for one request of the largest size for that size.
    #[must_use]
    pub fn new(options: &WorkerOptions) -> Self {
        let least = u64::from(limits::PAYLOAD) + (64 << 10);
        Self {
            pool: Arc::new(Pool {
                queue: Arc::new(Queue {
                    state: Mutex::default(),
                    work: Condvar::new(),
                    most: options.threads.max(1),
                    on_start: OnStart(options.on_start.clone()),
                }),
            }),
            budget: Budget::new(options.in_flight.max(least)),
            buffers: Buffers::new(KEPT),
            in_flight_each: options.in_flight_each.max(least),
            patience: options.patience,
            watch: options.limit.map(|limit| Arc::new(Watch::new(limit))),
        }
    }

    /// Has one of the threads run `job`; all jobs are begun in the order in which they came. If no thread can be started and there is none, runs it here.
    pub(super) fn run(&self, job: Job) {
        if let Err(job) = self.pool.queue.push(job) {
            job();
        }
    }
}

impl Default for Workers {
    fn default() -> Self {
        Self::new(&WorkerOptions::default())
    }
}

pub(super) type Job = Box<dyn FnOnce() + Send>;

struct OnStart(Option<Arc<dyn Fn() + Send + Sync>>);

/// Ends the threads when it goes.
struct Pool {
    queue: Arc<Queue>,
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pool")
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.queue.lock().over = true;
        self.queue.work.notify_all();
    }
}

struct Queue {
    state: Mutex<State>,
    work: Condvar,
    most: usize,
    on_start: OnStart,
}

/// Whoever waits for work has taken notice of an empty queue under the lock, and whoever adds work does so under the lock: no job is
/// overlooked. There are never more jobs than threads that wait for them, unless there are as many threads as there may be.
#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    /// How many threads wait. One that was woken counts until it has the lock again and takes a job, so it is
    /// the number of jobs that says whether another thread is wanted.
    idle: usize,
    over: bool,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Jobs run without the lock, and what is done under it does not panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(self: &Arc<Self>, job: Job) -> Result<(), Job> {
        if !self.add(job) {
            return Ok(());
        }
        let queue = Arc::clone(self);
        let started = thread::Builder::new()
            .name("nbd-worker".into())
            .spawn(move || queue.work());
        if started.is_ok() {
            return Ok(());
        }
        let mut state = self.lock();
        state.threads -= 1;
        if state.threads == 0 {
            // Nobody else will do it. It need not be this one; any that waits is as good.
            return state.jobs.pop_front().map_or(Ok(()), Err);
        }
        drop(state);
        self.work.notify_one();
        Ok(())
    }

    /// Whether another thread has to be started for it, which is counted already.
    fn add(&self, job: Job) -> bool {
        let mut state = self.lock();
        state.jobs.push_back(job);
        let more = state.jobs.len() > state.idle && state.threads < self.most;
        if more {
            state.threads += 1;
        }
        drop(state);
        if !more {
            self.work.notify_one();
        }
        more
    }

    fn work(self: Arc<Self>) {
        if let Some(on_start) = &self.on_start.0 {
            on_start();
        }
        self.attend();
    }

    /// Does jobs until there are none for a while.
    fn attend(&self) {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                // A storage that panics has not answered; the job's own clean-up ends its connection.
                let _ = catch_unwind(AssertUnwindSafe(job));
                state = self.lock();
                continue;
            }
            if state.over {
                break;
            }
            state.idle += 1;
            let (next, waited) = self
                .work
                .wait_timeout(state, IDLE)
                .unwrap_or_else(PoisonError::into_inner);
            state = next;
            state.idle -= 1;
            if waited.timed_out() && state.jobs.is_empty() {
                break;
            }
        }
        state.threads -= 1;
    }
}

#[cfg(not(loom))]
#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;
    use std::time::Instant;

    const SOON: Duration = Duration::from_secs(20);

    fn workers(threads: usize) -> Workers {
        Workers::new(&WorkerOptions {
            threads,
            ..WorkerOptions::default()
        })
    }

    #[test]
    fn a_job_never_waits_for_another_while_there_may_be_more_threads() {
        // Two jobs came while one thread was idle. Both saw it, it took the first, and the second waited until that was done: 30 s, when the
        // first was a read that hung. Each job here waits for the one that comes after it.
        for _ in 0..200 {
            let workers = workers(8);
            let (warm, warmed) = mpsc::channel();
            workers.run(Box::new(move || warm.send(()).unwrap()));
            warmed.recv_timeout(SOON).unwrap();
            let (tell, told) = mpsc::channel();
            let mut last = None;
            for _ in 0..8 {
                let (done, wait) = mpsc::channel::<()>();
                let tell = tell.clone();
                let before = last.replace(done);
                workers.run(Box::new(move || {
                    if let Some(before) = before {
                        before.send(()).unwrap();
                    }
                    wait.recv_timeout(SOON).unwrap();
                    tell.send(()).unwrap();
                }));
            }
            last.unwrap().send(()).unwrap();
            for _ in 0..8 {
                told.recv_timeout(SOON).unwrap();
            }
        }
    }

    #[test]
    fn every_job_is_done_whoever_adds_it() {
        let workers = workers(3);
        let done = Arc::new(AtomicUsize::new(0));
        let (tell, told) = mpsc::channel();
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..5000 {
                        let (done, tell) = (Arc::clone(&done), tell.clone());
                        workers.run(Box::new(move || {
                            if done.fetch_add(1, Ordering::Relaxed) + 1 == 20_000 {
                                tell.send(()).unwrap();
                            }
                        }));
                    }
                });
            }
        });
        told.recv_timeout(SOON).unwrap();
        let queue = workers.pool.queue.lock();
        assert!(queue.threads <= 3, "{} threads", queue.threads);
    }

    #[test]
    fn a_job_that_panics_takes_no_thread_with_it() {
        let workers = workers(1);
        let (tell, told) = mpsc::channel();
        workers.run(Box::new(|| panic!("a storage that is broken")));
        workers.run(Box::new(move || tell.send(()).unwrap()));
        told.recv_timeout(SOON).unwrap();
    }

    #[test]
    fn threads_end_with_the_last_of_their_users() {
        let workers = workers(2);
        let (tell, told) = mpsc::channel();
        workers.run(Box::new(move || tell.send(()).unwrap()));
        told.recv_timeout(SOON).unwrap();
        let queue = Arc::clone(&workers.pool.queue);
        drop(workers);
        let end = Instant::now() + SOON;
        while queue.lock().threads > 0 {
            assert!(Instant::now() < end);
            thread::yield_now();
        }
    }
}

/// Every interleaving. A wake-up that is lost is a deadlock, which loom reports.
#[cfg(loom)]
#[cfg(test)]
mod loom_models {
    use super::*;
    use loom::sync::Arc as LoomArc;
    use loom::sync::Notify;

    fn queue(threads: usize) -> LoomArc<Queue> {
        let queue = Queue {
            state: Mutex::new(State::default()),
            work: Condvar::new(),
            most: threads,
            on_start: OnStart(None),
        };
        // Threads of the model's, so that none is started.
        queue.lock().threads = threads;
        LoomArc::new(queue)
    }

    fn end(queue: &Queue) {
        queue.lock().over = true;
        queue.work.notify_all();
    }

    /// What is wrong with few threads shows with few switches among them; without a bound it takes minutes.
    fn model(check: impl Fn() + Sync + Send + 'static) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(2);
        model.check(check);
    }

    #[test]
    fn loom_a_job_never_waits_for_one_before_it_while_a_thread_is_idle() {
        model(|| {
            let queue = queue(2);
            let threads: Vec<_> = (0..2)
                .map(|_| {
                    let queue = LoomArc::clone(&queue);
                    loom::thread::spawn(move || queue.attend())
                })
                .collect();
            let second = LoomArc::new(Notify::new());
            let wait = LoomArc::clone(&second);
            assert!(!queue.add(Box::new(move || wait.wait())));
            assert!(!queue.add(Box::new(move || second.notify())));
            end(&queue);
            for thread in threads {
                thread.join().unwrap();
            }
            assert!(queue.lock().jobs.is_empty());
        });
    }

    #[test]
    fn loom_jobs_of_two_clients_are_all_done() {
        model(|| {
            let queue = queue(1);
            let worker = {
                let queue = LoomArc::clone(&queue);
                loom::thread::spawn(move || queue.attend())
            };
            let done: Vec<_> = (0..2).map(|_| LoomArc::new(Notify::new())).collect();
            let other = {
                let (queue, done) = (LoomArc::clone(&queue), LoomArc::clone(&done[0]));
                loom::thread::spawn(move || {
                    assert!(!queue.add(Box::new(move || done.notify())));
                })
            };
            let mine = LoomArc::clone(&done[1]);
            assert!(!queue.add(Box::new(move || mine.notify())));
            for done in done {
                done.wait();
            }
            other.join().unwrap();
            end(&queue);
            worker.join().unwrap();
        });
    }
}
