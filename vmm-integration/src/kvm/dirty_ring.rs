//! KVM's dirty rings.

mod rings;

use std::fmt;
use std::io;
use std::mem;
use std::ops::{Deref, DerefMut};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_DIRTY_LOG_PAGE_OFFSET,
    KVM_EXIT_DIRTY_RING_FULL, kvm_dirty_gfn, kvm_enable_cap,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use memferry::chunk::{ChunkBitmap, ChunkSize};
use memferry::dirty::DirtyTracker;

use self::rings::Rings;
use super::TrackError;
use super::dirty_log::without_manual_protection;
use super::slots::{Slots, page_size};
use super::sys::{self, Entry, Ring};
use crate::not_started;
use crate::pages::Pages;

/// The dirty rings of a VM: what each vCPU wrote, page after page, harvested into one [`DirtyTracker`] a region.
///
/// Rings belong to a VM from its beginning to its end: [`enable`](Self::enable) comes before the first vCPU is made, each
/// vCPU is [added](Self::add_vcpu) when it is made, and every end of `KVM_RUN` is shown to
/// [`make_room`](Self::make_room), which deals with those that are because a ring is full. A VM with rings has no dirty log
/// on x86.
///
/// Entries are harvested by every take of any region, and when a ring is full; what is of other regions is kept for them.
/// An entry that was read is reset, which protects its page again, before any take names the page: in that order nothing is
/// lost. What is written before the reset is there when the caller reads the page, and what is written after it makes a
/// new entry.
///
/// KVM stops a vCPU before its ring is full. If it does so too late, which has been seen where it emulates the guest's
/// instructions, entries are lost: then all pages are protected anew and the next take of each region names all of it. So
/// still nothing is left out, and [`overruns`](Self::overruns) tells how often it was so. Where that is often, the log is
/// the better tracker.
///
/// Nobody else may read the rings. [The module](super) says what a VMM has to do before the last take.
///
/// ```no_run
/// use std::sync::Arc;
///
/// use kvm_ioctls::{Kvm, VcpuExit};
/// use memferry::chunk::ChunkSize;
/// use vm_memory::{GuestAddress, GuestMemoryMmap};
/// use vmm_integration::kvm::{DirtyRing, Slot, Slots};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let vm = Arc::new(Kvm::new()?.create_vm()?);
/// let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 30)])?;
/// let memory = Arc::new(memory);
/// let slots = Slots::register(vm.clone(), memory.clone(), Slot::one_a_region(&*memory, 0))?;
/// let rings = DirtyRing::enable(&slots, DirtyRing::entries_for(1 << 30, 1), ChunkSize::PAGE)?;
///
/// let mut vcpu = vm.create_vcpu(0)?;
/// let number = rings.add_vcpu(&vcpu)?;
/// let trackers = DirtyRing::trackers(&rings);
/// loop {
///     let exit = vcpu.run()?;
///     if rings.make_room(number, &exit)? {
///         continue;
///     }
///     match exit {
///         VcpuExit::Hlt => break,
///         _ => { /* devices */ }
///     }
/// }
/// # Ok(())
/// # }
/// ```
pub struct DirtyRing {
    slots: Arc<Slots>,
    /// Entries of each vCPU's ring.
    entries: u32,
    /// Of each slot: its number, its region and its pages.
    pages: Vec<(u32, usize, Pages)>,
    chunk_size: ChunkSize,
    /// Held from the first entry that is read until all that were read are reset: no take may come between.
    state: Mutex<State>,
    /// Takes that wait for the state or have it: a vCPU whose ring is full lets them go first, since they make room for it,
    /// too, and many vCPUs would leave them no turn.
    takes: AtomicUsize,
    /// After each take.
    taken: Condvar,
}

#[derive(Debug)]
struct State {
    rings: Rings,
    /// Of each region, what no take has named yet; `None` while it is not tracked.
    pending: Vec<Option<ChunkBitmap>>,
    /// What no slot has, found since the last take.
    unknown: Option<TrackError>,
    /// How often all rings were harvested.
    harvests: u64,
    /// How often entries were lost.
    overruns: u64,
}

impl State {
    fn has_no_rings(&self) -> bool {
        self.rings.is_empty()
    }
}

