//! What exists once both sides agree: which chunks are where, and what is sent next.

use alloc::vec::Vec;

use super::lanes::Lanes;
use super::offers::Offers;
use super::pace::Pace;
use super::{Batch, SeederConfig};
use crate::bitmap::ChunkBitmap;
use crate::chunk::ChunkRun;
use crate::converge::{Micros, Observation};
use crate::dirty::DirtyPage;
use crate::error::ProtocolError;
use crate::hello::Agreement;
use crate::limits::{MAX_CHUNKS_IN_FRAME, MAX_PAYLOAD, MAX_RUNS};
use crate::message::Message;
use crate::schedule::Scheduler;

/// A leecher asks for each chunk once, for a thread that waits: so many are never waiting or unacknowledged.
const MAX_FETCHES: usize = 1 << 20;

/// Rounds smaller than this say more about latency than about bandwidth.
const TELLING: u64 = 4 << 20;

/// How long a round lasts at least while nobody has asked for the cut-over: a take costs up to 5 ms a GiB, and nobody waits for it.
const LEISURE: Micros = Micros::from_millis(200);

/// What exists once both sides agree.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) agreement: Agreement,
    pub(super) schedule: Scheduler,
    /// Chunks that the first pass need not read, until all of them were handed out.
    pub(super) holes: Option<ChunkBitmap>,
    /// Holes below this chunk were handed out.
    pub(super) holes_sent: u64,
    /// Chunks of announced rounds which the leecher has not acknowledged.
    pub(super) outstanding: ChunkBitmap,
    /// The dirty set before the one of this round.
    pub(super) previous: ChunkBitmap,
    pub(super) lanes: Lanes,
    pub(super) pace: Pace,
    pub(super) round: u32,
    pub(super) round_bytes: u64,
    pub(super) round_began: Micros,
    pub(super) bandwidth: u64,
    pub(super) stalled: u32,
    pub(super) observation: Option<Observation>,
    pub(super) fetches: u64,
    /// What the leecher has of an earlier time, if that is kept and while it tells.
    pub(super) offers: Option<Offers>,
    /// Bytes that were sent in this round.
    payload: u64,
    /// The round in which the cut-over was asked for.
    pub(super) first_round: u32,
}

impl Session {
    pub(super) fn new(now: Micros, agreement: Agreement, config: &SeederConfig) -> Self {
        let chunks = agreement.layout.chunks();
        Self {
            schedule: Scheduler::new(chunks),
            holes: None,
            holes_sent: 0,
            outstanding: ChunkBitmap::full(chunks),
            previous: ChunkBitmap::empty(chunks),
            lanes: Lanes::new(config.lanes),
            pace: Pace::new(now, config.bandwidth),
            round: 0,
            round_bytes: 0,
            round_began: now,
            bandwidth: 0,
            stalled: 0,
            observation: None,
            fetches: 0,
            offers: agreement.keep.then(|| Offers::new(chunks)),
            payload: 0,
            first_round: 0,
            agreement,
        }
    }

    pub(super) fn bytes_of(&self, set: &ChunkBitmap) -> u64 {
        set.runs()
            .map(|run| self.agreement.layout.bytes_in(run))
            .sum()
    }

    pub(super) fn nothing_pending(&self) -> bool {
        self.offers.is_none() && self.holes.is_none() && self.schedule.is_empty()
    }

    /// The first pass begins: what the leecher may still offer waits until it has.
    pub(super) fn begin(&mut self, present: &ChunkBitmap) {
        match &mut self.offers {
            Some(offers) => {
                let free = offers.begin(present);
                self.let_go(&free);
            }
            None => {
                let nothing = ChunkBitmap::empty(present.chunks());
                self.schedule.add(present, &nothing);
            }
        }
    }

    /// The leecher begins to offer.
    pub(super) fn keep(&mut self) -> Result<(), ProtocolError> {
        self.offers_mut()?.open()
    }

    /// The leecher has offered `count` chunks from `first` on, and none before that it has not offered already.
    pub(super) fn offer(&mut self, first: u64, count: u64) -> Result<(), ProtocolError> {
        let free = self.offers_mut()?.advance(first, count)?;
        self.let_go(&free);
        Ok(())
    }

    pub(super) fn offered_all(&mut self) -> Result<(), ProtocolError> {
        let free = self.offers_mut()?.end()?;
        self.let_go(&free);
        Ok(())
    }

    fn offers_mut(&mut self) -> Result<&mut Offers, ProtocolError> {
        self.offers.as_mut().ok_or(ProtocolError::Violation {
            reason: "it offers chunks although that was not agreed, or after it said that it had no more",
        })
    }

    /// These chunks need not wait any more.
    fn let_go(&mut self, free: &[ChunkRun]) {
        self.schedule.add_runs(free);
        if self.offers.as_ref().is_some_and(Offers::is_over) {
            self.offers = None;
        }
    }

