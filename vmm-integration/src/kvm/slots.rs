//! Which guest memory KVM shows where.

use std::any::Any;
use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::mem;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY};
use kvm_ioctls::VmFd;
use memferry::chunk::ChunkSize;
use rustix::io::Errno;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use super::{TrackError, sys};
use crate::pages::Pages;

/// A memory slot of a VM: a part of a region of guest memory that KVM knows by a number.
///
/// The guest sees it where the region is in its physical addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// Its number; the address space in the upper 16 bits, as KVM has it.
    pub number: u32,
    /// The region that it is of: the index in the order of [`GuestMemoryBackend::iter`].
    pub region: usize,
    /// Where in the region it begins, in bytes; whole pages.
    pub offset: u64,
    /// How many bytes of the region it shows; whole pages.
    pub len: u64,
    /// The flags that it has while nobody tracks it. With `KVM_MEM_LOG_DIRTY_PAGES` it is logged before a start and
    /// after a stop, too.
    pub flags: u32,
}

impl Slot {
    /// One slot a region, as most VMMs have it, numbered from `first` on, without flags.
    #[must_use]
    pub fn one_a_region<M: GuestMemoryBackend>(memory: &M, first: u32) -> Vec<Self> {
        let regions = (first..).zip(memory.iter().enumerate());
        regions
            .map(|(number, (region, memory))| Self {
                number,
                region,
                offset: 0,
                len: memory.len(),
                flags: 0,
            })
            .collect()
    }
}

/// A slot, and where it is. Made only of what lies in a region.
#[derive(Debug)]
pub(super) struct Placed {
    pub(super) slot: Slot,
    pub(super) guest_address: u64,
    pub(super) host_address: u64,
}

/// The memory slots of a guest, which the trackers switch.
///
/// There are two ways to get them: [`register`](Self::register) makes the slots, without `unsafe`, and removes them when
/// this goes away; [`adopt`](Self::adopt) takes those that a VMM has made by itself. Either keeps the guest's memory
/// mapped.
///
/// They are fixed. A VMM that plugs or unplugs memory says so by [`memory_changed`](Self::memory_changed): then every
/// tracker over them fails its takes, which ends a migration that runs with the guest unharmed, and the next one gets new
/// `Slots` and trackers over the new memory.
pub struct Slots {
    vm: Arc<VmFd>,
    slots: Vec<Placed>,
    region_lens: Vec<u64>,
    /// Whether they are removed in the end.
    made: bool,
    /// Whether the VM has other slots than these by now.
    changed: AtomicBool,
    /// Numbers of slots that are there no longer. Held while a slot is switched, so that one that goes is not made anew.
    gone: Mutex<BTreeSet<u32>>,
    /// The guest's memory.
    memory: Arc<dyn Any + Send + Sync>,
}

/// Why slots cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SlotsError {
    /// It is no part of a region.
    #[error(
        "slot {number} ({len} bytes at {offset} of region {region}) is no part in whole pages of any region of the guest's memory"
    )]
    NoMemory {
        /// The slot's number.
        number: u32,
        /// Its region.
        region: usize,
        /// Where in it.
        offset: u64,
        /// How long.
        len: u64,
    },
    /// Two slots have one number, or show the same bytes.
    #[error("slots {one} and {other} have the same number or show the same memory")]
    Twice {
        /// One of them.
        one: u32,
        /// The other one.
        other: u32,
    },
    /// The region's memory has no address here.
    #[error("region {region} of the guest's memory is not mapped by this process")]
    NotMapped {
        /// The region.
        region: usize,
        /// Why.
        source: vm_memory::GuestMemoryError,
    },
    /// The VM has no such slot.
    #[error(
        "the VM has no slot {number} at the guest's address {guest_address:#x}: register it with KVM first"
    )]
    Missing {
        /// The slot's number.
        number: u32,
        /// Where it should be.
        guest_address: u64,
    },
    /// KVM refuses.
    #[error("KVM refuses slot {number} at the guest's address {guest_address:#x}")]
    Refused {
        /// The slot's number.
        number: u32,
        /// Where it is.
        guest_address: u64,
        /// Why.
        source: io::Error,
    },
}

