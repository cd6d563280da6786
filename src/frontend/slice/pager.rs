//! The pages of a program's memory, and what makes them present.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use crate::chunk::{AtomicBitmap, ChunkRun, Storage};
use crate::sys::mapping::page_size;
use crate::sys::uffd::{Features, Installed, Stop, Uffd};

/// Where a program has a part of a region, to be filled as it is accessed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Area {
    /// Whole pages of the program's address space.
    pub(super) addresses: Range<u64>,
    /// Where in the region it begins.
    pub(super) offset: u64,
}

/// Pages are counted through all areas, one after the other.
#[derive(Debug)]
struct Placed {
    area: Area,
    pages: Range<u64>,
}

/// Pages, from whoever knows their bytes.
pub(super) struct Pager {
    pub(super) uffd: Uffd,
    pub(super) storage: Arc<dyn Storage>,
    areas: Vec<Placed>,
    /// What was installed, and not taken away again. A page can be present before it is in here.
    resident: AtomicBitmap,
    /// Pages that the program gave back: zeros from now on.
    given_back: Option<AtomicBitmap>,
    /// Whether an installed page is write-protected, so that a write to it is noticed.
    pub(super) protects: bool,
    poison: Mutex<BTreeSet<u64>>,
    any_poison: AtomicBool,
    /// Counts how often pages were taken away; what was read before is not installed afterwards. Changed under the lock, under
    /// which pages are installed.
    generation: AtomicU64,
    stable: RwLock<()>,
}

/// What a program waits for cannot be had.
#[derive(Debug)]
pub(super) enum Problem {
    /// The storage says why.
    Storage(io::Error),
    /// There is no such memory any more, nobody waits.
    Gone,
    /// The program changes its mappings, which it can once its events are read: to be tried again after that.
    Changing,
}

impl From<io::Error> for Problem {
    fn from(error: io::Error) -> Self {
        Self::Storage(error)
    }
}

/// What an installed page counts as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Install {
    /// As the storage has it.
    Clean,
    /// Written by the program.
    Written,
}

/// Most bytes that are read at once, and kept in a buffer for it.
pub(super) const LARGEST: u64 = 1 << 20;

impl std::fmt::Debug for Pager {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pager")
            .field("uffd", &self.uffd)
            .field("storage", &self.storage)
            .field("areas", &self.areas)
            .finish_non_exhaustive()
    }
}

impl Pager {
    /// Fills `areas`, which were checked to be whole pages and within the storage. Their faults are those of `uffd`.
    pub(super) fn new(
        uffd: Uffd,
        storage: Arc<dyn Storage>,
        areas: Vec<Area>,
        protects: bool,
    ) -> Self {
        let mut next = 0;
        let mut areas: Vec<_> = areas
            .into_iter()
            .map(|area| {
                let start = next;
                next += (area.addresses.end - area.addresses.start) / page_size();
                Placed {
                    area,
                    pages: start..next,
                }
            })
            .collect();
        areas.sort_by_key(|placed| placed.area.addresses.start);
        let given_back = uffd
            .features()
            .contains(Features::EVENT_REMOVE)
            .then(|| AtomicBitmap::empty(next));
        Self {
            uffd,
            storage,
            areas,
            resident: AtomicBitmap::empty(next),
            given_back,
            protects,
            poison: Mutex::default(),
            any_poison: AtomicBool::new(false),
            generation: AtomicU64::new(0),
            stable: RwLock::new(()),
        }
    }

    /// The page at an address, if it is ours.
    pub(super) fn page_at(&self, address: u64) -> Option<u64> {
        let before = self
            .areas
            .partition_point(|placed| placed.area.addresses.start <= address);
        let placed = &self.areas[before.checked_sub(1)?];
        placed
            .area
            .addresses
            .contains(&address)
            .then(|| placed.pages.start + (address - placed.area.addresses.start) / page_size())
    }

    fn placed(&self, page: u64) -> Option<&Placed> {
        self.areas
            .iter()
            .find(|placed| placed.pages.contains(&page))
    }

    /// All pages of the area that `page` is in.
    pub(super) fn area_of(&self, page: u64) -> Option<Range<u64>> {
        self.placed(page).map(|placed| placed.pages.clone())
    }

    /// The part of `pages` that begins it and lies in one area; `None` if there is none, or it begins outside of all.
    pub(super) fn within_area(&self, pages: &Range<u64>) -> Option<Range<u64>> {
        if pages.is_empty() {
            return None;
        }
        let end = self.placed(pages.start)?.pages.end;
        Some(pages.start..pages.end.min(end))
    }

