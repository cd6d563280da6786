//! Tests of the public interface that need no privilege, and of the rules of this house.
#![allow(clippy::unwrap_used, reason = "a test may panic, helpers too")]
#![allow(
    clippy::cast_possible_truncation,
    reason = "sizes of tests are small, and bytes of patterns are meant to be cut"
)]

mod dependencies;
mod layers;
mod managed;
mod migrate;
mod mount;
mod nbd;
mod remote;
#[cfg(feature = "tls")]
mod remote_tls;
mod rules;
mod serve;
mod sources;
mod storages;
mod tidy;
