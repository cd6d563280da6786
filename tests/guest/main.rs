//! Tests with whole virtual machines. They need QEMU, and say so.
#![allow(clippy::unwrap_used, reason = "a test may panic, helpers too")]

mod deaths;
mod failures;
mod ferry;
mod fuse_ram;
mod qemu;
mod qemu_driver;
mod qemu_refusals;
