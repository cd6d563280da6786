//! What the user of a migration chooses.

use std::time::Duration;

use migrate_proto::{Budget, ChunkSize, Verify};

use super::cut_over::CutOver;

/// What the sending side chooses.
#[derive(Debug, Clone)]
pub struct SeedOptions {
    /// When to suspend, and whether post-copy is allowed.
    pub budget: Budget,
    /// The most bytes a second over all bulk lanes; faults are not limited.
    pub bandwidth: Option<u64>,
    /// When the copies are compared.
    pub verify: Verify,
    /// The unit of transfer. The page is right where writes are reported by the page.
    pub chunk_size: ChunkSize,
    /// Only compare and measure.
    pub dry_run: bool,
    /// The longest time that the peer may be silent.
    pub silence: Duration,
    /// The longest time that the subject may take to suspend, to save its state, or to run on.
    pub subject_deadline: Duration,
    /// The part of the blackout that has nothing to do with memory: suspending, the device state, resuming, as far as it is known
    /// beforehand. What remains of [`Budget::downtime`] is what the last dirty set may take.
    pub fixed_blackout: Duration,
    /// The longest time from suspending to hand-over, without a comparison in between; then it is given up, and the subject runs on here. Bounds what a
    /// destination can do that answers and gets nowhere.
    pub cut_over_deadline: Duration,
    /// Wait for a wish to cut over, of either side, before the budget may decide to suspend.
    pub hold: bool,
    /// This side's wish.
    pub cut_over: CutOver,
}

impl Default for SeedOptions {
    fn default() -> Self {
        Self {
            budget: Budget::default(),
            bandwidth: None,
            verify: Verify::After,
            chunk_size: ChunkSize::PAGE,
            dry_run: false,
            silence: Duration::from_secs(10),
            subject_deadline: Duration::from_secs(10),
            // As QEMU takes.
            fixed_blackout: Duration::from_millis(25),
            cut_over_deadline: Duration::from_secs(30),
            hold: false,
            cut_over: CutOver::default(),
        }
    }
}

/// What the receiving side chooses.
#[derive(Debug, Clone)]
pub struct LeechOptions {
    /// How many bytes of chunks may be in flight at once. They wait in sockets and not here; it bounds what is read for nothing when a migration is aborted. The default fills 10 Gbit/s at 50 ms.
    pub window: u64,
    /// The longest time that the peer may be silent.
    pub silence: Duration,
    /// The longest time that the subject may take to load its state, or to run.
    pub subject_deadline: Duration,
    /// Have the source wait for a wish to cut over, of either side, before it may decide to suspend. One that cannot wait is refused then.
    pub hold: bool,
    /// This side's wish.
    pub cut_over: CutOver,
}

impl Default for LeechOptions {
    fn default() -> Self {
        Self {
            window: 64 << 20,
            silence: Duration::from_secs(10),
            subject_deadline: Duration::from_secs(30),
            hold: false,
            cut_over: CutOver::default(),
        }
    }
}
