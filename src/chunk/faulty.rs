//! Storages that fail when they are told to: what every layer above is tried on.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::random::Random;
use super::{ChunkBitmap, ChunkIndex, ChunkRun, ChunkSize, ChunkStore, Storage, check_range};

/// What is done to a storage, or to a store of chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// `read_exact_at`, `read_ahead_at`; `get`.
    Read,
    /// `write_all_at`; `put`.
    Write,
    /// `zero`; `remove`.
    Zero,
    /// `flush`.
    Flush,
    /// `data_ranges`; `present`.
    Look,
}

/// One way to fail, and which operations it meets; every operation, if nothing narrows it down.
#[derive(Debug, Clone)]
pub struct Fault {
    effect: Effect,
    operation: Option<Operation>,
    within: Range<u64>,
    after: u64,
    times: u64,
    chance: Option<(u64, u64, Random)>,
}

#[derive(Debug, Clone, Copy)]
enum Effect {
    Error(io::ErrorKind),
    Partly(u64, io::ErrorKind),
    Stall(Duration),
    Damage,
}

impl Fault {
    /// Nothing is done, and it fails so.
    #[must_use]
    pub fn error(kind: io::ErrorKind) -> Self {
        Self::new(Effect::Error(kind))
    }

    /// The first `bytes` are done, then it fails so; with more bytes than there are, all is done and it still fails: a
    /// reply that was lost. Chunks are done whole.
    #[must_use]
    pub fn partly(bytes: u64, kind: io::ErrorKind) -> Self {
        Self::new(Effect::Partly(bytes, kind))
    }

    /// It waits until it is [released](Faults::release), then goes on; [`io::ErrorKind::TimedOut`] after so long.
    #[must_use]
    pub fn stall(longest: Duration) -> Self {
        Self::new(Effect::Stall(longest))
    }

    /// A read succeeds with one bit of the first byte wrong; other operations are left alone.
    #[must_use]
    pub fn damage() -> Self {
        Self {
            operation: Some(Operation::Read),
            ..Self::new(Effect::Damage)
        }
    }

    fn new(effect: Effect) -> Self {
        Self {
            effect,
            operation: None,
            within: 0..u64::MAX,
            after: 0,
            times: u64::MAX,
            chance: None,
        }
    }

    /// Meets this operation only.
    #[must_use]
    pub fn on(self, operation: Operation) -> Self {
        Self {
            operation: Some(operation),
            ..self
        }
    }

    /// Meets operations only that touch one of these bytes; a flush touches all.
    #[must_use]
    pub fn within(self, within: Range<u64>) -> Self {
        Self { within, ..self }
    }

    /// Leaves the first `count` alone that it would meet.
    #[must_use]
    pub fn after(self, count: u64) -> Self {
        Self {
            after: count,
            ..self
        }
    }

    /// Meets so many and no more.
    #[must_use]
    pub fn times(self, count: u64) -> Self {
        Self {
            times: count,
            ..self
        }
    }

    /// Meets `some` of `of` operations, which ones following from `seed`.
    #[must_use]
    pub fn by_chance(self, some: u64, of: u64, seed: u64) -> Self {
        Self {
            chance: Some((some, of, Random::new(seed))),
            ..self
        }
    }

    fn meets(&mut self, operation: Operation, range: &Range<u64>) -> bool {
        let touches = range.start < self.within.end && self.within.start < range.end;
        if self.operation.is_some_and(|met| met != operation) || !touches || self.times == 0 {
            return false;
        }
        let lucky = |(some, of, random): &mut (u64, u64, Random)| random.below(*of) >= *some;
        if self.chance.as_mut().is_some_and(lucky) {
            return false;
        }
        if self.after > 0 {
            self.after -= 1;
            return false;
        }
        self.times -= 1;
        true
    }
}

/// The faults of a storage, for the test that steers it; clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Faults(Arc<Steering>);

#[derive(Debug, Default)]
struct Steering {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    faults: Vec<Fault>,
    struck: u64,
    stalled: u64,
    /// Goes up with every release.
    releases: u64,
}

impl Faults {
    /// From now on, and before those that were added earlier are asked. One operation meets one fault.
    pub fn add(&self, fault: Fault) {
        self.state().faults.insert(0, fault);
    }

    /// The medium is well again; what stalls goes on.
    pub fn clear(&self) {
        self.state().faults.clear();
        self.release();
    }

    /// Lets everything go on that stalls now.
    pub fn release(&self) {
        self.state().releases += 1;
        self.0.changed.notify_all();
    }

