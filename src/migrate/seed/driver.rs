//! The script of the source: what to do at each event of the state machine.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use migrate_proto::seeder::Event;
use migrate_proto::{
    AbortCode, Agreement, ChunkBitmap, Decision, Hello, Layout, Message, Role, Seeder,
    SeederConfig, Token, VERSIONS, Verify, capability,
};
use rustix::rand::GetRandomFlags;

use super::compare::Digests;
use super::forecast;
use super::lanes::Sending;
use super::let_go::LetGo;
use super::offers::Offers;
use super::state::StateSink;
use super::{SeedError, SeedOutcome, SourceRegion, present_chunks, restore_dirty, take_dirty};
use crate::dirty::DirtyTracker;
use crate::migrate::cancel::Cancel;
use crate::migrate::clock::{Clock, duration, micros};
use crate::migrate::ending::{Cause, LINGER, bytes_of, local, wait_until};
use crate::migrate::monitor::Monitor;
use crate::migrate::on_panic::OnPanic;
use crate::migrate::options::SeedOptions;
use crate::migrate::priority::{go_first, go_last};
use crate::migrate::progress::{
    Counters, Phase, Progress, Rate, Reporter, SeedReport, Side, Verdict,
};
use crate::subject::{Farewell, Outgoing, SubjectError};
use crate::transport::{LaneError, LaneReader, LaneWriter, Session};

/// How often progress is reported, and how long a wish to cancel may go unnoticed.
const TICK: Duration = Duration::from_millis(100);

/// Chunks of a frame: large enough that a frame's cost does not matter, small enough for the second-level cache.
const BATCH: u32 = 512 << 10;

/// One session of the source.
#[derive(Debug)]
pub(super) struct Driver<'a> {
    session: &'a Session,
    regions: &'a [SourceRegion],
    layout: &'a Layout,
    options: &'a SeedOptions,
    reporter: &'a Reporter,
    cancel: &'a Cancel,
    clock: Clock,
    counters: Counters,
    digests: Mutex<Option<Digests>>,
    let_go: LetGo,
    offers: Offers,
}

/// Moments of the cut-over, for the report.
#[derive(Debug, Default)]
struct Moments {
    phase: Option<Phase>,
    began: Option<Duration>,
    marks: Vec<(&'static str, Duration)>,
    running: Option<Duration>,
    complete: Option<Duration>,
    post_copy: bool,
    state_bytes: u64,
    verified: Option<Verdict>,
    verify_blackout: Option<Duration>,
}

/// What the subject or this machine did wrong, kept until the state machine has wound up.
type Failure = Option<Cause>;

impl<'a> Driver<'a> {
    pub(super) fn new(
        session: &'a Session,
        regions: &'a [SourceRegion],
        layout: &'a Layout,
        options: &'a SeedOptions,
        reporter: &'a Reporter,
        cancel: &'a Cancel,
    ) -> Self {
        Self {
            session,
            regions,
            layout,
            options,
            reporter,
            cancel,
            clock: Clock::start(),
            counters: Counters::default(),
            digests: Mutex::new(None),
            let_go: LetGo::default(),
            offers: Offers::default(),
        }
    }

