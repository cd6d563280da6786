//! How fast each processor writes, while that is tracked.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use memferry::chunk::{ChunkBitmap, ChunkSize};
use memferry::dirty::DirtyTracker;
use vmm_integration::kvm::{DirtyRates, DirtyRing};

/// The processors' dirty rings, and what they say of the rates.
#[derive(Debug)]
pub(super) struct Meter {
    rings: Arc<DirtyRing>,
    /// While it is tracked.
    reading: Mutex<Option<Reading>>,
}

#[derive(Debug)]
struct Reading {
    rates: DirtyRates,
    /// Bytes a second, by processor.
    last: Option<Vec<u64>>,
}

impl Meter {
    /// Of these rings.
    pub(super) fn new(rings: Arc<DirtyRing>) -> Self {
        Self {
            rings,
            reading: Mutex::new(None),
        }
    }

    /// Bytes a second that each processor wrote between the last two takes. `None` while nothing is tracked, and before the first take.
    pub(super) fn rates(&self) -> Option<Vec<u64>> {
        self.reading().as_ref()?.last.clone()
    }

    /// What tells of the processors' writes to each region of memory. Rates are read with the first of them, at each take: its harvest is
    /// of all rings, and in between the counters stand still or leap.
    pub(super) fn trackers(meter: &Arc<Self>) -> Vec<Arc<dyn DirtyTracker>> {
        let mut trackers = DirtyRing::trackers(&meter.rings);
        if let Some(first) = trackers.first_mut() {
            *first = Arc::new(Metered {
                tracker: Arc::clone(first),
                meter: Arc::clone(meter),
            });
        }
        trackers
    }

    /// From now on it is tracked.
    fn start(&self) {
        let mut rates = DirtyRates::new();
        rates.since_last(Instant::now(), &self.rings.pages_written());
        *self.reading() = Some(Reading { rates, last: None });
    }

    fn read(&self) {
        let written = self.rings.pages_written();
        if let Some(reading) = &mut *self.reading()
            && let Some(pages) = reading.rates.since_last(Instant::now(), &written)
        {
            let bytes = |pages: u64| pages.saturating_mul(ChunkSize::PAGE.bytes().into());
            reading.last = Some(pages.into_iter().map(bytes).collect());
        }
    }

    fn reading(&self) -> MutexGuard<'_, Option<Reading>> {
        self.reading.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A tracker whose takes are when rates are read.
#[derive(Debug)]
struct Metered {
    tracker: Arc<dyn DirtyTracker>,
    meter: Arc<Meter>,
}

impl DirtyTracker for Metered {
    fn start(&self) -> io::Result<()> {
        self.tracker.start()?;
        self.meter.start();
        Ok(())
    }

    fn take(&self) -> io::Result<ChunkBitmap> {
        let taken = self.tracker.take()?;
        self.meter.read();
        Ok(taken)
    }

    fn restore(&self, chunks: &ChunkBitmap) -> io::Result<()> {
        self.tracker.restore(chunks)
    }

    fn stop(&self) -> io::Result<()> {
        *self.meter.reading() = None;
        self.tracker.stop()
    }
}
