//! Calls of KVM that `kvm-ioctls` lacks or cannot make safe, and memory that KVM fills: all that is unsafe about the trackers.

use std::ffi::c_int;
use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU32, Ordering};

use kvm_bindings::{
    KVMIO, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_dirty_gfn, kvm_dirty_log,
    kvm_dirty_log__bindgen_ty_1, kvm_userspace_memory_region,
};
use kvm_ioctls::VmFd;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags};
use vmm_sys_util::ioctl::{ioctl, ioctl_with_ref};
use vmm_sys_util::{ioctl_io_nr, ioctl_iow_nr, ioctl_iowr_nr};

use super::slots::Placed;

ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);

/// Bit of an entry's flags that KVM sets: the entry names a page.
const DIRTY: u32 = 1;
/// Bit of an entry's flags that we set: the entry was read.
const RESET: u32 = 2;
/// A bit that KVM does not look at, and loses when it writes the flags.
const HELD: u32 = 4;

/// Makes a slot with these flags, changes the flags of the one that is there, or with a length of zero removes it.
pub(super) fn set_slot(vm: &VmFd, slot: &Placed, len: u64, flags: u32) -> io::Result<()> {
    let region = kvm_userspace_memory_region {
        slot: slot.slot.number,
        flags,
        guest_phys_addr: slot.guest_address,
        memory_size: len,
        userspace_addr: slot.host_address,
    };
    debug_assert!(len == 0 || len == slot.slot.len);
    // SAFETY: a `Placed` is made only of a range that lies in a region of guest memory, which its `Slots` keep mapped.
    // Slots that they made are removed before they let go of it; those of the VMM are seen to exist before their
    // flags are changed, and then KVM refuses any change of their memory.
    unsafe { vm.set_user_memory_region(region) }.map_err(io::Error::from)
}

/// Room for the log of a slot: words, one bit a page.
///
/// KVM writes as many words as the slot has, and asks nobody how many fit. So behind this one lies a page that cannot be
/// written: for a slot that has grown behind our back the call fails, and overwrites nothing.
#[derive(Debug)]
pub(super) struct LogRoom {
    address: NonNull<u64>,
    words: usize,
    /// Bytes of the mapping, the guard included.
    mapped: usize,
}

// SAFETY: the mapping belongs to this value alone and is not bound to the thread that made it.
unsafe impl Send for LogRoom {}
// SAFETY: it is read through `&self` and written through `&mut self` only.
unsafe impl Sync for LogRoom {}

impl LogRoom {
    pub(super) fn new(words: usize) -> io::Result<Self> {
        let page = rustix::param::page_size();
        let room = words
            .checked_mul(8)
            .and_then(|bytes| bytes.checked_next_multiple_of(page))
            .filter(|&bytes| bytes > 0)
            .ok_or(io::ErrorKind::InvalidInput)?;
        let mapped = room.checked_add(page).ok_or(io::ErrorKind::InvalidInput)?;
        let (readable, private) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
        let address =
            unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), mapped, readable, private) }?;
        let address = NonNull::new(address.cast()).expect("the kernel maps nothing at zero");
        let made = Self {
            address,
            words,
            mapped,
        };
        let guard = address.as_ptr().cast::<u8>().wrapping_add(room);
        // SAFETY: the last page of the mapping that was just made; nothing refers to it.
        unsafe { rustix::mm::mprotect(guard.cast(), page, MprotectFlags::empty()) }?;
        Ok(made)
    }

    /// All words, as they were last read.
    pub(super) fn words(&self) -> &[u64] {
        // SAFETY: so many words are mapped and were zeroed by the kernel; nobody writes them without `&mut self`.
        unsafe { std::slice::from_raw_parts(self.address.as_ptr(), self.words) }
    }

    /// The same, to be written.
    pub(super) fn words_mut(&mut self) -> &mut [u64] {
        // SAFETY: as for `words`, and this borrow is the only one.
        unsafe { std::slice::from_raw_parts_mut(self.address.as_ptr(), self.words) }
    }

    /// Reads the log of a slot. Resets it, unless the VM has manual protection.
    pub(super) fn read(&mut self, vm: &VmFd, slot: u32) -> io::Result<()> {
        let log = kvm_dirty_log {
            slot,
            padding1: 0,
            __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 {
                dirty_bitmap: self.address.as_ptr().cast(),
            },
        };
        // SAFETY: KVM writes upwards from the first word, which is mapped, and stops at the guard at the latest.
        done(unsafe { ioctl_with_ref(vm, KVM_GET_DIRTY_LOG(), &log) }).map(drop)
    }

    /// Resets `count` pages of a slot from `first` on, those whose bits are set in the words: page `first` in the first
    /// bit of word `first / 64`.
    pub(super) fn clear(&self, vm: &VmFd, slot: u32, first: u64, count: u32) -> io::Result<()> {
        let word = usize::try_from(first / 64).unwrap_or(usize::MAX);
        let needed = usize::try_from(count.div_ceil(64)).unwrap_or(usize::MAX);
        let there = self.words.saturating_sub(word);
        if !first.is_multiple_of(64) || needed > there {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let bits = self.address.as_ptr().wrapping_add(word);
        let log = kvm_clear_dirty_log {
            slot,
            num_pages: count,
            first_page: first,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
                dirty_bitmap: bits.cast(),
            },
        };
        // SAFETY: KVM reads a bit for each of `count` pages, and so many are there, as was checked.
        done(unsafe { ioctl_with_ref(vm, KVM_CLEAR_DIRTY_LOG(), &log) }).map(drop)
    }
}

