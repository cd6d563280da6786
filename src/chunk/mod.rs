//! Regions as bytes at positions, and the chunks they are cut into.

mod storage;

pub use migrate_proto::{
    ChunkBitmap, ChunkIndex, ChunkRun, ChunkSize, Layout, RegionDescriptor, Span,
};
pub use storage::Storage;