    /// How many operations have met a fault.
    #[must_use]
    pub fn struck(&self) -> u64 {
        self.state().struck
    }

    /// How many operations stall now.
    #[must_use]
    pub fn stalled(&self) -> u64 {
        self.state().stalled
    }

    /// Returns when `count` operations stall at once.
    ///
    /// # Panics
    /// If they do not within `longest`.
    pub fn await_stalled(&self, count: u64, longest: Duration) {
        let (state, _) = self
            .0
            .changed
            .wait_timeout_while(self.state(), longest, |state| state.stalled < count)
            .unwrap_or_else(PoisonError::into_inner);
        assert!(state.stalled >= count, "{count} operations did not stall");
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Counters and a list, right between any two operations.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What happens to an operation, after it has stalled if it had to.
    fn strike(&self, operation: Operation, range: Range<u64>) -> io::Result<Strike> {
        let mut state = self.state();
        let met = state
            .faults
            .iter_mut()
            .find_map(|fault| fault.meets(operation, &range).then_some(fault.effect));
        let Some(effect) = met else {
            return Ok(Strike::Spared);
        };
        state.struck += 1;
        match effect {
            Effect::Error(kind) => Err(told_to(kind)),
            Effect::Partly(bytes, kind) => Ok(Strike::Partly(bytes, kind)),
            Effect::Damage => Ok(Strike::Damaged),
            Effect::Stall(longest) => {
                self.stall(state, Instant::now() + longest)?;
                Ok(Strike::Spared)
            }
        }
    }

    fn stall(&self, mut state: MutexGuard<'_, State>, deadline: Instant) -> io::Result<()> {
        let releases = state.releases;
        state.stalled += 1;
        self.0.changed.notify_all();
        let mut left = deadline.saturating_duration_since(Instant::now());
        while state.releases == releases && !left.is_zero() {
            (state, _) = self
                .0
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner);
            left = deadline.saturating_duration_since(Instant::now());
        }
        state.stalled -= 1;
        if state.releases == releases {
            return Err(told_to(io::ErrorKind::TimedOut));
        }
        Ok(())
    }
}

enum Strike {
    Spared,
    Partly(u64, io::ErrorKind),
    Damaged,
}

fn told_to(kind: io::ErrorKind) -> io::Error {
    io::Error::new(kind, "a fault that a test asked for")
}

/// A storage that meets faults.
#[derive(Debug)]
pub struct Faulty {
    storage: Arc<dyn Storage>,
    faults: Faults,
}

impl Faulty {
    /// `storage`, in good health until a fault is added.
    pub fn new(storage: Arc<dyn Storage>) -> Self {
        Self {
            storage,
            faults: Faults::default(),
        }
    }

    /// Its faults.
    #[must_use]
    pub fn faults(&self) -> Faults {
        self.faults.clone()
    }

    fn read(
        &self,
        buf: &mut [u8],
        offset: u64,
        how: impl Fn(&mut [u8], u64) -> io::Result<()>,
    ) -> io::Result<()> {
        check_range(self.len(), offset, buf.len() as u64)?;
        let range = offset..offset + buf.len() as u64;
        match self.faults.strike(Operation::Read, range)? {
            Strike::Spared => how(buf, offset),
            Strike::Partly(bytes, kind) => {
                let part = part_of(buf.len(), bytes);
                how(&mut buf[..part], offset)?;
                Err(told_to(kind))
            }
            Strike::Damaged => {
                how(buf, offset)?;
                if let Some(first) = buf.first_mut() {
                    *first ^= 1;
                }
                Ok(())
            }
        }
    }
}

fn part_of(len: usize, bytes: u64) -> usize {
    usize::try_from(bytes).map_or(len, |bytes| bytes.min(len))
}

impl Storage for Faulty {
    fn len(&self) -> u64 {
        self.storage.len()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.read(buf, offset, |buf, offset| {
            self.storage.read_exact_at(buf, offset)
        })
    }

