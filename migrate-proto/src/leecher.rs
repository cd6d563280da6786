//! The side that owns the memory next: what it accepts, what it asks for, and when it may run.
//!
//! ```text
//! Greeting → Preparing → Prefetching → Finalizing → Loading → Ready → Owning → Done
//! ```
//!
//! A chunk is *remote* until it is installed, and again once a dirty set names it. While prefetching, chunks are
//! received straight into memory, since nobody else looks at it. From `Finalizing` on the subject may look, so a
//! chunk is installed whole or not at all and never over a resident one.
//!
//! Only [`Message::Release`] makes this side an owner. If the session breaks while it waits for that, nobody can
//! know whether the token is on its way: [`Event::Undecided`].

mod capabilities;
mod ending;
mod install;

use alloc::collections::VecDeque;
use alloc::string::String;
use core::mem;

use crate::bitmap::ChunkBitmap;
use crate::chunk::ChunkRun;
use crate::converge::Micros;
use crate::error::{AbortCode, ProtocolError};
use crate::handover::Ownership;
use crate::hello::{Agreement, Hello, Verify};
use crate::limits::MAX_STATE;
use crate::message::{Chunks, Message};
use crate::seeder::URGENT_LANE;
use crate::silence::Silence;
use capabilities::CutOver;
use install::Residency;
pub use install::{Admission, Fault, Part, ZERO_DIGEST, chunk_digest, reserve};

/// What a leecher is started with.
#[derive(Debug, Clone)]
pub struct LeecherConfig {
    /// Its first message.
    pub hello: Hello,
    /// How many bytes of chunks may be in flight at once.
    pub window: u64,
    /// How many bulk lanes there are.
    pub lanes: u8,
    /// The longest time that the peer may be silent.
    pub silence: Micros,
    /// The key of the digests of what is kept, random for each session. Used where that was agreed.
    pub key: [u8; 32],
}

/// What the caller must do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The geometry fits. Compare the subject's description, make the memory empty, then say so:
    /// [`Leecher::handle_prepared`]. In a dry run: only compare.
    ///
    /// If [`Agreement::keep`] says so, the memory is left as it is, and once it is prepared the caller offers what it has, at
    /// the same time as chunks are received: [`Leecher::handle_offering`], [`Leecher::handle_offered`].
    Prepare,
    /// Arm the faults, then make every chunk of `remote` absent: nothing is written directly any more.
    ///
    /// In this order, or a page that is touched in between is a page of zeros for ever. Until the next event is
    /// polled, frames are told to wait: one that is installed now would be made absent again.
    Finalize {
        /// The chunks that are not here.
        remote: ChunkBitmap,
    },
    /// These chunks turned out to be stale; make them absent. Frames wait meanwhile, as for
    /// [`Finalize`](Self::Finalize).
    Discard {
        /// The chunks.
        stale: ChunkBitmap,
    },
    /// Send the digests ([`Leecher::digests`]), then [`Leecher::handle_digests_sent`].
    Digests,
    /// The device state is complete: check it, load it, then [`Leecher::handle_loaded`].
    Load {
        /// Length in bytes; as many were received.
        len: u64,
        /// The digest that it must have.
        digest: u64,
    },
    /// The subject is owned here: run it, then [`Leecher::handle_running`].
    Run,
    /// No chunk is remote any more: disarm the faults, then [`Leecher::handle_disarmed`].
    Drained,
    /// The seeder has compared the copies.
    Verdict {
        /// How many chunks were compared.
        compared: u64,
        /// How many differ.
        different: u64,
    },
    /// The session ended as it should.
    Done,
    /// The session failed before anything was owned here: the source runs on.
    Aborted {
        /// Why.
        error: ProtocolError,
    },
    /// The session broke after Ready and before Release arrived: the subject stands still on both sides, as far
    /// as this side knows. It must not be run here.
    Undecided {
        /// Why.
        error: ProtocolError,
    },
    /// The session broke after Release: the subject is owned here, and these chunks only the source has.
    Lost {
        /// Why.
        error: ProtocolError,
        /// How many.
        missing: u64,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Greeting,
    Preparing,
    Prefetching,
    /// Finalize came; the state has not ended.
    Finalizing,
    /// The state has ended; digests are compared or the state is loaded.
    Loading,
    Ready,
    Owning {
        running: bool,
        /// Drained was reported.
        drained: bool,
        /// Complete was said.
        complete: bool,
    },
    Closed,
}

