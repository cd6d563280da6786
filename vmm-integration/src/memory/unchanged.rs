//! Noticing that memory was plugged or unplugged.

use std::fmt;
use std::io;
use std::sync::Arc;

use memferry::chunk::ChunkBitmap;
use memferry::dirty::DirtyTracker;
use vm_memory::{GuestAddressSpace, GuestMemory, GuestMemoryBackend, GuestMemoryRegion};

/// A guest's memory in words that both ends of a migration compare: where each region begins, and its length.
pub(crate) fn describe<M: GuestMemoryBackend + ?Sized>(memory: &M) -> String {
    let regions = memory.iter().map(|region| {
        let start = region.start_addr().0;
        format!("{} bytes at {start:#x}", region.len())
    });
    regions.collect::<Vec<_>>().join(", ")
}

/// Says what memory a guest has now.
pub(crate) type Layout = Arc<dyn Fn() -> String + Send + Sync>;

/// The memory of an address space as it is now.
pub(crate) fn layout<A: GuestAddressSpace>(space: &A) -> String {
    let memory = space.memory();
    memory.physical_memory().map(describe).unwrap_or_default()
}

/// A tracker that names nothing, and fails once the guest has other memory than it had: what was plugged in is neither tracked
/// nor has it a place at the destination.
pub(crate) struct Unchanged {
    layout: Layout,
    was: String,
    /// How many chunks the region has that this is asked for.
    chunks: u64,
}

impl Unchanged {
    /// `was` is the memory that is known of.
    pub(crate) fn new(layout: Layout, was: String, chunks: u64) -> Self {
        Self {
            layout,
            was,
            chunks,
        }
    }
}

impl fmt::Debug for Unchanged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Unchanged")
            .field("was", &self.was)
            .finish_non_exhaustive()
    }
}

impl DirtyTracker for Unchanged {
    fn start(&self) -> io::Result<()> {
        Ok(())
    }

    fn take(&self) -> io::Result<ChunkBitmap> {
        let is = (self.layout)();
        if is != self.was {
            return Err(io::Error::other(format!(
                "memory was plugged or unplugged during the migration (it was {}, and is {is}): migrate the guest again",
                self.was
            )));
        }
        Ok(ChunkBitmap::empty(self.chunks))
    }

    fn restore(&self, _: &ChunkBitmap) -> io::Result<()> {
        Ok(())
    }

    fn stop(&self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{GuestAddress, GuestMemoryAtomic, GuestMemoryMmap, GuestRegionMmap};

    #[test]
    fn memory_that_is_plugged_in_is_noticed() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 8192)]).unwrap();
        let space = GuestMemoryAtomic::new(memory);
        let seen = space.clone();
        let was = layout(&space);
        let tracker = Unchanged::new(Arc::new(move || layout(&seen)), was, 2);
        tracker.start().unwrap();
        assert!(tracker.take().unwrap().is_empty());
        let more = GuestRegionMmap::from_range(GuestAddress(1 << 32), 4096, None).unwrap();
        let grown = space.memory().insert_region(Arc::new(more)).unwrap();
        space.lock().unwrap().replace(grown);
        let error = tracker.take().unwrap_err().to_string();
        assert!(error.contains("4096 bytes at 0x100000000"), "{error}");
    }
}
