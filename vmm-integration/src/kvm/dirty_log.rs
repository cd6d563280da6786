//! KVM's dirty log.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, kvm_enable_cap,
};
use memferry::chunk::{ChunkBitmap, ChunkSize};
use memferry::dirty::DirtyTracker;
use rustix::io::Errno;

use super::TrackError;
use super::slots::{Placed, Slots, is};
use super::sys::LogRoom;
use crate::not_started;
use crate::pages::Pages;

/// Tracks what a guest's vCPUs write to one region, by KVM's log: a bit a page.
///
/// From start to stop the region's slots have the flag `KVM_MEM_LOG_DIRTY_PAGES`, beside those that they have anyway. A
/// page that is written for the first time since the last take costs the guest a fault; so does each that is in a huge
/// page, which is split.
///
/// Where KVM can (Linux 5.7), pages are protected in ranges of 64 MiB, and only those that were written: KVM's lock over
/// the guest's page tables, at which its vCPUs' faults wait, is held for a millisecond and not for a pass over all of
/// its memory. This is a setting of the whole VM: once a `DirtyLog` was made, `KVM_GET_DIRTY_LOG` does not reset any
/// more, for the VMM's own uses neither. [`Clearing::WithRead`] leaves that as it is.
///
/// A take reads the log, resets what it has read, and returns: in that order nothing is lost. What is written before the
/// reset is there when the caller reads the pages, and what is written after it is in the log again.
///
/// It takes a bit a page for its log, and another one for the answer of a take; KVM has two. That is 0.012 % of the memory.
///
/// [The module](super) says what a VMM has to do before the last take.
#[derive(Debug)]
pub struct DirtyLog {
    slots: Arc<Slots>,
    region: usize,
    chunk_size: ChunkSize,
    clearing: Clearing,
    /// From start to stop.
    tracking: Mutex<Option<Tracking>>,
}

/// When pages whose bits were read are protected again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clearing {
    /// By calls of their own, in ranges. KVM calls it manual protection.
    InRanges,
    /// When the log is read, a slot at once.
    WithRead,
}

#[derive(Debug)]
struct Tracking {
    /// As many words as the largest slot needs.
    room: LogRoom,
    /// Taken and put back, or read by a take that failed: for the next one.
    pending: Option<ChunkBitmap>,
}

/// Pages that are protected by one call: 64 MiB, which takes KVM about a millisecond.
const RANGE: u64 = 16 << 10;

impl DirtyLog {
    /// A tracker for each region of the guest's memory, in order.
    ///
    /// # Errors
    /// If KVM refuses manual protection, though it says that it has it.
    pub fn regions(slots: &Arc<Slots>, chunk_size: ChunkSize) -> io::Result<Vec<Self>> {
        let has = slots
            .vm()
            .check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into());
        let wanted = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
        let usable = u32::try_from(has).unwrap_or(0) & wanted;
        // Without `INITIALLY_SET` a start protects everything in one go, and a take is as good.
        let clearing = if usable & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE == 0 {
            Clearing::WithRead
        } else {
            let mut manual = kvm_enable_cap {
                cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
                ..kvm_enable_cap::default()
            };
            manual.args[0] = usable.into();
            slots.vm().enable_cap(&manual).map_err(io::Error::from)?;
            Clearing::InRanges
        };
        Ok(Self::of(slots, chunk_size, clearing))
    }

    /// The same without manual protection: for VMs that read their log themselves, too, and count on its being reset.
    ///
    /// # Errors
    /// If KVM refuses to do without it.
    pub fn regions_cleared_with_read(
        slots: &Arc<Slots>,
        chunk_size: ChunkSize,
    ) -> io::Result<Vec<Self>> {
        without_manual_protection(slots)?;
        Ok(Self::of(slots, chunk_size, Clearing::WithRead))
    }

    fn of(slots: &Arc<Slots>, chunk_size: ChunkSize, clearing: Clearing) -> Vec<Self> {
        let regions = 0..slots.regions();
        regions
            .map(|region| Self {
                slots: Arc::clone(slots),
                region,
                chunk_size,
                clearing,
                tracking: Mutex::new(None),
            })
            .collect()
    }

    /// How pages are protected again.
    #[must_use]
    pub fn clearing(&self) -> Clearing {
        self.clearing
    }

    fn tracking(&self) -> MutexGuard<'_, Option<Tracking>> {
        // A panic elsewhere leaves the set as it was: no change to it is half done.
        self.tracking.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn own_slots(&self) -> impl Iterator<Item = (&Placed, Pages)> {
        self.slots.of_region(self.region, self.chunk_size)
    }

    fn no_chunks(&self) -> ChunkBitmap {
        ChunkBitmap::empty(self.slots.chunks(self.region, self.chunk_size))
    }

    /// Room for the log of the largest slot.
    fn room(&self) -> io::Result<LogRoom> {
        let most = self.own_slots().map(|(_, pages)| pages.count).max();
        let words = most.unwrap_or(0).div_ceil(64).max(1);
        LogRoom::new(usize::try_from(words).map_err(io::Error::other)?)
    }

    /// Has every slot logged, and nothing in the log.
    fn arm(&self, room: &mut LogRoom) -> io::Result<()> {
        self.slots.unchanged()?;
        for (placed, pages) in self.own_slots() {
            self.slots.log(placed, true)?;
            match self.clearing {
                // All pages may count as written now, or those that were while the VMM logged the slot for itself.
                Clearing::InRanges => {
                    room.words_mut().fill(u64::MAX);
                    self.clear(room, placed, &pages)?;
                }
                Clearing::WithRead => self.read(room, placed)?,
            }
        }
        Ok(())
    }

    /// Has every slot as it was; the first failure is reported, after all were tried.
    fn release(&self) -> io::Result<()> {
        let mut result = Ok(());
        for (placed, _) in self.own_slots() {
            let released = self.slots.log(placed, false);
            result = result.and(released);
        }
        result
    }

    fn read(&self, room: &mut LogRoom, placed: &Placed) -> io::Result<()> {
        room.read(self.slots.vm(), placed.slot.number).map_err(told)
    }

    /// Protects the pages whose bits are set again, and takes them out of the log.
    fn clear(&self, room: &LogRoom, placed: &Placed, pages: &Pages) -> io::Result<()> {
        let mut first = 0;
        while first < pages.count {
            let count = RANGE.min(pages.count - first);
            if any(room, first, count) {
                let count = u32::try_from(count).expect("a range is small");
                room.clear(self.slots.vm(), placed.slot.number, first, count)
                    .map_err(told)?;
            }
            first += RANGE;
        }
        Ok(())
    }

    /// Moves what was written to the slot from the log to `dirty`. After a failure there is more in `dirty`, not less.
    fn harvest(
        &self,
        room: &mut LogRoom,
        (placed, pages): (&Placed, Pages),
        dirty: &mut ChunkBitmap,
    ) -> io::Result<()> {
        if let Err(error) = self.read(room, placed) {
            if self.clearing == Clearing::WithRead {
                // It may have been reset without having been read.
                dirty.insert_run(pages.chunks(0, pages.count));
            }
            return Err(error);
        }
        let words = room.words().iter();
        pages.insert(words.map(|&word| u64::from_le(word)), dirty);
        match self.clearing {
            Clearing::InRanges => self.clear(room, placed, &pages),
            Clearing::WithRead => Ok(()),
        }
    }
}