    /// When the next dirty set is taken at the earliest, if nobody has asked for the cut-over.
    pub(super) fn next_take(&self) -> Micros {
        self.round_began.plus(LEISURE)
    }

    /// A frame with so many bytes is sent.
    pub(super) fn filled(&mut self, payload: u64) {
        self.payload = self.payload.saturating_add(payload);
    }

    /// Begins a round with `set`: those chunks are remote at the leecher again.
    pub(super) fn announce(&mut self, now: Micros, set: &ChunkBitmap) -> Vec<Message> {
        self.round += 1;
        self.round_began = now;
        self.round_bytes = self.bytes_of(set);
        self.payload = 0;
        self.lanes.outdate();
        self.outstanding.union_with(set);
        self.schedule.add(set, &self.previous);
        self.previous = set.clone();
        let mut messages = Message::dirty(self.round, DirtyPage::pages_of(set));
        messages.push(Message::Round {
            round: self.round,
            chunks: set.count(),
        });
        messages
    }

    pub(super) fn observe(
        &mut self,
        now: Micros,
        dirty: &ChunkBitmap,
        fixed: Micros,
    ) -> Observation {
        let took = now.since(self.round_began);
        let bytes = self.bytes_of(dirty);
        // What the leecher has kept says nothing about the link.
        let moved = if self.round == 0 && self.agreement.keep {
            self.payload.min(self.round_bytes)
        } else {
            self.round_bytes
        };
        let rate = u128::from(moved) * 1_000_000 / u128::from(took.0.max(1));
        let rate = u64::try_from(rate).unwrap_or(u64::MAX);
        let rate = self.pace.at_most(rate).max(1);
        self.bandwidth = if moved >= TELLING {
            rate
        } else {
            // A small round is slower than the link, never faster.
            self.bandwidth.max(rate)
        };
        self.stalled = if bytes * 10 <= self.round_bytes * 9 {
            0
        } else {
            self.stalled + 1
        };
        let observation = Observation {
            round: self.round,
            dirty: bytes,
            sent: self.round_bytes,
            took,
            bandwidth: self.bandwidth,
            fixed,
            stalled: self.stalled,
            post_copy: self.agreement.post_copy,
        };
        self.observation = Some(observation);
        observation
    }

    pub(super) fn fetch(&mut self, run: ChunkRun) -> Result<(), ProtocolError> {
        let end = run.start.0.checked_add(run.count);
        let inside = end.is_some_and(|end| end <= self.agreement.layout.chunks());
        if !inside || run.count == 0 || run.count > self.chunks_in_frame(u32::MAX) {
            return Err(ProtocolError::Violation {
                reason: "it fetches chunks that do not exist, or too many at once",
            });
        }
        if self.schedule.urgent_len() + self.lanes.urgent_len() >= MAX_FETCHES {
            return Err(ProtocolError::Violation {
                reason: "it fetches the same chunks again and again",
            });
        }
        self.fetches += 1;
        self.schedule.fetch(run);
        Ok(())
    }

    /// How many chunks fit a frame of about `bytes`.
    pub(super) fn chunks_in_frame(&self, bytes: u32) -> u64 {
        let size = self.agreement.layout.chunk_size().bytes();
        let bytes = bytes.min(MAX_PAYLOAD);
        u64::from((bytes / size).max(1)).min(MAX_CHUNKS_IN_FRAME)
    }

    pub(super) fn next_batch(
        &mut self,
        now: Micros,
        lane: u8,
        bytes: u32,
    ) -> Result<Option<Batch>, Micros> {
        if !self.lanes.has_room() {
            return Ok(None);
        }
        if let Some(holes) = self.next_holes() {
            return Ok(Some(self.batch(lane, holes, true, 0)));
        }
        self.pace.ready(now)?;
        let runs = self.schedule.next(self.chunks_in_frame(bytes));
        if runs.is_empty() {
            return Ok(None);
        }
        let bytes = runs
            .iter()
            .map(|&run| self.agreement.layout.bytes_in(run))
            .sum();
        Ok(Some(self.batch(lane, runs, false, bytes)))
    }

    /// A frame's worth of chunks that were never written.
    pub(super) fn next_holes(&mut self) -> Option<Vec<ChunkRun>> {
        let holes = self.holes.as_ref()?;
        let mut runs = Vec::new();
        while runs.len() < MAX_RUNS
            && let Some(run) = holes.run_from(self.holes_sent, u64::MAX)
        {
            self.holes_sent = run.end();
            runs.push(run);
        }
        if runs.len() < MAX_RUNS {
            self.holes = None;
        }
        (!runs.is_empty()).then_some(runs)
    }

    pub(super) fn batch(&mut self, lane: u8, runs: Vec<ChunkRun>, hole: bool, bytes: u64) -> Batch {
        let sequence = self.lanes.send(lane, runs.clone(), bytes);
        Batch {
            lane,
            sequence,
            round: self.round,
            runs,
            hole,
        }
    }
}
