//! Memferry for virtual machine monitors that are built on rust-vmm.
//!
//! | what a migration needs | from |
//! |---|---|
//! | the guest's memory, as bytes at positions | [`GuestRam`], over any memory of `vm-memory` |
//!
//! The types of rust-vmm stay in this crate: they change often, and Memferry's own interface should not.

mod guest_memory;

pub use guest_memory::{GuestRam, GuestRamError};
