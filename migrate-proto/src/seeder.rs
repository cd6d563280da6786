//! The side that owns the memory: what it sends and when it lets go.
//!
//! ```text
//! Greeting → Preparing → Starting → Sending → Draining → Taking → Suspending → Suspended → Releasing → Released → Done
//!                                      ▲─────── a round ────┘
//! ```
//!
//! Before `Released`, every failure ends in [`Event::Aborted`]: the caller restores the dirty set and the subject
//! runs on. From `Released` on this side never runs the subject again; a failure is [`Event::Lost`] then.
//!
//! The caller feeds `handle_*` and then drains [`poll_message`](Seeder::poll_message), [`poll_event`](Seeder::poll_event)
//! and, on the thread of each lane, [`poll_batch`](Seeder::poll_batch) or [`poll_urgent`](Seeder::poll_urgent).

mod capabilities;
mod ending;
mod lanes;
mod offers;
mod pace;
mod session;

use alloc::collections::VecDeque;
use alloc::string::String;
use alloc::vec::Vec;
use core::mem;

use crate::bitmap::ChunkBitmap;
use crate::chunk::ChunkRun;
use crate::converge::{Budget, Decision, Micros, Observation, decide};
use crate::error::{AbortCode, ProtocolError};
use crate::handover::{Ownership, Token};
use crate::hello::{Agreement, Hello, Verify};
use crate::limits::MAX_STATE;
use crate::message::Message;
use crate::schedule::Order;
use crate::silence::Silence;
use session::Session;

/// The lane of faults and their answers; bulk lanes are numbered from 1.
pub const URGENT_LANE: u8 = 0;

/// What a seeder is started with.
#[derive(Debug, Clone)]
pub struct SeederConfig {
    /// Its first message.
    pub hello: Hello,
    /// What the user allows.
    pub budget: Budget,
    /// The most bytes a second over all bulk lanes, if limited.
    pub bandwidth: Option<u64>,
    /// How many bytes of chunks a frame should hold; at least one chunk goes into a frame.
    pub batch: u32,
    /// How many bulk lanes there are.
    pub lanes: u8,
    /// The ownership token, random for each session.
    pub token: Token,
    /// The part of the blackout that does not depend on memory, as far as is known.
    pub fixed_blackout: Micros,
    /// The longest time that the peer may be silent.
    pub silence: Micros,
    /// Rounds go on until somebody asks for the cut-over: [`Seeder::cut_over`], or the leecher.
    pub hold: bool,
}

/// What the caller must do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Both sides fit together and the leecher is prepared. Start tracking, then say which chunks may hold data:
    /// [`Seeder::handle_started`]. In a dry run: measure, then [`Seeder::handle_measured`].
    Start,
    /// Take the dirty set: [`Seeder::handle_dirty`].
    Take,
    /// Suspend the subject, take the last dirty set: [`Seeder::handle_suspended`]. Then send the device state as
    /// [`Message::State`] and say so: [`Seeder::handle_saved`].
    Suspend {
        /// What was decided.
        decision: Decision,
        /// What it was decided on.
        observation: Observation,
    },
    /// Release was taken from [`Seeder::poll_message`]: the subject never runs here again.
    Released,
    /// The subject runs at the destination.
    Running,
    /// Every chunk is at the destination; what is left is to compare, if that was asked for.
    Complete,
    /// All digests of the leecher have come: compare and say what came out: [`Seeder::handle_compared`].
    Compare,
    /// The session ended as it should.
    Done,
    /// The session failed while this side owned the subject: give `restore` back to the tracker, and let the subject run.
    Aborted {
        /// Why.
        error: ProtocolError,
        /// Chunks that were taken from the tracker and are not at the destination.
        restore: ChunkBitmap,
    },
    /// The session failed after Release: nothing may run here.
    Lost {
        /// Why.
        error: ProtocolError,
        /// Chunks that only this side has.
        missing: u64,
        /// Whether the leecher had said that the subject runs there.
        running: bool,
    },
}

