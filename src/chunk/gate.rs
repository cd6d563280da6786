//! A door before a storage, which can be closed.

use std::io;
use std::ops::Range;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::Storage;
use super::sync::atomic::{AtomicU64, Ordering};
use super::sync::{Condvar, Mutex, MutexGuard};

/// How long an operation waits before the gate, if nothing else is said: as long as the kernel's block layer, which then
/// complains.
const PATIENCE: Duration = Duration::from_secs(30);

/// Lets operations through to a storage, or holds them up while it is [closed](Self::close).
///
/// An operation is inside for its whole length. So once `close` has returned, none is under way and none begins; what
/// was inside has been done. That is what a cut-over needs, or putting another storage in the place of this one.
///
/// Going through takes two atomic operations and no lock. An operation that finds the gate closed waits until it is
/// opened, with a deadline of its own.
#[derive(Debug)]
pub struct Gate {
    storage: Arc<dyn Storage>,
    door: Arc<Door>,
    patience: Duration,
}

/// The proof that nothing is under way behind a [`Gate`]; opens it when it goes away.
#[derive(Debug)]
#[must_use = "the gate opens when this is dropped"]
pub struct Closed {
    storage: Arc<dyn Storage>,
    door: Arc<Door>,
}

impl Gate {
    /// A gate before `storage`, open.
    pub fn new(storage: Arc<dyn Storage>) -> Self {
        Self {
            storage,
            door: Arc::new(Door::new()),
            patience: PATIENCE,
        }
    }

    /// As it is, but an operation waits for `patience` before it fails with [`io::ErrorKind::TimedOut`], instead of 30 s.
    #[must_use]
    pub fn with_patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    /// Closes the gate: lets no operation in any more, and returns when those that are inside have ended. Waits for its
    /// turn where somebody else has closed it.
    ///
    /// `why` is what an operation is told that waited too long. The thread that closes must not go through the gate
    /// before it is open again; [`Closed::storage`] is what lies behind.
    ///
    /// # Errors
    /// [`io::ErrorKind::TimedOut`] at the deadline; the gate is as it was before, then.
    pub fn close(&self, why: &'static str, deadline: Instant) -> io::Result<Closed> {
        self.door.close(why, deadline)?;
        Ok(Closed {
            storage: Arc::clone(&self.storage),
            door: Arc::clone(&self.door),
        })
    }

    /// Whether it is closed now, or being closed.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.door.is_closed()
    }

    fn enter(&self) -> io::Result<Inside<'_>> {
        self.door.enter(self.patience)
    }
}

impl Closed {
    /// What lies behind the gate, with nobody there.
    #[must_use]
    pub fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    /// Opens the gate; as dropping does.
    pub fn open(self) {}
}

impl Drop for Closed {
    fn drop(&mut self) {
        self.door.open();
    }
}

impl Storage for Gate {
    fn len(&self) -> u64 {
        self.storage.len()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let _inside = self.enter()?;
        self.storage.read_exact_at(buf, offset)
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let _inside = self.enter()?;
        self.storage.write_all_at(buf, offset)
    }

    fn zero(&self, range: Range<u64>) -> io::Result<()> {
        let _inside = self.enter()?;
        self.storage.zero(range)
    }

    fn flush(&self) -> io::Result<()> {
        let _inside = self.enter()?;
        self.storage.flush()
    }

    fn data_ranges(&self, within: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let _inside = self.enter()?;
        self.storage.data_ranges(within)
    }

    fn read_ahead_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let _inside = self.enter()?;
        self.storage.read_ahead_at(buf, offset)
    }

    /// Not while it is closed: who asks would wait.
    fn is_at_hand(&self, range: Range<u64>) -> bool {
        !self.is_closed() && self.storage.is_at_hand(range)
    }
}

/// Set while the door is closed; the other bits count who is inside.
const CLOSED: u64 = 1 << 63;

/// Who is inside, and whether anybody may enter.
#[derive(Debug)]
struct Door {
    state: AtomicU64,
    /// Why it is closed; held to change that, and to wait.
    why: Mutex<Option<&'static str>>,
    /// Told when the last one leaves a closed door, and when it opens.
    changed: Condvar,
}

/// Leaves when it goes away.
#[derive(Debug)]
struct Inside<'a>(&'a Door);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.leave();
    }
}

impl Door {
    fn new() -> Self {
        Self {
            state: AtomicU64::new(0),
            why: Mutex::new(None),
            changed: Condvar::new(),
        }
    }

    fn is_closed(&self) -> bool {
        self.state.load(Ordering::Acquire) & CLOSED != 0
    }

