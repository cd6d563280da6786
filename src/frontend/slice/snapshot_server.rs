//! Serving the faults of a VMM that restores a snapshot.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::latency::FaultTimes;
use super::pager::{Area, Install, Pager, Problem};
use super::retry::Waiting;
use super::serve::{OnFault, Running, Service};
use super::snapshot::{RefusedSnapshot, Snapshot, SnapshotError};
use super::{Failure, SliceOptions};
use crate::chunk::{Storage, is_zeros};
use crate::sys::mapping::page_size;
use crate::sys::uffd::{Features, Mode, Pages, Uffd};

/// How long a VMM may take to go on after it was told that it may change its mappings.
const SOON: Duration = Duration::from_millis(1);
/// So often it is looked at again, while the background has all the time.
const LOOKS: u32 = 1000;

/// Serves the faults of a VMM that restores a snapshot, from a storage that has the snapshot's memory.
///
/// Positions are those of the mappings one after the other, in the order in which the VMM named them, and pages those of the
/// mappings. What the VMM writes stays with it, what its guest gives back is zeros afterwards. Dropping this without
/// [`finish`](Self::finish) leaves the VMM waiting at every absent page.
#[derive(Debug)]
pub struct SnapshotServer {
    // Dropped first: no thread is left then.
    _running: Running,
    service: Arc<Service>,
}

/// How a VMM's faults are served.
///
/// Who accesses a page that the storage cannot give waits until it can, and [`SnapshotProgress::waiting`] tells of it: whoever embeds this
/// ends the VMM if that takes too long. A page that answers with an error instead, as [`Failure::Poison`] makes them, is no way out: KVM
/// takes an access to it for one to a device, and Firecracker answers that with zeros.
#[derive(Debug, Clone)]
pub struct SnapshotOptions {
    /// As [`SliceOptions::threads`].
    pub threads: usize,
    /// As [`SliceOptions::read_ahead`].
    pub read_ahead: u64,
}

impl Default for SnapshotOptions {
    fn default() -> Self {
        let SliceOptions {
            threads,
            read_ahead,
            ..
        } = SliceOptions::default();
        Self {
            threads,
            read_ahead,
        }
    }
}

impl SnapshotOptions {
    fn as_slice(&self) -> SliceOptions {
        SliceOptions {
            threads: self.threads,
            read_ahead: self.read_ahead,
            failure: Failure::Wait,
            ..SliceOptions::default()
        }
    }
}

/// How far the memory of a VMM is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotProgress {
    /// All of it.
    pub bytes: u64,
    /// What has come from the storage.
    pub resident: u64,
    /// What is zeros and is not installed before it is accessed: the guest gave it back, or the storage has nothing else there.
    pub zeros: u64,
    /// How long faults took.
    pub faults: FaultTimes,
    /// What somebody waits for in vain at this moment.
    pub waiting: Option<Waiting>,
    /// Since when the one waits that has waited for the longest time, whether in vain or not.
    pub oldest: Option<Instant>,
}

impl SnapshotProgress {
    /// Whether the VMM needs nothing any more.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.resident + self.zeros >= self.bytes
    }
}

impl SnapshotServer {
    /// Serves the VMM's faults from `storage`. `on_fault` is told of the positions of a fault once it is served, by the thread that
    /// served it: it must not block.
    ///
    /// # Errors
    /// See [`SnapshotError`]; the VMM waits then.
    pub fn serve(
        snapshot: Snapshot,
        storage: Arc<dyn Storage>,
        options: &SnapshotOptions,
        on_fault: Option<Box<dyn Fn(Range<u64>) + Send + Sync>>,
    ) -> Result<Self, RefusedSnapshot> {
        let waits = |error| RefusedSnapshot { error, waits: true };
        let pager = pager(snapshot, storage).map_err(waits)?;
        let page = pager.page;
        let start = || {
            let mut service = Service::new(pager, None, &options.as_slice())?;
            service.on_fault = on_fault.map(|on_fault| -> OnFault {
                Box::new(move |pages| on_fault(pages.start * page..pages.end * page))
            });
            let service = Arc::new(service);
            Ok(Self {
                _running: service.start()?,
                service,
            })
        };
        start().map_err(|error: io::Error| waits(error.into()))
    }

