//! Regions as bytes at positions, and the chunks they are cut into.

mod atomic_bitmap;
mod caches;
mod chunked;
#[doc(hidden)]
pub mod conformance;
mod cow;
mod faulty;
mod gate;
mod install;
mod marks;
mod random;
mod ranges;
mod residency;
mod storage;
mod store;
mod stripes;
pub(crate) mod sync;
mod synced;
mod zeros;

pub(crate) use atomic_bitmap::AtomicBitmap;
pub use caches::Caches;
pub use chunked::Chunked;
pub use cow::Cow;
pub use faulty::{Fault, Faults, Faulty, FaultyStore, Operation};
pub use gate::{Closed, Gate};
pub use install::{Install, Place};
pub use marks::Marks;
pub use migrate_proto::{
    ChunkBitmap, ChunkIndex, ChunkRun, ChunkSize, Layout, RegionDescriptor, Span,
};
pub(crate) use ranges::Ranges;
pub use residency::{ChunkState, Claim, Residency, Writing};
pub(crate) use storage::check_range;
pub use storage::{Storage, write_zeros};
pub use store::ChunkStore;
pub use synced::{Listener, Synced};
pub(crate) use zeros::is_zeros;