    fn enter(&self, patience: Duration) -> io::Result<Inside<'_>> {
        if let Some(inside) = self.try_enter() {
            return Ok(inside);
        }
        let deadline = Instant::now() + patience;
        loop {
            let mut why = self.why();
            while let Some(reason) = *why {
                why = self.wait(why, deadline, || {
                    format!("the storage has been closed for {patience:?}: {reason}")
                })?;
            }
            drop(why);
            // It may be closed again by now.
            if let Some(inside) = self.try_enter() {
                return Ok(inside);
            }
        }
    }

    fn try_enter(&self) -> Option<Inside<'_>> {
        let before = self.state.fetch_add(1, Ordering::AcqRel);
        let inside = Inside(self);
        // Whoever closes it from now on sees us inside; who has closed it sees us leave.
        (before & CLOSED == 0).then_some(inside)
    }

    fn leave(&self) {
        if self.state.fetch_sub(1, Ordering::AcqRel) == CLOSED | 1 {
            // With the lock: who closes has either not looked yet, or waits.
            let _why = self.why();
            self.changed.notify_all();
        }
    }

    fn close(&self, new: &'static str, deadline: Instant) -> io::Result<()> {
        let mut why = self.why();
        while let Some(reason) = *why {
            why = self.wait(why, deadline, || {
                format!("the storage is closed already: {reason}")
            })?;
        }
        *why = Some(new);
        self.state.fetch_or(CLOSED, Ordering::AcqRel);
        while self.state.load(Ordering::Acquire) != CLOSED {
            why = self
                .wait(why, deadline, || {
                    "operations are still under way in the storage".to_owned()
                })
                .inspect_err(|_| self.open())?;
        }
        Ok(())
    }

    fn open(&self) {
        let mut why = self.why();
        self.state.fetch_and(!CLOSED, Ordering::AcqRel);
        *why = None;
        self.changed.notify_all();
    }

    fn why(&self) -> MutexGuard<'_, Option<&'static str>> {
        // One assignment, which a panic cannot halve.
        self.why.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a change, up to the deadline. The guard is gone when this fails.
    fn wait<'a>(
        &self,
        guard: MutexGuard<'a, Option<&'static str>>,
        deadline: Instant,
        late: impl FnOnce() -> String,
    ) -> io::Result<MutexGuard<'a, Option<&'static str>>> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            drop(guard);
            return Err(io::Error::new(io::ErrorKind::TimedOut, late()));
        }
        let (guard, _) = self
            .changed
            .wait_timeout(guard, left)
            .unwrap_or_else(PoisonError::into_inner);
        Ok(guard)
    }
}

