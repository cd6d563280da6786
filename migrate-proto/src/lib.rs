//! What a seeder and a leecher may say to each other, and when.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod bitmap;
mod chunk;

pub use bitmap::ChunkBitmap;
pub use chunk::{ChunkIndex, ChunkRun, ChunkSize, Layout, RegionDescriptor, Span};
