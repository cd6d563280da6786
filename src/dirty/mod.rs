//! What changed since? One question, many answers.

mod area;
#[doc(hidden)]
pub mod conformance;
mod digest;
mod discards;
mod populated;
mod soft_dirty;
mod tracked;
mod union;
mod write_protect;

pub use area::Area;
pub use digest::Digest;
pub use discards::Discards;
pub use soft_dirty::{Halt, SoftDirty};
pub use tracked::Tracked;
pub use union::Union;
pub use write_protect::WriteProtect;

use std::fmt::Debug;
use std::io;

use crate::chunk::ChunkBitmap;

/// Tells which chunks of one region were written since it was last asked.
///
/// The order that loses nothing: [`start`](Self::start), then read; [`take`](Self::take), then read what it
/// named; suspend the writer, then take the last time. A tracker may name a chunk that did not change; it never
/// leaves out one that did.
pub trait DirtyTracker: Debug + Send + Sync {
    /// Starts to track. Every write that happens after this returns is reported by some later take.
    ///
    /// # Errors
    /// If the kernel refuses; nothing is tracked then and nothing is left behind.
    fn start(&self) -> io::Result<()>;

    /// The chunks written since `start` or the last take; tracking goes on without a gap.
    ///
    /// The bitmap's space is the chunks of this region, its first chunk being 0.
    ///
    /// # Errors
    /// If the kernel refuses, or `start` was not called.
    fn take(&self) -> io::Result<ChunkBitmap>;

    /// Puts chunks that were taken back: the next take reports them again. For an attempt that failed.
    ///
    /// # Errors
    /// If the tracker was not started.
    fn restore(&self, chunks: &ChunkBitmap) -> io::Result<()>;

    /// Stops to track and releases what tracking holds. Stopping twice is no error.
    ///
    /// # Errors
    /// If the kernel refuses.
    fn stop(&self) -> io::Result<()>;
}

impl<T: DirtyTracker + ?Sized> DirtyTracker for std::sync::Arc<T> {
    fn start(&self) -> io::Result<()> {
        (**self).start()
    }

    fn take(&self) -> io::Result<ChunkBitmap> {
        (**self).take()
    }

    fn restore(&self, chunks: &ChunkBitmap) -> io::Result<()> {
        (**self).restore(chunks)
    }

    fn stop(&self) -> io::Result<()> {
        (**self).stop()
    }
}
