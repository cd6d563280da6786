//! A region as memory of this process.
//!
//! ```text
//!  threads of the program        kernel            threads of ours
//! ┌────────────────────┐   ┌──────────────┐   ┌─────────────────────┐
//! │ load, store        │──►│ absent page  │──►│ read the page,      │──►┌─────────┐
//! │                    │   │ userfaultfd  │◄──│ install it          │◄──│ Storage │
//! │ read_exact_at, …   │───┼──────────────┼──►│ (no fault needed)   │◄─►│         │
//! │ sync               │──►│ PAGEMAP_SCAN │──►│ what was written    │──►└─────────┘
//! └────────────────────┘   └──────────────┘   └─────────────────────┘
//! ```
//!
//! `pager.rs` has the pages; `serve.rs` the threads; `ahead.rs` knows what is accessed next; `write_back.rs` what was written.
//! `retry.rs` has what could not be had yet. `hand_over.rs` lets another process's faults be served in the same way, and `snapshot.rs`
//! those of a VMM that restores a snapshot.

mod ahead;
mod hand_over;
mod latency;
mod pager;
mod retry;
mod serve;
mod snapshot;
mod snapshot_server;
mod write_back;

pub use hand_over::{
    FaultServer, HandOverError, HandedOver, HandedRange, hand_over, parse_hand_over,
};
pub use latency::FaultTimes;
pub use retry::Waiting;
pub use snapshot::{
    MOST_MAPPINGS, MemoryMapping, RefusedSnapshot, Snapshot, SnapshotError, parse_mappings,
};
pub use snapshot_server::{SnapshotOptions, SnapshotProgress, SnapshotServer};

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use self::pager::{Area, Install, Pager, Problem};
use self::serve::{Running, Service};
use self::write_back::{WriteBack, cut, in_parallel};
use crate::chunk::{Marks, Storage, check_range};
use crate::sys::mapping::page_size;
use crate::sys::memory::Memory;
use crate::sys::uffd::{self, Features, Mode, Scope, Uffd};

/// A region as memory of this process: a page comes from the storage when it is first accessed, and goes back when it was
/// written and [`sync`](Self::sync) is called.
///
/// Embedders access it by its [pointer](Self::as_ptr), from as many threads as they like; each waits until its page is there. It is
/// also a [`Storage`], which is the way for everybody else: its methods fetch what they need themselves, fault nowhere, and report a
/// storage that fails as an error. A write of whole pages that are absent fetches nothing.
///
/// Pages stay as they were when they came: what others write to the storage later is seen after
/// [`invalidate`](Self::invalidate) only. Absent pages never pass for zeros, also not while this value is dropped: a thread that
/// accesses the memory then is killed (`SIGSEGV`).
///
/// A child that is forked does not inherit the memory.
#[derive(Debug)]
pub struct Slice {
    // In the order in which they are dropped: no thread is left, then there is no memory, then the userfaultfd wakes who waited.
    _running: Running,
    memory: Memory,
    service: Arc<Service>,
    scope: Scope,
    read_only: bool,
}

/// What becomes of a thread that accesses a page which the storage cannot give.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// It is killed by `SIGBUS` when nothing has come after this long, as is anybody who accesses the page later, until it is
    /// [populated](Slice::populate) or written. Where the kernel cannot (before Linux 6.6), as [`Wait`](Self::Wait).
    ///
    /// Only a program's own access is one that nobody can overlook. A system call into such a page fails with `EFAULT`, and the emulator
    /// of KVM takes it for a device of the guest's, whose answer is the VMM's: Firecracker's is zeros. So memory of a guest of KVM wants
    /// [`Wait`](Self::Wait), and somebody who ends the VMM if that takes too long.
    Poison {
        /// How long to try, with pauses.
        after: Duration,
    },
    /// It waits, and the storage is tried for ever.
    Wait,
}