/// What KVM keeps free in a ring, with Intel's log of 512 pages; a ring has more entries than that.
const FEWEST: u32 = 1024;
/// The most that KVM allows.
const MOST: u32 = 1 << 16;
/// How long a vCPU whose ring is full waits for a take that makes room. Takes last a millisecond or so, on a machine that is
/// not short of processors.
const PATIENCE: Duration = Duration::from_secs(1);

impl DirtyRing {
    /// Gives the VM of `slots` rings of `entries` entries, a power of two. Before any vCPU is made.
    ///
    /// Switches manual protection off, should the VM have that: rings need every page protected at a start.
    ///
    /// # Errors
    /// [`TrackError::NoRings`] if KVM has none, or not of that size, or the VM has vCPUs or rings already.
    pub fn enable(
        slots: &Arc<Slots>,
        entries: u32,
        chunk_size: ChunkSize,
    ) -> io::Result<Arc<Self>> {
        let vm = slots.vm();
        let offered = |cap: u32| u32::try_from(vm.check_extension_raw(cap.into())).unwrap_or(0);
        // The second is for kernels before 6.1, on x86 alone, where loads and stores have the order that rings need.
        let caps = [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING];
        let cap = caps.into_iter().find(|&cap| offered(cap) > 0);
        let size = size_of::<kvm_dirty_gfn>() as u64;
        let refused = |source: io::Error| TrackError::NoRings {
            entries,
            most: cap.map_or(0, |cap| offered(cap) / 16),
            source,
        };
        let cap = cap.ok_or_else(|| refused(io::ErrorKind::Unsupported.into()))?;
        if !entries.is_power_of_two() {
            return Err(refused(io::ErrorKind::InvalidInput.into()).into());
        }
        let mut rings = kvm_enable_cap {
            cap,
            ..kvm_enable_cap::default()
        };
        rings.args[0] = u64::from(entries) * size;
        vm.enable_cap(&rings)
            .map_err(|error| refused(error.into()))?;
        // A start would protect nothing, since all counts as written then, and rings do not say so.
        without_manual_protection(slots)?;
        Ok(Arc::new(Self::over(slots, entries, chunk_size)))
    }

    fn over(slots: &Arc<Slots>, entries: u32, chunk_size: ChunkSize) -> Self {
        let regions = 0..slots.regions();
        let pages = regions.clone().flat_map(|region| {
            let own = slots.of_region(region, chunk_size);
            own.map(move |(placed, pages)| (placed.slot.number, region, pages))
        });
        Self {
            slots: Arc::clone(slots),
            entries,
            pages: pages.collect(),
            chunk_size,
            state: Mutex::new(State {
                rings: Rings::default(),
                pending: regions.map(|_| None).collect(),
                unknown: None,
                harvests: 0,
                overruns: 0,
            }),
            takes: AtomicUsize::new(0),
            taken: Condvar::new(),
        }
    }

    /// How many entries each of the rings of `vcpus` vCPUs may have so that all bookkeeping, two sets of pages included,
    /// is at most 0.02 % of a guest's memory of so many bytes; from 1024, the fewest that KVM can use, to 65,536, the most.
    ///
    /// A ring that is full stops its vCPU until there is room; it has a part of the time between two takes to fill.
    #[must_use]
    pub fn entries_for(memory: u64, vcpus: u32) -> u32 {
        let sets = 2 * (memory / page_size()).div_ceil(8);
        let room = (memory / 5000).saturating_sub(sets) / u64::from(vcpus.max(1));
        let entries = room / size_of::<kvm_dirty_gfn>() as u64;
        let entries = u32::try_from(entries).unwrap_or(MOST).clamp(FEWEST, MOST);
        // Down to a power of two.
        1 << entries.ilog2()
    }

    /// Reads the ring of this vCPU, too. To be called as soon as it was made. Its number here: they count from zero.
    ///
    /// # Errors
    /// If its ring cannot be mapped.
    pub fn add_vcpu(&self, vcpu: &VcpuFd) -> io::Result<usize> {
        let offset = u64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * page_size();
        self.add_ring(sys::borrow(vcpu), offset)
    }

    fn add_ring(&self, vcpu: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        let ring = Ring::map(vcpu, offset, self.entries)?;
        Ok(self.state().rings.add(ring))
    }

