//! Runs both ends against each other.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use memferry::migrate::{
    Budget, Cancel, LeechError, LeechOptions, LeechOutcome, LeechReport, PostCopy, Progress,
    SeedError, SeedOptions, SeedOutcome, SeedReport, Verify, leech, seed,
};
use memferry::transport::{Listener, Pairing, Session};

use super::destination::Destination;
use super::proxy::{Proxy, Trap};
use super::source::Source;

/// Runs `body`, which must end in time: a migration that hangs fails its test.
#[track_caller]
pub(crate) fn within<R: Send + 'static>(
    limit: Duration,
    body: impl FnOnce() -> R + Send + 'static,
) -> R {
    let (done, ended) = mpsc::channel();
    let thread = thread::spawn(move || {
        let _ = done.send(body());
    });
    match ended.recv_timeout(limit) {
        Ok(result) => result,
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("it has not ended within {limit:?}"),
        Err(mpsc::RecvTimeoutError::Disconnected) => {
            std::panic::resume_unwind(thread.join().unwrap_err())
        }
    }
}

/// What a migration is to be like.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub seed: SeedOptions,
    pub leech: LeechOptions,
    pub lanes: u8,
    /// Where the network breaks. Without a trap there is no proxy.
    pub trap: Option<Trap>,
    /// A proxy that only counts.
    pub count: bool,
    /// The source cancels when this is true of what it is told.
    pub cancel_at: Option<fn(&Progress) -> bool>,
    /// The destination cancels when this is true of what it is told.
    pub cancel_there_at: Option<fn(&Progress) -> bool>,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            seed: SeedOptions {
                verify: Verify::Off,
                ..SeedOptions::default()
            },
            leech: LeechOptions::default(),
            lanes: 1,
            trap: None,
            count: false,
            cancel_at: None,
            cancel_there_at: None,
        }
    }
}

impl Plan {
    pub(crate) fn post_copy(mut self, post_copy: PostCopy) -> Self {
        self.seed.budget = Budget {
            post_copy,
            ..self.seed.budget
        };
        self
    }

    pub(crate) fn verify(mut self, verify: Verify) -> Self {
        self.seed.verify = verify;
        self
    }

    pub(crate) fn bandwidth(mut self, bytes: u64) -> Self {
        self.seed.bandwidth = Some(bytes);
        self
    }

    pub(crate) fn silence(mut self, silence: Duration) -> Self {
        self.seed.silence = silence;
        self.leech.silence = silence;
        self
    }

    pub(crate) fn trap(mut self, trap: Trap) -> Self {
        self.trap = Some(trap);
        self
    }
}

/// What became of both ends; `None` where no session came about.
#[derive(Debug)]
pub(crate) struct Run {
    pub seed: Option<Result<SeedOutcome, SeedError>>,
    pub leech: Option<Result<LeechOutcome, LeechError>>,
    /// What the source and the destination told.
    pub told: Vec<Progress>,
    pub told_there: Vec<Progress>,
    pub proxy: Option<Proxy>,
    pub took: Duration,
}

impl Run {
    #[track_caller]
    pub(crate) fn moved(&self) -> (&SeedReport, &LeechReport) {
        match (&self.seed, &self.leech) {
            (Some(Ok(SeedOutcome::Moved(seed))), Some(Ok(LeechOutcome::Moved(leech)))) => {
                (seed, leech)
            }
            other => panic!("it did not move: {other:?}"),
        }
    }

    /// Why the source gave up, in words.
    #[track_caller]
    pub(crate) fn aborted(&self) -> String {
        match &self.seed {
            Some(Err(error @ SeedError::Aborted { .. })) => words(error),
            other => panic!("the source did not give up: {other:?}"),
        }
    }

    /// Why the destination gave up, in words.
    #[track_caller]
    pub(crate) fn aborted_there(&self) -> String {
        match &self.leech {
            Some(Err(error @ LeechError::Aborted { .. })) => words(error),
            other => panic!("the destination did not give up: {other:?}"),
        }
    }
}

/// An error with its causes.
pub(crate) fn words(error: &dyn std::error::Error) -> String {
    let mut words = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        words += &format!(": {cause}");
        next = cause.source();
    }
    words
}

/// Reads progress to its end, and cancels when it is time.
fn listen(
    receiver: mpsc::Receiver<Progress>,
    cancel: &Cancel,
    at: Option<fn(&Progress) -> bool>,
) -> Vec<Progress> {
    receiver
        .into_iter()
        .inspect(|told| {
            if at.is_some_and(|at| at(told)) {
                cancel.cancel();
            }
        })
        .collect()
}

/// Migrates once.
pub(crate) fn migrate(source: &Source, destination: &Destination, plan: &Plan) -> Run {
    let began = Instant::now();
    let listener = Listener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let upstream = listener.local_addr().unwrap();
    let mut pairing = Pairing::new(upstream.to_string()).unwrap();
    let proxy = (plan.count || plan.trap.is_some()).then(|| Proxy::new(upstream, plan.trap));
    let waiting = pairing.clone();
    if let Some(proxy) = &proxy {
        pairing.address = proxy.address().to_string();
    }
    let connected = Instant::now() + Duration::from_secs(5);
    let (seeder, leecher) = (Cancel::default(), Cancel::default());
    let (seed_told, seed_heard) = mpsc::channel();
    let (leech_told, leech_heard) = mpsc::channel();
    let gone = AtomicBool::new(false);
    let mut run = thread::scope(|scope| {
        let told = scope.spawn(|| listen(seed_heard, &seeder, plan.cancel_at));
        let told_there = scope.spawn(|| listen(leech_heard, &leecher, plan.cancel_there_at));
        let leeching = scope.spawn(|| {
            let leech_told = leech_told;
            let trying = || !gone.load(Ordering::Relaxed);
            let patience = Duration::from_secs(5);
            let session =
                listener.accept(&waiting, plan.leech.silence, patience, trying, |_, _| {});
            session.ok().map(|session| {
                leech(
                    &session,
                    &destination.names(),
                    destination.ram(),
                    &mut destination.subject(),
                    &plan.leech,
                    Some(leech_told),
                    &leecher,
                )
            })
        });
        let seeding = scope.spawn(|| {
            let seed_told = seed_told;
            let silence = plan.seed.silence;
            let session = Session::connect(&pairing, plan.lanes, silence, connected).ok();
            gone.store(session.is_none(), Ordering::Relaxed);
            session.map(|session| {
                let options = SeedOptions {
                    chunk_size: source.chunk_size,
                    ..plan.seed.clone()
                };
                seed(
                    &session,
                    &source.regions(),
                    &mut source.subject(),
                    &options,
                    Some(seed_told),
                    &seeder,
                )
            })
        });
        Run {
            seed: seeding.join().unwrap(),
            leech: leeching.join().unwrap(),
            told: told.join().unwrap(),
            told_there: told_there.join().unwrap(),
            proxy: None,
            took: began.elapsed(),
        }
    });
    run.proxy = proxy;
    run
}
