//! The pages of a program's memory, and what makes them present.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockWriteGuard};

use super::write_back::cut_by;
use crate::chunk::{AtomicBitmap, ChunkRun, Storage};
use crate::sys::mapping::page_size;
use crate::sys::uffd::{Features, Installed, Pages, Stop, Uffd};

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
    /// The size of a page in bytes, and what kind it is of.
    pub(super) page: u64,
    kind: Pages,
    areas: Vec<Placed>,
    /// What was installed, and not taken away again. A page can be present before it is in here.
    resident: AtomicBitmap,
    /// Pages that are zeros for ever unless they are present: the program gave them back, or the storage has nothing there.
    zeros: Option<AtomicBitmap>,
    /// Whether an installed page is write-protected, so that a write to it is noticed.
    pub(super) protects: bool,
    poison: Mutex<BTreeSet<u64>>,
    any_poison: AtomicBool,
    /// Counts how often pages were taken away; what was read before is not installed afterwards. Changed under the lock, under
    /// which pages are installed.
    generation: AtomicU64,
    /// Held to install pages, by one alone to take them away, and so from reading that the program gives pages back until they are noted:
    /// the program goes on as soon as that is read.
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

/// Events of a program are read by one thread at a time, which knows what they say before another reads on.
pub(super) struct Reading<'a> {
    pager: &'a Pager,
    _stable: Option<RwLockWriteGuard<'a, ()>>,
}

impl Reading<'_> {
    /// The program gives back what it has at these addresses. What was read for them is not installed any more.
    pub(super) fn give_back(&self, addresses: &Range<u64>) {
        self.pager.give_back(addresses);
    }
}

/// Most bytes that are read at once, and kept in a buffer for it.
pub(super) const LARGEST: u64 = 1 << 20;