    /// A tracker for each region of the guest's memory, in order.
    #[must_use]
    pub fn trackers(rings: &Arc<Self>) -> Vec<Arc<dyn DirtyTracker>> {
        let regions = 0..rings.slots.regions();
        regions
            .map(|region| {
                Arc::new(OfRegion {
                    rings: Arc::clone(rings),
                    region,
                }) as _
            })
            .collect()
    }

    /// Harvests all rings if `KVM_RUN` of vCPU `number` ended so because its ring is full, and says whether it was so: then
    /// there is nothing else to do but to run it again. For the thread that runs the vCPU; takes a millisecond or so.
    ///
    /// # Errors
    /// If KVM fails. It may pass: run the vCPU again for some time before the guest is given up. What a vCPU wrote and no slot has is an
    /// error of the next take, not of this.
    pub fn make_room(&self, number: usize, exit: &VcpuExit<'_>) -> io::Result<bool> {
        let full = matches!(exit, VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL));
        if full {
            self.make_room_for(number)?;
        }
        Ok(full)
    }

    fn make_room_for(&self, number: usize) -> io::Result<()> {
        let mut state = self.state();
        let before = state.harvests;
        let deadline = Instant::now() + PATIENCE;
        while self.takes.load(Ordering::Relaxed) > 0 && state.harvests == before {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.taken.wait_timeout(state, left);
            (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
        // Whoever harvested since the ring was full has made room, unless KVM has lost count.
        if state.harvests != before && !state.rings.may_be_full(number) {
            return Ok(());
        }
        self.harvest_with(&mut state, |rings, found, reset| {
            rings.make_room(number, found, reset)
        })
    }

    /// How many pages each vCPU has written for the first time since they were taken, all in all, while they were
    /// tracked: counters for [`DirtyRates`](super::DirtyRates), as of the last harvest. What KVM writes for a vCPU, such as
    /// by an instruction that it emulates, counts each time.
    #[must_use]
    pub fn pages_written(&self) -> Vec<u64> {
        self.state().rings.pages()
    }

    /// How often KVM has overwritten entries that nobody had read, so that all pages had to be named.
    #[must_use]
    pub fn overruns(&self) -> u64 {
        self.state().overruns
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere may have left entries that were read and are not reset; they are counted.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state, before those who make room.
    fn first(&self) -> First<'_> {
        self.takes.fetch_add(1, Ordering::Relaxed);
        First {
            rings: self,
            state: Some(self.state()),
        }
    }

    /// Moves all entries to the sets of their regions, and has KVM protect their pages.
    fn harvest(&self, state: &mut State) -> io::Result<()> {
        self.harvest_with(state, |rings, found, reset| rings.harvest(found, reset))
    }

    fn harvest_with(
        &self,
        state: &mut State,
        harvest: impl FnOnce(
            &mut Rings,
            &mut dyn FnMut(usize, Entry),
            &mut dyn FnMut() -> io::Result<u64>,
        ) -> io::Result<()>,
    ) -> io::Result<()> {
        let State {
            rings,
            pending,
            unknown,
            ..
        } = state;
        let mut found = |vcpu, entry: Entry| match self.place(entry) {
            Some((region, pages)) => {
                if let Some(pending) = &mut pending[region] {
                    pending.insert_run(pages.chunks(entry.page, 1));
                }
            }
            None => {
                unknown.get_or_insert(TrackError::Unknown {
                    vcpu,
                    slot: entry.slot,
                    page: entry.page,
                });
            }
        };
        let mut reset = || sys::reset_rings(self.slots.vm());
        let harvested = harvest(rings, &mut found, &mut reset);
        if state.rings.lost() {
            self.name_everything(state)?;
            state.rings.found_again();
            state.overruns += 1;
        }
        harvested?;
        state.harvests += 1;
        Ok(())
    }

    /// Names all chunks of all regions that are tracked, and protects their pages: those whose entries were lost are not.
    fn name_everything(&self, state: &mut State) -> io::Result<()> {
        for (region, pending) in state.pending.iter_mut().enumerate() {
            let Some(pending) = pending else {
                continue;
            };
            *pending = ChunkBitmap::full(pending.chunks());
            for (placed, _) in self.slots.of_region(region, self.chunk_size) {
                self.slots.protect(placed)?;
            }
        }
        Ok(())
    }

    /// The region of an entry and the pages of its slot, if there is such a page.
    fn place(&self, entry: Entry) -> Option<(usize, &Pages)> {
        let mut slots = self.pages.iter();
        let (_, region, pages) = slots.find(|(number, ..)| *number == entry.slot)?;
        (entry.page < pages.count).then_some((*region, pages))
    }

    fn start(&self, region: usize) -> io::Result<()> {
        let mut state = self.first();
        if state.has_no_rings() {
            return Err(TrackError::NoVcpus.into());
        }
        let none = ChunkBitmap::empty(self.slots.chunks(region, self.chunk_size));
        let own = || self.slots.of_region(region, self.chunk_size);
        let before = state.overruns;
        let mut arm = || {
            self.slots.unchanged()?;
            own().try_for_each(|(placed, _)| self.slots.log(placed, true))?;
            state.pending[region] = Some(none.clone());
            // Left over from before the last stop, or written while this ran.
            self.harvest(&mut state)
        };
        if let Err(error) = arm() {
            state.pending[region] = None;
            for (placed, _) in own() {
                // The first error says why.
                let _ = self.slots.log(placed, false);
            }
            return Err(error);
        }
        state.unknown = None;
        if state.overruns == before {
            state.pending[region] = Some(none);
        }
        Ok(())
    }

    fn take(&self, region: usize) -> io::Result<ChunkBitmap> {
        let mut state = self.first();
        if state.pending[region].is_none() {
            return Err(not_started());
        }
        self.slots.unchanged()?;
        self.harvest(&mut state)?;
        if let Some(unknown) = state.unknown.take() {
            return Err(unknown.into());
        }
        let pending = state.pending[region].as_mut().ok_or_else(not_started)?;
        let chunks = pending.chunks();
        Ok(mem::replace(pending, ChunkBitmap::empty(chunks)))
    }

    fn restore(&self, region: usize, chunks: &ChunkBitmap) -> io::Result<()> {
        let mut state = self.state();
        let pending = state.pending[region].as_mut().ok_or_else(not_started)?;
        pending.union_with(chunks);
        Ok(())
    }

    fn stop(&self, region: usize) -> io::Result<()> {
        let mut state = self.first();
        if state.pending[region].is_none() {
            return Ok(());
        }
        let mut result = Ok(());
        for (placed, _) in self.slots.of_region(region, self.chunk_size) {
            let released = self.slots.log(placed, false);
            result = result.and(released);
        }
        result?;
        state.pending[region] = None;
        // What is in the rings now is for no take; a vCPU that stopped at a full one goes on.
        self.harvest(&mut state)
    }
}

impl Drop for DirtyRing {
    fn drop(&mut self) {
        for region in 0..self.slots.regions() {
            // Nobody is left to be told.
            let _ = self.stop(region);
        }
    }
}

impl fmt::Debug for DirtyRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirtyRing")
            .field("slots", &self.slots)
            .field("entries", &self.entries)
            .finish_non_exhaustive()
    }
}

