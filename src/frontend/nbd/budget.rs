//! How many bytes may be held for clients, and buffers that are used again.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Bytes that may be in use.
#[derive(Debug)]
pub(super) struct Budget {
    limit: u64,
    state: Mutex<State>,
    freed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    used: u64,
    waiting: usize,
}

impl Budget {
    pub(super) fn new(limit: u64) -> Arc<Self> {
        Arc::new(Self {
            limit,
            state: Mutex::default(),
            freed: Condvar::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that could panic runs under the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `bytes`, if there are so many; if none are in use, more than there are.
    pub(super) fn try_take(self: &Arc<Self>, bytes: u64) -> Option<Charge> {
        let mut state = self.lock();
        if state.used > 0 && state.used.saturating_add(bytes) > self.limit {
            return None;
        }
        state.used += bytes;
        let budget = Arc::clone(self);
        Some(Charge { budget, bytes })
    }

    /// As [`try_take`](Self::try_take), but waits until `deadline` for others to give theirs back.
    pub(super) fn take(self: &Arc<Self>, bytes: u64, deadline: Instant) -> Option<Charge> {
        let room =
            |state: &State| state.used == 0 || state.used.saturating_add(bytes) <= self.limit;
        // Somebody else may be faster; then the next round of the caller's decides.
        self.wait(deadline, room)
            .then(|| self.try_take(bytes))
            .flatten()
    }

    /// Waits until `deadline` for nothing to be in use.
    pub(super) fn wait_idle(&self, deadline: Instant) -> bool {
        self.wait(deadline, |state| state.used == 0)
    }

    fn wait(&self, deadline: Instant, ready: impl Fn(&State) -> bool) -> bool {
        let mut state = self.lock();
        while !ready(&state) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state.waiting += 1;
            state = self
                .freed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
            state.waiting -= 1;
        }
        true
    }
}

/// Bytes of a budget, given back when this is dropped.
#[derive(Debug)]
pub(super) struct Charge {
    budget: Arc<Budget>,
    bytes: u64,
}

impl Drop for Charge {
    fn drop(&mut self) {
        let mut state = self.budget.lock();
        state.used -= self.bytes;
        let waiting = state.waiting > 0;
        drop(state);
        if waiting {
            self.budget.freed.notify_all();
        }
    }
}

/// What one connection holds, of its own budget and of that of all.
#[derive(Debug)]
pub(super) struct Charges {
    /// Given back first, so that who waits for all finds that the connection has nothing in use.
    _all: Option<Charge>,
    _own: Charge,
}

/// A request of at most this size is never kept waiting by other connections if it is the only one of its own: who fills the
/// budget of all and takes no answers cannot stop the others.
const GUARANTEED: u64 = 256 << 10;

impl Charges {
    /// Takes `bytes` of both if they are there now.
    pub(super) fn try_take(own: &Arc<Budget>, all: &Arc<Budget>, bytes: u64) -> Option<Self> {
        let alone = bytes <= GUARANTEED && own.lock().used == 0;
        let own = own.try_take(bytes)?;
        let all = all.try_take(bytes);
        if all.is_none() && !alone {
            return None;
        }
        Some(Self {
            _all: all,
            _own: own,
        })
    }

    /// Waits for `bytes` of both for as long as `wait` says so, which is asked once a second.
    pub(super) fn take(
        own: &Arc<Budget>,
        all: &Arc<Budget>,
        bytes: u64,
        wait: impl Fn() -> bool,
    ) -> Option<Self> {
        loop {
            if let Some(charges) = Self::try_take(own, all, bytes) {
                return Some(charges);
            }
            if !wait() {
                return None;
            }
            let deadline = Instant::now() + Duration::from_secs(1);
            // Where one has room and the other has not, only that one is waited for. What is taken to know is given back
            // at once.
            drop(own.take(bytes, deadline));
            drop(all.take(bytes, deadline));
        }
    }
}

/// The smallest buffer that is kept, as a power of two.
const SMALLEST: u32 = 12;
/// So many sizes of buffers: up to 32 MiB, the largest payload.
const SIZES: usize = 14;

/// Buffers that are used again: memory that is touched for the first time costs more than the request.
#[derive(Debug)]
pub(super) struct Buffers {
    most: usize,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    bytes: usize,
    free: [Vec<Box<[u8]>>; SIZES],
}

impl Buffers {
    /// Keeps at most `most` bytes of what is not in use.
    pub(super) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self {
            most,
            kept: Mutex::default(),
        })
    }

    /// A buffer of `len` bytes, holding whatever it held last.
    pub(super) fn take(self: &Arc<Self>, len: usize) -> Buffer {
        let class = class(len);
        let kept = {
            let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            let buffer = kept.free.get_mut(class).and_then(Vec::pop);
            kept.bytes -= buffer.as_ref().map_or(0, |buffer| buffer.len());
            buffer
        };
        let bytes = kept.unwrap_or_else(|| {
            vec![0; len.next_power_of_two().max(1 << SMALLEST)].into_boxed_slice()
        });
        Buffer {
            bytes,
            len,
            home: Arc::clone(self),
        }
    }
}

fn class(len: usize) -> usize {
    (len.next_power_of_two().trailing_zeros().max(SMALLEST) - SMALLEST) as usize
}

/// Bytes on loan from [`Buffers`].
#[derive(Debug)]
pub(super) struct Buffer {
    bytes: Box<[u8]>,
    len: usize,
    home: Arc<Buffers>,
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        let class = class(bytes.len());
        let mut kept = self
            .home
            .kept
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let total = kept.bytes + bytes.len();
        if class < SIZES && total <= self.home.most {
            kept.bytes = total;
            kept.free[class].push(bytes);
        }
    }
}

#[cfg(not(loom))]
#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn what_is_given_back_wakes_who_waits() {
        let (own, all) = (Budget::new(1 << 20), Budget::new(1 << 20));
        let held = Charges::try_take(&own, &all, 1 << 20).unwrap();
        assert!(Charges::try_take(&own, &all, 1).is_none());
        thread::scope(|scope| {
            let waits = scope.spawn(|| {
                let end = Instant::now() + Duration::from_secs(20);
                Charges::take(&own, &all, 4096, || Instant::now() < end).is_some()
            });
            drop(held);
            assert!(waits.join().unwrap());
        });
        assert!(own.wait_idle(Instant::now()) && all.wait_idle(Instant::now()));
    }

    #[test]
    fn one_small_request_of_a_connection_is_not_kept_waiting_by_others() {
        let (hog, all) = (Budget::new(1 << 20), Budget::new(1 << 20));
        let _held = Charges::try_take(&hog, &all, 1 << 20).unwrap();
        let own = Budget::new(1 << 20);
        let first = Charges::try_take(&own, &all, 4096);
        assert!(first.is_some());
        assert!(Charges::try_take(&own, &all, 4096).is_none());
        let late = Charges::take(&own, &all, GUARANTEED + 1, || false);
        assert!(late.is_none());
        drop(first);
        assert!(own.wait_idle(Instant::now()));
    }

    #[test]
    fn buffers_are_used_again_up_to_a_limit() {
        let buffers = Buffers::new(10 << 10);
        let mut buffer = buffers.take(5000);
        assert_eq!(buffer.len(), 5000);
        buffer[4999] = 7;
        drop(buffer);
        let again = buffers.take(8192);
        assert_eq!(again[4999], 7);
        let another = buffers.take(4096);
        drop(again);
        drop(another);
        assert_eq!(buffers.kept.lock().unwrap().bytes, 8192);
        assert_eq!(buffers.take(0).len(), 0);
    }
}
