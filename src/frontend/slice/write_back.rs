//! What the program has written, and bringing it back to the storage.

use std::io;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use super::pager::{LARGEST, Pager};
use crate::chunk::{ChunkBitmap, ChunkRun};
use crate::sys::mapping::page_size;
use crate::sys::memory::Memory;
use crate::sys::pagemap::Pagemap;

/// So many batches are on their way to the storage at once: with 1 MiB each, what 1 Gbit/s carries in a round trip of 30 ms.
const AT_ONCE: usize = 4;

/// Knows which pages were written since they were written back. An order it keeps: take, then read; so what is written
/// meanwhile is found the next time.
#[derive(Debug)]
pub(super) struct WriteBack {
    tracking: Tracking,
    /// Held while pages are written back, and while others are taken away.
    busy: Mutex<()>,
    /// Taken from the tracking and not known to be durable.
    pending: Mutex<ChunkBitmap>,
}

/// Who notices that a page is written.
#[derive(Debug)]
enum Tracking {
    /// The kernel remembers it by itself, and is asked. Linux 6.7.
    Kernel(Mutex<Pagemap>),
    /// The first write to a page waits until we have made a note.
    Faults(Mutex<ChunkBitmap>),
}

impl WriteBack {
    /// Asks the kernel what was written.
    ///
    /// # Errors
    /// If the page table of this process cannot be read.
    pub(super) fn by_the_kernel(pages: u64) -> io::Result<Self> {
        let pagemap = Pagemap::of_this_process()?;
        Ok(Self::new(Tracking::Kernel(Mutex::new(pagemap)), pages))
    }

    /// Makes notes of the write faults that the fault threads report.
    pub(super) fn by_faults(pages: u64) -> Self {
        Self::new(
            Tracking::Faults(Mutex::new(ChunkBitmap::empty(pages))),
            pages,
        )
    }

    fn new(tracking: Tracking, pages: u64) -> Self {
        Self {
            tracking,
            busy: Mutex::default(),
            pending: Mutex::new(ChunkBitmap::empty(pages)),
        }
    }

    /// A thread waits because it writes to a page that is protected: notes that, and lets it.
    pub(super) fn write_fault(&self, pager: &Pager, page: u64) -> io::Result<()> {
        self.while_noted(pager, &(page..page + 1), || ())
    }

    /// Runs `write`, which writes to `pages` that are present, as noted: it does not fault.
    pub(super) fn while_noted<T>(
        &self,
        pager: &Pager,
        pages: &Range<u64>,
        write: impl FnOnce() -> T,
    ) -> io::Result<T> {
        let Tracking::Faults(noted) = &self.tracking else {
            return Ok(write());
        };
        // Nobody protects the pages again before the lock is released: a note that is taken goes with a protected page.
        let mut noted = locked(noted);
        noted.insert_run(run(pages));
        pager.uffd.write_protect(pager.addresses(pages), false)?;
        Ok(write())
    }

    /// Pages that were made present with bytes of the program's.
    pub(super) fn note(&self, pages: &Range<u64>) {
        if let Tracking::Faults(noted) = &self.tracking {
            locked(noted).insert_run(run(pages));
        }
    }

    /// Writes back everything that was written, and flushes. Returns when it is durable.
    pub(super) fn sync(&self, pager: &Pager, memory: &Memory) -> io::Result<()> {
        let _busy = locked(&self.busy);
        let taken = self.take(pager, memory);
        let batches: Vec<_> = {
            let pending = locked(&self.pending);
            pending.runs().flat_map(batches_of).collect()
        };
        let written = in_parallel(&batches, |pages, buffer| {
            let bytes = pager.bytes(pages);
            let len = usize::try_from(bytes.end - bytes.start).expect("at most a batch");
            buffer.resize(buffer.len().max(len), 0);
            // The memory of a slice is the storage, byte by byte.
            memory.load(bytes.start, &mut buffer[..len])?;
            pager.storage.write_all_at(&buffer[..len], bytes.start)
        });
        taken.and(written)?;
        pager.storage.flush()?;
        // Until here everything stays to be written again: of what came before a flush that failed nobody knows what is durable.
        locked(&self.pending).clear();
        Ok(())
    }

    /// Runs `take_away` unless one of `pages` was written and not written back; nobody writes back meanwhile.
    pub(super) fn unless_written(
        &self,
        pager: &Pager,
        memory: &Memory,
        pages: &Range<u64>,
        take_away: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        let _busy = locked(&self.busy);
        pager.take_away(pages, || {
            self.take(pager, memory)?;
            let written = locked(&self.pending)
                .runs_within(run(pages))
                .next()
                .is_some();
            if written {
                return Err(io::Error::new(
                    io::ErrorKind::ResourceBusy,
                    "some of it was written and not written back: sync first",
                ));
            }
            take_away()
        })
    }

