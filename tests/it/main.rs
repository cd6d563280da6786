//! Tests of the public interface that need no privilege.
#![allow(clippy::unwrap_used, reason = "a test may panic, helpers too")]

mod migrate;
