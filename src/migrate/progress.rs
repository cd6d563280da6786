//! What a migration tells while it goes on, and at its end.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::time::Duration;

use serde::Serialize;

/// What a side is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Comparing versions, geometry and subjects.
    Greeting,
    /// The subject runs at the source and its memory is copied.
    PreCopy,
    /// At the source: the subject is being suspended, or stands still, and the last dirty set and the device state travel.
    /// At the destination: nothing is written directly any more, which in post-copy begins a little earlier and
    /// otherwise later.
    CutOver,
    /// The subject runs at the destination and the rest of its memory follows.
    PostCopy,
    /// The copies are compared.
    Verifying,
    /// It is over.
    Done,
}

/// Which side speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// The source.
    Seeder,
    /// The destination.
    Leecher,
}

/// What has gone over the wire so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Traffic {
    /// All bytes of frames on all lanes, in both directions; without what TCP adds.
    pub wire_bytes: u64,
    /// Bytes of memory that were sent or received.
    pub memory_bytes: u64,
    /// Bytes of memory that were zero or never written and cost nothing.
    pub zero_bytes: u64,
    /// Bytes of memory that the destination had already.
    pub kept_bytes: u64,
}

/// What the threads of a side count.
#[derive(Debug, Default)]
pub(super) struct Counters {
    wire: AtomicU64,
    memory: AtomicU64,
    zero: AtomicU64,
    kept: AtomicU64,
}

impl Counters {
    /// A frame of so many bytes went over a lane.
    pub(super) fn frame(&self, bytes: u64) {
        self.wire.fetch_add(bytes, Ordering::Relaxed);
    }

    /// So many bytes of memory had to be sent, so many were zero, and so many were there already.
    pub(super) fn memory(&self, data: u64, zero: u64, kept: u64) {
        self.memory.fetch_add(data, Ordering::Relaxed);
        self.zero.fetch_add(zero, Ordering::Relaxed);
        self.kept.fetch_add(kept, Ordering::Relaxed);
    }

    pub(super) fn traffic(&self) -> Traffic {
        Traffic {
            wire_bytes: self.wire.load(Ordering::Relaxed),
            memory_bytes: self.memory.load(Ordering::Relaxed),
            zero_bytes: self.zero.load(Ordering::Relaxed),
            kept_bytes: self.kept.load(Ordering::Relaxed),
        }
    }
}

/// A step of a migration. Times are seconds since the session began.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Progress {
    /// Both sides agree.
    Agreed {
        /// Bytes of memory.
        bytes: u64,
        /// How many regions.
        regions: usize,
        /// Whether post-copy is possible.
        post_copy: bool,
    },
    /// A phase begins.
    Phase {
        /// Which.
        phase: Phase,
        /// When.
        at: f64,
    },
    /// Several times a second.
    Update {
        /// Which side.
        side: Side,
        /// What it is doing.
        phase: Phase,
        /// When.
        at: f64,
        /// The round, from 0.
        round: u32,
        /// Bytes of memory.
        total: u64,
        /// Bytes that the destination lacks.
        remaining: u64,
        /// What went over the wire.
        traffic: Traffic,
        /// Bytes of memory a second, lately.
        rate: u64,
        /// Bytes a second that the guest dirtied in the last round.
        dirty_rate: Option<u64>,
        /// The blackout if the guest were suspended now and the dirty set sent, in seconds.
        predicted_blackout: Option<f64>,
        /// Seconds until the round ends.
        eta: Option<f64>,
        /// Faults that were fetched over the network.
        faults: u64,
        /// At the destination: how long they took so far, as in [`LeechReport::fault_micros`].
        fault_micros: Option<[u64; 3]>,
    },
    /// A dirty set was taken and judged.
    Round {
        /// The round that it ends.
        round: u32,
        /// When.
        at: f64,
        /// Bytes in the set.
        dirty: u64,
        /// Bytes a second that the guest dirties.
        dirty_rate: u64,
        /// Bytes a second that the link moves.
        bandwidth: u64,
        /// The blackout if the guest were suspended now and the set sent, in seconds.
        predicted_blackout: f64,
    },
    /// Ownership has passed.
    HandedOver {
        /// Which side says so.
        side: Side,
        /// When.
        at: f64,
    },
    /// The copies were compared.
    Verified(Verdict),
}