    fn read_ahead_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.read(buf, offset, |buf, offset| {
            self.storage.read_ahead_at(buf, offset)
        })
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        check_range(self.len(), offset, buf.len() as u64)?;
        let range = offset..offset + buf.len() as u64;
        if let Strike::Partly(bytes, kind) = self.faults.strike(Operation::Write, range)? {
            let part = part_of(buf.len(), bytes);
            self.storage.write_all_at(&buf[..part], offset)?;
            return Err(told_to(kind));
        }
        self.storage.write_all_at(buf, offset)
    }

    fn zero(&self, range: Range<u64>) -> io::Result<()> {
        if let Strike::Partly(bytes, kind) = self.faults.strike(Operation::Zero, range.clone())? {
            let end = range.end.min(range.start.saturating_add(bytes));
            self.storage.zero(range.start..end)?;
            return Err(told_to(kind));
        }
        self.storage.zero(range)
    }

    fn flush(&self) -> io::Result<()> {
        let strike = self.faults.strike(Operation::Flush, 0..u64::MAX)?;
        self.storage.flush()?;
        match strike {
            Strike::Partly(_, kind) => Err(told_to(kind)),
            Strike::Spared | Strike::Damaged => Ok(()),
        }
    }

    fn data_ranges(&self, within: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let strike = self.faults.strike(Operation::Look, within.clone())?;
        let ranges = self.storage.data_ranges(within)?;
        match strike {
            Strike::Partly(_, kind) => Err(told_to(kind)),
            Strike::Spared | Strike::Damaged => Ok(ranges),
        }
    }
}

/// A store of chunks that meets faults.
#[derive(Debug)]
pub struct FaultyStore {
    store: Arc<dyn ChunkStore>,
    faults: Faults,
}

impl FaultyStore {
    /// `store`, in good health until a fault is added.
    pub fn new(store: Arc<dyn ChunkStore>) -> Self {
        Self {
            store,
            faults: Faults::default(),
        }
    }

    /// Its faults. Ranges are the bytes of the chunks.
    #[must_use]
    pub fn faults(&self) -> Faults {
        self.faults.clone()
    }

    /// How many of the chunks the operation does, and how it fails after them.
    fn strike(
        &self,
        operation: Operation,
        chunks: impl ExactSizeIterator<Item = ChunkIndex> + Clone,
    ) -> io::Result<(usize, Option<io::ErrorKind>, bool)> {
        let size = u64::from(self.store.chunk_size().bytes());
        let count = chunks.len();
        let first = chunks.clone().map(|chunk| chunk.0).min().unwrap_or(0);
        let last = chunks.map(|chunk| chunk.0).max().unwrap_or(0);
        let range = first.saturating_mul(size)..last.saturating_add(1).saturating_mul(size);
        Ok(match self.faults.strike(operation, range)? {
            Strike::Spared => (count, None, false),
            Strike::Damaged => (count, None, true),
            Strike::Partly(bytes, kind) => (part_of(count, bytes / size), Some(kind), false),
        })
    }
}

fn failed(how: Option<io::ErrorKind>) -> io::Result<()> {
    how.map_or(Ok(()), |kind| Err(told_to(kind)))
}

impl ChunkStore for FaultyStore {
    fn chunk_size(&self) -> ChunkSize {
        self.store.chunk_size()
    }

    fn len(&self) -> u64 {
        self.store.len()
    }

    fn get(
        &self,
        chunks: &[ChunkIndex],
        found: &mut dyn FnMut(usize, Option<&[u8]>),
    ) -> io::Result<()> {
        let (count, fails, damages) = self.strike(Operation::Read, chunks.iter().copied())?;
        self.store
            .get(&chunks[..count], &mut |place, bytes| match bytes {
                Some(bytes) if damages => {
                    let mut wrong = bytes.to_vec();
                    wrong[0] ^= 1;
                    found(place, Some(&wrong));
                }
                bytes => found(place, bytes),
            })?;
        failed(fails)
    }

    fn put(&self, chunks: &[(ChunkIndex, &[u8])]) -> io::Result<()> {
        let (count, fails, _) = self.strike(Operation::Write, chunks.iter().map(|put| put.0))?;
        self.store.put(&chunks[..count])?;
        failed(fails)
    }

    fn remove(&self, chunks: &[ChunkIndex]) -> io::Result<()> {
        let (count, fails, _) = self.strike(Operation::Zero, chunks.iter().copied())?;
        self.store.remove(&chunks[..count])?;
        failed(fails)
    }

    fn present(&self, within: ChunkRun) -> io::Result<ChunkBitmap> {
        let (_, fails, _) = self.strike(Operation::Look, [within.start].into_iter())?;
        failed(fails)?;
        self.store.present(within)
    }