impl DirtyTracker for DirtyLog {
    /// Protects all of the region: about 5 ms for each GiB that the guest has touched. Starting again forgets what was
    /// not taken.
    fn start(&self) -> io::Result<()> {
        let mut tracking = self.tracking();
        *tracking = None;
        let armed = self.room().and_then(|mut room| {
            self.arm(&mut room)?;
            Ok(room)
        });
        match armed {
            Ok(room) => {
                *tracking = Some(Tracking {
                    room,
                    pending: None,
                });
                Ok(())
            }
            Err(error) => {
                // The first error says why.
                let _ = self.release();
                Err(error)
            }
        }
    }

    fn take(&self) -> io::Result<ChunkBitmap> {
        let mut tracking = self.tracking();
        let Tracking { room, pending } = tracking.as_mut().ok_or_else(not_started)?;
        self.slots.unchanged()?;
        let mut dirty = pending.take().unwrap_or_else(|| self.no_chunks());
        let mut slots = self.own_slots();
        if let Err(error) = slots.try_for_each(|slot| self.harvest(room, slot, &mut dirty)) {
            // What was found is out of the log, and is reported by the next take.
            *pending = Some(dirty);
            return Err(error);
        }
        Ok(dirty)
    }

    fn restore(&self, chunks: &ChunkBitmap) -> io::Result<()> {
        let mut tracking = self.tracking();
        let Tracking { pending, .. } = tracking.as_mut().ok_or_else(not_started)?;
        pending
            .get_or_insert_with(|| self.no_chunks())
            .union_with(chunks);
        Ok(())
    }

    fn stop(&self) -> io::Result<()> {
        let mut tracking = self.tracking();
        if tracking.is_some() {
            self.release()?;
            *tracking = None;
        }
        Ok(())
    }
}

impl Drop for DirtyLog {
    fn drop(&mut self) {
        // Nobody is left to be told.
        let _ = self.stop();
    }
}

/// Has the log of a VM reset when it is read, and slots protected as a whole when they are first logged.
pub(super) fn without_manual_protection(slots: &Slots) -> io::Result<()> {
    let cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
    if slots.vm().check_extension_raw(cap.into()) <= 0 {
        return Ok(());
    }
    let off = kvm_enable_cap {
        cap,
        ..kvm_enable_cap::default()
    };
    slots.vm().enable_cap(&off).map_err(io::Error::from)
}

/// Whether any of so many bits from `first` on is set; both are multiples of 64, but for the last bits of a slot.
fn any(room: &LogRoom, first: u64, count: u64) -> bool {
    let index = |bit: u64| usize::try_from(bit.div_ceil(64)).unwrap_or(usize::MAX);
    let words = room.words().get(index(first)..index(first + count));
    words.is_some_and(|words| words.iter().any(|&word| word != 0))
}

/// What an error of KVM's means.
fn told(error: io::Error) -> io::Error {
    if is(&error, Errno::NOENT) {
        TrackError::Changed.into()
    } else if is(&error, Errno::FAULT) || is(&error, Errno::INVAL) {
        // The slot has another size than it had.
        TrackError::Changed.into()
    } else if is(&error, Errno::NXIO) {
        TrackError::HasRings.into()
    } else {
        error
    }
}
