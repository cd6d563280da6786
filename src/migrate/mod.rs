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
//!
//! A region that programs use, as a device, a file or memory, is a [`Region`], and [`Seeder`] and [`Leecher`] take it through the same two calls step by
//! step (`docs/moving.md`):
//!
//! ```
//! use std::sync::Arc;
//! use std::time::{Duration, Instant};
//!
//! use memferry::backend::MemoryStorage;
//! use memferry::chunk::{ChunkSize, Storage};
//! use memferry::migrate::{LeechOptions, Leecher, Region, Seeder, Standing};
//! use memferry::transport::{Listener, Pairing, Session};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // At the source: a region that any front end may show. At the destination: a place for it.
//! let here = Arc::new(Region::new(Arc::new(MemoryStorage::new(1 << 20)), ChunkSize::PAGE)?);
//! let there = Arc::new(Region::empty(Arc::new(MemoryStorage::new(1 << 20)), ChunkSize::PAGE)?);
//! here.write_all_at(b"the state of a program", 4096)?;
//!
//! // One side listens, the other knows its address and its secret.
//! let limit = Duration::from_secs(10);
//! let listener = Listener::bind("127.0.0.1:0".parse()?)?;
//! let pairing = Pairing::new(listener.local_addr()?.to_string())?;
//! let dialer = pairing.clone();
//! let dialing = std::thread::spawn(move || Session::connect(&dialer, 1, limit, Instant::now() + limit));
//! let accepted = listener.accept(&pairing, limit, limit, || true, |_, _| {})?;
//! let dialed = dialing.join().expect("it does not panic")?;
//!
//! // Track, pull: the program goes on.
//! let tracking = Seeder::new([("state", here.clone())]).open(dialed)?;
//! let hold = LeechOptions { hold: true, ..LeechOptions::default() };
//! let receiving = Leecher::new([("state", there.clone())]).options(hold).open(accepted)?;
//! here.write_all_at(b"and what it wrote since", 8192)?;
//!
//! // Sync, finalize: from here on the region is there.
//! let finalized = receiving.finalize()?;
//! let mut state = [0; 23];
//! there.read_exact_at(&mut state, 8192)?;
//! assert_eq!(&state, b"and what it wrote since");
//!
//! // Release, close: everything is there, and the region may leave again.
//! finalized.release()?;
//! tracking.released()?.close()?;
//! assert_eq!((here.standing(), there.standing()), (Standing::Moved, Standing::Owner));
//! # Ok(())
//! # }
//! ```

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
pub use migrate_proto::{Budget, Decision, Micros, Observation, PostCopy, Verify, decide};
pub use options::{LeechOptions, SeedOptions};
pub use progress::{Forecast, LeechReport, Phase, Progress, SeedReport, Side, Traffic, Verdict};
pub use region::{Region, RegionError, Standing};
pub use seed::{SeedError, SeedOutcome, SourceRegion, seed};
pub use seeder::{Released, Seeder, Tracking};
