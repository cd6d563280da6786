//! Tests with programs of others that speak what we speak: run them with `cargo test --test foreign -- --ignored`.
//!
//! Debian packages: `libnbd-bin` (nbdinfo, nbdcopy), `python3-libnbd` (nbdsh), `qemu-utils` (qemu-img, qemu-io, qemu-nbd), `fio`, `nbd-client`, and
//! `nbdkit`.
#![allow(clippy::unwrap_used, reason = "a test may panic, helpers too")]
#![allow(
    clippy::cast_possible_truncation,
    clippy::single_range_in_vec_init,
    reason = "sizes of tests are small, and one range is what is expected"
)]

mod fio;
mod libnbd;
mod listing;
mod nbd_client;
mod nbd_measure;
mod nbd_servers;
mod qemu;
mod rig;
#[cfg(feature = "tls")]
mod tls;