impl Slots {
    /// Makes these slots of `memory`. They are removed when the last reference goes away.
    ///
    /// # Errors
    /// If a slot is no part of a region, or KVM refuses it; no slot is left then.
    pub fn register<M: GuestMemoryBackend + Send + Sync + 'static>(
        vm: Arc<VmFd>,
        memory: Arc<M>,
        slots: Vec<Slot>,
    ) -> Result<Arc<Self>, SlotsError> {
        let mut slots = Self::place(vm, memory, slots)?;
        for (index, placed) in slots.slots.iter().enumerate() {
            let made = sys::set_slot(&slots.vm, placed, placed.slot.len, placed.slot.flags);
            if let Err(source) = made {
                let error = refused(placed, source);
                slots.slots.truncate(index);
                slots.made = true;
                return Err(error);
            }
        }
        slots.made = true;
        Ok(Arc::new(slots))
    }

    /// Takes the slots that the VMM has made of `memory`, with `set_user_memory_region`, and that it removes itself.
    ///
    /// The VMM must not change them as long as this exists, without [`memory_changed`](Self::memory_changed).
    ///
    /// # Errors
    /// If a slot is no part of a region, or the VM does not have it.
    pub fn adopt<M: GuestMemoryBackend + Send + Sync + 'static>(
        vm: Arc<VmFd>,
        memory: Arc<M>,
        slots: Vec<Slot>,
    ) -> Result<Arc<Self>, SlotsError> {
        let slots = Self::place(vm, memory, slots)?;
        for placed in &slots.slots {
            slots
                .exists(placed)
                .map_err(|source| refused(placed, source))?
                .ok_or(SlotsError::Missing {
                    number: placed.slot.number,
                    guest_address: placed.guest_address,
                })?;
        }
        Ok(Arc::new(slots))
    }

    /// To be called when memory was plugged, or is about to be unplugged: these slots do not tell all of the guest's memory
    /// any more, so takes of trackers over them fail from now on.
    ///
    /// `gone` are the numbers of slots that go. Those that [`register`](Self::register) made are removed by this; a VMM
    /// removes its own ones after this has returned.
    ///
    /// # Errors
    /// If KVM refuses to remove one.
    pub fn memory_changed(&self, gone: &[u32]) -> io::Result<()> {
        self.changed.store(true, Ordering::Release);
        let mut are_gone = self.gone();
        for placed in &self.slots {
            let number = placed.slot.number;
            if !gone.contains(&number) || are_gone.contains(&number) {
                continue;
            }
            if self.made {
                sys::set_slot(&self.vm, placed, 0, 0)?;
            }
            are_gone.insert(number);
        }
        Ok(())
    }

    /// The slots.
    pub fn iter(&self) -> impl Iterator<Item = &Slot> {
        self.slots.iter().map(|placed| &placed.slot)
    }

    /// The VM that has them.
    #[must_use]
    pub fn vm(&self) -> &Arc<VmFd> {
        &self.vm
    }

    /// How many regions the guest's memory has.
    #[must_use]
    pub fn regions(&self) -> usize {
        self.region_lens.len()
    }

    /// The slots of one region, each with its pages as chunks.
    pub(super) fn of_region(
        &self,
        region: usize,
        chunk_size: ChunkSize,
    ) -> impl Iterator<Item = (&Placed, Pages)> {
        let page = page_size();
        let region_len = self.region_lens.get(region).copied().unwrap_or(0);
        let slots = self.slots.iter();
        slots
            .filter(move |placed| placed.slot.region == region)
            .map(move |placed| {
                let pages = Pages {
                    region_len,
                    chunk_size,
                    offset: placed.slot.offset,
                    page,
                    count: placed.slot.len / page,
                };
                (placed, pages)
            })
    }

    /// The chunks of a region.
    pub(super) fn chunks(&self, region: usize, chunk_size: ChunkSize) -> u64 {
        let len = self.region_lens.get(region).copied().unwrap_or(0);
        chunk_size.chunks_in(len)
    }

    /// That the slots are what they were.
    pub(super) fn unchanged(&self) -> io::Result<()> {
        if self.changed.load(Ordering::Acquire) {
            return Err(TrackError::Changed.into());
        }
        Ok(())
    }

    /// Has a slot logged, or as it is while nobody tracks it. What is gone stays so.
    pub(super) fn log(&self, placed: &Placed, on: bool) -> io::Result<()> {
        let gone = self.gone();
        if gone.contains(&placed.slot.number) {
            return if on {
                Err(TrackError::Changed.into())
            } else {
                Ok(())
            };
        }
        let missing = !self.made && self.exists(placed)?.is_none();
        match (missing, on) {
            (true, true) => Err(TrackError::Changed.into()),
            (true, false) => Ok(()),
            (false, _) => {
                let log = if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
                let flags = placed.slot.flags | log;
                sys::set_slot(&self.vm, placed, placed.slot.len, flags)
            }
        }
    }

    /// Has all pages of a slot that is logged protected anew, by not logging it for a moment.
    pub(super) fn protect(&self, placed: &Placed) -> io::Result<()> {
        let gone = self.gone();
        let missing = !self.made && self.exists(placed)?.is_none();
        if missing || gone.contains(&placed.slot.number) {
            return Err(TrackError::Changed.into());
        }
        let flags = placed.slot.flags & !KVM_MEM_LOG_DIRTY_PAGES;
        sys::set_slot(&self.vm, placed, placed.slot.len, flags)?;
        let flags = flags | KVM_MEM_LOG_DIRTY_PAGES;
        sys::set_slot(&self.vm, placed, placed.slot.len, flags)
    }

    /// Whether the VM has this slot: KVM refuses to make one read-only that is there, before it looks at anything else,
    /// and makes one that is not.
    fn exists(&self, placed: &Placed) -> io::Result<Option<()>> {
        let flags = (placed.slot.flags & !KVM_MEM_LOG_DIRTY_PAGES) ^ KVM_MEM_READONLY;
        match sys::set_slot(&self.vm, placed, placed.slot.len, flags) {
            Ok(()) => sys::set_slot(&self.vm, placed, 0, 0).map(|()| None),
            Err(error) if is(&error, Errno::INVAL) => Ok(Some(())),
            Err(error) if is(&error, Errno::EXIST) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn gone(&self) -> MutexGuard<'_, BTreeSet<u32>> {
        // A panic elsewhere leaves the set as it was: no change to it is half done.
        self.gone.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks up where each slot is, and checks that it is a part of a region.
    fn place<M: GuestMemoryBackend + Send + Sync + 'static>(
        vm: Arc<VmFd>,
        memory: Arc<M>,
        slots: Vec<Slot>,
    ) -> Result<Self, SlotsError> {
        let mut placed: Vec<Placed> = Vec::with_capacity(slots.len());
        for slot in slots {
            let twice = placed.iter().find(|other| overlap(&other.slot, &slot));
            if let Some(other) = twice {
                return Err(SlotsError::Twice {
                    one: other.slot.number,
                    other: slot.number,
                });
            }
            placed.push(find(&*memory, slot)?);
        }
        Ok(Self {
            vm,
            slots: placed,
            region_lens: memory.iter().map(GuestMemoryRegion::len).collect(),
            made: false,
            changed: AtomicBool::new(false),
            gone: Mutex::default(),
            memory,
        })
    }
}

