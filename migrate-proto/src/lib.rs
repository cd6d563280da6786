//! What a seeder and a leecher may say to each other, and when.
//!
//! Sans-IO: [`Seeder`] and [`Leecher`] are functions of messages and time. They do no I/O, read no clock and start no
//! thread; the caller brings messages and moments in (`handle_*`), and carries messages and events out (`poll_*`).
//!
//! ```text
//!            seeder                                            leecher
//!   Hello ──────────────────────────────────────────────────────► Hello
//!         ◄─────────────────────────────────────────────── Accept(window)
//!   Chunks (round 0, bulk lanes) ───────────────────────────────► install
//!   Dirty…, Round(1), Chunks (round 1) … ───────────────────────► install
//!   Dirty…, Round(n), Finalize ─────────────────────────────────► [arm faults, discard]
//!   [suspend]  Dirty…, Round(n+1) ──────────────────────────────► [discard]
//!   State…, StateEnd ───────────────────────────────────────────► [load]
//!         ◄──────────────────────────────────────────────────────  Ready
//!   Release ────────────────────────────────────────────────────► [run]
//!         ◄──────────────────────────────────────── Running, Fetch (urgent lane)
//!   Chunks (urgent and bulk lanes) ─────────────────────────────► install
//!         ◄─────────────────────────────────────────── Complete, Digests…
//!   Verdict, Farewell ──────────────────────────────────────────►
//! ```
//!
//! Reading order: [`Layout`] and [`ChunkBitmap`], [`Hello`], [`Message`], [`FrameHeader`], [`decide`], [`Seeder`], [`Leecher`].
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod bitmap;
mod chunk;
mod coding;
mod converge;
mod dirty;
mod error;
mod frame;
mod handover;
mod hello;
pub mod leecher;
pub mod limits;
mod message;
mod schedule;
pub mod seeder;
mod silence;
#[cfg(test)]
mod tests;

pub use bitmap::ChunkBitmap;
pub use chunk::{ChunkIndex, ChunkRun, ChunkSize, Layout, RegionDescriptor, Span};
pub use converge::{Budget, Decision, Micros, Observation, PostCopy, decide};
pub use dirty::DirtyPage;
pub use error::{AbortCode, DecodeError, ProtocolError};
pub use frame::{FrameHeader, HEADER_LEN, encode_frame};
pub use handover::{Ownership, Token};
pub use hello::{Agreement, Hello, Role, VERSIONS, Verify, Version, capability};
pub use leecher::{Leecher, LeecherConfig, ZERO_DIGEST, chunk_digest};
pub use message::{Chunks, Content, Message, Run};
pub use seeder::{Seeder, SeederConfig, URGENT_LANE};