impl Drop for LogRoom {
    fn drop(&mut self) {
        // SAFETY: the mapping that `new` made; no borrow of it is left.
        let unmapped = unsafe { rustix::mm::munmap(self.address.as_ptr().cast(), self.mapped) };
        debug_assert_eq!(unmapped, Ok(()));
    }
}

/// Makes KVM protect the pages of all entries that were read, and use the entries again; how many there were.
pub(super) fn reset_rings(vm: &VmFd) -> io::Result<u64> {
    // SAFETY: the call has no argument.
    let count = done(unsafe { ioctl(vm, KVM_RESET_DIRTY_RINGS()) })?;
    Ok(count.unsigned_abs().into())
}

/// A page that a vCPU wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    /// The number of the slot, as KVM has it.
    pub(super) slot: u32,
    /// The page in the slot.
    pub(super) page: u64,
}

/// Whose an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mark {
    /// KVM may fill it.
    Free,
    /// KVM has filled it.
    Filled,
    /// It was read, and KVM may reset it, and has not yet.
    Read,
    /// It was read, and KVM may not reset it yet.
    Held,
}

/// The ring of one vCPU, which KVM fills and we read.
#[derive(Debug)]
pub(super) struct Ring {
    entries: NonNull<kvm_dirty_gfn>,
    /// A power of two.
    count: u32,
}

// SAFETY: the mapping belongs to this value alone and is not bound to the thread that made it.
unsafe impl Send for Ring {}
// SAFETY: what KVM writes too is read and written by atomic and volatile accesses alone, and never lent.
unsafe impl Sync for Ring {}

impl Ring {
    /// Maps the ring at `offset` of a vCPU's descriptor, whose VM has rings of `count` entries.
    pub(super) fn map(vcpu: BorrowedFd<'_>, offset: u64, count: u32) -> io::Result<Self> {
        if !count.is_power_of_two() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let readable = ProtFlags::READ | ProtFlags::WRITE;
        let (nowhere, len) = (ptr::null_mut(), Self::bytes(count));
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
        let address =
            unsafe { rustix::mm::mmap(nowhere, len, readable, MapFlags::SHARED, vcpu, offset) }?;
        Ok(Self {
            entries: NonNull::new(address.cast()).expect("the kernel maps nothing at zero"),
            count,
        })
    }

    fn bytes(count: u32) -> usize {
        usize::try_from(count).expect("an address has 64 bits") * size_of::<kvm_dirty_gfn>()
    }

    pub(super) fn count(&self) -> u32 {
        self.count
    }

    /// What the flags of the entry at `index` say, which goes round and round.
    pub(super) fn look(&self, index: u32) -> Mark {
        // Acquire: what KVM wrote into the entry before it set the flag is seen.
        match self.flags(index).load(Ordering::Acquire) & (DIRTY | RESET | HELD) {
            0 => Mark::Free,
            DIRTY => Mark::Filled,
            HELD => Mark::Held,
            _ => Mark::Read,
        }
    }

