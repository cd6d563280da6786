//! Writes as the page tables see them: asynchronous write protection, asked and reset by `PAGEMAP_SCAN`.

use std::fs::File;
use std::io;
use std::mem;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use super::DirtyTracker;
use super::area::{Area, Areas, not_started};
use super::populated::Populated;
use crate::chunk::{ChunkBitmap, ChunkRun, ChunkSize};
use crate::sys::pagemap::Pagemap;
use crate::sys::uffd::{Features, Mode, Uffd};

/// Tracks the writes of one process to a region that it has mapped, exactly, by page. Linux 6.7.
///
/// The kernel lifts the protection of a page on the first write to it, in about a microsecond and without asking us,
/// so the process never waits for this one; if this one dies, its userfaultfd is closed and tracking just ends. A
/// take costs about 0.3 ms for each GiB that was not written, and about 4 ms for each that was.
///
/// It sees writes through the areas that it was given, by the process or by the kernel for it (KVM, vhost-net,
/// `read`). It does not see those that another process makes to the same file, nor `write` to the file itself: give
/// each such process a tracker of its own and join them by [`Union`](super::Union). If the process maps an area anew
/// (`mremap`, `munmap`), what it writes there later is not seen: make a new tracker.
///
/// Nor does it see that pages were given back (a guest's balloon, `fallocate` with holes): the kernel keeps their
/// protection and does not call it a write. Where the copy must be equal there too, join it with
/// [`Discards`](super::Discards).
///
/// Holes are never allocated. Without [`sparse`](Self::sparse), page tables for them are: 2 MiB for each GiB.
#[derive(Debug)]
pub struct WriteProtect {
    uffd: Uffd,
    areas: Areas,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    pagemap: Pagemap,
    populated: Populated,
    /// Taken and put back, or lost to a failed scan: for the next take. `None` while nothing is tracked.
    pending: Option<ChunkBitmap>,
}

impl WriteProtect {
    /// Tracks the `areas` in which a process maps a region of `region_len` bytes. `uffd` and `pagemap` are of that
    /// process; the userfaultfd has [`Features::TRACKING`].
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] if the userfaultfd lacks a feature or an area is not whole pages of the region.
    pub fn new(
        uffd: Uffd,
        pagemap: Pagemap,
        areas: Vec<Area>,
        region_len: u64,
        chunk_size: ChunkSize,
    ) -> io::Result<Self> {
        let lacking = Features::TRACKING.without(uffd.features());
        if lacking != Features::none() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("the userfaultfd was made without {lacking}, which tracking needs"),
            ));
        }
        Ok(Self {
            uffd,
            areas: Areas::new(areas, region_len, chunk_size)?,
            state: Mutex::new(State {
                pagemap,
                populated: Populated::new(None, region_len),
                pending: None,
            }),
        })
    }

    /// Leaves alone what is a hole in `file`, whose first byte is the region's: no page tables for it, no time. A
    /// hole that gets data is tracked from the take on that finds it, which names what data it has then.
    ///
    /// To be called before [`start`](DirtyTracker::start). Moves the cursor of the file.
    #[must_use]
    pub fn sparse(self, file: File) -> Self {
        self.state().populated = Populated::new(Some(file), self.areas.region_len());
        self
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves the set as it was: no change to it is half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds the chunks written since the last scan to `dirty`, and protects them again.
    fn add_written(
        &self,
        pagemap: &mut Pagemap,
        populated: &mut Populated,
        dirty: &mut ChunkBitmap,
    ) -> io::Result<()> {
        self.scan(pagemap, populated.seen(), |run| dirty.insert_run(run))?;
        let fresh = populated.discover()?;
        if fresh.is_empty() {
            return Ok(());
        }
        // A block that was all hole until now was never protected, so all of it is named; only what has data, now
        // that it is protected, can have been written.
        let mut news = self.areas.no_chunks();
        self.scan(pagemap, populated.ranges(&fresh), |run| {
            news.insert_run(run);
        })?;
        let mut data = self.areas.no_chunks();
        for block in populated.ranges(&fresh) {
            populated.data(block, |bytes| data.insert_run(self.areas.chunks_of(&bytes)))?;
        }
        news.intersect_with(&data);
        dirty.union_with(&news);
        populated.add(&fresh);
        Ok(())
    }

    /// Names the chunks written in `ranges` of the region, through any area, and protects them again.
    fn scan(
        &self,
        pagemap: &mut Pagemap,
        ranges: impl Iterator<Item = Range<u64>>,
        mut found: impl FnMut(ChunkRun),
    ) -> io::Result<()> {
        for bytes in ranges {
            for area in self.areas.iter() {
                let addresses = Areas::addresses(area, &bytes);
                pagemap.scan_written_and_protect(addresses, &mut |written| {
                    found(self.areas.chunks(area, &written));
                })?;
            }
        }
        Ok(())
    }

    /// Unregisters every area; the first failure is reported, after all were tried.
    fn release(&self) -> io::Result<()> {
        let mut result = Ok(());
        for area in self.areas.iter() {
            match self.uffd.unregister(area.address.clone()) {
                // Nothing is mapped there now, or the process has exited: nothing is held.
                Err(error) if is(&error, Errno::INVAL) || is(&error, Errno::NOMEM) => {}
                done => result = result.and(done),
            }
        }
        result
    }
}

impl DirtyTracker for WriteProtect {
    /// Takes about 4 ms for each GiB. Starting again forgets what was not taken.
    fn start(&self) -> io::Result<()> {
        let mut state = self.state();
        let wp = Mode {
            wp: true,
            ..Mode::default()
        };
        let State {
            pagemap,
            populated,
            pending,
        } = &mut *state;
        let mut arm = || {
            for area in self.areas.iter() {
                self.uffd.register(area.address.clone(), wp)?;
            }
            let fresh = populated.discover()?;
            populated.add(&fresh);
            // Everything counts as written until it is protected for the first time: not news.
            self.scan(pagemap, populated.seen(), |_| {})
        };
        match arm() {
            Ok(()) => {
                *pending = Some(self.areas.no_chunks());
                Ok(())
            }
            Err(error) => {
                *pending = None;
                // The first error says why; what could not be released goes with the userfaultfd.
                let _ = self.release();
                Err(error)
            }
        }
    }

    fn take(&self) -> io::Result<ChunkBitmap> {
        let mut state = self.state();
        let State {
            pagemap,
            populated,
            pending,
        } = &mut *state;
        let pending = pending.as_mut().ok_or_else(not_started)?;
        // What is found goes to the set that a failure leaves behind, so it is reported either way.
        if let Err(error) = self.add_written(pagemap, populated, pending) {
            // The kernel may have reset pages without naming them.
            for area in self.areas.iter() {
                pending.insert_run(self.areas.chunks(area, &area.address));
            }
            return Err(error);
        }
        Ok(mem::replace(pending, self.areas.no_chunks()))
    }

    fn restore(&self, chunks: &ChunkBitmap) -> io::Result<()> {
        let mut state = self.state();
        let pending = state.pending.as_mut().ok_or_else(not_started)?;
        pending.union_with(chunks);
        Ok(())
    }

    fn stop(&self) -> io::Result<()> {
        let mut state = self.state();
        if state.pending.is_none() {
            return Ok(());
        }
        self.release()?;
        state.pending = None;
        Ok(())
    }
}

fn is(error: &io::Error, errno: Errno) -> bool {
    error.raw_os_error() == Some(errno.raw_os_error())
}

#[cfg(test)]
mod tests;