/// What comparing the copies showed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// Chunks compared.
    pub compared: u64,
    /// Chunks that differ.
    pub different: u64,
}

/// What the source says at the end. Times are in seconds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SeedReport {
    /// From the session's begin until every chunk was at the destination.
    pub total: f64,
    /// From the request to suspend until the destination said that the subject runs.
    pub blackout: f64,
    /// Parts of the blackout, in order: what, and how long.
    pub blackout_parts: Vec<(&'static str, f64)>,
    /// How many rounds there were; the first pass is one.
    pub rounds: u32,
    /// What went over the wire.
    pub traffic: Traffic,
    /// Bytes of device state.
    pub state_bytes: u64,
    /// Whether the last dirty set followed after hand-over.
    pub post_copy: bool,
    /// Chunks that were fetched on demand.
    pub faults: u64,
    /// What comparing the copies showed, if they were.
    pub verified: Option<Verdict>,
    /// What verification before hand-over added to the blackout.
    pub verify_blackout: Option<f64>,
}

/// What a dry run found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Forecast {
    /// Bytes of memory.
    pub bytes: u64,
    /// Bytes that may hold anything but zeros.
    pub data_bytes: u64,
    /// Bytes a second that the guest dirties, counted by chunk.
    pub dirty_rate: u64,
    /// Bytes a second that the link moved.
    pub bandwidth: u64,
    /// How many rounds pre-copy would take.
    pub rounds: u32,
    /// The expected time in seconds until the destination runs.
    pub time: f64,
    /// The expected blackout in seconds.
    pub blackout: f64,
    /// Whether it would end with post-copy.
    pub post_copy: bool,
    /// Whether it would not end within the limits.
    pub gives_up: bool,
}

/// What the destination says at the end. Times are in seconds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LeechReport {
    /// From the session's begin until every chunk was here.
    pub total: f64,
    /// What came over the wire.
    pub traffic: Traffic,
    /// Chunks that were fetched on demand.
    pub faults: u64,
    /// How long fetched chunks took, from the fault's being read to its being resolved, in microseconds: median, 99th
    /// percentile, longest.
    pub fault_micros: Option<[u64; 3]>,
    /// Bytes of device state.
    pub state_bytes: u64,
    /// What comparing the copies showed, if they were.
    pub verified: Option<Verdict>,
}

/// Where progress goes. A receiver that is gone is no error: nobody listens.
#[derive(Debug, Clone)]
pub(super) struct Reporter(pub(super) Option<Sender<Progress>>);

impl Reporter {
    pub(super) fn say(&self, progress: Progress) {
        if let Some(sender) = &self.0 {
            let _ = sender.send(progress);
        }
    }
}

/// Bytes a second over the last while.
#[derive(Debug)]
pub(super) struct Rate {
    last: (Duration, u64),
    rate: u64,
}

impl Rate {
    pub(super) fn new() -> Self {
        Self {
            last: (Duration::ZERO, 0),
            rate: 0,
        }
    }

    pub(super) fn update(&mut self, at: Duration, bytes: u64) -> u64 {
        let span = at.saturating_sub(self.last.0);
        if span >= Duration::from_millis(50) {
            self.rate = per_second(bytes.saturating_sub(self.last.1), span);
            self.last = (at, bytes);
        }
        self.rate
    }
}

pub(super) fn per_second(bytes: u64, span: Duration) -> u64 {
    let rate = u128::from(bytes) * 1_000_000 / span.as_micros().max(1);
    u64::try_from(rate).unwrap_or(u64::MAX)
}
