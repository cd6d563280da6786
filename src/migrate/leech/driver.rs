//! The script of the destination: what to do at each event of the state machine.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use migrate_proto::leecher::Event;
use migrate_proto::{
    AbortCode, ChunkBitmap, ChunkRun, ChunkSize, Hello, Layout, Leecher, LeecherConfig, Message,
    RegionDescriptor, Role, VERSIONS, Verify, capability,
};

use super::faults::{FaultCounters, serve_faults};
use super::lanes::Receiving;
use super::offer::offer;
use super::state::IncomingState;
use super::{LeechError, LeechOutcome};
use crate::chunk::{Install, Storage};
use crate::migrate::cancel::Cancel;
use crate::migrate::clock::{Clock, micros};
use crate::migrate::ending::{Cause, LINGER, bytes_of, local, wait_until};
use crate::migrate::monitor::Monitor;
use crate::migrate::on_panic::OnPanic;
use crate::migrate::options::LeechOptions;
use crate::migrate::priority::go_first;
use crate::migrate::progress::{
    Counters, LeechReport, Phase, Progress, Rate, Reporter, Side, Verdict,
};
use crate::subject::{Description, Incoming, SubjectError};
use crate::transport::{LaneError, LaneReader, LaneWriter, Session};
use rustix::rand::GetRandomFlags;

/// How often progress is reported, and how long a wish to cancel may go unnoticed.
const TICK: Duration = Duration::from_millis(100);

/// How many digests go into a frame: 512 KiB of them.
const DIGESTS: u64 = 64 << 10;

/// One session of the destination.
#[derive(Debug)]
pub(super) struct Driver<'a> {
    session: &'a Session,
    names: &'a [String],
    memory: &'a dyn Install,
    options: &'a LeechOptions,
    reporter: &'a Reporter,
    cancel: &'a Cancel,
    clock: Clock,
    counters: Counters,
    faults: FaultCounters,
    /// What the memory holds of an earlier time, if that is worth to be compared.
    old: Option<Vec<Arc<dyn Storage>>>,
    key: [u8; 32],
}

/// What is kept for the report, and while the session fails.
#[derive(Debug, Default)]
struct Course {
    phase: Option<Phase>,
    owned: bool,
    armed: bool,
    /// The memory is complete, but it could not be disarmed: the guest waits for pages that nobody brings.
    watched: bool,
    complete: Option<Duration>,
    state_bytes: u64,
    verified: Option<Verdict>,
    failure: Option<Cause>,
    not_running: Option<SubjectError>,
}

/// Threads that are needed only in some sessions.
struct Threads<'a> {
    serve_faults: &'a mut dyn FnMut(),
    offer: &'a mut dyn FnMut(),
}

impl<'a> Driver<'a> {
    pub(super) fn new(
        session: &'a Session,
        names: &'a [String],
        memory: &'a dyn Install,
        options: &'a LeechOptions,
        reporter: &'a Reporter,
        cancel: &'a Cancel,
    ) -> Self {
        Self {
            session,
            names,
            memory,
            options,
            reporter,
            cancel,
            clock: Clock::start(),
            counters: Counters::default(),
            faults: FaultCounters::default(),
            old: memory.old(),
            key: [0; 32],
        }
    }