    /// Where pages of one area are in the program.
    pub(super) fn addresses(&self, pages: &Range<u64>) -> Range<u64> {
        let placed = self.placed(pages.start).expect("pages of an area");
        let address =
            |page: u64| placed.area.addresses.start + (page - placed.pages.start) * page_size();
        address(pages.start)..address(pages.end)
    }

    /// What pages of one area hold of the storage; the last may end before its page.
    pub(super) fn bytes(&self, pages: &Range<u64>) -> Range<u64> {
        let placed = self.placed(pages.start).expect("pages of an area");
        let offset = |page: u64| placed.area.offset + (page - placed.pages.start) * page_size();
        let len = self.storage.len();
        offset(pages.start).min(len)..offset(pages.end).min(len)
    }

    pub(super) fn is_resident(&self, page: u64) -> bool {
        self.resident.contains(page)
    }

    /// The next run of pages of `within` that are not resident and that the storage has, at most [`LARGEST`].
    pub(super) fn next_absent(&self, within: Range<u64>) -> Option<Range<u64>> {
        let settled = |page| self.is_resident(page) || self.is_given_back(page);
        let start = within.clone().find(|&page| !settled(page))?;
        let end = within.end.min(start + LARGEST / page_size());
        let stop = (start + 1..end).find(|&page| settled(page));
        Some(start..stop.unwrap_or(end))
    }

    fn is_given_back(&self, page: u64) -> bool {
        self.given_back
            .as_ref()
            .is_some_and(|given_back| given_back.contains(page))
    }