    fn flush(&self) -> io::Result<()> {
        let (_, fails, _) = self.strike(Operation::Flush, std::iter::empty())?;
        self.store.flush()?;
        failed(fails)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::MemoryStorage;
    use crate::chunk::conformance::MapStore;

    crate::chunk::conformance::storage_conformance!(|len| {
        Arc::new(Faulty::new(Arc::new(MemoryStorage::new(len)))) as _
    });

    mod of_chunks {
        use super::*;

        crate::chunk::conformance::store_conformance!(|chunk_size, len| {
            Arc::new(FaultyStore::new(Arc::new(MapStore::new(chunk_size, len)))) as _
        });
    }

    fn faulty() -> (Faulty, Faults) {
        let faulty = Faulty::new(Arc::new(MemoryStorage::new(10_000)));
        let faults = faulty.faults();
        (faulty, faults)
    }

    #[test]
    fn a_fault_meets_what_it_was_narrowed_down_to() {
        let (faulty, faults) = faulty();
        let full = Fault::error(io::ErrorKind::StorageFull).on(Operation::Write);
        faults.add(full.within(100..200).after(1).times(2));
        let write = |offset| faulty.write_all_at(&[1; 10], offset).is_ok();
        assert!(write(90), "ends where the range begins");
        assert!(write(95), "the first that it would meet");
        assert!(faulty.read_exact_at(&mut [0], 150).is_ok());
        assert!(!write(195) && !write(100));
        assert!(write(100), "as often as it was told");
        assert_eq!(faults.struck(), 2);
        faults.add(Fault::error(io::ErrorKind::Other).on(Operation::Flush));
        assert!(faulty.flush().is_err());
        faults.clear();
        assert!(faulty.flush().is_ok());
    }

    #[test]
    fn a_part_is_done_before_it_fails() {
        let (faulty, faults) = faulty();
        faults.add(Fault::partly(3, io::ErrorKind::BrokenPipe).times(1));
        assert!(faulty.write_all_at(&[7; 10], 0).is_err());
        let mut buf = [9; 10];
        faulty.read_exact_at(&mut buf, 0).unwrap();
        assert_eq!(buf, [7, 7, 7, 0, 0, 0, 0, 0, 0, 0]);
        faults.add(Fault::partly(2, io::ErrorKind::BrokenPipe).times(1));
        let mut buf = [9; 4];
        assert!(faulty.read_exact_at(&mut buf, 0).is_err());
        assert_eq!(buf, [7, 7, 9, 9]);
        faults.add(Fault::damage().times(1));
        faulty.read_exact_at(&mut buf, 0).unwrap();
        assert_eq!(buf, [6, 7, 7, 0]);
    }

    #[test]
    fn what_stalls_goes_on_when_it_is_released_and_fails_when_it_is_not() {
        let (faulty, faults) = faulty();
        faults.add(Fault::stall(Duration::from_secs(60)).times(2));
        std::thread::scope(|scope| {
            let stalled = [(); 2].map(|()| scope.spawn(|| faulty.read_exact_at(&mut [0], 0)));
            faults.await_stalled(2, Duration::from_secs(60));
            assert!(faulty.read_exact_at(&mut [0], 0).is_ok(), "nobody else");
            faults.release();
            for thread in stalled {
                thread.join().unwrap().unwrap();
            }
        });
        faults.add(Fault::stall(Duration::from_millis(1)));
        let late = faulty.read_exact_at(&mut [0], 0).unwrap_err();
        assert_eq!(late.kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn chance_can_be_had_again() {
        let strikes = |seed| {
            let (faulty, faults) = faulty();
            faults.add(Fault::error(io::ErrorKind::Other).by_chance(1, 4, seed));
            let reads = (0..400).map(|_| faulty.read_exact_at(&mut [0], 0).is_err());
            reads.collect::<Vec<_>>()
        };
        let count = strikes(1).iter().filter(|&&struck| struck).count();
        assert!((50..150).contains(&count), "{count} of 400");
        assert_eq!(strikes(1), strikes(1));
        assert_ne!(strikes(1), strikes(2));
    }

    #[test]
    fn a_batch_fails_after_the_chunks_that_were_done() {
        let store = Arc::new(MapStore::new(ChunkSize::PAGE, 3 * 4096));
        let faulty = FaultyStore::new(store.clone());
        faulty
            .faults()
            .add(Fault::partly(8192, io::ErrorKind::BrokenPipe).times(1));
        let page = [1; 4096];
        let batch = [0, 1, 2].map(|chunk| (ChunkIndex(chunk), &page[..]));
        assert!(faulty.put(&batch).is_err());
        assert_eq!(store.present(ChunkRun::new(0, 3)).unwrap().count(), 2);
    }
}