/// Most bytes that are installed at once while a program may give pages back: whoever reads faults waits for as long, some 30 µs.
const LONGEST_HOLD: u64 = 128 << 10;

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
        Self::with_pages(uffd, storage, areas, protects, (page_size(), Pages::Base))
    }

    /// As [`new`](Self::new), with pages of another size.
    pub(super) fn with_pages(
        uffd: Uffd,
        storage: Arc<dyn Storage>,
        areas: Vec<Area>,
        protects: bool,
        (page, kind): (u64, Pages),
    ) -> Self {
        let mut next = 0;
        let mut areas: Vec<_> = areas
            .into_iter()
            .map(|area| {
                let start = next;
                next += (area.addresses.end - area.addresses.start) / page;
                Placed {
                    area,
                    pages: start..next,
                }
            })
            .collect();
        areas.sort_by_key(|placed| placed.area.addresses.start);
        let zeros = uffd
            .features()
            .contains(Features::EVENT_REMOVE)
            .then(|| AtomicBitmap::empty(next));
        Self {
            uffd,
            storage,
            page,
            kind,
            areas,
            resident: AtomicBitmap::empty(next),
            zeros,
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
            .then(|| placed.pages.start + (address - placed.area.addresses.start) / self.page)
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
            |page: u64| placed.area.addresses.start + (page - placed.pages.start) * self.page;
        address(pages.start)..address(pages.end)
    }

    /// What pages of one area hold of the storage; the last may end before its page.
    pub(super) fn bytes(&self, pages: &Range<u64>) -> Range<u64> {
        let placed = self.placed(pages.start).expect("pages of an area");
        let offset = |page: u64| placed.area.offset + (page - placed.pages.start) * self.page;
        let len = self.storage.len();
        offset(pages.start).min(len)..offset(pages.end).min(len)
    }

    pub(super) fn is_resident(&self, page: u64) -> bool {
        self.resident.contains(page)
    }

    /// The next run of pages of `within` that are not resident and that the storage has, at most [`LARGEST`].
    pub(super) fn next_absent(&self, within: Range<u64>) -> Option<Range<u64>> {
        let settled = |page| self.is_resident(page) || self.is_zero(page);
        let start = within.clone().find(|&page| !settled(page))?;
        let end = within.end.min(start + self.batch());
        let stop = (start + 1..end).find(|&page| settled(page));
        Some(start..stop.unwrap_or(end))
    }

    /// The first of `pages` that is zeros, or their end.
    pub(super) fn until_zeros(&self, mut pages: Range<u64>) -> u64 {
        let end = pages.end;
        pages.find(|&page| self.is_zero(page)).unwrap_or(end)
    }

    fn is_zero(&self, page: u64) -> bool {
        self.zeros
            .as_ref()
            .is_some_and(|zeros| zeros.contains(page))
    }

    /// Reads `pages`, of one area, with `read` and makes them present; those that are already stay as they are. `buffer` may be any.
    pub(super) fn fetch(
        &self,
        pages: &Range<u64>,
        buffer: &mut Vec<u8>,
        read: impl Fn(&(dyn Storage + 'static), &mut [u8], u64) -> io::Result<()>,
    ) -> Result<(), Problem> {
        loop {
            if self.zeros.is_some() {
                return self.fetch_or_zero(pages, buffer, read);
            }
            let generation = self.generation();
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

    /// As [`fetch`](Self::fetch), where some of `pages` may be zeros, which are not read.
    fn fetch_or_zero(
        &self,
        pages: &Range<u64>,
        buffer: &mut Vec<u8>,
        read: impl Fn(&(dyn Storage + 'static), &mut [u8], u64) -> io::Result<()>,
    ) -> Result<(), Problem> {
        for (run, zeros) in self.alike(pages) {
            if zeros {
                self.install_zeros(&run)?;
            } else {
                let data = self.read(&run, buffer, &read)?;
                self.install_but_zeros(&run, data)?;
            }
        }
        Ok(())
    }

    /// Cuts `pages` into runs that are zeros, or are not.
    fn alike(&self, pages: &Range<u64>) -> impl Iterator<Item = (Range<u64>, bool)> {
        let mut rest = pages.clone();
        std::iter::from_fn(move || {
            let start = rest.next()?;
            let zeros = self.is_zero(start);
            while !rest.is_empty() && self.is_zero(rest.start) == zeros {
                rest.start += 1;
            }
            Some((start..rest.start, zeros))
        })
    }

    /// Makes `pages` present with `data`, but for those that are zeros by now, or are mapped no more: who waits for one of them looks
    /// again.
    fn install_but_zeros(&self, pages: &Range<u64>, data: &[u8]) -> Result<u64, Problem> {
        let step = (LONGEST_HOLD / self.page).max(1);
        let mut installed = 0;
        for part in cut_by(pages.clone(), step) {
            // Nothing is behind the lock that could be left half done.
            let _stable = self.stable.read().unwrap_or_else(PoisonError::into_inner);
            for (mut run, zeros) in self.alike(&part) {
                if zeros {
                    self.uffd.wake(self.addresses(&run))?;
                    continue;
                }
                while !run.is_empty() {
                    let place = |page: u64| {
                        usize::try_from((page - pages.start) * self.page).expect("within the data")
                    };
                    let bytes = &data[place(run.start)..place(run.end)];
                    let address = self.addresses(&run).start;
                    let done =
                        self.healing(&run, || Ok(self.uffd.install(address, bytes, self.page)?))?;
                    let count = done.done / self.page;
                    self.resident.insert_run(ChunkRun::new(run.start, count));
                    run.start += count;
                    installed += done.bytes;
                    if done.stopped == Some(Stop::Unmapped) {
                        // It is not of the snapshot any more: what is mapped there next begins as zeros. The page after it may be there.
                        let gone = run.start..run.start + 1;
                        self.note_zeros(&gone);
                        self.wake(&gone);
                        run.start = gone.end;
                    } else {
                        outcome(done)?;
                    }
                }
            }
        }
        Ok(installed)
    }

    /// Reads `pages` of one area into `buffer`, as whole pages.
    pub(super) fn read<'b>(
        &self,
        pages: &Range<u64>,
        buffer: &'b mut Vec<u8>,
        read: impl Fn(&(dyn Storage + 'static), &mut [u8], u64) -> io::Result<()>,
    ) -> io::Result<&'b [u8]> {
        let bytes = self.bytes(pages);
        let whole = usize::try_from((pages.end - pages.start) * self.page)
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
        if self.zeros.is_some() {
            // What was given back is known by the page: all else is as it was read, however long ago.
            return self.install_but_zeros(pages, data).map(Some);
        }
        let addresses = self.addresses(pages);
        // Nothing is behind the lock that could be left half done.
        let _stable = self.stable.read().unwrap_or_else(PoisonError::into_inner);
        if generation.is_some_and(|then| then != self.generation()) {
            return Ok(None);
        }
        let installed = self.healing(pages, || {
            outcome(if self.protects && how == Install::Clean {
                self.uffd
                    .install_protected(addresses.start, data, self.page)?
            } else {
                self.uffd.install(addresses.start, data, self.page)?
            })
        })?;
        self.resident
            .insert_run(ChunkRun::new(pages.start, pages.end - pages.start));
        Ok(Some(installed))
    }

    /// Runs `install` for pages of which some may be poisoned, which they are not afterwards.
    fn healing<T>(
        &self,
        pages: &Range<u64>,
        install: impl FnOnce() -> Result<T, Problem>,
    ) -> Result<T, Problem> {
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
        let _stable = self.stable.read().unwrap_or_else(PoisonError::into_inner);
        let mut poison = self.poison.lock().unwrap_or_else(PoisonError::into_inner);
        for page in pages.clone() {
            if self.is_zero(page) {
                // Who waits there looks again.
                self.uffd.wake(self.addresses(&(page..page + 1)))?;
                continue;
            }
            let poisoned = self
                .uffd
                .poison(self.addresses(&(page..page + 1)), self.page)?;
            if poisoned.bytes > 0 {
                poison.insert(page);
                self.any_poison.store(true, Ordering::Release);
            }
            // To be tried again when the program's events are read: who waits there still does.
            if poisoned.stopped == Some(Stop::Changing) {
                return Ok(false);
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

    /// For the time in which events are read: what the program gives back by them is not installed until it is noted.
    pub(super) fn reading(&self) -> Reading<'_> {
        Reading {
            pager: self,
            _stable: self
                .zeros
                .is_some()
                .then(|| self.stable.write().unwrap_or_else(PoisonError::into_inner)),
        }
    }

    fn give_back(&self, addresses: &Range<u64>) {
        for placed in &self.areas {
            let start = addresses.start.max(placed.area.addresses.start);
            let end = addresses.end.min(placed.area.addresses.end);
            if start >= end {
                continue;
            }
            let page = |address: u64| {
                placed.pages.start + (address - placed.area.addresses.start) / self.page
            };
            let run = ChunkRun::new(page(start), page(end) - page(start));
            if let Some(zeros) = &self.zeros {
                zeros.insert_run(run);
            }
            self.resident.remove_run(run);
        }
    }

    /// Makes `pages` of one area, which are zeros, present.
    fn install_zeros(&self, pages: &Range<u64>) -> Result<(), Problem> {
        let addresses = self.addresses(pages);
        match self.kind {
            Pages::Base => outcome(self.uffd.zero(addresses, self.page)?)?,
            Pages::Huge => {
                let len = usize::try_from(addresses.end - addresses.start)
                    .map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
                outcome(
                    self.uffd
                        .install(addresses.start, &vec![0; len], self.page)?,
                )?
            }
        };
        Ok(())
    }

    /// Lets whoever waits for `pages`, of one area, look again.
    pub(super) fn wake(&self, pages: &Range<u64>) {
        // It fails for ranges only that are not pages.
        let _ = self.uffd.wake(self.addresses(pages));
    }

    /// Takes note that the storage has nothing but zeros in `pages`: they are not read.
    pub(super) fn note_zeros(&self, pages: &Range<u64>) {
        let Some(zeros) = &self.zeros else { return };
        for page in pages.clone().filter(|&page| !self.is_resident(page)) {
            zeros.insert_run(ChunkRun::new(page, 1));
        }
    }

    /// How many pages there are.
    pub(super) fn pages(&self) -> u64 {
        self.areas
            .iter()
            .map(|placed| placed.pages.end)
            .max()
            .unwrap_or(0)
    }

    /// How many pages were installed, and how many of the others are zeros.
    pub(super) fn count(&self) -> (u64, u64) {
        let resident = self.resident.snapshot();
        let zeros = self.zeros.as_ref().map_or(0, |zeros| {
            let mut zeros = zeros.snapshot();
            zeros.subtract(&resident);
            zeros.count()
        });
        (resident.count(), zeros)
    }

    /// Most pages that are read at once.
    pub(super) fn batch(&self) -> u64 {
        (LARGEST / self.page).max(1)
    }

    /// Reports nothing any more: what is absent reads as zeros from then on.
    pub(super) fn unregister(&self) -> io::Result<()> {
        for placed in &self.areas {
            self.uffd.unregister(placed.area.addresses.clone())?;
            // The kernel wakes who waits before it unregisters: a fault that came in between would wait for ever.
            self.uffd.wake(placed.area.addresses.clone())?;
        }
        Ok(())
    }

    /// Whether the program changes its mappings at this moment: an event of that is to be read before it goes on.
    pub(super) fn is_changing(&self) -> io::Result<bool> {
        let Some(first) = self.areas.first().map(|placed| placed.pages.start) else {
            return Ok(false);
        };
        // Nothing is registered there any more, or the page is there, or it becomes zeros: it was asked for only once nothing is absent.
        let tried = self
            .uffd
            .zero(self.addresses(&(first..first + 1)), self.page)?;
        Ok(tried.stopped == Some(Stop::Changing))
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