    /// Reads `pages`, of one area, with `read` and makes them present; those that are already stay as they are. `buffer` may be any.
    pub(super) fn fetch(
        &self,
        pages: &Range<u64>,
        buffer: &mut Vec<u8>,
        read: impl Fn(&(dyn Storage + 'static), &mut [u8], u64) -> io::Result<()>,
    ) -> Result<(), Problem> {
        loop {
            let generation = self.generation();
            if pages.clone().any(|page| self.is_given_back(page)) {
                return self.fetch_or_zero(pages, buffer, read);
            }
            let data = self.read(pages, buffer, &read)?;
            // Else the bytes may have changed since they were read.
            if self
                .install(pages, data, Install::Clean, Some(generation))?
                .is_some()
            {
                return Ok(());
            }
        }
    }

    /// As [`fetch`](Self::fetch), page by page: what was given back is zeros.
    fn fetch_or_zero(
        &self,
        pages: &Range<u64>,
        buffer: &mut Vec<u8>,
        read: impl Fn(&(dyn Storage + 'static), &mut [u8], u64) -> io::Result<()>,
    ) -> Result<(), Problem> {
        for page in pages.clone() {
            let one = page..page + 1;
            let generation = self.generation();
            if self.is_given_back(page) {
                outcome(self.uffd.zero(self.addresses(&one), page_size())?)?;
            } else {
                let data = self.read(&one, buffer, &read)?;
                // If it was given back meanwhile, whoever waits for it faults again.
                self.install(&one, data, Install::Clean, Some(generation))?;
                self.uffd.wake(self.addresses(&one))?;
            }
        }
        Ok(())
    }

    /// Reads `pages` of one area into `buffer`, as whole pages.
    pub(super) fn read<'b>(
        &self,
        pages: &Range<u64>,
        buffer: &'b mut Vec<u8>,
        read: impl Fn(&(dyn Storage + 'static), &mut [u8], u64) -> io::Result<()>,
    ) -> io::Result<&'b [u8]> {
        let bytes = self.bytes(pages);
        let whole = usize::try_from((pages.end - pages.start) * page_size())
            .map_err(|_| io::ErrorKind::OutOfMemory)?;
        if buffer.len() < whole {
            buffer.resize(whole, 0);
        }
        let (data, rest) = buffer[..whole]
            .split_at_mut(usize::try_from(bytes.end - bytes.start).expect("at most the pages"));
        read(&*self.storage, data, bytes.start)?;
        rest.fill(0);
        Ok(&buffer[..whole])
    }

    /// For [`install`](Self::install), to be asked before the bytes are read.
    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Makes `pages` of one area present with `data`, those that are absent; says how many bytes that were. `None` if pages were taken
    /// away since `generation`, and nothing was done.
    pub(super) fn install(
        &self,
        pages: &Range<u64>,
        data: &[u8],
        how: Install,
        generation: Option<u64>,
    ) -> Result<Option<u64>, Problem> {
        let addresses = self.addresses(pages);
        // Nothing is behind the lock that could be left half done.
        let _stable = self.stable.read().unwrap_or_else(PoisonError::into_inner);
        if generation.is_some_and(|then| then != self.generation()) {
            return Ok(None);
        }
        let installed = self.healing(pages, || {
            outcome(if self.protects && how == Install::Clean {
                self.uffd
                    .install_protected(addresses.start, data, page_size())?
            } else {
                self.uffd.install(addresses.start, data, page_size())?
            })
        })?;
        self.resident
            .insert_run(ChunkRun::new(pages.start, pages.end - pages.start));
        Ok(Some(installed))
    }

    /// Runs `install` for pages of which some may be poisoned, which they are not afterwards.
    fn healing(
        &self,
        pages: &Range<u64>,
        install: impl FnOnce() -> Result<u64, Problem>,
    ) -> Result<u64, Problem> {
        if !self.any_poison.load(Ordering::Acquire) {
            return install();
        }
        // Held until the page is there: a scan for written pages takes a poisoned one for written.
        let mut poison = self.poison.lock().unwrap_or_else(PoisonError::into_inner);
        poison.retain(|page| !pages.contains(page));
        self.any_poison.store(!poison.is_empty(), Ordering::Release);
        install()
    }

    /// Lets whoever accesses one of `pages` be killed by `SIGBUS`, now and until it is installed; `false` if the kernel cannot.
    pub(super) fn poison(&self, pages: &Range<u64>) -> io::Result<bool> {
        if !self.uffd.features().contains(Features::POISON) {
            return Ok(false);
        }
        let mut poison = self.poison.lock().unwrap_or_else(PoisonError::into_inner);
        for page in pages.clone() {
            let poisoned = self
                .uffd
                .poison(self.addresses(&(page..page + 1)), page_size())?;
            if poisoned.bytes > 0 {
                poison.insert(page);
                self.any_poison.store(true, Ordering::Release);
            }
        }
        Ok(true)
    }

    /// Runs `look` with the poisoned pages, none of which is healed meanwhile.
    pub(super) fn with_poison<T>(&self, look: impl FnOnce(&BTreeSet<u64>) -> T) -> T {
        look(&self.poison.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Runs `work` while no page is taken away.
    pub(super) fn while_stable<T>(&self, work: impl FnOnce() -> T) -> T {
        let _stable = self.stable.read().unwrap_or_else(PoisonError::into_inner);
        work()
    }

    /// Takes `pages` away by `discard`: nobody else installs meanwhile, and what was read before is not installed afterwards.
    pub(super) fn take_away<T>(
        &self,
        pages: &Range<u64>,
        discard: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        let _stable = self.stable.write().unwrap_or_else(PoisonError::into_inner);
        self.generation.fetch_add(1, Ordering::AcqRel);
        let done = discard()?;
        self.resident
            .remove_run(ChunkRun::new(pages.start, pages.end - pages.start));
        Ok(done)
    }

    /// The program gives back what it has at these addresses. What was read for them is not installed any more.
    pub(super) fn give_back(&self, addresses: &Range<u64>) {
        let _stable = self.stable.write().unwrap_or_else(PoisonError::into_inner);
        self.generation.fetch_add(1, Ordering::AcqRel);
        for placed in &self.areas {
            let start = addresses.start.max(placed.area.addresses.start);
            let end = addresses.end.min(placed.area.addresses.end);
            if start >= end {
                continue;
            }
            let page = |address: u64| {
                placed.pages.start + (address - placed.area.addresses.start) / page_size()
            };
            let run = ChunkRun::new(page(start), page(end) - page(start));
            if let Some(given_back) = &self.given_back {
                given_back.insert_run(run);
            }
            self.resident.remove_run(run);
        }
    }
}

/// How many bytes an installation made present, all of which are now.
fn outcome(installed: Installed) -> Result<u64, Problem> {
    match installed.stopped {
        None => Ok(installed.bytes),
        Some(Stop::Changing) => Err(Problem::Changing),
        Some(Stop::Unmapped | Stop::Exited) => Err(Problem::Gone),
        Some(Stop::NoRoom) => Err(Problem::Storage(io::Error::new(
            io::ErrorKind::StorageFull,
            "there is no memory for a page",
        ))),
    }
}