/// Chunks for one frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// The lane to send on.
    pub lane: u8,
    /// The lane's number of the frame.
    pub sequence: u64,
    /// The round.
    pub round: u32,
    /// The chunks to read, not more than a frame holds.
    pub runs: Vec<ChunkRun>,
    /// They were never written: nothing needs to be read.
    pub hole: bool,
}

#[derive(Debug)]
enum Phase {
    Greeting,
    Preparing,
    Starting,
    Sending,
    Draining,
    Taking,
    Suspending {
        post_copy: bool,
        /// The dirty set that led to the decision, which was not announced.
        unsent: ChunkBitmap,
    },
    Suspended(Suspended),
    /// The leecher is ready; Release waits in [`Seeder::poll_message`] and can still be taken back.
    Releasing,
    Released {
        running: bool,
        complete: bool,
        /// All digests have come.
        digests: bool,
    },
    Closed,
}

#[derive(Debug)]
struct Suspended {
    post_copy: bool,
    /// Set when the state is saved: its length, its digest, and what saving it has written.
    saved: Option<(u64, u64, ChunkBitmap)>,
    finalized: bool,
    ended: bool,
    compared: Compared,
}

/// How far the comparison before hand-over is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Compared {
    /// The leecher still sends digests, if any were asked for.
    Awaited,
    /// They have come and are compared.
    Running,
    /// They are equal.
    Equal,
}

/// The seeder's half of a session. See the module's documentation.
#[derive(Debug)]
pub struct Seeder {
    config: SeederConfig,
    phase: Phase,
    ownership: Ownership,
    session: Option<Session>,
    messages: VecDeque<Message>,
    /// The answer to Ping, however often it was asked.
    pong_due: bool,
    events: VecDeque<Event>,
    silence: Silence,
    /// Somebody has asked for the cut-over.
    asked: bool,
}

impl Seeder {
    /// A seeder at the start of a session: its hello waits in [`poll_message`](Self::poll_message).
    ///
    /// If the hello is beyond the limits of the protocol, the session is over at once: [`Event::Aborted`].
    #[must_use]
    pub fn new(now: Micros, config: SeederConfig) -> Self {
        let checked = config.hello.check();
        let mut seeder = Self {
            silence: Silence::new(now, config.silence),
            phase: Phase::Greeting,
            ownership: Ownership::Here,
            session: None,
            messages: VecDeque::new(),
            pong_due: false,
            events: VecDeque::new(),
            asked: false,
            config,
        };
        match checked {
            Ok(()) => {
                let hello = Message::Hello(seeder.config.hello.clone());
                seeder.messages.push_back(hello);
            }
            Err(error) => seeder.fail(error),
        }
        seeder
    }

    /// Who may run the subject, as far as this side knows.
    #[must_use]
    pub fn ownership(&self) -> Ownership {
        self.ownership
    }