/// How far the digests are, where copies are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Digests {
    Unasked,
    /// The caller sends them.
    Asked,
    /// The seeder compares.
    Sent,
    /// It said what came out.
    Judged,
}

/// The leecher's half of a session. See the module's documentation.
#[derive(Debug)]
pub struct Leecher {
    config: LeecherConfig,
    phase: Phase,
    ownership: Ownership,
    theirs: Option<Hello>,
    agreement: Option<Agreement>,
    residency: Residency,
    /// What was offered and may be kept, until the first round begins.
    offered: Option<ChunkBitmap>,
    cut_over: CutOver,
    /// The dirty set that is coming in, and its round.
    incoming: Option<(u32, ChunkBitmap)>,
    round: u32,
    state_len: u64,
    state_end: Option<(u64, u64)>,
    /// The state has ended, but stale bytes are still being installed: nobody may look until they are discarded.
    held: bool,
    digests: Digests,
    messages: VecDeque<Message>,
    /// The answer to Ping, however often it was asked.
    pong_due: bool,
    events: VecDeque<Event>,
    /// Finalize and Discard events that the caller has not obeyed, the one it works on included.
    unobeyed: usize,
    /// It works on one of those.
    obeying: bool,
    silence: Silence,
}

impl Leecher {
    /// A leecher at the start of a session: its hello waits in [`poll_message`](Self::poll_message).
    ///
    /// If the hello is beyond the limits of the protocol, the session is over at once: [`Event::Aborted`].
    #[must_use]
    pub fn new(now: Micros, config: LeecherConfig) -> Self {
        let mut leecher = Self {
            phase: Phase::Greeting,
            ownership: Ownership::There,
            theirs: None,
            agreement: None,
            residency: Residency::new(0, config.lanes, false),
            offered: None,
            cut_over: CutOver::Unwanted,
            incoming: None,
            round: 0,
            state_len: 0,
            state_end: None,
            held: false,
            digests: Digests::Unasked,
            messages: VecDeque::new(),
            pong_due: false,
            events: VecDeque::new(),
            unobeyed: 0,
            obeying: false,
            silence: Silence::new(now, config.silence),
            config,
        };
        match leecher.config.hello.check() {
            Ok(()) => {
                let hello = Message::Hello(leecher.config.hello.clone());
                leecher.messages.push_back(hello);
            }
            Err(error) => leecher.fail(error),
        }
        leecher
    }

    /// Who may run the subject, as far as this side knows.
    #[must_use]
    ///
    /// Once Release came it is this one, also when the session is over, well or not.
    pub fn ownership(&self) -> Ownership {
        self.ownership
    }