    /// Reads the entry at `index`, if KVM has filled it, and says so to KVM.
    ///
    /// KVM leaves it alone until it is reset, and protects its page then.
    pub(super) fn collect(&self, index: u32) -> Option<Entry> {
        if self.look(index) != Mark::Filled {
            return None;
        }
        // SAFETY: `entry` gives a place that is mapped and aligned. KVM does not write it before it was reset; if it did,
        // a volatile read of integers would see either value.
        let gfn = unsafe { self.entry(index).read_volatile() };
        self.say_read(index);
        Some(Entry {
            slot: gfn.slot,
            page: gfn.offset,
        })
    }

    fn say_read(&self, index: u32) {
        // Release: KVM may write the entry anew once it sees this, and we have read it by then.
        self.flags(index).store(RESET, Ordering::Release);
    }

    /// Tells KVM that the entry at `index` was read, though there is nothing in it to be read now. `false` if there is: KVM may
    /// fill it at this moment.
    pub(super) fn pass(&self, index: u32) -> bool {
        let (flags, order) = (self.flags(index), Ordering::AcqRel);
        let unread = |flags| (flags & DIRTY == 0).then_some(RESET);
        flags.fetch_update(order, Ordering::Acquire, unread).is_ok()
    }

    /// Takes that back, unless KVM has reset the entry or filled it anew meanwhile.
    pub(super) fn hold(&self, index: u32) {
        let (flags, order) = (self.flags(index), Ordering::AcqRel);
        // Whatever else is there is newer.
        let _ = flags.compare_exchange(RESET, HELD, order, Ordering::Acquire);
    }

    /// A place in the mapping, aligned as KVM aligns entries.
    fn entry(&self, index: u32) -> *mut kvm_dirty_gfn {
        let at = usize::try_from(index & (self.count - 1)).expect("an address has 64 bits");
        self.entries.as_ptr().wrapping_add(at)
    }

    fn flags(&self, index: u32) -> &AtomicU32 {
        // SAFETY: `entry` gives a place that is mapped as long as `self` lives, and aligned. The flags are the first field
        // of an entry and are only accessed atomically, here and by KVM, but for the read of a whole entry, in between.
        unsafe { AtomicU32::from_ptr(self.entry(index).cast()) }
    }
}

/// What KVM does with a ring.
#[cfg(test)]
impl Ring {
    /// Fills an entry, whatever it is.
    pub(super) fn fill(&self, index: u32, entry: Entry) {
        let place = self.entry(index);
        // SAFETY: the second word of an entry, which is mapped and aligned, is its slot.
        unsafe {
            place
                .cast::<u32>()
                .wrapping_add(1)
                .write_volatile(entry.slot);
        };
        // SAFETY: its second half is the page.
        unsafe {
            place
                .cast::<u64>()
                .wrapping_add(1)
                .write_volatile(entry.page);
        };
        self.flags(index).store(DIRTY, Ordering::Release);
    }

    /// Resets an entry if it was read, as KVM does it: not in one go.
    pub(super) fn reset(&self, index: u32) -> bool {
        let was_read = self.flags(index).load(Ordering::Acquire) & RESET != 0;
        if was_read {
            self.flags(index).store(0, Ordering::Release);
        }
        was_read
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let len = Self::bytes(self.count);
        // SAFETY: the mapping that `map` made; nothing refers to it any more.
        let unmapped = unsafe { rustix::mm::munmap(self.entries.as_ptr().cast(), len) };
        debug_assert_eq!(unmapped, Ok(()));
    }
}

/// A descriptor that is open as long as its owner lives.
pub(super) fn borrow<T: std::os::fd::AsRawFd>(owner: &T) -> BorrowedFd<'_> {
    // SAFETY: types of `kvm-ioctls` own the descriptor that they name, and the owner is borrowed as long as it.
    unsafe { BorrowedFd::borrow_raw(owner.as_raw_fd()) }
}

fn done(result: c_int) -> io::Result<c_int> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_for_a_log_is_zero_at_first_and_as_large_as_asked() {
        let mut room = LogRoom::new(1000).unwrap();
        assert_eq!(room.words(), [0; 1000]);
        room.words_mut()[999] = 7;
        assert_eq!(room.words()[999], 7);
        assert!(LogRoom::new(0).is_err());
        assert!(LogRoom::new(usize::MAX).is_err());
    }
}
