//! Regions as bytes at positions, and the chunks they are cut into.

mod install;
mod storage;
mod store;

pub use install::{Install, Place};
pub use migrate_proto::{
    ChunkBitmap, ChunkIndex, ChunkRun, ChunkSize, Layout, RegionDescriptor, Span,
};
pub use storage::{Storage, write_zeros};
pub use store::ChunkStore;
