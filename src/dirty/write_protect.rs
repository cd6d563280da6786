//! Writes as the page tables see them: asynchronous write protection, asked and reset by `PAGEMAP_SCAN`.

use std::io;
use std::mem;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use super::DirtyTracker;
use super::area::{Area, Areas, not_started};
use crate::chunk::{ChunkBitmap, ChunkSize};
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
/// Holes are never allocated. Page tables for the areas are (2 MiB for each GiB that the process has not touched).
#[derive(Debug)]
pub struct WriteProtect {
    uffd: Uffd,
    areas: Areas,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    pagemap: Pagemap,
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
                pending: None,
            }),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves the set as it was: no change to it is half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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
        let armed = self.areas.iter().try_for_each(|area| {
            self.uffd.register(area.address.clone(), wp)?;
            // Everything counts as written until it is protected for the first time: not news.
            state
                .pagemap
                .scan_written_and_protect(area.address.clone(), &mut |_| {})
        });
        match armed {
            Ok(()) => {
                state.pending = Some(self.areas.no_chunks());
                Ok(())
            }
            Err(error) => {
                state.pending = None;
                // The first error says why; what could not be released goes with the userfaultfd.
                let _ = self.release();
                Err(error)
            }
        }
    }

    fn take(&self) -> io::Result<ChunkBitmap> {
        let mut state = self.state();
        let State { pagemap, pending } = &mut *state;
        let pending = pending.as_mut().ok_or_else(not_started)?;
        for area in self.areas.iter() {
            // What is found is put into the set that a failure leaves behind, so it is reported either way.
            let scanned = pagemap.scan_written_and_protect(area.address.clone(), &mut |found| {
                pending.insert_run(self.areas.chunks(area, &found));
            });
            if let Err(error) = scanned {
                // The kernel may have reset pages without naming them.
                pending.insert_run(self.areas.chunks(area, &area.address));
                return Err(error);
            }
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
