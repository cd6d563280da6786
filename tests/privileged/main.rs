//! Tests that need root: run them with `cargo test --test privileged -- --ignored --test-threads 1`.
//! One at a time, because a child that one of them forks holds, until it is another program, what another would unmount.
#![allow(clippy::unwrap_used, reason = "a test may panic, helpers too")]
#![allow(unsafe_code, reason = "a victim makes raw system calls")]

mod attach;
#[cfg(feature = "fuse")]
mod fuse;
#[cfg(feature = "fuse")]
mod mount;
mod slice;
#[cfg(feature = "fuse")]
mod storages;
mod trackers;
mod uffd_handler;
mod userfaultfd;
mod victim;