#[cfg(not(loom))]
#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use crate::backend::MemoryStorage;
    use crate::chunk::{Fault, Faults, Faulty, Operation};

    crate::chunk::conformance::storage_conformance!(|len| {
        Arc::new(Gate::new(Arc::new(MemoryStorage::new(len)))) as _
    });

    const LONG: Duration = Duration::from_secs(60);

    fn late() -> Instant {
        Instant::now() + LONG
    }

    fn gate() -> (Gate, Faults) {
        let faulty = Faulty::new(Arc::new(MemoryStorage::new(8192)));
        let faults = faulty.faults();
        (Gate::new(Arc::new(faulty)).with_patience(LONG), faults)
    }

    /// r3map let its lock go before the operation ran, so that locking returned with writes in flight.
    #[test]
    fn closing_waits_for_what_is_in_flight() {
        let (gate, faults) = gate();
        faults.add(Fault::stall(LONG).on(Operation::Write));
        thread::scope(|scope| {
            let write = scope.spawn(|| gate.write_all_at(&[1; 10], 0));
            faults.await_stalled(1, LONG);
            let closing = scope.spawn(|| gate.close("a test", late()));
            while !gate.is_closed() {
                thread::yield_now();
            }
            assert!(!closing.is_finished());
            faults.clear();
            write.join().unwrap().unwrap();
            let closed = closing.join().unwrap().unwrap();
            let mut buf = [0; 10];
            closed.storage().read_exact_at(&mut buf, 0).unwrap();
            assert_eq!(buf, [1; 10]);
        });
    }

    #[test]
    fn what_comes_while_it_is_closed_waits_and_goes_on_when_it_opens() {
        let (gate, _) = gate();
        let closed = gate.close("a test", late()).unwrap();
        assert!(!gate.is_at_hand(0..1));
        thread::scope(|scope| {
            let waiting = [
                scope.spawn(|| gate.write_all_at(&[1; 10], 0)),
                scope.spawn(|| gate.read_exact_at(&mut [0; 10], 4000)),
                scope.spawn(|| gate.flush()),
                scope.spawn(|| gate.zero(4096..8192)),
                scope.spawn(|| gate.data_ranges(0..8192).map(drop)),
            ];
            // Nothing tells that a thread waits; that it went through would be seen here, now and then.
            thread::yield_now();
            assert!(waiting.iter().all(|thread| !thread.is_finished()));
            assert!(closed.storage().data_ranges(0..8192).unwrap().is_empty());
            closed.open();
            for thread in waiting {
                thread.join().unwrap().unwrap();
            }
        });
        assert!(!gate.is_closed());
    }

    #[test]
    fn who_waits_too_long_is_told_why_and_the_gate_is_well_afterwards() {
        let (gate, _) = gate();
        let gate = gate.with_patience(Duration::from_millis(1));
        let closed = gate.close("the subject is moving", late()).unwrap();
        let error = gate.read_exact_at(&mut [0], 0).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(
            error.to_string().contains("the subject is moving"),
            "{error}"
        );
        let error = gate.close("another", Instant::now()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(gate.is_closed(), "by the first");
        drop(closed);
        gate.read_exact_at(&mut [0], 0).unwrap();
        gate.close("again", late()).unwrap().open();
    }

    #[test]
    fn closing_that_takes_too_long_leaves_the_gate_open() {
        let (gate, faults) = gate();
        faults.add(Fault::stall(LONG).times(1));
        thread::scope(|scope| {
            let read = scope.spawn(|| gate.read_exact_at(&mut [0], 0));
            faults.await_stalled(1, LONG);
            let error = gate.close("a test", Instant::now()).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
            gate.write_all_at(&[1], 0).unwrap();
            faults.clear();
            read.join().unwrap().unwrap();
        });
        gate.close("again", late()).unwrap().open();
    }

    #[test]
    fn an_operation_that_panics_has_left() {
        #[derive(Debug)]
        struct Panics;
        impl Storage for Panics {
            fn len(&self) -> u64 {
                1
            }
            fn read_exact_at(&self, _: &mut [u8], _: u64) -> io::Result<()> {
                panic!("as told")
            }
            fn write_all_at(&self, _: &[u8], _: u64) -> io::Result<()> {
                Ok(())
            }
            fn flush(&self) -> io::Result<()> {
                Ok(())
            }
            fn data_ranges(&self, _: Range<u64>) -> io::Result<Vec<Range<u64>>> {
                Ok(Vec::new())
            }
        }
        let gate = Arc::new(Gate::new(Arc::new(Panics)));
        let reader = gate.clone();
        assert!(
            thread::spawn(move || reader.read_exact_at(&mut [0], 0))
                .join()
                .is_err()
        );
        gate.close("a test", late()).unwrap().open();
    }

    #[test]
    fn closers_take_turns() {
        let (gate, _) = gate();
        let inside = AtomicU64::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for round in 0..50_u8 {
                        let closed = gate.close("a test", late()).unwrap();
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        closed.storage().write_all_at(&[round], 0).unwrap();
                        inside.fetch_sub(1, Ordering::SeqCst);
                        drop(closed);
                        gate.read_exact_at(&mut [0], 0).unwrap();
                    }
                });
            }
        });
    }
}

#[cfg(loom)]
#[cfg(test)]
mod loom_models {
    use loom::cell::UnsafeCell;
    use loom::sync::Arc;
    use loom::thread;

    use super::*;

    const LONG: Duration = Duration::from_secs(3600);

    fn late() -> Instant {
        Instant::now() + LONG
    }

    /// loom reports two that touch the cell without an order between them.
    #[test]
    fn loom_who_has_closed_is_alone_and_sees_what_was_done() {
        loom::model(|| {
            let door = Arc::new((Door::new(), UnsafeCell::new(())));
            let other = door.clone();
            let operation = thread::spawn(move || {
                let _inside = other.0.enter(LONG).unwrap();
                other.1.with_mut(drop);
            });
            door.0.close("a model", late()).unwrap();
            door.1.with_mut(drop);
            door.0.open();
            operation.join().unwrap();
        });
    }

    /// A wake-up that is lost is a deadlock, which loom reports.
    #[test]
    fn loom_nobody_waits_for_ever_before_the_gate_or_for_it() {
        // Three threads that may be interrupted anywhere take hours; a wake-up is lost by two interruptions.
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(2);
        model.check(|| {
            let door = Arc::new(Door::new());
            let operations = [(); 2].map(|()| {
                let door = door.clone();
                thread::spawn(move || drop(door.enter(LONG).unwrap()))
            });
            door.close("a model", late()).unwrap();
            door.open();
            for operation in operations {
                operation.join().unwrap();
            }
            assert_eq!(door.state.load(Ordering::SeqCst), 0);
        });
    }

    #[test]
    fn loom_closers_take_turns() {
        loom::model(|| {
            let door = Arc::new((Door::new(), UnsafeCell::new(())));
            let other = door.clone();
            let close = |door: &(Door, UnsafeCell<()>)| {
                door.0.close("a model", late()).unwrap();
                door.1.with_mut(drop);
                door.0.open();
            };
            let closer = thread::spawn(move || close(&other));
            close(&door);
            closer.join().unwrap();
        });
    }
}
