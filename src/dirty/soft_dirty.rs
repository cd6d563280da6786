//! Writes as the soft-dirty bits of older kernels show them.

use std::fmt::Debug;
use std::io;
use std::mem;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::DirtyTracker;
use super::area::{Area, Areas, not_started};
use crate::chunk::{ChunkBitmap, ChunkSize};
use crate::sys::pagemap::{Pagemap, soft_dirty_works};

/// Keeps a process from running for a moment.
pub trait Halt: Debug + Send + Sync {
    /// Runs `work` while no thread of the process runs, and lets them go on whatever it answers.
    ///
    /// # Errors
    /// If the process could not be stopped, in which case `work` did not run; else what `work` answers.
    fn halted(&self, work: &mut (dyn FnMut() -> io::Result<()> + Send)) -> io::Result<()>;
}

/// Tracks the writes of one process to a region that it has mapped, exactly, by page, where nothing better works:
/// needs `CONFIG_MEM_SOFT_DIRTY` and no userfaultfd.
///
/// What it costs:
/// - The bits cannot be read and cleared at once, so each take **halts** the process while it does both; about
///   10 ms for each GiB.
/// - Clearing covers **all** memory of the process: two trackers of one process, or a checkpoint tool at work on it,
///   take each other's bits.
/// - Where the kernel swaps shared memory out, it forgets the bit: use it on hosts without swap, or with the memory
///   locked.
///
/// Like [`WriteProtect`](super::WriteProtect) it sees the writes of this process only.
#[derive(Debug)]
pub struct SoftDirty {
    areas: Areas,
    halt: Box<dyn Halt>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    pagemap: Pagemap,
    /// Taken and put back, or lost to a failed take: for the next one. `None` while nothing is tracked.
    pending: Option<ChunkBitmap>,
}

impl SoftDirty {
    /// Tracks the `areas` in which process `pid` maps a region of `region_len` bytes; `halt` stops that process.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] if the kernel keeps no soft-dirty bits; [`io::ErrorKind::InvalidInput`] if an
    /// area is not whole pages of the region; else if the process may not be traced.
    pub fn new(
        pid: u32,
        areas: Vec<Area>,
        region_len: u64,
        chunk_size: ChunkSize,
        halt: Box<dyn Halt>,
    ) -> io::Result<Self> {
        if !soft_dirty_works()? {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the kernel was built without CONFIG_MEM_SOFT_DIRTY: track with userfaultfd or with digests",
            ));
        }
        Ok(Self {
            areas: Areas::new(areas, region_len, chunk_size)?,
            halt,
            state: Mutex::new(State {
                pagemap: Pagemap::open(pid)?,
                pending: None,
            }),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves the set as it was: no change to it is half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DirtyTracker for SoftDirty {
    /// The process runs on: what it writes while the bits are being cleared was written before this returned.
    fn start(&self) -> io::Result<()> {
        let mut state = self.state();
        state.pagemap.clear_soft_dirty()?;
        state.pending = Some(self.areas.no_chunks());
        Ok(())
    }

    fn take(&self) -> io::Result<ChunkBitmap> {
        let mut state = self.state();
        let State { pagemap, pending } = &mut *state;
        let pending = pending.as_mut().ok_or_else(not_started)?;
        // What is read before a failure stays pending; bits are cleared only when all were read.
        self.halt.halted(&mut || {
            for area in self.areas.iter() {
                pagemap.soft_dirty(area.address.clone(), &mut |found| {
                    pending.insert_run(self.areas.chunks(area, &found));
                })?;
            }
            pagemap.clear_soft_dirty()
        })?;
        Ok(mem::replace(pending, self.areas.no_chunks()))
    }

    fn restore(&self, chunks: &ChunkBitmap) -> io::Result<()> {
        let mut state = self.state();
        let pending = state.pending.as_mut().ok_or_else(not_started)?;
        pending.union_with(chunks);
        Ok(())
    }

    fn stop(&self) -> io::Result<()> {
        self.state().pending = None;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::dirty::conformance::Tracked;
    use crate::sys::mapping::Mapping;
    use std::sync::{Arc, RwLock};

    /// Holds up the writers of a test: they write under the other side of the lock.
    #[derive(Debug, Default, Clone)]
    struct Gate(Arc<RwLock<()>>);

    impl Halt for Gate {
        fn halted(&self, work: &mut (dyn FnMut() -> io::Result<()> + Send)) -> io::Result<()> {
            let _closed = self.0.write().unwrap();
            work()
        }
    }

    #[derive(Debug)]
    struct OwnMemory {
        memory: Mapping,
        gate: Gate,
        tracker: SoftDirty,
    }

    fn own_memory(len: u64, chunk_size: ChunkSize) -> OwnMemory {
        let memory = Mapping::anonymous(len).unwrap();
        let area = Area {
            address: memory.addresses(),
            offset: 0,
        };
        let gate = Gate::default();
        let halt = Box::new(gate.clone());
        let pid = std::process::id();
        let tracker = SoftDirty::new(pid, vec![area], len, chunk_size, halt).unwrap();
        OwnMemory {
            memory,
            gate,
            tracker,
        }
    }

    impl Tracked for OwnMemory {
        fn tracker(&self) -> &dyn DirtyTracker {
            &self.tracker
        }

        fn write(&self, offset: u64, bytes: &[u8]) {
            let _open = self.gate.0.read().unwrap();
            self.memory.write(offset, bytes).unwrap();
        }

        fn read(&self, offset: u64, buf: &mut [u8]) {
            let range = offset..offset + buf.len() as u64;
            self.memory.read(range, buf).unwrap();
        }

        fn allocated(&self) -> u64 {
            self.memory.file().metadata().unwrap().blocks() * 512
        }
    }

    // One after the other: clearing the bits of this process takes those of a test that runs beside it.
    #[test]
    #[ignore = "kernel: needs CONFIG_MEM_SOFT_DIRTY, and the process to itself"]
    fn soft_dirty_bits_keep_the_promises_of_a_tracker() {
        crate::dirty::conformance::run_all(own_memory);
    }

    #[test]
    fn a_kernel_without_soft_dirty_bits_is_refused_with_the_reason() {
        let refused = SoftDirty::new(
            std::process::id(),
            vec![],
            0,
            ChunkSize::PAGE,
            Box::new(Gate::default()),
        );
        // Both kinds of kernel are right, each in its own way.
        match (soft_dirty_works().unwrap(), refused) {
            (true, Ok(_)) => {}
            (false, Err(error)) => {
                assert_eq!(error.kind(), io::ErrorKind::Unsupported);
                assert!(error.to_string().contains("CONFIG_MEM_SOFT_DIRTY"));
            }
            (works, answer) => panic!("soft-dirty works: {works}, but: {answer:?}"),
        }
    }
}
