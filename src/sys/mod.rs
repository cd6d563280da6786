//! Owned, safe wrappers around what needs `unsafe`: the only folder of this crate that may.
//!
//! Memory that others write is never lent as `&[u8]`. Layouts and ioctl numbers are asserted at compile time.

pub mod apart;
pub mod mapping;
pub mod memfd;
pub mod memory;
#[cfg(feature = "nbd-device")]
pub mod nbd;
pub mod pagemap;
pub mod ptrace;
pub mod reclaim;
pub mod sparse;
pub mod uevent;
pub mod uffd;