    /// Runs the session to its end.
    pub(super) fn run(mut self, subject: &mut dyn Incoming) -> Result<LeechOutcome, LeechError> {
        let aborted = |source| LeechError::Aborted {
            cause: Cause::Local {
                what: "cannot begin a session",
                source,
            },
        };
        rustix::rand::getrandom(&mut self.key, GetRandomFlags::empty())
            .map_err(|errno| aborted(errno.into()))?;
        let monitor = Monitor::new(Leecher::new(self.clock.now(), self.config(subject)));
        let (reader, writer) = self.session.control.split().map_err(aborted)?;
        let state = IncomingState::new().map_err(aborted)?;
        let writer = Mutex::new(writer);
        let receiving = Receiving {
            monitor: &monitor,
            clock: self.clock,
            memory: self.memory,
            counters: &self.counters,
            old: self.old.as_deref(),
            layout: OnceLock::new(),
        };
        thread::scope(|scope| {
            let (this, monitor, writer) = (&self, &monitor, &writer);
            let _all_threads_end = OnPanic(|| {
                monitor.close();
                self.session.shut_down();
            });
            let (state, receiving) = (&state, &receiving);
            let reading = scope.spawn(move || this.read_control(monitor, reader, state));
            let writing = scope.spawn(move || this.write_control(monitor, writer));
            for (index, lane) in (1..=u8::MAX).zip(&self.session.bulk) {
                scope.spawn(move || receiving.serve_bulk(index, lane));
            }
            let mut serve_faults = || {
                scope.spawn(move || serve_faults(receiving, &this.faults, &this.session.urgent));
            };
            let mut offer = || {
                if let Some(old) = &this.old {
                    scope.spawn(move || offer(receiving, old, writer, &this.key));
                }
            };
            let mut threads = Threads {
                serve_faults: &mut serve_faults,
                offer: &mut offer,
            };
            let outcome = self.drive(monitor, writer, state, subject, &mut threads);
            monitor.close();
            // As at the source: the last messages go out and are read before the sockets are shut.
            let end = Instant::now() + LINGER;
            wait_until(end, || writing.is_finished());
            self.session.control.finish_sending();
            wait_until(end, || reading.is_finished());
            self.session.shut_down();
            outcome
        })
    }

    fn config(&self, subject: &dyn Incoming) -> LeecherConfig {
        LeecherConfig {
            hello: Hello {
                oldest: VERSIONS.0,
                newest: VERSIONS.1,
                required: if self.options.hold {
                    capability::CUT_OVER
                } else {
                    0
                },
                optional: capability::CUT_OVER
                    | if self.old.is_some() {
                        capability::KEEP
                    } else {
                        0
                    },
                role: Role::Leecher,
                chunk_size: ChunkSize::PAGE,
                regions: self
                    .names
                    .iter()
                    .zip(self.memory.lens())
                    .map(|(name, len)| RegionDescriptor {
                        name: name.clone(),
                        len,
                    })
                    .collect(),
                post_copy: self.memory.can_fault(),
                verify: Verify::Off,
                dry_run: false,
                kind: subject.kind().into(),
                attributes: Vec::new(),
            },
            window: self.options.window,
            lanes: u8::try_from(self.session.bulk.len()).unwrap_or(u8::MAX),
            silence: micros(self.options.silence),
            key: self.key,
        }
    }

    fn read_control(
        &self,
        monitor: &Monitor<Leecher>,
        mut reader: LaneReader,
        state: &IncomingState,
    ) {
        go_first();
        let _session_ends = self.end_on_panic(monitor);
        if let Err(error) = self.try_read_control(monitor, &mut reader, state) {
            let code = match error {
                LaneError::Decode(_) => AbortCode::Protocol,
                _ => AbortCode::Failed,
            };
            monitor.tell(|leecher| {
                leecher.abort(code, format!("the connection to the source broke: {error}"));
            });
        }
    }

    fn try_read_control(
        &self,
        monitor: &Monitor<Leecher>,
        reader: &mut LaneReader,
        state: &IncomingState,
    ) -> Result<(), LaneError> {
        let mut buffer = Vec::new();
        loop {
            let (message, payload) = reader.receive()?;
            self.counters.frame(reader.frame_len());
            buffer.resize(payload, 0);
            reader.read_exact(&mut buffer)?;
            let now = self.clock.now();
            // What is wrong with a message has closed the session and is told as an event.
            let _ = match message {
                Message::State { offset } => {
                    let len = payload as u64;
                    let (accepted, over) = monitor.tell(|leecher| {
                        let accepted = leecher.handle_state(now, offset, len);
                        (accepted, leecher.is_closed())
                    });
                    if accepted.is_ok() && !over {
                        state.put(offset, &buffer)?;
                    }
                    accepted
                }
                message => monitor.tell(|leecher| leecher.handle_message(now, message)),
            };
        }
    }

