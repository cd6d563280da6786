//! Tests that need a kernel with what many have not: run them with `cargo lab lab`.
#![allow(clippy::unwrap_used, reason = "a test may panic, helpers too")]

mod kernel;
mod mount;
mod nbd_device;