    /// How much memory there is, in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.pager().pages() * self.page_size()
    }

    /// Whether there is none; never.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The size of a page in bytes.
    #[must_use]
    pub fn page_size(&self) -> u64 {
        self.pager().page
    }

    /// How far it is. Takes time that grows with the memory: less than a millisecond for a hundred gigabytes.
    #[must_use]
    pub fn progress(&self) -> SnapshotProgress {
        let page = self.page_size();
        let (resident, zeros) = self.pager().count();
        SnapshotProgress {
            bytes: self.len(),
            resident: resident * page,
            zeros: zeros * page,
            faults: self.service.latencies.times(),
            waiting: self.service.retries.waiting(),
            oldest: self.service.oldest(),
        }
    }

    /// Makes what is absent in `range`, whole pages, present, for nobody who waits. `buffer` may be any.
    ///
    /// # Errors
    /// What the storage says; [`io::ErrorKind::TimedOut`] if the VMM changes its mappings and does not go on.
    pub fn bring(&self, range: Range<u64>, buffer: &mut Vec<u8>) -> io::Result<()> {
        let page = self.page_size();
        let mut rest = range.start / page..range.end.div_ceil(page).min(self.pager().pages());
        let mut looks = 0;
        while let Some(absent) = self.pager().next_absent(rest.clone()) {
            let Some(absent) = self.pager().within_area(&absent) else {
                break;
            };
            match self.bring_pages(&absent, buffer) {
                Ok(()) => {
                    rest.start = absent.end;
                    looks = 0;
                }
                // The VMM has ended.
                Err(Problem::Gone) => return Ok(()),
                Err(Problem::Storage(error)) => return Err(error),
                // The threads that serve faults read of it.
                Err(Problem::Changing) if looks < LOOKS => {
                    looks += 1;
                    thread::park_timeout(SOON);
                }
                Err(Problem::Changing) => {
                    return Err(io::Error::new(
                        io::ErrorKind::TimedOut,
                        "the VMM gives memory back and does not go on",
                    ));
                }
            }
        }
        Ok(())
    }

    fn bring_pages(&self, pages: &Range<u64>, buffer: &mut Vec<u8>) -> Result<(), Problem> {
        let pager = self.pager();
        let data = pager.read(pages, buffer, <dyn Storage>::read_ahead_at)?;
        let len = usize::try_from(pager.page).expect("a page is little");
        for (page, bytes) in pages.clone().zip(data.chunks_exact(len)) {
            // A file without holes may be zeros for the most part, which the VMM has at no cost if they are not installed.
            if is_zeros(bytes) {
                pager.note_zeros(&(page..page + 1));
            }
        }
        pager.install(pages, data, Install::Clean, None).map(|_| ())
    }

    /// Takes note that the storage has nothing but zeros in `range`: whole pages of it are not fetched.
    pub fn skip(&self, range: Range<u64>) {
        let page = self.page_size();
        self.pager()
            .note_zeros(&(range.start.div_ceil(page)..range.end / page));
    }

    /// The ranges of `within` that may hold anything but zeros, in order.
    ///
    /// # Errors
    /// What the storage says.
    pub fn data_ranges(&self, within: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let page = self.page_size();
        let mut rest = within.start / page..within.end.div_ceil(page).min(self.pager().pages());
        let mut ranges = Vec::new();
        while let Some(part) = self.pager().within_area(&rest) {
            rest.start = part.end;
            let bytes = self.pager().bytes(&part);
            let begin = bytes.start;
            for range in self.pager().storage.data_ranges(bytes)? {
                let position =
                    |at: u64| (at - begin + part.start * page).clamp(within.start, within.end);
                ranges.push(position(range.start)..position(range.end));
            }
        }
        Ok(ranges)
    }

    /// Lets go of the VMM, which needs nothing any more: its faults are the kernel's again.
    ///
    /// # Errors
    /// [`io::ErrorKind::ResourceBusy`] if something is absent: nothing is done then; [`io::ErrorKind::TimedOut`] if the VMM does not go
    /// on after it was told that it may give memory back.
    pub fn finish(&self, at_most: Duration) -> io::Result<()> {
        if !self.progress().is_complete() {
            return Err(io::Error::new(
                io::ErrorKind::ResourceBusy,
                "not all of the VMM's memory is there",
            ));
        }
        self.pager().unregister()?;
        // Who gave memory back a moment before waits until that is read, which the threads do that serve faults.
        let until = Instant::now() + at_most;
        while self.pager().is_changing()? {
            if Instant::now() >= until {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "the VMM gives memory back and does not go on",
                ));
            }
            thread::park_timeout(SOON);
        }
        Ok(())
    }

    fn pager(&self) -> &Pager {
        &self.service.pager
    }
}

/// Checks what only the storage and the kernel know.
fn pager(snapshot: Snapshot, storage: Arc<dyn Storage>) -> Result<Pager, SnapshotError> {
    let Snapshot {
        descriptor,
        mappings,
    } = snapshot;
    let len = storage.len();
    let room = len
        .checked_next_multiple_of(page_size())
        .unwrap_or(u64::MAX);
    for (number, mapping) in mappings.iter().enumerate() {
        let end = mapping.offset + mapping.len;
        if end > room {
            return Err(SnapshotError::Outside { number, end, len });
        }
    }
    let uffd = Uffd::initialised(descriptor).map_err(SnapshotError::Unusable)?;
    if !uffd.features().contains(Features::EVENT_REMOVE) {
        return Err(SnapshotError::NoRemove);
    }
    let missing = Mode {
        missing: true,
        ..Mode::default()
    };
    let page = mappings[0].page_size;
    let expected = if page == page_size() {
        Pages::Base
    } else {
        Pages::Huge
    };
    let mut areas = Vec::with_capacity(mappings.len());
    for (number, mapping) in mappings.iter().enumerate() {
        let addresses = mapping.address..mapping.address + mapping.len;
        let unmapped = |source| SnapshotError::Unmapped { number, source };
        // It is registered already; this shows that it is there, and what it is.
        let pages = uffd
            .register_and_look(addresses.clone(), missing)
            .map_err(unmapped)?;
        if pages != expected {
            return Err(unmapped(io::Error::new(
                io::ErrorKind::InvalidInput,
                "its pages are of another size than the VMM says",
            )));
        }
        areas.push(Area {
            addresses,
            offset: mapping.offset,
        });
    }
    Ok(Pager::with_pages(
        uffd,
        storage,
        areas,
        false,
        (page, expected),
    ))
}

#[cfg(test)]
mod tests;
