//! Trackers of what a guest writes, with a real guest as the writer.
#![cfg(feature = "kvm")]
#![allow(clippy::unwrap_used, reason = "a test may panic, helpers too")]

mod conformance;
mod machine;
mod measure;
mod slots;
mod storm;
