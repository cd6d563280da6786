//! What every storage and every store of chunks promises, as tests that each of them runs.
//!
//! One test a promise is made by [`storage_conformance!`] and [`store_conformance!`]; a test that has something to set up
//! first calls [`storage::run_all`] or [`store::run_all`]. Both get a function that makes a fresh one, all zeros or all missing.

mod map_store;
pub mod storage;
pub mod store;

pub use map_store::{Calls, MapStore};
pub use storage::storage_conformance;
pub use store::store_conformance;

use super::random::Random;

/// The numbers of this run: `MEMFERRY_SEED` gives those of an earlier one again.
fn random() -> Random {
    let seed = std::env::var("MEMFERRY_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(|| {
            use std::hash::{BuildHasher, RandomState};
            RandomState::new().hash_one(0)
        });
    eprintln!("MEMFERRY_SEED={seed}");
    Random::new(seed)
}

/// How often something is done; miri takes a thousand times as long as a processor.
const fn times(count: u64) -> u64 {
    if cfg!(miri) {
        count.div_ceil(20)
    } else {
        count
    }
}
