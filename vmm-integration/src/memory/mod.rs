//! Guest memory that can move.

mod arriving;
mod build;
mod unchanged;

pub use arriving::{ArrivingError, ArrivingRam};
pub use build::{MemoryError, Pages, RamBuilder, ranges};
pub(crate) use unchanged::{Layout, Unchanged, describe, layout};