/// How a [`Slice`] is served.
#[derive(Debug, Clone)]
pub struct SliceOptions {
    /// So many faults are served at once. By default 8.
    pub threads: usize,
    /// Most bytes to read ahead of who accesses pages in a sequence. By default 8 MiB, twice what 1 Gbit/s carries in a round trip of
    /// 30 ms; zero reads nothing that nobody has asked for.
    pub read_ahead: u64,
    /// What becomes of who waits in vain. By default they are killed after 30 s.
    pub failure: Failure,
    /// Whose faults are served: `None` means the kernel's too (`read` into the memory, KVM) if this process may, which takes what
    /// [`Scope::UserAndKernel`] says, else those of programs alone.
    pub scope: Option<Scope>,
    /// Nothing is written back, and nothing that is written is taken note of.
    pub read_only: bool,
    /// Does without the kernel's memory of what was written (Linux 6.7): the first write to each page takes a fault.
    pub track_by_faults: bool,
}

impl Default for SliceOptions {
    fn default() -> Self {
        Self {
            threads: 8,
            read_ahead: 8 << 20,
            failure: Failure::Poison {
                after: Duration::from_secs(30),
            },
            scope: None,
            read_only: false,
            track_by_faults: false,
        }
    }
}

impl Slice {
    /// Shows `storage` as memory. Nothing is read yet.
    ///
    /// # Errors
    /// [`io::ErrorKind::PermissionDenied`] if this process may not make a userfaultfd of the scope that was asked for, with what would
    /// allow it; [`io::ErrorKind::Unsupported`] if the kernel lacks write protection (Linux 5.7); [`io::ErrorKind::InvalidInput`] if
    /// the storage is empty.
    pub fn new(storage: Arc<dyn Storage>, options: &SliceOptions) -> io::Result<Self> {
        let memory = Memory::reserve(storage.len())?;
        let offered = uffd::offered()?;
        let by_kernel = !options.track_by_faults && offered.contains(Features::TRACKING_PRIVATE);
        let tracking = match (options.read_only, by_kernel) {
            (true, _) => Features::none(),
            (false, true) => Features::TRACKING_PRIVATE,
            (false, false) => Features::WRITE_PROTECT,
        };
        let features = tracking | Features::POISON.intersection(offered);
        let (uffd, scope) = create(options.scope, features)?;
        let protects = !options.read_only;
        uffd.register(
            memory.addresses(),
            Mode {
                missing: true,
                wp: protects,
                minor: false,
            },
        )?;
        let area = Area {
            addresses: memory.addresses(),
            offset: 0,
        };
        let pages = (area.addresses.end - area.addresses.start) / page_size();
        let writes = match (protects, by_kernel) {
            (false, _) => None,
            (true, true) => Some(WriteBack::by_the_kernel(pages)?),
            (true, false) => Some(WriteBack::by_faults(pages)),
        };
        let pager = Pager::new(uffd, storage, vec![area], protects);
        let service = Arc::new(Service::new(pager, writes, options)?);
        Ok(Self {
            _running: service.start()?,
            memory,
            service,
            scope,
            read_only: options.read_only,
        })
    }