    /// Runs the session to its end.
    pub(super) fn run(self, subject: &mut dyn Outgoing) -> Result<SeedOutcome, SeedError> {
        let aborted = |what, source| SeedError::Aborted {
            cause: Cause::Local { what, source },
        };
        let config = self
            .config(subject)
            .map_err(|source| aborted("cannot begin a session", source))?;
        let monitor = Monitor::new(Seeder::new(self.clock.now(), config));
        let control = self.session.control.split();
        let (reader, writer) =
            control.map_err(|source| aborted("cannot begin a session", source))?;
        let writer = Mutex::new(writer);
        let sending = Sending {
            monitor: &monitor,
            clock: self.clock,
            regions: self.regions,
            layout: self.layout,
            counters: &self.counters,
            offers: &self.offers,
        };
        let outcome = thread::scope(|scope| {
            let (this, monitor, writer, sending) = (&self, &monitor, &writer, &sending);
            let _all_threads_end = OnPanic(|| {
                monitor.close();
                self.session.shut_down();
            });
            let reading = scope.spawn(move || this.read_control(monitor, reader));
            let writing = scope.spawn(move || this.write_control(monitor, writer));
            for (index, lane) in (1..=u8::MAX).zip(&self.session.bulk) {
                scope.spawn(move || sending.serve_bulk(index, lane));
            }
            scope.spawn(move || sending.serve_urgent(&self.session.urgent));
            let part = |farewell: Farewell| {
                // Nothing can be undone any more: a panic of it is its own.
                scope.spawn(move || catch_unwind(AssertUnwindSafe(farewell)).is_ok());
            };
            let outcome = self.drive(monitor, writer, subject, &part);
            monitor.close();
            // The last messages go out, the peer reads them and closes; only then are the sockets shut, since closing
            // one with unread bytes would take back what is still on its way.
            let end = Instant::now() + LINGER;
            wait_until(end, || writing.is_finished());
            self.session.control.finish_sending();
            wait_until(end, || reading.is_finished());
            self.session.shut_down();
            outcome
        });
        for region in self.regions {
            for tracker in region.trackers() {
                // After the session nobody needs to know what changes. A kernel that refuses has nothing registered.
                let _ = tracker.stop();
            }
        }
        outcome
    }

    fn config(&self, subject: &dyn Outgoing) -> io::Result<SeederConfig> {
        let mut token = [0; 16];
        rustix::rand::getrandom(&mut token, GetRandomFlags::empty())?;
        let description = subject.describe();
        Ok(SeederConfig {
            hello: Hello {
                oldest: VERSIONS.0,
                newest: VERSIONS.1,
                required: 0,
                optional: capability::KEEP | capability::CUT_OVER,
                role: Role::Seeder,
                chunk_size: self.options.chunk_size,
                regions: self.layout.regions().to_vec(),
                post_copy: self.options.budget.post_copy != migrate_proto::PostCopy::Never,
                verify: self.options.verify,
                dry_run: self.options.dry_run,
                kind: description.kind,
                attributes: description.attributes,
            },
            budget: self.options.budget,
            bandwidth: self.options.bandwidth,
            batch: BATCH,
            lanes: u8::try_from(self.session.bulk.len()).unwrap_or(u8::MAX),
            token: Token(token),
            fixed_blackout: micros(self.options.fixed_blackout),
            silence: micros(self.options.silence),
            hold: self.options.hold,
        })
    }

    fn read_control(&self, monitor: &Monitor<Seeder>, mut reader: LaneReader) {
        go_first();
        let _session_ends = self.end_on_panic(monitor);
        if let Err(error) = self.try_read_control(monitor, &mut reader) {
            monitor.tell(|seeder| {
                seeder.abort(
                    AbortCode::Failed,
                    format!("the connection to the destination broke: {error}"),
                );
            });
        }
    }

    fn try_read_control(
        &self,
        monitor: &Monitor<Seeder>,
        reader: &mut LaneReader,
    ) -> Result<(), LaneError> {
        let mut buffer = Vec::new();
        loop {
            let (message, payload) = reader.receive()?;
            self.counters.frame(reader.frame_len());
            buffer.resize(payload, 0);
            reader.read_exact(&mut buffer)?;
            let first = match message {
                Message::Digests { first } => Some(first),
                _ => None,
            };
            let now = self.clock.now();
            // What is wrong with a message has closed the session and is told as an event.
            match message {
                Message::Offer { first } => {
                    // Before the machine lets those chunks go.
                    monitor.tell(|seeder| match self.offers.put(first, &buffer) {
                        Ok(count) => drop(seeder.handle_offer(now, first, count)),
                        Err(reason) => seeder.abort(AbortCode::Protocol, reason.into()),
                    });
                    continue;
                }
                Message::Keep { key } => self.offers.begin(key),
                _ => {}
            }
            let accepted = monitor.tell(|seeder| seeder.handle_message(now, message));
            if let (Ok(()), Some(first)) = (accepted, first) {
                let mut digests = self.digests();
                let kept = match &mut *digests {
                    Some(digests) => digests,
                    empty => empty.insert(Digests::new(self.layout.chunks())?),
                };
                if let Err(reason) = kept.put(first, &buffer) {
                    drop(digests);
                    monitor.tell(|seeder| seeder.abort(AbortCode::Protocol, reason.into()));
                }
            }
        }
    }

