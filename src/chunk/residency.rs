//! Which chunks of a region are here: two bits a chunk, and who waits for one.
//!
//! ```text
//!                  claim                 land
//!          Remote ──────► Fetching ─────────────────► Writing ──done──► Resident
//!            ▲ ▲             │ │   overwrite, fill     ▲ │ ▲                │
//!            │ └────fail─────┘ └───────────────────────┘ │ │                │
//!            │ └───────────────overwrite, fill───────────┼─┘                │
//!            ├───────────────────fail────────────────────┘                  │
//!            └──────────────────────mark_remote─────────────────────────────┘
//! ```
//!
//! A chunk is `Writing` while its bytes are put into the local storage, by one thread alone. So what comes late finds the chunk
//! `Writing` or `Resident` and is dropped: it never overwrites a newer write. [`Residency::mark_remote`] begins a new epoch, and
//! a claim of an older epoch lands nothing: what was asked for before a cut-over never passes for what is current after it.

mod table;
mod waiters;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::PoisonError;
use std::time::Instant;

use super::sync::RwLock;
use super::{ChunkBitmap, ChunkIndex, ChunkRun};
pub use table::ChunkState;
use table::{States, Table};
use waiters::{Next, Waiters, is_settled};

const NONE: States = States::of(&[]);
const REMOTE: States = States::of(&[ChunkState::Remote]);
const FETCHING: States = States::of(&[ChunkState::Fetching]);
const WRITING: States = States::of(&[ChunkState::Writing]);
const RESIDENT: States = States::of(&[ChunkState::Resident]);
const ABSENT: States = States::of(&[ChunkState::Remote, ChunkState::Fetching]);

/// Which chunks of a region are here.
///
/// All methods may be called from any thread; only those with a deadline wait. The states themselves take two bits a chunk, which are
/// allocated when chunks leave the state of the beginning. Counters are derived from the states by counting.
///
/// The methods that take chunks panic if they are not of the region.
#[derive(Debug)]
pub struct Residency {
    table: Table,
    waiters: Waiters,
    /// How often chunks were marked remote. Held for reading while chunks are claimed and land.
    epoch: RwLock<u64>,
}

impl Residency {
    /// Of a region of so many chunks, all remote.
    #[must_use]
    pub fn new(chunks: u64) -> Self {
        Self::all(chunks, ChunkState::Remote)
    }

    /// Of a region of so many chunks, all here.
    #[must_use]
    pub fn all_resident(chunks: u64) -> Self {
        Self::all(chunks, ChunkState::Resident)
    }

    fn all(chunks: u64, state: ChunkState) -> Self {
        Self {
            table: Table::new(chunks, state),
            waiters: Waiters::new(),
            epoch: RwLock::new(0),
        }
    }

    /// Queues the chunks that somebody [waits](Self::wait) for, for [`take_faults`](Self::take_faults).
    ///
    /// # Errors
    /// If the kernel has no descriptor left.
    pub fn reporting_faults(mut self) -> io::Result<Self> {
        self.waiters.report_faults()?;
        Ok(self)
    }

    /// How many chunks there are.
    #[must_use]
    pub fn chunks(&self) -> u64 {
        self.table.chunks()
    }

    /// All chunks.
    #[must_use]
    pub fn all_chunks(&self) -> ChunkRun {
        ChunkRun::new(0, self.chunks())
    }

    /// The state of a chunk, now.
    #[must_use]
    pub fn state(&self, chunk: ChunkIndex) -> ChunkState {
        self.table.state(chunk)
    }

    /// Whether all chunks of `run` are here. What was written before they came here is seen then.
    #[must_use]
    pub fn is_resident(&self, run: ChunkRun) -> bool {
        self.table.all(run, RESIDENT)
    }

    /// How many chunks of `run` are in `state`. Takes time that grows with the run: some 20 ms for 2³⁰ chunks.
    #[must_use]
    pub fn count(&self, run: ChunkRun, state: ChunkState) -> u64 {
        self.table.count(run, States::of(&[state]))
    }

    /// The first run of chunks of `within` that are in `state`, of at most `longest` chunks.
    #[must_use]
    pub fn find(&self, within: ChunkRun, longest: u64, state: ChunkState) -> Option<ChunkRun> {
        self.table.find(within, longest, States::of(&[state]))
    }