    /// The first byte. Valid for reads and writes of [`len`](Storage::len) bytes while this value lives; with volatile or atomic
    /// accesses, since other threads, and [`sync`](Self::sync), access the same bytes.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.memory.as_ptr()
    }

    /// Loads bytes as a program with the [pointer](Self::as_ptr) does: each page that is absent is a fault that this thread waits for.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] if the range is outside of the region. A page that cannot be had kills this thread, as
    /// [`Failure`] says.
    pub fn load(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.memory.load(offset, buf)
    }

    /// Whose faults are served.
    #[must_use]
    pub fn scope(&self) -> Scope {
        self.scope
    }

    /// Puts bytes there that came on their own: those of pages which are present already are left out. They count as what the
    /// storage has. `offset` begins a page, and `data` is whole pages but for the end of the region.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] for parts of pages; [`io::ErrorKind::UnexpectedEof`] beyond the end.
    pub fn install(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let len = data.len() as u64;
        check_range(self.memory.len(), offset, len)?;
        let end = offset + len;
        let page = page_size();
        if !offset.is_multiple_of(page) || !(end.is_multiple_of(page) || end == self.memory.len()) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{offset}..{end} does not begin and end at pages"),
            ));
        }
        self.install_pages(offset / page, data, Install::Clean)?;
        Ok(())
    }

    /// Makes `range` present: nobody waits there any more.
    ///
    /// # Errors
    /// What the storage says; [`io::ErrorKind::UnexpectedEof`] if the range is outside of the region.
    pub fn populate(&self, range: Range<u64>) -> io::Result<()> {
        check_range(
            self.memory.len(),
            range.start,
            range.end.saturating_sub(range.start),
        )?;
        let batches: Vec<_> = cut(pages_of(&range)).collect();
        in_parallel(&batches, |pages, buffer| {
            self.make_present(pages.clone(), buffer, <dyn Storage>::read_ahead_at)
        })
    }

    /// Writes back the pages that were written, and returns when they are durable.
    ///
    /// Pages written meanwhile may be left to the next time. After a failure everything that was to be written back is written back
    /// again by the next call: it is not reported as saved before it is.
    ///
    /// # Errors
    /// What the storage says.
    pub fn sync(&self) -> io::Result<()> {
        self.service.writes.as_ref().map_or(Ok(()), |writes| {
            writes.sync(&self.service.pager, &self.memory)
        })
    }

    /// Makes the pages of `range` absent again, because the storage's bytes have changed and nobody wrote them through this memory.
    /// Accesses that begin after this see what the storage has.
    ///
    /// # Errors
    /// [`io::ErrorKind::ResourceBusy`] if one of them was written and not written back: nothing is done then.
    pub fn invalidate(&self, range: Range<u64>) -> io::Result<()> {
        let end = range.end.min(self.memory.len());
        if range.start >= end {
            return Ok(());
        }
        let pages = pages_of(&(range.start..end));
        let pager = &self.service.pager;
        let discard = || {
            self.memory
                .discard(pages.start * page_size()..pages.end * page_size())
        };
        match &self.service.writes {
            Some(writes) => writes.unless_written(pager, &self.memory, &pages, discard),
            None => pager.take_away(&pages, discard),
        }
    }

    /// What of `within` has come from the storage or was written.
    #[must_use]
    pub fn resident(&self, within: Range<u64>) -> u64 {
        pages_of(&(within.start..within.end.min(self.memory.len())))
            .filter(|&page| self.service.pager.is_resident(page))
            .count() as u64
            * page_size()
    }

    fn make_present(
        &self,
        pages: Range<u64>,
        buffer: &mut Vec<u8>,
        read: fn(&(dyn Storage + 'static), &mut [u8], u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut rest = pages;
        while let Some(absent) = self.service.pager.next_absent(rest.clone()) {
            self.service
                .pager
                .fetch(&absent, buffer, read)
                .map_err(unexpected)?;
            rest.start = absent.end;
        }
        Ok(())
    }

    /// Makes absent pages from `first` on present with `data`; says how many bytes that were.
    fn install_pages(&self, first: u64, data: &[u8], how: Install) -> io::Result<u64> {
        let page = usize::try_from(page_size()).expect("a page is little");
        let (whole, last) = data.split_at(data.len() / page * page);
        let mut installed = 0;
        let mut put = |first: u64, data: &[u8]| -> io::Result<()> {
            let pages = first..first + data.len() as u64 / page_size();
            let done = self.service.pager.install(&pages, data, how, None);
            installed += done.map_err(unexpected)?.unwrap_or(0);
            if let (Install::Written, Some(writes)) = (how, &self.service.writes) {
                writes.note(&pages);
            }
            Ok(())
        };
        if !whole.is_empty() {
            put(first, whole)?;
        }
        if !last.is_empty() {
            let mut padded = last.to_vec();
            padded.resize(page, 0);
            put(first + whole.len() as u64 / page_size(), &padded)?;
        }
        Ok(installed)
    }

    /// Runs `access` to `pages` while all of them are present; `false` if they are not, and nothing was done.
    fn if_present(
        &self,
        pages: &Range<u64>,
        access: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<bool> {
        let pager = &self.service.pager;
        pager.while_stable(|| {
            if pages.clone().all(|page| pager.is_resident(page)) {
                access().map(|()| true)
            } else {
                Ok(false)
            }
        })
    }

    fn store(&self, pages: &Range<u64>, offset: u64, bytes: &[u8]) -> io::Result<bool> {
        let writes = self.service.writes.as_ref();
        self.if_present(pages, || {
            let store = || self.memory.store(offset, bytes);
            writes.map_or_else(store, |writes| {
                writes.while_noted(&self.service.pager, pages, store)?
            })
        })
    }
}

impl Storage for Slice {
    fn len(&self) -> u64 {
        self.memory.len()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let len = buf.len() as u64;
        check_range(self.memory.len(), offset, len)?;
        let pages = pages_of(&(offset..offset + len));
        loop {
            self.make_present(pages.clone(), &mut Vec::new(), <dyn Storage>::read_exact_at)?;
            if self.if_present(&pages, || self.memory.load(offset, buf))? {
                return Ok(());
            }
        }
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let end = offset.saturating_add(buf.len() as u64);
        check_range(self.memory.len(), offset, buf.len() as u64)?;
        if self.read_only {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        if buf.is_empty() {
            return Ok(());
        }
        let page = page_size();
        let pages = pages_of(&(offset..end));
        let covered = offset.div_ceil(page)..if end == self.memory.len() {
            pages.end
        } else {
            end / page
        };
        loop {
            // Pages that are overwritten whole are not fetched for it.
            if covered.start < covered.end {
                let skipped = usize::try_from(covered.start * page - offset).expect("in the slice");
                let until =
                    usize::try_from((covered.end * page).min(end) - offset).expect("in the slice");
                let data = &buf[skipped..until];
                let absent = self.service.pager.next_absent(covered.clone()).is_some();
                let made = if absent {
                    self.install_pages(covered.start, data, Install::Written)?
                } else {
                    0
                };
                if covered == pages && made == (covered.end - covered.start) * page {
                    return Ok(());
                }
            }
            for part in [pages.start, pages.end - 1] {
                if !covered.contains(&part) {
                    self.make_present(
                        part..part + 1,
                        &mut Vec::new(),
                        <dyn Storage>::read_exact_at,
                    )?;
                }
            }
            if self.store(&pages, offset, buf)? {
                return Ok(());
            }
        }
    }

    fn flush(&self) -> io::Result<()> {
        self.sync()
    }

    fn data_ranges(&self, within: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let end = within.end.min(self.memory.len());
        if within.start >= end {
            return Ok(Vec::new());
        }
        let mut ranges = self.service.pager.storage.data_ranges(within.start..end)?;
        ranges.extend(self.written(&(within.start..end))?);
        ranges.sort_by_key(|range| range.start);
        Ok(merged(ranges))
    }

    fn is_at_hand(&self, range: Range<u64>) -> bool {
        pages_of(&(range.start..range.end.min(self.memory.len())))
            .all(|page| self.service.pager.is_resident(page))
    }
}

impl Slice {
    /// What of `within`, which lies in the region, was written and is not known to be durable.
    fn written(&self, within: &Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let Some(writes) = &self.service.writes else {
            return Ok(Vec::new());
        };
        let pages = writes.written(&self.service.pager, &self.memory, &pages_of(within))?;
        let cut = |run: Range<u64>| {
            (run.start * page_size()).max(within.start)..(run.end * page_size()).min(within.end)
        };
        Ok(pages.into_iter().map(cut).collect())
    }
}

/// What [`sync`](Slice::sync) would write back.
impl Marks for Slice {
    fn marked(&self, within: Range<u64>) -> Vec<Range<u64>> {
        let within = within.start..within.end.min(self.memory.len());
        if within.start >= within.end {
            return Vec::new();
        }
        // If the kernel does not say what was written, anything may be.
        self.written(&within)
            .unwrap_or_else(|_| std::iter::once(within).collect())
    }
}

fn create(scope: Option<Scope>, features: Features) -> io::Result<(Uffd, Scope)> {
    match scope {
        Some(scope) => Ok((Uffd::create(scope, features)?, scope)),
        None => match Uffd::create(Scope::UserAndKernel, features) {
            Ok(uffd) => Ok((uffd, Scope::UserAndKernel)),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                let uffd = Uffd::create(Scope::UserModeOnly, features)?;
                Ok((uffd, Scope::UserModeOnly))
            }
            Err(error) => Err(error),
        },
    }
}

/// The pages that hold `range`.
fn pages_of(range: &Range<u64>) -> Range<u64> {
    if range.start >= range.end {
        return 0..0;
    }
    range.start / page_size()..range.end.div_ceil(page_size())
}

/// Joins sorted ranges that touch.
fn merged(ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    let mut merged: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

fn unexpected(problem: Problem) -> io::Error {
    match problem {
        Problem::Storage(error) => error,
        Problem::Gone | Problem::Changing => {
            io::Error::other("memory of our own was mapped anew by somebody")
        }
    }
}

#[cfg(test)]
mod tests;
