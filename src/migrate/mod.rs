//! A migration from one end to the other: the drivers of the protocol's state machines.
//!
//! [`seed()`] runs where the subject runs now, [`leech()`] where it will. Both are calls that return when the session has
//! ended; they use plain threads, because their work is copying memory between blocking sockets and page faults:
//!
//! ```text
//!  seed                                          leech
//!    driver: events, suspend, save                 driver: events, load, resume
//!    control reader, control writer   ◄─────►      control reader, control writer
//!    urgent: fetch → chunk            ◄─────►      faults: uffd → fetch, chunk → install
//!    bulk × n: read, hash, send       ──────►      bulk × n: receive, hash, write
//! ```
//!
//! Each thread locks the state machine for a decision, never while it reads, hashes, sends or waits.

mod cancel;
mod clock;
mod cut_over;
mod ending;
mod hooks;
mod leech;
mod leecher;
mod monitor;
mod on_panic;
mod options;
mod priority;
mod progress;
mod region;
mod running;
mod seed;
mod seeder;

pub use cancel::Cancel;
pub use cut_over::CutOver;
pub use ending::Cause;
pub use hooks::{Hook, LeecherHooks, SeederHooks};
pub use leech::{LeechError, LeechOutcome, leech};
pub use leecher::{FinalizeError, Finalized, Leecher, Receiving};
pub use migrate_proto::{Budget, Decision, Observation, PostCopy, Verify};
pub use options::{LeechOptions, SeedOptions};
pub use progress::{Forecast, LeechReport, Phase, Progress, SeedReport, Side, Traffic, Verdict};
pub use region::{Region, RegionError, Standing};
pub use seed::{SeedError, SeedOutcome, SourceRegion, seed};
pub use seeder::{Released, Seeder, Tracking};