    /// A session of which a thread is gone is given up.
    fn end_on_panic<'m>(&self, monitor: &'m Monitor<Seeder>) -> OnPanic<impl Fn() + use<'m>> {
        OnPanic(|| {
            let reason = "a thread of memferry has panicked; this is a bug";
            monitor.tell(|seeder| seeder.abort(AbortCode::Failed, reason.into()));
        })
    }

    fn write_control(&self, monitor: &Monitor<Seeder>, writer: &Mutex<LaneWriter>) {
        go_first();
        let _session_ends = self.end_on_panic(monitor);
        let sent = monitor.send_messages(writer, |writer, message| {
            if let Message::Release { .. } = message {
                monitor.wake_driver();
                if !self.let_go.wait(LINGER) {
                    return Err(io::Error::other("the guest was not let go in time"));
                }
            }
            writer
                .send(message, &[])
                .map(|bytes| self.counters.frame(bytes))
        });
        if let Err(error) = sent {
            monitor.tell(|seeder| {
                seeder.abort(
                    AbortCode::Failed,
                    format!("the connection to the destination broke: {error}"),
                );
            });
        }
    }

    /// Deals with one event after the other until one ends the session.
    fn drive(
        &self,
        monitor: &Monitor<Seeder>,
        writer: &Mutex<LaneWriter>,
        subject: &mut dyn Outgoing,
        part: &dyn Fn(Farewell),
    ) -> Result<SeedOutcome, SeedError> {
        let mut farewell = None;
        let mut failure: Failure = None;
        let mut moments = Moments::default();
        let mut forecast = None;
        let mut rate = Rate::new();
        self.enter(&mut moments, Phase::Greeting);
        loop {
            let timeout = monitor.lock().machine.poll_timeout();
            let event = monitor.next_event(self.clock.until(timeout, TICK));
            let Some(event) = event else {
                self.tick(monitor, &moments, &mut rate);
                continue;
            };
            if matches!(event, Event::Running | Event::Lost { .. })
                && let Some(farewell) = farewell.take()
            {
                part(farewell);
            }
            let result = match event {
                Event::Start if self.options.dry_run => self
                    .forecast(monitor, writer)
                    .map(|made| forecast = Some(made)),
                Event::Start => self.start(monitor, &mut moments),
                Event::Take => self.end_round(monitor),
                Event::Suspend { decision, .. } => {
                    self.enter(&mut moments, Phase::CutOver);
                    moments.post_copy = decision == Decision::PostCopy;
                    self.cut_over(monitor, writer, subject, &mut moments)
                }
                Event::Released => {
                    subject.release();
                    self.let_go.done();
                    farewell = subject.farewell();
                    self.mark(&mut moments, "released");
                    Ok(())
                }
                Event::Running => {
                    self.mark(&mut moments, "running");
                    moments.running = Some(self.clock.elapsed());
                    self.reporter.say(Progress::HandedOver {
                        side: Side::Seeder,
                        at: self.clock.elapsed().as_secs_f64(),
                    });
                    self.enter(&mut moments, Phase::PostCopy);
                    Ok(())
                }
                Event::Complete => {
                    moments.complete = Some(self.clock.elapsed());
                    self.enter(&mut moments, Phase::Verifying);
                    Ok(())
                }
                Event::Compare => self.compare(monitor, &mut moments),
                Event::Done => {
                    self.enter(&mut moments, Phase::Done);
                    return Ok(forecast.map_or_else(
                        || SeedOutcome::Moved(self.report(monitor, &moments)),
                        SeedOutcome::Forecast,
                    ));
                }
                Event::Aborted { error, restore } => {
                    let cause = failure.take().unwrap_or(Cause::Protocol(error));
                    return Err(self.roll_back(monitor, subject, cause, restore));
                }
                Event::Lost {
                    error,
                    missing: 0,
                    running: true,
                } => {
                    // All is there; only the farewell is missing, or the comparison.
                    moments.complete.get_or_insert_with(|| self.clock.elapsed());
                    let compared = moments.verified.is_some() || self.options.verify == Verify::Off;
                    if compared {
                        return Ok(SeedOutcome::Moved(self.report(monitor, &moments)));
                    }
                    return Err(SeedError::Unverified {
                        cause: failure.take().unwrap_or(Cause::Protocol(error)),
                    });
                }
                Event::Lost {
                    error,
                    missing,
                    running,
                } => {
                    return Err(SeedError::Lost {
                        cause: failure.take().unwrap_or(Cause::Protocol(error)),
                        missing: bytes_of(self.layout, missing),
                        advice: if running {
                            "The destination owns the guest. When you have made sure that it is gone for good, \
                             the guest here is as it was at hand-over."
                        } else {
                            "The destination may own the guest: look there first. Only if it does not run there, and never \
                             will, may it be resumed here."
                        },
                    });
                }
            };
            if let Err(cause) = result {
                let reason = format!("the source failed: {cause}");
                failure.get_or_insert(cause);
                monitor.tell(|seeder| seeder.abort(AbortCode::Failed, reason));
            }
        }
    }

    /// Time has passed: the machine wants to know, and so does the user.
    fn tick(&self, monitor: &Monitor<Seeder>, moments: &Moments, rate: &mut Rate) {
        let now = self.clock.now();
        let cancelled = self.cancel.is_cancelled();
        let late = moments.began.is_some_and(|began| {
            // A comparison before hand-over takes as long as the memory is large, and the user asked for it.
            let span = self.clock.elapsed().saturating_sub(began);
            span.saturating_sub(moments.verify_blackout.unwrap_or_default())
                > self.options.cut_over_deadline
        });
        monitor.tell(|seeder| {
            seeder.handle_timeout(now);
            if self.options.cut_over.is_asked() {
                seeder.cut_over(now);
            }
            if seeder.ownership() != migrate_proto::Ownership::Here {
                return;
            }
            if cancelled {
                seeder.abort(AbortCode::Cancelled, "cancelled by the user".into());
            } else if late {
                let reason =
                    "the cut-over took longer than it may; the guest stood still for all of that time";
                seeder.abort(AbortCode::Failed, reason.into());
            }
        });
        if self.reporter.0.is_none() {
            return;
        }
        let (missing, round, faults, seen) = {
            let state = monitor.lock();
            let seeder = &state.machine;
            let seen = seeder.observation().copied();
            (seeder.missing(), seeder.round(), seeder.fetches(), seen)
        };
        let traffic = self.counters.traffic();
        let at = self.clock.elapsed();
        let remaining = bytes_of(self.layout, missing);
        let rate = rate.update(at, traffic.memory_bytes + traffic.zero_bytes);
        self.reporter.say(Progress::Update {
            side: Side::Seeder,
            phase: moments.phase.unwrap_or(Phase::Greeting),
            at: at.as_secs_f64(),
            round,
            total: self.layout.bytes(),
            remaining,
            traffic,
            rate,
            dirty_rate: seen.map(|seen| seen.dirty_rate()),
            predicted_blackout: seen.map(|seen| duration(seen.predicted_blackout()).as_secs_f64()),
            #[expect(clippy::cast_precision_loss, reason = "an estimate")]
            eta: (rate > 0).then(|| remaining as f64 / rate as f64),
            faults,
            fault_micros: None,
        });
    }

    fn enter(&self, moments: &mut Moments, phase: Phase) {
        moments.phase = Some(phase);
        self.reporter.say(Progress::Phase {
            phase,
            at: self.clock.elapsed().as_secs_f64(),
        });
    }

    fn mark(&self, moments: &mut Moments, what: &'static str) {
        moments.marks.push((what, self.clock.elapsed()));
    }

    /// Tracking first, so that nothing that is written while the first pass reads is lost.
    fn start(&self, monitor: &Monitor<Seeder>, moments: &mut Moments) -> Result<(), Cause> {
        let Agreement {
            layout, post_copy, ..
        } = monitor
            .lock()
            .machine
            .agreement()
            .cloned()
            .expect("the session has begun");
        self.reporter.say(Progress::Agreed {
            bytes: layout.bytes(),
            regions: layout.regions().len(),
            post_copy,
        });
        self.enter(moments, Phase::PreCopy);
        for region in self.regions {
            for tracker in region.trackers() {
                tracker
                    .start()
                    .map_err(local("cannot track what the guest writes"))?;
            }
        }
        let present =
            present_chunks(self.regions, self.layout).map_err(local("cannot look for holes"))?;
        let now = self.clock.now();
        monitor.tell(|seeder| seeder.handle_started(now, &present));
        Ok(())
    }

    fn forecast(
        &self,
        monitor: &Monitor<Seeder>,
        writer: &Mutex<LaneWriter>,
    ) -> Result<crate::migrate::Forecast, Cause> {
        let post_copy = monitor
            .lock()
            .machine
            .agreement()
            .is_some_and(|agreement| agreement.post_copy);
        let made = forecast::measure(
            self.regions,
            self.layout,
            self.options,
            post_copy,
            micros(self.options.fixed_blackout),
            writer,
        )
        .map_err(local("cannot measure"))?;
        monitor.tell(Seeder::handle_measured);
        Ok(made)
    }

    fn end_round(&self, monitor: &Monitor<Seeder>) -> Result<(), Cause> {
        self.offers.forget();
        let dirty = self.take(SourceRegion::trackers)?;
        let now = self.clock.now();
        let seen = monitor.tell(|seeder| {
            seeder.handle_dirty(now, dirty);
            seeder.observation().copied()
        });
        if let Some(seen) = seen {
            self.reporter.say(Progress::Round {
                round: seen.round,
                at: self.clock.elapsed().as_secs_f64(),
                dirty: seen.dirty,
                dirty_rate: seen.dirty_rate(),
                bandwidth: seen.bandwidth,
                predicted_blackout: duration(seen.predicted_blackout()).as_secs_f64(),
            });
        }
        Ok(())
    }

    fn take<'t, T: IntoIterator<Item = &'t dyn DirtyTracker>>(
        &'t self,
        trackers: impl Fn(&'t SourceRegion) -> T,
    ) -> Result<ChunkBitmap, Cause> {
        take_dirty(self.regions, self.layout, trackers)
            .map_err(local("cannot tell what the guest wrote"))
    }

    /// Suspend, take, save, take again: the last take is after everything that writes, but for the late trackers, which
    /// find what only a running subject does.
    fn cut_over(
        &self,
        monitor: &Monitor<Seeder>,
        writer: &Mutex<LaneWriter>,
        subject: &mut dyn Outgoing,
        moments: &mut Moments,
    ) -> Result<(), Cause> {
        moments.began = Some(self.clock.elapsed());
        subject.suspend(Instant::now() + self.options.subject_deadline)?;
        self.mark(moments, "suspended");
        let dirty = self.take(|region| [region.tracker.as_ref()])?;
        let now = self.clock.now();
        monitor.tell(|seeder| seeder.handle_suspended(now, &dirty));
        self.mark(moments, "dirty set sent");
        // What takes long to find is looked for while the subject is busy with its state.
        let (saved, late) = thread::scope(|scope| {
            let late = scope.spawn(|| self.take(|region| region.late.as_deref()));
            let saved = self.save(writer, subject);
            let late = late
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            (saved, late)
        });
        let (len, digest) = saved?;
        let mut dirty = late?;
        self.mark(moments, "state sent");
        moments.state_bytes = len;
        dirty.union_with(&self.take(|region| [region.tracker.as_ref()])?);
        let now = self.clock.now();
        monitor.tell(|seeder| seeder.handle_saved(now, len, digest, dirty));
        Ok(())
    }

    /// Sends the device state; its length and digest.
    fn save(
        &self,
        writer: &Mutex<LaneWriter>,
        subject: &mut dyn Outgoing,
    ) -> Result<(u64, u64), SubjectError> {
        let end = Instant::now() + self.options.cut_over_deadline;
        let mut sink = StateSink::new(writer, &self.counters, end, self.cancel);
        subject.save(&mut sink, Instant::now() + self.options.subject_deadline)?;
        sink.finish()
            .map_err(|error| SubjectError::because("cannot send the device state", error))
    }

    fn compare(&self, monitor: &Monitor<Seeder>, moments: &mut Moments) -> Result<(), Cause> {
        let began = self.clock.elapsed();
        let digests = self.digests().take();
        let verdict = match digests {
            Some(digests) => self
                .compare_with(&digests)
                .map_err(local("cannot compare the copies"))?,
            None => Verdict {
                compared: 0,
                different: 0,
            },
        };
        if self.options.verify == Verify::Before {
            self.mark(moments, "verified");
            moments.verify_blackout = Some(self.clock.elapsed() - began);
        }
        moments.verified = Some(verdict);
        self.reporter.say(Progress::Verified(verdict));
        monitor.tell(|seeder| seeder.handle_compared(verdict.compared, verdict.different));
        Ok(())
    }

    /// Once the guest runs elsewhere, nobody waits for this, and others of this host want its processors.
    fn compare_with(&self, digests: &Digests) -> io::Result<Verdict> {
        let after = self.options.verify == Verify::After;
        thread::scope(|scope| {
            let comparing = scope.spawn(|| {
                if after {
                    go_last();
                }
                digests.compare(self.regions, self.layout)
            });
            comparing
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// The source runs on as though nothing had been asked of it.
    fn roll_back(
        &self,
        monitor: &Monitor<Seeder>,
        subject: &mut dyn Outgoing,
        cause: Cause,
        mut restore: ChunkBitmap,
    ) -> SeedError {
        // A set that was taken while the session was failing comes in an event of its own.
        while let Some(event) = monitor.next_event(Duration::ZERO) {
            if let Event::Aborted { restore: more, .. } = event
                && more.chunks() == self.layout.chunks()
            {
                let mut all = more;
                if restore.chunks() == all.chunks() {
                    all.union_with(&restore);
                }
                restore = all;
            }
        }
        // A tracker that was not started has nothing to take back, and one that fails now loses nothing for the guest:
        // the next migration begins with all of the memory.
        let _ = restore_dirty(self.regions, self.layout, &restore);
        match subject.resume(Instant::now() + self.options.subject_deadline) {
            Ok(()) => SeedError::Aborted { cause },
            Err(resume) => SeedError::Stuck { cause, resume },
        }
    }

    fn report(&self, monitor: &Monitor<Seeder>, moments: &Moments) -> SeedReport {
        let (rounds, faults) = {
            let state = monitor.lock();
            (state.machine.round(), state.machine.fetches())
        };
        let began = moments.began.unwrap_or_default();
        let mut last = began;
        let blackout_parts = moments
            .marks
            .iter()
            .map(|&(what, at)| {
                let part = at.saturating_sub(last).as_secs_f64();
                last = at;
                (what, part)
            })
            .collect();
        SeedReport {
            total: moments.complete.unwrap_or_default().as_secs_f64(),
            blackout: moments
                .running
                .unwrap_or_default()
                .saturating_sub(began)
                .as_secs_f64(),
            blackout_parts,
            rounds,
            traffic: self.counters.traffic(),
            state_bytes: moments.state_bytes,
            post_copy: moments.post_copy,
            faults,
            verified: moments.verified,
            verify_blackout: moments.verify_blackout.map(|span| span.as_secs_f64()),
        }
    }

    fn digests(&self) -> std::sync::MutexGuard<'_, Option<Digests>> {
        self.digests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
