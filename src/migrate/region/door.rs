//! Who may be inside of a region: everybody, nobody for now, or nobody any more.
//!
//! [`chunk::Gate`](crate::chunk::Gate) is closed by somebody who will open it soon, and opens if he is gone. This door stays as it is, for as long as the
//! region is elsewhere, and can send away who comes.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// What the door does with who comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// Lets them in.
    Open,
    /// Lets them wait.
    Closed,
    /// Sends them away, and says why.
    Refusing(&'static str),
}

/// Counts who is inside, so that closing can wait until nobody is. An operation that finds it open takes two atomic steps.
#[derive(Debug)]
pub(super) struct Door {
    /// How many are inside, and [`SHUT`] if the door is not open.
    word: AtomicU64,
    mode: Mutex<Mode>,
    changed: Condvar,
}

const SHUT: u64 = 1 << 63;

impl Door {
    pub(super) fn new(mode: Mode) -> Self {
        let word = if mode == Mode::Open { 0 } else { SHUT };
        Self {
            word: AtomicU64::new(word),
            mode: Mutex::new(mode),
            changed: Condvar::new(),
        }
    }

    /// Goes in, and waits until `deadline` while it is closed.
    pub(super) fn enter(&self, deadline: Instant) -> io::Result<Inside<'_>> {
        loop {
            if self.word.fetch_add(1, Ordering::SeqCst) & SHUT == 0 {
                return Ok(Inside(self));
            }
            self.leave();
            let mut mode = self.lock();
            loop {
                match *mode {
                    Mode::Open => break,
                    Mode::Refusing(why) => return Err(io::Error::other(why)),
                    Mode::Closed => {}
                }
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(io::Error::new(
                        io::ErrorKind::TimedOut,
                        "the region is being moved, which has taken too long",
                    ));
                }
                mode = self
                    .changed
                    .wait_timeout(mode, left)
                    .unwrap_or_else(PoisonError::into_inner)
                    .0;
            }
        }
    }

    /// Goes in if it is open.
    pub(super) fn try_enter(&self) -> Option<Inside<'_>> {
        if self.word.fetch_add(1, Ordering::SeqCst) & SHUT == 0 {
            return Some(Inside(self));
        }
        self.leave();
        None
    }

    fn leave(&self) {
        if self.word.fetch_sub(1, Ordering::SeqCst) == SHUT | 1 {
            // With the lock, so that it is not between somebody's look and his sleep.
            drop(self.lock());
            self.changed.notify_all();
        }
    }

    /// From now on whoever comes is dealt with as `mode` says. Who is inside stays there.
    pub(super) fn set(&self, mode: Mode) {
        let mut is = self.lock();
        *is = mode;
        if mode == Mode::Open {
            self.word.fetch_and(!SHUT, Ordering::SeqCst);
        } else {
            self.word.fetch_or(SHUT, Ordering::SeqCst);
        }
        drop(is);
        self.changed.notify_all();
    }

    /// Waits until nobody is inside. The door must not be open.
    ///
    /// # Errors
    /// [`io::ErrorKind::TimedOut`] after `deadline`.
    pub(super) fn drain(&self, deadline: Instant) -> io::Result<()> {
        let mut mode = self.lock();
        while self.word.load(Ordering::SeqCst) & !SHUT != 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "an operation on the region has not ended in time",
                ));
            }
            mode = self
                .changed
                .wait_timeout(mode, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Mode> {
        // Nothing panics while it is held.
        self.mode.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Somebody is inside for as long as this lives.
#[derive(Debug)]
pub(super) struct Inside<'a>(&'a Door);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.leave();
    }
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Duration;

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(20)
    }

    fn late() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    #[test]
    fn closing_waits_for_who_is_inside() {
        let door = Door::new(Mode::Open);
        let inside = door.enter(soon()).unwrap();
        door.set(Mode::Closed);
        assert_eq!(
            door.drain(soon()).unwrap_err().kind(),
            io::ErrorKind::TimedOut
        );
        thread::scope(|scope| {
            scope.spawn(move || drop(inside));
            door.drain(late()).unwrap();
        });
    }

    #[test]
    fn who_comes_to_a_closed_door_waits_and_is_not_forgotten() {
        let door = Door::new(Mode::Closed);
        assert_eq!(
            door.enter(soon()).unwrap_err().kind(),
            io::ErrorKind::TimedOut
        );
        assert!(door.try_enter().is_none());
        thread::scope(|scope| {
            let waiting: Vec<_> = (0..4)
                .map(|_| scope.spawn(|| door.enter(late()).map(drop)))
                .collect();
            door.set(Mode::Open);
            for thread in waiting {
                thread.join().unwrap().unwrap();
            }
        });
        door.set(Mode::Closed);
        door.drain(soon()).unwrap();
    }

    #[test]
    fn who_waits_is_sent_away_when_there_is_nothing_to_wait_for() {
        let door = Door::new(Mode::Closed);
        thread::scope(|scope| {
            let waiting = scope.spawn(|| door.enter(late()).map(drop));
            door.set(Mode::Refusing("gone"));
            assert_eq!(waiting.join().unwrap().unwrap_err().to_string(), "gone");
        });
    }

    #[test]
    fn nobody_is_inside_of_a_drained_door_whatever_the_order() {
        let door = Door::new(Mode::Open);
        let inside = AtomicU64::new(0);
        let stop = AtomicU64::new(0);
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while stop.load(Ordering::SeqCst) == 0 {
                        let _inside = door.enter(late()).unwrap();
                        inside.fetch_add(1, Ordering::SeqCst);
                        thread::yield_now();
                        inside.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
            for _ in 0..500 {
                door.set(Mode::Closed);
                door.drain(late()).unwrap();
                assert_eq!(inside.load(Ordering::SeqCst), 0);
                door.set(Mode::Open);
            }
            stop.store(1, Ordering::SeqCst);
        });
    }
}
