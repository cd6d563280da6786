//! Tests of the public interface that need no privilege, and of the rules of this house.
#![allow(clippy::unwrap_used, reason = "a test may panic, helpers too")]

mod dependencies;
mod layers;
mod migrate;
mod nbd;
mod rules;
mod serve;
mod sources;
mod storages;
mod tidy;
