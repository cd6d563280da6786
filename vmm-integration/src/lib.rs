//! Memferry for virtual machine monitors that are built on rust-vmm.
//!
//! | what a migration needs | from |
//! |---|---|
//! | guest memory that can move | [`RamBuilder`], or any memory of `vm-memory` |
//! | its bytes at positions | [`GuestRam`] |
//! | to suspend and resume the guest, its state | your implementation of [`Vmm`] |
//! | the guest sent, and received | [`Departure`], [`Arrival`] |
//! | a place that fills up while vCPUs run | [`ArrivingRam`] |
//! | what the guest has written since | [`kvm::DirtyLog`] or [`kvm::DirtyRing`] |
//! | what the VMM has written since | [`VmmWrites`] |
//! | a guest that writes too fast slowed down | [`AutoConverge`] |
//!
//! The types of rust-vmm stay in this crate: they change often, and Memferry's own interface should not.

mod bitmap;
mod guest_memory;
#[cfg(feature = "kvm")]
pub mod kvm;
mod memory;
mod migration;
mod pages;
#[allow(unsafe_code, reason = "the only module that may")]
mod sys;
mod throttle;
mod vmm;
mod withheld;

pub use bitmap::{VmmWrites, VmmWritesError, WrittenPages};
pub use guest_memory::{GuestRam, GuestRamError};
pub use memory::{ArrivingError, ArrivingRam, MemoryError, Pages, RamBuilder, ranges};
pub use migration::{Arrival, Departure};
pub use throttle::{AutoConverge, Round, Throttle};
pub use vmm::{Vmm, VmmError};

/// What a tracker says that is asked before it was started.
fn not_started() -> std::io::Error {
    std::io::Error::other("the tracker was asked what changed before it was started")
}