    /// What this side is doing, in one word.
    #[must_use]
    pub fn phase(&self) -> &'static str {
        match self.phase {
            Phase::Greeting => "greeting",
            Phase::Preparing => "preparing",
            Phase::Starting => "starting",
            Phase::Sending | Phase::Draining | Phase::Taking => "tracking",
            Phase::Suspending { .. } => "suspending",
            Phase::Suspended(_) | Phase::Releasing => "suspended",
            Phase::Released { .. } => "released",
            Phase::Closed => "closed",
        }
    }

    /// What was agreed, once it was.
    #[must_use]
    pub fn agreement(&self) -> Option<&Agreement> {
        self.session.as_ref().map(|session| &session.agreement)
    }

    /// The round that is being sent.
    #[must_use]
    pub fn round(&self) -> u32 {
        self.session.as_ref().map_or(0, |session| session.round)
    }

    /// How many chunks the destination does not have yet. Takes time in proportion to the memory.
    #[must_use]
    pub fn missing(&self) -> u64 {
        self.session
            .as_ref()
            .map_or(0, |session| session.outstanding.count())
    }

    /// How many fetches the leecher has sent.
    #[must_use]
    pub fn fetches(&self) -> u64 {
        self.session.as_ref().map_or(0, |session| session.fetches)
    }

    /// What was measured at the end of the last round.
    #[must_use]
    pub fn observation(&self) -> Option<&Observation> {
        self.session.as_ref()?.observation.as_ref()
    }

    /// A message came on the control or the urgent lane. The payload, if it has one, stays with the caller.
    ///
    /// # Errors
    /// If the session cannot go on. It is closed then, and the event that says so is waiting.
    pub fn handle_message(&mut self, now: Micros, message: Message) -> Result<(), ProtocolError> {
        self.silence.heard(now);
        let result = self.dispatch(now, message);
        if let Err(error) = &result {
            self.fail(error.clone());
        }
        result
    }

    fn dispatch(&mut self, now: Micros, message: Message) -> Result<(), ProtocolError> {
        let verify = self.verify();
        let can_be_asked = self.agreement().is_some_and(|agreed| agreed.cut_over);
        match (&mut self.phase, message) {
            (Phase::Closed, _) | (_, Message::Pong) => {}
            (_, Message::Ping) => self.pong_due = true,
            (_, Message::Abort { code, reason }) => {
                return Err(ProtocolError::PeerAborted { code, reason });
            }
            (Phase::Greeting, Message::Hello(theirs)) => {
                let agreement = self.config.hello.agree(&theirs)?;
                self.session = Some(Session::new(now, agreement, &self.config));
                self.phase = Phase::Preparing;
            }
            (Phase::Preparing, Message::Accept { window: 0 }) => {
                return Err(ProtocolError::Violation {
                    reason: "it takes no chunks at all",
                });
            }
            (Phase::Preparing, Message::Accept { window }) => {
                self.session_mut().lanes.open(window);
                self.phase = Phase::Starting;
                self.events.push_back(Event::Start);
            }
            (
                Phase::Sending
                | Phase::Draining
                | Phase::Taking
                | Phase::Suspending { .. }
                | Phase::Suspended(_)
                | Phase::Releasing
                | Phase::Released { .. },
                Message::Credit { lane, sequence },
            ) => {
                let session = self.session_mut();
                session
                    .lanes
                    .acknowledge(lane, sequence, &mut session.outstanding)?;
                self.advance(now);
            }
            (
                Phase::Suspending {
                    post_copy: true, ..
                }
                | Phase::Suspended(Suspended {
                    finalized: true, ..
                })
                | Phase::Releasing
                | Phase::Released { .. },
                Message::Fetch { run },
            ) => self.session_mut().fetch(run)?,
            (
                Phase::Suspended(Suspended {
                    ended: true,
                    compared,
                    ..
                }),
                Message::Ready,
            ) if verify != Verify::Before || *compared == Compared::Equal => self.hand_over(),
            (
                Phase::Suspended(Suspended {
                    ended: true,
                    compared: Compared::Awaited,
                    ..
                }),
                Message::Digests { .. },
            ) if verify == Verify::Before => {}
            (
                Phase::Suspended(Suspended {
                    ended: true,
                    compared: compared @ Compared::Awaited,
                    ..
                }),
                Message::DigestsEnd,
            ) if verify == Verify::Before => {
                *compared = Compared::Running;
                self.events.push_back(Event::Compare);
            }
            (Phase::Starting | Phase::Sending, Message::Keep { .. }) => {
                self.session_mut().keep()?;
            }
            (Phase::Starting | Phase::Sending, Message::OfferEnd) => {
                self.session_mut().offered_all()?;
                self.advance(now);
            }
            (Phase::Starting | Phase::Sending, Message::Offer { .. }) => {}
            // It may cross the decision, and so come at any time after Accept.
            (
                Phase::Starting
                | Phase::Sending
                | Phase::Draining
                | Phase::Taking
                | Phase::Suspending { .. }
                | Phase::Suspended(_)
                | Phase::Releasing
                | Phase::Released { .. },
                Message::CutOver,
            ) if can_be_asked => self.cut_over(now),
            (Phase::Released { running, .. }, Message::Running) if !*running => {
                *running = true;
                self.events.push_back(Event::Running);
            }
            (
                Phase::Released {
                    running: true,
                    complete,
                    ..
                },
                Message::Complete,
            ) if !*complete => {
                let nothing_pending = self.session.as_ref().is_some_and(Session::nothing_pending);
                if !nothing_pending {
                    return Err(ProtocolError::Violation {
                        reason: "it claims to have chunks that were never sent",
                    });
                }
                *complete = true;
                self.session_mut().outstanding.clear();
                self.events.push_back(Event::Complete);
                if verify != Verify::After {
                    self.finish();
                }
            }
            (
                Phase::Released {
                    complete: true,
                    digests: false,
                    ..
                },
                Message::Digests { .. },
            ) if verify == Verify::After => {}
            (
                Phase::Released {
                    complete: true,
                    digests: digests @ false,
                    ..
                },
                Message::DigestsEnd,
            ) if verify == Verify::After => {
                *digests = true;
                self.events.push_back(Event::Compare);
            }
            (_, message) => {
                return Err(ProtocolError::Unexpected {
                    message: message.name(),
                    phase: self.phase(),
                });
            }
        }
        Ok(())
    }

    /// Tracking runs; `present` are the chunks that may hold anything but zeros. The first pass begins.
    pub fn handle_started(&mut self, now: Micros, present: &ChunkBitmap) {
        if let Phase::Starting = self.phase
            && !self.is_dry_run()
        {
            let session = self.session_mut();
            let mut holes = ChunkBitmap::full(present.chunks());
            holes.subtract(present);
            session.holes = (!holes.is_empty()).then_some(holes);
            session.begin(present);
            session.round_bytes = session.bytes_of(present);
            session.round_began = now;
            self.phase = Phase::Sending;
            self.advance(now);
        }
    }

    /// The measurements of a dry run are done.
    pub fn handle_measured(&mut self) {
        if let Phase::Starting = self.phase
            && self.is_dry_run()
        {
            self.finish();
        }
    }

    /// The answer to [`Event::Take`]: what was written since the last take.
    pub fn handle_dirty(&mut self, now: Micros, dirty: ChunkBitmap) {
        let Phase::Taking = self.phase else {
            return self.keep_for_restore(&dirty);
        };
        let mut budget = self.config.budget;
        let fixed = self.config.fixed_blackout;
        let held = self.is_held();
        let session = self.session_mut();
        let observation = session.observe(now, &dirty, fixed);
        budget.rounds = budget.rounds.saturating_add(session.first_round);
        let decision = if held {
            Decision::Continue
        } else {
            decide(&budget, &observation)
        };
        match decision {
            Decision::Continue => {
                let messages = session.announce(now, &dirty);
                self.messages.extend(messages);
                self.phase = Phase::Sending;
                self.advance(now);
            }
            Decision::GiveUp => {
                session.outstanding.union_with(&dirty);
                let error = ProtocolError::NotConverging {
                    remaining: observation.dirty,
                    bandwidth: observation.bandwidth,
                    round: observation.round,
                };
                self.fail(error);
            }
            decision @ (Decision::StopAndCopy | Decision::PostCopy) => {
                let post_copy = decision == Decision::PostCopy;
                let mut unsent = dirty;
                if post_copy {
                    // The leecher makes these chunks absent while the subject still runs; what is left for the
                    // blackout are those that are written from now on and are not among them.
                    let messages = session.announce(now, &unsent);
                    self.messages.extend(messages);
                    self.messages.push_back(Message::Finalize);
                    unsent.clear();
                }
                self.phase = Phase::Suspending { post_copy, unsent };
                self.events.push_back(Event::Suspend {
                    decision,
                    observation,
                });
            }
        }
    }

    /// The subject is suspended and `dirty` is what it wrote since the last take.
    pub fn handle_suspended(&mut self, now: Micros, dirty: &ChunkBitmap) {
        if !matches!(self.phase, Phase::Suspending { .. }) {
            return self.keep_for_restore(dirty);
        }
        let Phase::Suspending {
            post_copy,
            mut unsent,
        } = mem::replace(&mut self.phase, Phase::Closed)
        else {
            unreachable!("looked at above");
        };
        unsent.union_with(dirty);
        let messages = self.session_mut().announce(now, &unsent);
        self.messages.extend(messages);
        self.phase = Phase::Suspended(Suspended {
            post_copy,
            saved: None,
            finalized: post_copy,
            ended: false,
            compared: Compared::Awaited,
        });
        self.advance(now);
    }

    /// All of the device state was sent; `dirty` is what was written while it was saved.
    pub fn handle_saved(&mut self, now: Micros, len: u64, digest: u64, dirty: ChunkBitmap) {
        match &mut self.phase {
            Phase::Suspended(suspended) if suspended.saved.is_none() => {
                if len > MAX_STATE {
                    suspended.saved = Some((0, 0, dirty));
                    return self.fail(ProtocolError::Aborted {
                        code: AbortCode::Failed,
                        reason: alloc::format!(
                            "the device state has {len} bytes; at most {MAX_STATE} can be moved"
                        ),
                    });
                }
                suspended.saved = Some((len, digest, dirty));
                self.advance(now);
            }
            _ => self.keep_for_restore(&dirty),
        }
    }

    /// The answer to [`Event::Compare`].
    pub fn handle_compared(&mut self, compared: u64, different: u64) {
        let verdict = Message::Verdict {
            compared,
            different,
        };
        match &mut self.phase {
            Phase::Suspended(Suspended {
                compared: state @ Compared::Running,
                ..
            }) => {
                self.messages.push_back(verdict);
                if different == 0 {
                    *state = Compared::Equal;
                } else {
                    self.fail(ProtocolError::Different { different });
                }
            }
            Phase::Released { digests: true, .. } => {
                self.messages.push_back(verdict);
                self.finish();
            }
            _ => {}
        }
    }

    /// A lane broke, the user cancelled, or something failed on this machine.
    pub fn abort(&mut self, code: AbortCode, reason: String) {
        self.fail(ProtocolError::Aborted { code, reason });
    }

    /// Time has passed.
    pub fn handle_timeout(&mut self, now: Micros) {
        if let Phase::Closed = self.phase {
            return;
        }
        match self.silence.check(now) {
            // One that is still waiting to be sent is enough.
            Ok(true) if self.messages.contains(&Message::Ping) => {}
            Ok(true) => self.messages.push_back(Message::Ping),
            Ok(false) => {}
            Err(error) => return self.fail(error),
        }
        self.advance(now);
    }

    /// When to call [`handle_timeout`](Self::handle_timeout), and to poll for batches again, at the latest.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Micros> {
        let silence = self.silence.next();
        match (&self.phase, &self.session) {
            (Phase::Closed, _) => None,
            (Phase::Draining, Some(session)) if self.is_held() => {
                Some(silence.min(session.next_take()))
            }
            _ => Some(silence),
        }
    }

    /// The next message for the control lane.
    ///
    /// With [`Message::Release`] ownership leaves: the caller that got it may have sent it, whatever becomes of the
    /// lane, so nothing takes it back. [`Event::Released`] follows.
    pub fn poll_message(&mut self) -> Option<Message> {
        if mem::take(&mut self.pong_due) && !matches!(self.phase, Phase::Closed) {
            return Some(Message::Pong);
        }
        let message = self.messages.pop_front()?;
        if let (Message::Release { .. }, Phase::Releasing) = (&message, &self.phase) {
            self.ownership = Ownership::There;
            self.phase = Phase::Released {
                running: false,
                complete: false,
                digests: false,
            };
            self.events.push_back(Event::Released);
        }
        Some(message)
    }

    /// The next thing that the caller must do.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Whether [`poll_event`](Self::poll_event) has something.
    #[must_use]
    pub fn has_event(&self) -> bool {
        !self.events.is_empty()
    }

    /// The next frame for a bulk lane, or, if the bandwidth limit says so, when to ask again.
    ///
    /// # Errors
    /// The moment before which the bandwidth limit allows nothing.
    pub fn poll_batch(&mut self, now: Micros, lane: u8) -> Result<Option<Batch>, Micros> {
        if !matches!(self.phase, Phase::Sending | Phase::Released { .. })
            && !matches!(&self.phase, Phase::Suspended(s) if !s.finalized)
        {
            return Ok(None);
        }
        let batch = self.config.batch;
        let Some(session) = &mut self.session else {
            return Ok(None);
        };
        let batch = session.next_batch(now, lane, batch);
        if let Ok(None) = batch {
            self.advance(now);
        }
        batch
    }

    /// The next answer to a fetch, for the urgent lane.
    pub fn poll_urgent(&mut self) -> Option<Batch> {
        if let Phase::Closed = self.phase {
            return None;
        }
        let session = self.session.as_mut()?;
        let run = session.schedule.next_urgent()?;
        Some(session.batch(URGENT_LANE, alloc::vec![run], false, 0))
    }

    /// A batch was read and has `payload` bytes without its zeros. To be called before the frame is sent.
    pub fn handle_filled(&mut self, now: Micros, batch: &Batch, payload: u64) {
        if let Some(session) = &mut self.session {
            session.lanes.fill(batch.lane, batch.sequence, payload);
            session.filled(payload);
            if batch.lane != URGENT_LANE {
                session.pace.spend(now, payload);
            }
        }
    }

    fn verify(&self) -> Verify {
        self.agreement()
            .map_or(Verify::Off, |agreement| agreement.verify)
    }

    fn is_dry_run(&self) -> bool {
        self.agreement().is_some_and(|agreement| agreement.dry_run)
    }

    fn session_mut(&mut self) -> &mut Session {
        self.session
            .as_mut()
            .expect("phases after Greeting have a session")
    }

    /// Goes on to the next step if nothing is left to do in this one.
    fn advance(&mut self, now: Micros) {
        let held = self.is_held();
        let Some(session) = &mut self.session else {
            return;
        };
        match &mut self.phase {
            Phase::Sending if session.nothing_pending() => {
                self.phase = Phase::Draining;
                self.advance(now);
            }
            Phase::Draining if session.lanes.is_drained() => {
                if held && now < session.next_take() {
                    return;
                }
                self.phase = Phase::Taking;
                self.events.push_back(Event::Take);
            }
            Phase::Suspended(suspended) if !suspended.ended => {
                let drained = session.nothing_pending() && session.lanes.is_drained();
                if !suspended.post_copy && !drained {
                    return;
                }
                let Some((len, digest, dirty)) = &mut suspended.saved else {
                    return;
                };
                // Saving the state may have written memory; that is one more set, seldom more than empty.
                if !dirty.is_empty() {
                    let messages = session.announce(now, dirty);
                    self.messages.extend(messages);
                    dirty.clear();
                    if !suspended.post_copy {
                        return;
                    }
                }
                if !suspended.finalized {
                    suspended.finalized = true;
                    self.messages.push_back(Message::Finalize);
                }
                suspended.ended = true;
                self.messages.push_back(Message::StateEnd {
                    len: *len,
                    digest: *digest,
                });
            }
            _ => {}
        }
    }

    /// Once the caller has taken this message, the subject never runs on this side again.
    fn hand_over(&mut self) {
        self.phase = Phase::Releasing;
        self.session_mut().schedule.set_order(Order::HotFirst);
        self.messages.push_back(Message::Release {
            token: self.config.token,
        });
    }
}
