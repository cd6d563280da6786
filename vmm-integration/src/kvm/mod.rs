//! What a KVM guest writes, told by KVM.
//!
//! | tracker | how KVM tells | for |
//! |---|---|---|
//! | [`DirtyLog`] | one bit a page, read slot by slot | any VM |
//! | [`DirtyRing`] | the pages that each vCPU wrote, in the order in which it did | VMs that were made with rings: also tells how fast each vCPU writes |
//!
//! Both find what vCPUs write, and what KVM writes for them. Neither finds what the VMM writes (that is for
//! [`VmmWrites`](crate::VmmWrites)), nor what the kernel or another process writes into the memory: vhost, VFIO.
//!
//! # What a VMM has to do
//!
//! 1. Have its memory in [`Slots`]: [`register`](Slots::register) makes them, [`adopt`](Slots::adopt) takes those that
//!    the VMM has made.
//! 2. Give each region of the migration its tracker, joined with that of the VMM's own writes by
//!    [`Union`](memferry::dirty::Union).
//! 3. Before the last take, bring **every vCPU out of `KVM_RUN`**, and keep it out: that is what `suspend` is for. A
//!    processor may keep the pages that it wrote to itself until it leaves the guest (Intel's page-modification log holds
//!    512), so a take while vCPUs run names those only later. Nothing is lost by that, but the last take has no later.
//! 4. Say [`memory_changed`](Slots::memory_changed) when it plugs or unplugs memory.
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use kvm_ioctls::Kvm;
//! use memferry::chunk::ChunkSize;
//! use memferry::dirty::{DirtyTracker, Union};
//! use vm_memory::bitmap::AtomicBitmap;
//! use vm_memory::{GuestAddress, GuestMemoryMmap};
//! use vmm_integration::VmmWrites;
//! use vmm_integration::kvm::{DirtyLog, Slot, Slots};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let vm = Arc::new(Kvm::new()?.create_vm()?);
//! let ranges = [(GuestAddress(0), 2 << 30), (GuestAddress(4 << 30), 2 << 30)];
//! let memory = Arc::new(GuestMemoryMmap::<AtomicBitmap>::from_ranges(&ranges)?);
//! let slots = Slots::register(vm, memory.clone(), Slot::one_a_region(&*memory, 0))?;
//!
//! let guests = DirtyLog::regions(&slots, ChunkSize::PAGE)?;
//! let vmms = VmmWrites::regions(&memory, ChunkSize::PAGE)?;
//! let trackers: Vec<Arc<dyn DirtyTracker>> = guests
//!     .into_iter()
//!     .zip(vmms)
//!     .map(|(guest, vmm)| Arc::new(Union(guest, vmm)) as _)
//!     .collect();
//! # Ok(())
//! # }
//! ```

mod dirty_log;
mod dirty_ring;
mod rates;
mod slots;
#[allow(unsafe_code, reason = "the one file of the trackers that may")]
mod sys;

use std::io;

pub use dirty_log::{Clearing, DirtyLog};
pub use dirty_ring::DirtyRing;
pub use rates::DirtyRates;
pub use slots::{Slot, Slots, SlotsError};

/// Why KVM cannot tell what the guest writes. The trackers' errors have it inside, where KVM's own error would not say.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrackError {
    /// Memory was plugged or unplugged.
    #[error(
        "the guest's memory slots have changed since its trackers were made: migrate again, with trackers over the new memory"
    )]
    Changed,
    /// A vCPU wrote a page that no known slot has.
    #[error(
        "vCPU {vcpu} wrote page {page} of slot {slot}, which is not among the slots that are tracked: has memory been plugged?"
    )]
    Unknown {
        /// Who wrote.
        vcpu: usize,
        /// The slot's number.
        slot: u32,
        /// The page in it.
        page: u64,
    },
    /// The log of a VM that has rings.
    #[error("this VM has dirty rings, and with them no dirty log: track it by the rings")]
    HasRings,
    /// Rings of a kernel that has none, or of a VM that has vCPUs.
    #[error("KVM gives this VM no dirty rings of {entries} entries (it offers up to {most})")]
    NoRings {
        /// What was asked for.
        entries: u32,
        /// The most that this kernel has; 0 if it has no rings.
        most: u32,
        /// What KVM says.
        source: io::Error,
    },
    /// Rings of no vCPU are read.
    #[error(
        "no vCPU was added whose dirty ring is read, so nothing that the guest writes would be found"
    )]
    NoVcpus,
    /// KVM does not free entries.
    #[error("KVM does not reset {left} entries of dirty rings that were read")]
    NotReset {
        /// How many.
        left: u64,
    },
}

impl From<TrackError> for io::Error {
    fn from(error: TrackError) -> Self {
        Self::other(error)
    }
}