    /// A session of which a thread is gone is given up.
    fn end_on_panic<'m>(&self, monitor: &'m Monitor<Leecher>) -> OnPanic<impl Fn() + use<'m>> {
        OnPanic(|| {
            let reason = "a thread of memferry has panicked; this is a bug";
            monitor.tell(|leecher| leecher.abort(AbortCode::Failed, reason.into()));
        })
    }

    fn write_control(&self, monitor: &Monitor<Leecher>, writer: &Mutex<LaneWriter>) {
        go_first();
        let _session_ends = self.end_on_panic(monitor);
        let sent = monitor.send_messages(writer, |writer, message| {
            writer
                .send(message, &[])
                .map(|bytes| self.counters.frame(bytes))
        });
        if let Err(error) = sent {
            monitor.tell(|leecher| {
                leecher.abort(
                    AbortCode::Failed,
                    format!("the connection to the source broke: {error}"),
                );
            });
        }
    }

    fn drive(
        &self,
        monitor: &Monitor<Leecher>,
        writer: &Mutex<LaneWriter>,
        state: &IncomingState,
        subject: &mut dyn Incoming,
        threads: &mut Threads<'_>,
    ) -> Result<LeechOutcome, LeechError> {
        let mut course = Course::default();
        let mut rate = Rate::new();
        self.enter(&mut course, Phase::Greeting);
        loop {
            let timeout = monitor.lock().machine.poll_timeout();
            let event = monitor.next_event(self.clock.until(timeout, TICK));
            let Some(event) = event else {
                self.tick(monitor, &course, &mut rate);
                continue;
            };
            let result = match event {
                Event::Prepare => self.prepare(monitor, subject, &mut course, threads),
                Event::Finalize { remote } => {
                    self.enter(&mut course, Phase::CutOver);
                    self.make_absent(monitor, &remote, &mut course, threads)
                }
                Event::Discard { stale } => self.make_absent(monitor, &stale, &mut course, threads),
                Event::Digests => self.send_digests(monitor, writer),
                Event::Load { len, digest } => {
                    course.state_bytes = len;
                    self.load(monitor, state, subject, len, digest)
                }
                Event::Run => {
                    self.run_subject(monitor, subject, &mut course);
                    Ok(())
                }
                Event::Drained => {
                    course.complete = Some(self.clock.elapsed());
                    self.faults.stop();
                    self.enter(&mut course, Phase::Verifying);
                    let disarmed = self.memory.disarm();
                    course.watched = disarmed.is_err();
                    disarmed
                        .map_err(local("cannot stop watching the guest's memory"))
                        .map(|()| monitor.tell(Leecher::handle_disarmed))
                }
                Event::Verdict {
                    compared,
                    different,
                } => {
                    let verdict = Verdict {
                        compared,
                        different,
                    };
                    course.verified = Some(verdict);
                    self.reporter.say(Progress::Verified(verdict));
                    Ok(())
                }
                Event::Done => {
                    self.enter(&mut course, Phase::Done);
                    return self.outcome(&mut course);
                }
                Event::Aborted { error } => {
                    // Nobody needs this memory: nothing is left in the program that has it.
                    let _ = self.memory.disarm();
                    let cause = course.failure.take();
                    return Err(LeechError::Aborted {
                        cause: cause.unwrap_or(Cause::Protocol(error)),
                    });
                }
                Event::Undecided { error } => {
                    let cause = course.failure.take();
                    return Err(LeechError::Undecided {
                        cause: cause.unwrap_or(Cause::Protocol(error)),
                    });
                }
                Event::Lost { missing: 0, .. } => {
                    // All is here; only the farewell is missing, or the comparison.
                    self.faults.stop();
                    if course.watched
                        && let Some(cause) = course.failure.take()
                    {
                        return Err(LeechError::Lost { cause, missing: 0 });
                    }
                    let _ = self.memory.disarm();
                    course.complete.get_or_insert_with(|| self.clock.elapsed());
                    return self.outcome(&mut course);
                }
                Event::Lost { error, missing } => {
                    let cause = course.failure.take();
                    return Err(LeechError::Lost {
                        cause: cause.unwrap_or(Cause::Protocol(error)),
                        missing: bytes_of(&self.layout(monitor), missing),
                    });
                }
            };
            if let Err(cause) = result {
                let reason = format!("the destination failed: {cause}");
                course.failure.get_or_insert(cause);
                monitor.tell(|leecher| leecher.abort(AbortCode::Failed, reason));
            }
        }
    }

    fn layout(&self, monitor: &Monitor<Leecher>) -> Layout {
        let state = monitor.lock();
        let agreement = state.machine.agreement();
        agreement.expect("the session has begun").layout.clone()
    }

    fn enter(&self, course: &mut Course, phase: Phase) {
        course.phase = Some(phase);
        self.reporter.say(Progress::Phase {
            phase,
            at: self.clock.elapsed().as_secs_f64(),
        });
    }

    fn tick(&self, monitor: &Monitor<Leecher>, course: &Course, rate: &mut Rate) {
        let now = self.clock.now();
        let cancelled = self.cancel.is_cancelled();
        monitor.tell(|leecher| {
            leecher.handle_timeout(now);
            if self.options.cut_over.is_asked() {
                leecher.cut_over();
            }
            // A source that waits for nothing but our Ready may be told; one that has released may not.
            if cancelled && !course.owned && leecher.phase() != "ready" {
                leecher.abort(AbortCode::Cancelled, "cancelled by the user".into());
            }
        });
        if self.reporter.0.is_none() {
            return;
        }
        let state = monitor.lock();
        let Some(agreement) = state.machine.agreement() else {
            return;
        };
        let (layout, missing, round) = (
            agreement.layout.clone(),
            state.machine.missing(),
            state.machine.round(),
        );
        drop(state);
        let traffic = self.counters.traffic();
        let at = self.clock.elapsed();
        let remaining = bytes_of(&layout, missing);
        let rate = rate.update(at, traffic.memory_bytes + traffic.zero_bytes);
        self.reporter.say(Progress::Update {
            side: Side::Leecher,
            phase: course.phase.unwrap_or(Phase::Greeting),
            at: at.as_secs_f64(),
            round,
            total: layout.bytes(),
            remaining,
            traffic,
            rate,
            dirty_rate: None,
            predicted_blackout: None,
            #[expect(clippy::cast_precision_loss, reason = "an estimate")]
            eta: (rate > 0).then(|| remaining as f64 / rate as f64),
            faults: self.faults.fetched(),
            fault_micros: self.faults.percentiles(),
        });
    }

    /// Compares the subjects, then makes the memory empty: what was in it would pass for the source's. Unless it is kept: then the source
    /// is told what there is.
    fn prepare(
        &self,
        monitor: &Monitor<Leecher>,
        subject: &dyn Incoming,
        course: &mut Course,
        threads: &mut Threads<'_>,
    ) -> Result<(), Cause> {
        let (theirs, agreement) = {
            let state = monitor.lock();
            let machine = &state.machine;
            (machine.theirs().cloned(), machine.agreement().cloned())
        };
        let (theirs, agreement) = theirs
            .zip(agreement)
            .expect("Prepare comes after both hellos");
        let description = Description {
            kind: theirs.kind,
            attributes: theirs.attributes,
        };
        subject.accept(&description)?;
        self.reporter.say(Progress::Agreed {
            bytes: agreement.layout.bytes(),
            regions: agreement.layout.regions().len(),
            post_copy: agreement.post_copy,
        });
        if !agreement.dry_run {
            self.enter(course, Phase::PreCopy);
            if !agreement.keep {
                self.memory
                    .clear()
                    .map_err(local("cannot empty the destination's memory"))?;
            }
        }
        monitor.tell(Leecher::handle_prepared);
        if agreement.keep {
            (threads.offer)();
        }
        Ok(())
    }

    /// Makes chunks absent. Faults are armed first, so that what is absent then is asked for and not read as zeros;
    /// where nothing is remote there is nothing to arm for, and the guest never waits for this process.
    fn make_absent(
        &self,
        monitor: &Monitor<Leecher>,
        remote: &ChunkBitmap,
        course: &mut Course,
        threads: &mut Threads<'_>,
    ) -> Result<(), Cause> {
        if remote.is_empty() {
            return Ok(());
        }
        if !course.armed {
            self.memory
                .arm()
                .map_err(local("cannot watch the guest's memory"))?;
            course.armed = true;
            (threads.serve_faults)();
        }
        let layout = self.layout(monitor);
        let mut bytes = vec![0; layout.regions().len()];
        for span in remote.runs().flat_map(|run| layout.spans(run)) {
            bytes[span.region] += span.len;
            self.memory
                .discard(span.region, span.offset..span.offset + span.len)
                .map_err(local("cannot drop stale pages"))?;
        }
        // What comes before finds out when it is written; what comes after hand-over would find out too late.
        self.memory
            .check_room(&bytes)
            .map_err(local("cannot hold the rest of the guest's memory"))
    }

    fn send_digests(
        &self,
        monitor: &Monitor<Leecher>,
        writer: &Mutex<LaneWriter>,
    ) -> Result<(), Cause> {
        let chunks = self.layout(monitor).chunks();
        monitor
            .flush(writer, &mut |writer: &mut LaneWriter, message: &Message| {
                writer
                    .send(message, &[])
                    .map(|bytes| self.counters.frame(bytes))
            })
            .map_err(local("cannot send the digests"))?;
        let mut first = 0;
        while first < chunks {
            let count = DIGESTS.min(chunks - first);
            let bytes: Vec<u8> = {
                let state = monitor.lock();
                let digests = state.machine.digests(ChunkRun::new(first, count));
                digests
                    .iter()
                    .flat_map(|digest| digest.to_le_bytes())
                    .collect()
            };
            let sent = lock(writer).send(&Message::Digests { first }, &[&bytes]);
            self.counters
                .frame(sent.map_err(local("cannot send the digests"))?);
            first += count;
        }
        monitor.tell(Leecher::handle_digests_sent);
        Ok(())
    }

    fn load(
        &self,
        monitor: &Monitor<Leecher>,
        state: &IncomingState,
        subject: &mut dyn Incoming,
        len: u64,
        digest: u64,
    ) -> Result<(), Cause> {
        let mut state = state
            .finish(len, digest)
            .map_err(local("cannot use the device state"))?;
        subject.load(&mut state, Instant::now() + self.options.subject_deadline)?;
        monitor.tell(Leecher::handle_loaded);
        Ok(())
    }

    /// Ownership has passed, so whatever happens now, the subject belongs here.
    fn run_subject(
        &self,
        monitor: &Monitor<Leecher>,
        subject: &mut dyn Incoming,
        course: &mut Course,
    ) {
        course.owned = true;
        if let Err(error) = subject.resume(Instant::now() + self.options.subject_deadline) {
            // The memory goes on coming: an operator can start what is complete.
            course.not_running = Some(error);
        }
        monitor.tell(Leecher::handle_running);
        self.reporter.say(Progress::HandedOver {
            side: Side::Leecher,
            at: self.clock.elapsed().as_secs_f64(),
        });
        self.enter(course, Phase::PostCopy);
    }

    fn outcome(&self, course: &mut Course) -> Result<LeechOutcome, LeechError> {
        if let Some(cause) = course.not_running.take() {
            return Err(LeechError::NotRunning { cause });
        }
        let Some(complete) = course.complete else {
            return Ok(LeechOutcome::DryRun);
        };
        Ok(LeechOutcome::Moved(LeechReport {
            total: complete.as_secs_f64(),
            traffic: self.counters.traffic(),
            faults: self.faults.fetched(),
            fault_micros: self.faults.percentiles(),
            state_bytes: course.state_bytes,
            verified: course.verified,
        }))
    }
}

fn lock(writer: &Mutex<LaneWriter>) -> MutexGuard<'_, LaneWriter> {
    writer.lock().unwrap_or_else(PoisonError::into_inner)
}