    /// What this side is doing, in one word.
    #[must_use]
    pub fn phase(&self) -> &'static str {
        match self.phase {
            Phase::Greeting => "greeting",
            Phase::Preparing => "preparing",
            Phase::Prefetching => "prefetching",
            Phase::Finalizing => "finalizing",
            Phase::Loading => "loading",
            Phase::Ready => "ready",
            Phase::Owning { .. } => "owning",
            Phase::Closed => "closed",
        }
    }

    /// What was agreed, once it was.
    #[must_use]
    pub fn agreement(&self) -> Option<&Agreement> {
        self.agreement.as_ref()
    }

    /// The seeder's first message, once it came.
    #[must_use]
    pub fn theirs(&self) -> Option<&Hello> {
        self.theirs.as_ref()
    }

    /// Whether no dirty set can name a chunk any more: what is here stays here.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        matches!(
            self.phase,
            Phase::Loading | Phase::Ready | Phase::Owning { .. } | Phase::Closed
        )
    }

    /// Whether the session is over.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.phase == Phase::Closed
    }

    /// The round that is being received.
    #[must_use]
    pub fn round(&self) -> u32 {
        self.round
    }

    /// How many chunks are not here. Takes time in proportion to the memory.
    #[must_use]
    pub fn missing(&self) -> u64 {
        self.residency.missing()
    }

    /// Whether `chunk` is here, in its newest version that was announced.
    #[cfg(test)]
    #[must_use]
    pub(crate) fn is_resident(&self, chunk: u64) -> bool {
        chunk < self.residency.chunks() && !self.residency.remote().contains(chunk)
    }

    /// The digests of the chunks `run` as they were installed, 0 where a chunk is remote; empty if nothing is verified.
    #[must_use]
    pub fn digests(&self, run: ChunkRun) -> &[u64] {
        self.residency.digests(run)
    }

    /// A message came on the control lane, or one that is not [`Message::Chunks`] on another.
    ///
    /// # Errors
    /// If the session cannot go on. It is closed then, and the event that says so is waiting.
    pub fn handle_message(&mut self, now: Micros, message: Message) -> Result<(), ProtocolError> {
        self.silence.heard(now);
        let result = self.dispatch(message);
        if let Err(error) = &result {
            self.fail(error.clone());
        }
        result
    }

    fn dispatch(&mut self, message: Message) -> Result<(), ProtocolError> {
        match (self.phase, message) {
            (Phase::Closed, _) | (_, Message::Pong) => {}
            (_, Message::Ping) => self.pong_due = true,
            (_, Message::Abort { code, reason }) => {
                return Err(ProtocolError::PeerAborted { code, reason });
            }
            (Phase::Greeting, Message::Hello(theirs)) => self.greet(theirs)?,
            (Phase::Prefetching, message) if self.is_dry_run() => match message {
                Message::Probe => {}
                Message::Farewell => self.close(Event::Done),
                _ => {
                    return Err(ProtocolError::Violation {
                        reason: "it moves something although this is a dry run",
                    });
                }
            },
            (Phase::Prefetching | Phase::Finalizing, Message::Dirty { round, pages }) => {
                let (current, chunks) = (self.round, self.residency.chunks());
                let (incoming, set) = self
                    .incoming
                    .get_or_insert_with(|| (round, ChunkBitmap::empty(chunks)));
                if round != *incoming || current.checked_add(1) != Some(round) {
                    return Err(ProtocolError::Violation {
                        reason: "its dirty sets are out of order",
                    });
                }
                for page in pages {
                    page.add_to(set)?;
                }
            }
            (Phase::Prefetching | Phase::Finalizing, Message::Round { round, chunks }) => {
                self.begin_round(round, chunks)?;
            }
            (Phase::Prefetching, Message::Finalize) => {
                self.nothing_may_be_received()?;
                self.phase = Phase::Finalizing;
                self.unobeyed += 1;
                self.events.push_back(Event::Finalize {
                    remote: self.residency.remote().clone(),
                });
            }
            (Phase::Finalizing, Message::StateEnd { len, digest }) => {
                if len != self.state_len {
                    return Err(ProtocolError::Violation {
                        reason: "its device state is not as long as it says",
                    });
                }
                if self.incoming.is_some() {
                    return Err(ProtocolError::Violation {
                        reason: "its dirty set is incomplete or out of order",
                    });
                }
                self.phase = Phase::Loading;
                self.state_end = Some((len, digest));
                self.held = true;
                self.go_on_loading();
            }
            (
                Phase::Loading,
                Message::Verdict {
                    compared,
                    different,
                },
            ) if self.verify() == Verify::Before && self.digests == Digests::Sent => {
                self.digests = Digests::Judged;
                self.events.push_back(Event::Verdict {
                    compared,
                    different,
                });
                // With a difference the seeder ends the session.
                if let (0, Some((len, digest))) = (different, self.state_end.take()) {
                    self.events.push_back(Event::Load { len, digest });
                }
            }
            (Phase::Ready, Message::Release { token: _ }) => {
                self.ownership = Ownership::Here;
                self.phase = Phase::Owning {
                    running: false,
                    drained: false,
                    complete: false,
                };
                self.events.push_back(Event::Run);
            }
            (
                Phase::Owning { complete: true, .. },
                Message::Verdict {
                    compared,
                    different,
                },
            ) if self.verify() == Verify::After && self.digests == Digests::Sent => {
                self.digests = Digests::Judged;
                self.events.push_back(Event::Verdict {
                    compared,
                    different,
                });
            }
            (Phase::Owning { complete: true, .. }, Message::Farewell) => self.close(Event::Done),
            (_, message) => {
                return Err(ProtocolError::Unexpected {
                    message: message.name(),
                    phase: self.phase(),
                });
            }
        }
        Ok(())
    }

    fn greet(&mut self, theirs: Hello) -> Result<(), ProtocolError> {
        let agreement = self.config.hello.agree(&theirs)?;
        // A dry run moves nothing, so nothing needs to be kept for it.
        if !agreement.dry_run {
            let verify = agreement.verify != Verify::Off;
            let chunks = agreement.layout.chunks();
            self.residency = Residency::new(chunks, self.config.lanes, verify);
            self.offered = agreement.keep.then(|| ChunkBitmap::empty(chunks));
        }
        self.agreement = Some(agreement);
        self.theirs = Some(theirs);
        self.phase = Phase::Preparing;
        self.events.push_back(Event::Prepare);
        Ok(())
    }

    /// The set of the round is complete: what it names is remote again.
    fn begin_round(&mut self, round: u32, chunks: u64) -> Result<(), ProtocolError> {
        let space = self.residency.chunks();
        let (incoming, set) = self
            .incoming
            .take()
            .unwrap_or_else(|| (round, ChunkBitmap::empty(space)));
        let next = self.round.checked_add(1);
        if next != Some(round) || incoming != round || set.count() != chunks {
            return Err(ProtocolError::Violation {
                reason: "its dirty set is incomplete or out of order",
            });
        }
        self.nothing_may_be_received()?;
        self.round = round;
        self.offered = None;
        // What was remote before is absent already, or will be when the events before this one are obeyed.
        let mut stale = set.clone();
        stale.subtract(self.residency.remote());
        self.residency.invalidate(&set);
        if self.phase == Phase::Finalizing && !stale.is_empty() {
            // Sets that come faster than they are obeyed wait as one.
            if let Some(Event::Discard { stale: waiting }) = self.events.back_mut() {
                waiting.union_with(&stale);
            } else {
                self.unobeyed += 1;
                self.events.push_back(Event::Discard { stale });
            }
        }
        Ok(())
    }

    /// A seeder begins a round, and finalizes, when all bulk frames were acknowledged: what is received straight
    /// into memory now would be written under the feet of whoever looks next.
    fn nothing_may_be_received(&self) -> Result<(), ProtocolError> {
        if self.residency.is_receiving_bulk() {
            return Err(ProtocolError::Violation {
                reason: "it goes on while its chunks are still being received",
            });
        }
        Ok(())
    }

    /// Lets the caller look at the memory, once it holds nothing stale.
    fn go_on_loading(&mut self) {
        let Some((len, digest)) = self.state_end else {
            return;
        };
        if !self.held || self.residency.is_overtaken() {
            return;
        }
        self.held = false;
        if self.verify() == Verify::Before {
            self.digests = Digests::Asked;
            self.events.push_back(Event::Digests);
        } else {
            self.events.push_back(Event::Load { len, digest });
        }
    }

    /// A piece of `len` bytes of device state came, which begins at `offset`.
    ///
    /// # Errors
    /// As for [`handle_message`](Self::handle_message).
    pub fn handle_state(
        &mut self,
        now: Micros,
        offset: u64,
        len: u64,
    ) -> Result<(), ProtocolError> {
        self.silence.heard(now);
        let result = match self.phase {
            Phase::Closed => Ok(()),
            Phase::Prefetching | Phase::Finalizing
                if !self.is_dry_run()
                    && offset == self.state_len
                    && offset.saturating_add(len) <= MAX_STATE =>
            {
                self.state_len += len;
                Ok(())
            }
            _ => Err(ProtocolError::Violation {
                reason: "its device state has gaps, is too long, or comes at the wrong time",
            }),
        };
        if let Err(error) = &result {
            self.fail(error.clone());
        }
        result
    }

    /// The answer to [`Event::Prepare`].
    pub fn handle_prepared(&mut self) {
        if self.phase == Phase::Preparing {
            self.phase = Phase::Prefetching;
            self.messages.push_back(Message::Accept {
                window: self.config.window,
            });
            if self.offered.is_some() {
                let key = self.config.key;
                self.messages.push_back(Message::Keep { key });
            }
            self.say_cut_over();
        }
    }

    /// The fields of a frame of chunks came on `lane`; its payload has not been read yet and has `payload` bytes.
    ///
    /// # Errors
    /// As for [`handle_message`](Self::handle_message).
    pub fn admit(
        &mut self,
        now: Micros,
        lane: u8,
        chunks: &Chunks,
        payload: u64,
    ) -> Result<Admission, ProtocolError> {
        let result = self.try_admit(lane, chunks, payload);
        // Asking again about a frame that waits is no sign of life.
        if !matches!(result, Ok(Admission::Wait)) {
            self.silence.heard(now);
        }
        if let Err(error) = &result {
            self.fail(error.clone());
        }
        result
    }

    fn try_admit(
        &mut self,
        lane: u8,
        chunks: &Chunks,
        payload: u64,
    ) -> Result<Admission, ProtocolError> {
        let direct = match self.phase {
            Phase::Prefetching if lane == URGENT_LANE => {
                return Err(ProtocolError::Violation {
                    reason: "it answers a fetch that was never sent",
                });
            }
            Phase::Prefetching => true,
            Phase::Finalizing | Phase::Loading | Phase::Ready | Phase::Owning { .. } => false,
            Phase::Closed => return Ok(Admission::Ignore),
            Phase::Greeting | Phase::Preparing => {
                return Err(ProtocolError::Unexpected {
                    message: "Chunks",
                    phase: self.phase(),
                });
            }
        };
        let layout = match &self.agreement {
            Some(agreement) if !agreement.dry_run => &agreement.layout,
            _ => {
                return Err(ProtocolError::Violation {
                    reason: "it sends chunks in a dry run",
                });
            }
        };
        install::check(layout, chunks, payload)?;
        if !self.residency.is_next(lane, chunks.sequence)? {
            return Ok(Admission::Ignore);
        }
        // What is installed before the caller has made it absent would be lost, and count as here.
        if chunks.round > self.round || self.unobeyed > 0 {
            return Ok(Admission::Wait);
        }
        let stale = chunks.round < self.round;
        if !stale && !install::may_keep(chunks, self.offered.as_ref()) {
            return Err(ProtocolError::Violation {
                reason: "it takes chunks for kept that were not offered",
            });
        }
        let parts = self.residency.sort(chunks, stale);
        if stale {
            for run in &chunks.runs {
                self.residency.ask_again(run.run);
            }
        }
        self.residency.receive(lane, &parts);
        Ok(Admission::Install { parts, direct })
    }

    /// The parts of a frame that [`admit`](Self::admit) said to install are in place: `parts` are those it gave.
    ///
    /// To be called for each admitted frame, also where nothing of it was wanted: it is acknowledged then.
    pub fn handle_installed(&mut self, lane: u8, chunks: &Chunks, parts: &[Part]) {
        if self.phase == Phase::Closed {
            return;
        }
        // A dirty set that came while the payload was received names chunks that have stale bytes now.
        if let Some(stale) = self.residency.install(lane, chunks, parts) {
            self.unobeyed += 1;
            self.events.push_back(Event::Discard { stale });
        }
        if self.phase == Phase::Loading {
            self.go_on_loading();
        }
        self.check_drained();
    }

    /// To be called directly after [`handle_installed`](Self::handle_installed) if bytes of the next frame wait on
    /// `lane` already: one credit will do for a few frames. What waits has to be taken then, whatever happens: the
    /// seeder begins no round before every frame has its credit.
    pub fn defer_credit(&mut self, lane: u8) {
        self.residency.defer_credit(lane);
    }

    /// Somebody waits for `chunk`. One beyond the chunk space counts as resident.
    pub fn handle_fault(&mut self, chunk: u64) -> Fault {
        if self.phase == Phase::Closed && self.residency.remote().contains(chunk) {
            return Fault::Lost;
        }
        self.residency.fault(chunk)
    }

    /// The answer to [`Event::Digests`].
    pub fn handle_digests_sent(&mut self) {
        if self.phase != Phase::Closed && self.digests == Digests::Asked {
            self.digests = Digests::Sent;
            self.messages.push_back(Message::DigestsEnd);
        }
    }

    /// The answer to [`Event::Load`].
    pub fn handle_loaded(&mut self) {
        if self.phase == Phase::Loading && !self.held {
            self.phase = Phase::Ready;
            self.messages.push_back(Message::Ready);
        }
    }

    /// The answer to [`Event::Run`].
    pub fn handle_running(&mut self) {
        if let Phase::Owning { running, .. } = &mut self.phase
            && !*running
        {
            *running = true;
            self.messages.push_back(Message::Running);
            self.check_drained();
        }
    }

    /// The answer to [`Event::Drained`].
    pub fn handle_disarmed(&mut self) {
        if let Phase::Owning {
            drained: true,
            complete,
            ..
        } = &mut self.phase
            && !*complete
        {
            *complete = true;
            self.messages.push_back(Message::Complete);
            if self.verify() == Verify::After {
                self.digests = Digests::Asked;
                self.events.push_back(Event::Digests);
            }
        }
    }

    /// A lane broke, the user cancelled, or something failed on this machine.
    pub fn abort(&mut self, code: AbortCode, reason: String) {
        self.fail(ProtocolError::Aborted { code, reason });
    }

    /// Time has passed.
    pub fn handle_timeout(&mut self, now: Micros) {
        if self.phase == Phase::Closed {
            return;
        }
        match self.silence.check(now) {
            // One that is still waiting to be sent is enough.
            Ok(true) if self.messages.contains(&Message::Ping) => {}
            Ok(true) => self.messages.push_back(Message::Ping),
            Ok(false) => {}
            Err(error) => self.fail(error),
        }
    }

    /// When to call [`handle_timeout`](Self::handle_timeout).
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Micros> {
        (self.phase != Phase::Closed).then(|| self.silence.next())
    }

    /// The next message for the control lane.
    pub fn poll_message(&mut self) -> Option<Message> {
        let closed = self.phase == Phase::Closed;
        if mem::take(&mut self.pong_due) && !closed {
            return Some(Message::Pong);
        }
        if let Some(message) = self.messages.pop_front() {
            return Some(message);
        }
        if closed {
            return None;
        }
        let (lane, sequence) = self.residency.credit()?;
        Some(Message::Credit { lane, sequence })
    }

    /// The next message for the urgent lane.
    pub fn poll_urgent(&mut self) -> Option<Message> {
        // Before Finalize a chunk may come straight into memory, and the seeder answers no fetch.
        if let Phase::Finalizing | Phase::Loading | Phase::Ready | Phase::Owning { .. } = self.phase
        {
            let run = ChunkRun::new(self.residency.next_fetch()?, 1);
            return Some(Message::Fetch { run });
        }
        None
    }

    /// The next thing that the caller must do. To be called when the last one was done.
    pub fn poll_event(&mut self) -> Option<Event> {
        if mem::take(&mut self.obeying) {
            self.unobeyed -= 1;
        }
        let event = self.events.pop_front();
        self.obeying = matches!(event, Some(Event::Finalize { .. } | Event::Discard { .. }));
        event
    }

    /// Whether [`poll_event`](Self::poll_event) has something.
    #[must_use]
    pub fn has_event(&self) -> bool {
        !self.events.is_empty()
    }

    fn verify(&self) -> Verify {
        self.agreement
            .as_ref()
            .map_or(Verify::Off, |agreement| agreement.verify)
    }

    fn is_dry_run(&self) -> bool {
        self.agreement
            .as_ref()
            .is_some_and(|agreement| agreement.dry_run)
    }

    fn check_drained(&mut self) {
        if let Phase::Owning {
            running: true,
            drained,
            ..
        } = &mut self.phase
            && !*drained
            && self.residency.is_complete()
        {
            *drained = true;
            self.events.push_back(Event::Drained);
        }
    }
}