    /// Claims the first run of remote chunks of `within`, at most `longest`, for the caller to fetch: nobody else gets them.
    /// `None` if there is none.
    #[must_use]
    pub fn claim(&self, within: ChunkRun, longest: u64) -> Option<Claim<'_>> {
        let epoch = self.epoch.read().unwrap_or_else(PoisonError::into_inner);
        let run = self
            .table
            .change_first(within, longest, REMOTE, ChunkState::Fetching)?;
        Some(Claim {
            residency: self,
            run,
            epoch: *epoch,
        })
    }

    /// Takes all chunks of `run` that are not here for the caller, who overwrites them whole: a fetch in flight is defeated. Those
    /// that are here stay so; the caller writes them, too. Waits while others write them.
    ///
    /// # Errors
    /// [`io::ErrorKind::TimedOut`] after `deadline`.
    pub fn overwrite(&self, run: ChunkRun, deadline: Instant) -> io::Result<Writing<'_>> {
        let mut writing = Writing {
            residency: self,
            runs: Vec::new(),
        };
        let mut left = run;
        // In ascending order, so that two who take overlapping runs never wait for each other.
        while let Some(busy) = writing.take_until(left, WRITING) {
            self.waiters
                .wait(busy, deadline, false, || match self.state(busy) {
                    ChunkState::Writing => Next::Wait { fault: false },
                    _ => Next::Return(()),
                })?;
            left = ChunkRun::new(busy.0, left.end() - busy.0);
        }
        Ok(writing)
    }

    /// Takes those chunks of `run` for the caller, who has bytes for them from the remote end, that are neither here nor written by
    /// anybody. Does not wait.
    pub fn fill(&self, run: ChunkRun) -> Writing<'_> {
        let mut writing = Writing {
            residency: self,
            runs: Vec::new(),
        };
        writing.take_until(run, NONE);
        writing
    }

    /// Makes `chunks` remote, whatever they are, and lets no claim land that was made before. Waits for who writes one of them.
    ///
    /// Who calls this makes sure that nobody reads or writes the region meanwhile; who waits for a chunk goes on waiting.
    ///
    /// # Errors
    /// [`io::ErrorKind::TimedOut`] after `deadline`, if a chunk is still being written; others are remote then.
    ///
    /// # Panics
    /// If `chunks` is not of this region.
    pub fn mark_remote(&self, chunks: &ChunkBitmap, deadline: Instant) -> io::Result<()> {
        assert_eq!(chunks.chunks(), self.chunks(), "a set of this region");
        let mut busy = Vec::new();
        {
            let mut epoch = self.epoch.write().unwrap_or_else(PoisonError::into_inner);
            *epoch += 1;
            // Claims of the epoch that ends own nothing any more, also of chunks that are not in the set.
            self.table
                .change(self.all_chunks(), FETCHING, ChunkState::Remote);
            for run in chunks.runs() {
                self.collect(run, WRITING, &mut busy);
                self.table.change(run, RESIDENT, ChunkState::Remote);
            }
        }
        self.waiters.wake_all();
        for run in busy {
            for chunk in run.range() {
                self.settle(ChunkIndex(chunk), deadline)?;
            }
            self.table.change(run, RESIDENT, ChunkState::Remote);
            self.waiters.wake(run, None);
        }
        Ok(())
    }

    /// Waits until `chunk` is here. A fault is [reported](Self::reporting_faults) if it is not.
    ///
    /// # Errors
    /// [`io::ErrorKind::TimedOut`] after `deadline`; what the fetch failed with; the error of [`refuse`](Self::refuse).
    pub fn wait(&self, chunk: ChunkIndex, deadline: Instant) -> io::Result<()> {
        self.waiters
            .wait(chunk, deadline, true, || match self.state(chunk) {
                ChunkState::Resident => Next::Return(()),
                state => Next::Wait {
                    fault: state != ChunkState::Writing,
                },
            })
    }

    /// Waits until nobody fetches or writes `chunk`, and says whether it is remote or resident.
    ///
    /// # Errors
    /// [`io::ErrorKind::TimedOut`] after `deadline`.
    pub fn settle(&self, chunk: ChunkIndex, deadline: Instant) -> io::Result<ChunkState> {
        self.waiters
            .wait(chunk, deadline, false, || match self.state(chunk) {
                state if is_settled(state) => Next::Return(state),
                _ => Next::Wait { fault: false },
            })
    }

    /// Everybody who waits for a chunk that is not here is told `error`, now and from now on; `None` takes it back.
    pub fn refuse(&self, error: Option<io::Error>) {
        self.waiters.refuse(error);
    }

    /// How many threads wait for chunks.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiters.waiting()
    }

    /// Something to poll for reading: faults wait then. `None` if they are not reported.
    #[must_use]
    pub fn fault_fd(&self) -> Option<BorrowedFd<'_>> {
        self.waiters.fault_fd()
    }

    /// Reports faults for those of `run` that are not here, though nobody waits for them yet: for who will wait for one after the other.
    pub fn request(&self, run: ChunkRun) {
        let mut absent = Vec::new();
        let mut left = run;
        while left.count > 0
            && let Some(found) = self.table.find(left, left.count, ABSENT)
        {
            absent.extend(found.range().map(ChunkIndex));
            left = ChunkRun::new(found.end(), left.end() - found.end());
        }
        self.waiters.request(&absent);
    }

    /// Lets those look again who wait for chunks of `run`; their faults are reported again if nothing has come.
    pub fn look_again(&self, run: ChunkRun) {
        self.waiters.wake(run, None);
    }

    /// Appends the chunks that somebody began to wait for since the last call. A chunk comes again if it did not come and
    /// somebody still waits. Never blocks.
    pub fn take_faults(&self, into: &mut Vec<ChunkIndex>) {
        self.waiters.take_faults(into);
    }

    fn collect(&self, within: ChunkRun, states: States, into: &mut Vec<ChunkRun>) {
        let mut left = within;
        while let Some(run) = self.table.find(left, u64::MAX, states) {
            into.push(run);
            left = ChunkRun::new(run.end(), left.end() - run.end());
        }
    }

    fn settle_all(&self, runs: &[ChunkRun], to: ChunkState, failure: Option<&io::Error>) {
        for &run in runs {
            self.table.change(run, WRITING, to);
            self.waiters.wake(run, failure);
        }
    }
}