/// Where a slot is, if it is a part of a region that is mapped here.
fn find<M: GuestMemoryBackend>(memory: &M, slot: Slot) -> Result<Placed, SlotsError> {
    let region = memory.iter().nth(slot.region);
    let page = page_size();
    let whole_pages = slot.offset.is_multiple_of(page) && slot.len.is_multiple_of(page);
    let inside = |region: &M::R| {
        let end = slot.offset.checked_add(slot.len);
        end.is_some_and(|end| end <= region.len())
    };
    let Some(region) = region.filter(|region| whole_pages && slot.len > 0 && inside(region)) else {
        return Err(SlotsError::NoMemory {
            number: slot.number,
            region: slot.region,
            offset: slot.offset,
            len: slot.len,
        });
    };
    let host_address = region
        .get_host_address(MemoryRegionAddress(slot.offset))
        .map_err(|source| SlotsError::NotMapped {
            region: slot.region,
            source,
        })?;
    Ok(Placed {
        // No overflow: a region ends within the addresses.
        guest_address: region.start_addr().0 + slot.offset,
        host_address: host_address.addr() as u64,
        slot,
    })
}

fn overlap(one: &Slot, other: &Slot) -> bool {
    let apart = one.region != other.region
        || one.offset >= other.offset.saturating_add(other.len)
        || other.offset >= one.offset.saturating_add(one.len);
    one.number == other.number || !apart
}

fn refused(placed: &Placed, source: io::Error) -> SlotsError {
    SlotsError::Refused {
        number: placed.slot.number,
        guest_address: placed.guest_address,
        source,
    }
}

pub(super) fn page_size() -> u64 {
    rustix::param::page_size() as u64
}

pub(super) fn is(error: &io::Error, errno: Errno) -> bool {
    error.raw_os_error() == Some(errno.raw_os_error())
}

impl Drop for Slots {
    fn drop(&mut self) {
        if !self.made {
            return;
        }
        let gone = mem::take(&mut *self.gone());
        for placed in &self.slots {
            if !gone.contains(&placed.slot.number) && sys::set_slot(&self.vm, placed, 0, 0).is_err()
            {
                // The guest can still reach it, so it stays mapped.
                mem::forget(Arc::clone(&self.memory));
            }
        }
    }
}

impl fmt::Debug for Slots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slots")
            .field("slots", &self.slots)
            .field("made", &self.made)
            .field("changed", &self.changed)
            .field("gone", &self.gone)
            .finish_non_exhaustive()
    }
}