    /// What of `pages` was written and is not known to be durable.
    pub(super) fn written(
        &self,
        pager: &Pager,
        memory: &Memory,
        pages: &Range<u64>,
    ) -> io::Result<Vec<Range<u64>>> {
        let mut written = locked(&self.pending).clone();
        match &self.tracking {
            Tracking::Kernel(pagemap) => pager.with_poison(|poison| {
                let first = memory.addresses().start;
                locked(pagemap).peek_present_written(pager.addresses(pages), &mut |found| {
                    insert_healthy(&mut written, &(pages_of(first, &found)), poison);
                })
            })?,
            Tracking::Faults(noted) => written.union_with(&locked(noted)),
        }
        Ok(written
            .runs_within(run(pages))
            .map(|run| run.range())
            .collect())
    }

    /// Moves what was written since the last time to `pending`.
    fn take(&self, pager: &Pager, memory: &Memory) -> io::Result<()> {
        let mut pending = locked(&self.pending);
        match &self.tracking {
            Tracking::Kernel(pagemap) => {
                let all = memory.addresses();
                let scanned = pager.with_poison(|poison| {
                    locked(pagemap).scan_present_written_and_protect(all.clone(), &mut |found| {
                        insert_healthy(&mut pending, &pages_of(all.start, &found), poison);
                    })
                });
                if scanned.is_err() {
                    // Some may have been protected again and not named.
                    for page in 0..pending.chunks() {
                        if pager.is_resident(page) {
                            pending.insert(page);
                        }
                    }
                }
                scanned
            }
            Tracking::Faults(noted) => {
                let mut noted = locked(noted);
                for run in noted.runs() {
                    pager
                        .uffd
                        .write_protect(pager.addresses(&run.range()), true)?;
                }
                pending.union_with(&noted);
                noted.clear();
                Ok(())
            }
        }
    }
}

/// Calls `work` with each batch, from several threads if it is worth it, and with a buffer that is its thread's. Goes on after a
/// failure; the first is returned.
pub(super) fn in_parallel(
    batches: &[Range<u64>],
    work: impl Fn(&Range<u64>, &mut Vec<u8>) -> io::Result<()> + Sync,
) -> io::Result<()> {
    let next = Mutex::new(batches.iter());
    let failed = Mutex::new(None);
    let worker = || {
        let mut buffer = Vec::new();
        loop {
            let Some(batch) = locked(&next).next() else {
                return;
            };
            if let Err(error) = work(batch, &mut buffer) {
                locked(&failed).get_or_insert(error);
            }
        }
    };
    thread::scope(|scope| {
        for _ in 1..AT_ONCE.min(batches.len()) {
            // If there are no threads to be had, this one does it all.
            let _ = thread::Builder::new().spawn_scoped(scope, worker);
        }
        worker();
    });
    failed
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner)
        .map_or(Ok(()), Err)
}

/// Cuts a run of pages into batches of [`LARGEST`].
fn batches_of(run: ChunkRun) -> impl Iterator<Item = Range<u64>> {
    cut(run.range())
}

/// Cuts `pages` into batches of [`LARGEST`].
pub(super) fn cut(pages: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    cut_by(pages, LARGEST / page_size())
}

/// Cuts `pages` into batches of `step`.
pub(super) fn cut_by(pages: Range<u64>, step: u64) -> impl Iterator<Item = Range<u64>> {
    let end = pages.end;
    (pages.start..end)
        .step_by(usize::try_from(step).expect("a few hundred"))
        .map(move |start| start..(start + step).min(end))
}

fn insert_healthy(
    into: &mut ChunkBitmap,
    pages: &Range<u64>,
    poison: &std::collections::BTreeSet<u64>,
) {
    let mut next = pages.start;
    for &sick in poison.range(pages.clone()) {
        into.insert_run(run(&(next..sick)));
        next = sick + 1;
    }
    into.insert_run(run(&(next..pages.end)));
}

fn pages_of(first: u64, addresses: &Range<u64>) -> Range<u64> {
    (addresses.start - first) / page_size()..(addresses.end - first).div_ceil(page_size())
}

fn run(pages: &Range<u64>) -> ChunkRun {
    ChunkRun::new(pages.start, pages.end - pages.start)
}

/// No lock here guards what a panic could leave half done: sets only grow until they are replaced whole.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