/// Chunks that their holder fetches. Dropped, it has failed.
#[derive(Debug)]
#[must_use = "what is claimed is not fetched by anybody else"]
pub struct Claim<'a> {
    residency: &'a Residency,
    run: ChunkRun,
    epoch: u64,
}

impl<'a> Claim<'a> {
    /// What was claimed: at least one chunk.
    #[must_use]
    pub fn run(&self) -> ChunkRun {
        self.run
    }

    /// The bytes have come: those chunks are the holder's to write that nobody has overwritten or marked remote since.
    pub fn land(self) -> Writing<'a> {
        let residency = self.residency;
        let runs = self.release(ChunkState::Writing);
        Writing { residency, runs }
    }

    /// The bytes do not come: the chunks are remote again, and who waits for one is told `error`.
    pub fn fail(self, error: &io::Error) {
        self.give_back(error);
        std::mem::forget(self);
    }

    fn release(self, to: ChunkState) -> Vec<ChunkRun> {
        let runs = self.change(to);
        std::mem::forget(self); // nothing in it needs to be dropped
        runs
    }

    fn change(&self, to: ChunkState) -> Vec<ChunkRun> {
        let epoch = self.residency.epoch.read();
        let epoch = epoch.unwrap_or_else(PoisonError::into_inner);
        if *epoch == self.epoch {
            self.residency.table.change(self.run, FETCHING, to)
        } else {
            Vec::new()
        }
    }

    fn give_back(&self, error: &io::Error) {
        for run in self.change(ChunkState::Remote) {
            self.residency.waiters.wake(run, Some(error));
        }
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.give_back(&io::Error::other("whoever fetched the chunk gave up"));
    }
}

/// Chunks that their holder writes into the local storage: nobody else does. Dropped, it has failed.
#[derive(Debug)]
#[must_use = "the chunks become resident when this is told that they are written"]
pub struct Writing<'a> {
    residency: &'a Residency,
    runs: Vec<ChunkRun>,
}

impl Writing<'_> {
    /// The chunks, in order; there may be none.
    #[must_use]
    pub fn runs(&self) -> &[ChunkRun] {
        &self.runs
    }

    /// Their bytes are in the local storage: the chunks are resident. Says which.
    pub fn done(mut self) -> Vec<ChunkRun> {
        let runs = std::mem::take(&mut self.runs);
        self.residency.settle_all(&runs, ChunkState::Resident, None);
        runs
    }

    /// Their bytes could not be written: the chunks are remote, and who waits for one is told `error`.
    pub fn fail(mut self, error: &io::Error) {
        let runs = std::mem::take(&mut self.runs);
        self.residency
            .settle_all(&runs, ChunkState::Remote, Some(error));
    }

    fn take_until(&mut self, run: ChunkRun, stop: States) -> Option<ChunkIndex> {
        let table = &self.residency.table;
        table.change_until(run, stop, ABSENT, ChunkState::Writing, &mut self.runs)
    }
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        if !self.runs.is_empty() {
            let error = io::Error::other("whoever wrote the chunk gave up");
            let runs = std::mem::take(&mut self.runs);
            self.residency
                .settle_all(&runs, ChunkState::Remote, Some(&error));
        }
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests;

#[cfg(all(test, loom))]
mod loom_tests;