/// The state, for a take. Those who make room wait until it is given back.
struct First<'a> {
    rings: &'a DirtyRing,
    /// `None` only while this is dropped.
    state: Option<MutexGuard<'a, State>>,
}

impl Deref for First<'_> {
    type Target = State;

    fn deref(&self) -> &State {
        self.state.as_ref().expect("given back on drop")
    }
}

impl DerefMut for First<'_> {
    fn deref_mut(&mut self) -> &mut State {
        self.state.as_mut().expect("given back on drop")
    }
}

impl Drop for First<'_> {
    fn drop(&mut self) {
        self.rings.takes.fetch_sub(1, Ordering::Relaxed);
        self.state = None;
        self.rings.taken.notify_all();
    }
}

/// What the rings tell of one region.
#[derive(Debug)]
struct OfRegion {
    rings: Arc<DirtyRing>,
    region: usize,
}

impl DirtyTracker for OfRegion {
    /// Protects all of the region: about 5 ms for each GiB that the guest has touched, in one go. Starting again forgets
    /// what was not taken.
    fn start(&self) -> io::Result<()> {
        self.rings.start(self.region)
    }

    fn take(&self) -> io::Result<ChunkBitmap> {
        self.rings.take(self.region)
    }

    fn restore(&self, chunks: &ChunkBitmap) -> io::Result<()> {
        self.rings.restore(self.region, chunks)
    }

    fn stop(&self) -> io::Result<()> {
        self.rings.stop(self.region)
    }
}

#[cfg(test)]
mod tests;
