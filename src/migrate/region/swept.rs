//! A tracker that first looks into the caches.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Region;
use crate::chunk::ChunkBitmap;
use crate::dirty::DirtyTracker;

/// The trackers of a region, and the caches of its front ends: what a program has written to a mapping is no write to the region before the
/// kernel writes it back, which it does when it likes. So it is made to at each take, and a round finds what was written, and not the last
/// one all of it, while the program stands still.
///
/// Once the program stands still, who suspends it has everything written back, and the takes look no further.
#[derive(Debug)]
pub(super) struct Swept {
    region: Arc<Region>,
    tracker: Arc<dyn DirtyTracker>,
}

impl Swept {
    pub(super) fn new(region: Arc<Region>, tracker: Arc<dyn DirtyTracker>) -> Self {
        Self { region, tracker }
    }
}

impl DirtyTracker for Swept {
    fn start(&self) -> io::Result<()> {
        self.tracker.start()
    }

    fn take(&self) -> io::Result<ChunkBitmap> {
        if !self.region.still.load(Ordering::Acquire) {
            self.region.write_back().map_err(io::Error::other)?;
        }
        self.tracker.take()
    }

    fn restore(&self, chunks: &ChunkBitmap) -> io::Result<()> {
        self.tracker.restore(chunks)
    }

    fn stop(&self) -> io::Result<()> {
        self.tracker.stop()
    }
}
