//! Slowing processors down: each runs for a slice of time, is kicked out of the guest, and rests.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmm_integration::Throttle;

/// How long a processor that is slowed down runs at a stretch. Long against the ten or so microseconds that a kick costs it; and so
/// short that it does not rest for longer than a round of pre-copy takes (0.2 s at 99 %), lest rounds see it run only or rest only.
pub(super) const SLICE: Duration = Duration::from_millis(2);

/// Who is slowed down how far, and whose slice is over when.
///
/// A processor's thread comes here each time that it is out of the guest. What brings it out at the end of its slice is a thread of the
/// machine's own ([`keep`](Self::keep)), asleep until the next slice is over and for ever while nobody is slowed down. A timer for each thread
/// whose signal is the kick would come more exactly. That is not needed: what a processor rests follows from what it has run, not from what it
/// should have, so its share is right however late it is kicked.
#[derive(Debug)]
pub(super) struct Slices {
    state: Mutex<State>,
    /// Whether anybody is slowed down, for who looks after every exit.
    slowed: AtomicBool,
    /// For those who rest.
    changed: Condvar,
    /// For who kicks.
    begun: Condvar,
}

#[derive(Debug)]
struct State {
    throttles: Vec<Throttle>,
    /// When each processor is to be kicked.
    ends: Vec<Option<Instant>>,
    over: bool,
}

/// When a processor began to run, if it is slowed down. Kept by its thread, and begun anew each time that it has stood.
#[derive(Debug, Default)]
pub(super) struct Slice(Option<Instant>);

impl Slices {
    /// For so many processors, which run as they like.
    pub(super) fn new(cpus: usize) -> Self {
        Self {
            state: Mutex::new(State {
                throttles: vec![Throttle::NONE; cpus],
                ends: vec![None; cpus],
                over: false,
            }),
            slowed: AtomicBool::new(false),
            changed: Condvar::new(),
            begun: Condvar::new(),
        }
    }

    /// How far each processor is slowed down.
    pub(super) fn throttles(&self) -> Vec<Throttle> {
        self.state().throttles.clone()
    }

    /// Slows them down so far from now on. Who rests for longer than that rests no more; who is in the guest has to be kicked, to begin.
    pub(super) fn set(&self, throttles: &[Throttle]) {
        let mut state = self.state();
        state.throttles.copy_from_slice(throttles);
        let slowed = throttles.iter().any(|&throttle| throttle > Throttle::NONE);
        self.slowed.store(slowed, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// Has those who rest look whether they are to leave.
    pub(super) fn interrupt(&self) {
        // Who has looked before that was said waits by now, and is woken.
        let _state = self.state();
        self.changed.notify_all();
    }

    /// Kicks every processor when its slice is over. Returns after [`end`](Self::end).
    pub(super) fn keep(&self, kick: impl Fn(usize)) {
        let mut state = self.state();
        while !state.over {
            let now = Instant::now();
            for (cpu, end) in state.ends.iter_mut().enumerate() {
                if end.take_if(|end| *end <= now).is_some() {
                    kick(cpu);
                }
            }
            let next = state.ends.iter().flatten().min().copied();
            state = if let Some(end) = next {
                let waited = self.begun.wait_timeout(state, end - now);
                waited.unwrap_or_else(PoisonError::into_inner).0
            } else {
                let woken = self.begun.wait(state);
                woken.unwrap_or_else(PoisonError::into_inner)
            };
        }
    }

    /// Nobody is to be kicked any more.
    pub(super) fn end(&self) {
        self.state().over = true;
        self.begun.notify_all();
    }

    /// Rests if the processor's slice is over and it is slowed down, and begins the next one. Returns at once if it is to `leave`, which
    /// whoever says it makes known by [`interrupt`](Self::interrupt).
    ///
    /// To be called after a kick has been answered and before the guest is entered: a kick that is answered first has come at the end of
    /// the slice or later, which is seen here; one that comes later keeps the processor out of the guest. So none is lost.
    pub(super) fn rest(&self, cpu: usize, slice: &mut Slice, leave: &AtomicBool) {
        if !self.slowed.load(Ordering::SeqCst) {
            slice.0 = None;
            return;
        }
        let ran = slice.0.map(|began| began.elapsed());
        if ran.is_some_and(|ran| ran < SLICE) {
            return;
        }
        let ran = ran.unwrap_or_default();
        let rests = Instant::now();
        let mut state = self.state();
        loop {
            let leaves = leave.load(Ordering::SeqCst);
            let throttle = state.throttles[cpu];
            if leaves || throttle == Throttle::NONE {
                slice.0 = None;
                state.ends[cpu] = None;
                return;
            }
            // As the throttle is now: it may have changed since.
            let left = throttle.rest_after(ran).saturating_sub(rests.elapsed());
            if left.is_zero() {
                break;
            }
            let waited = self.changed.wait_timeout(state, left);
            (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
        let begins = Instant::now();
        slice.0 = Some(begins);
        state.ends[cpu] = Some(begins + SLICE);
        self.begun.notify_one();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::sync::mpsc;
    use std::thread;

    /// Longer than anything here takes that does not hang.
    const LONG: Duration = Duration::from_secs(5);

    fn ran_for(run: Duration) -> Slice {
        let began = Instant::now().checked_sub(run);
        Slice(Some(began.expect("the machine has run for longer")))
    }

    /// How long it takes until a processor that has run for so long may run again.
    fn rests(throttle: Throttle, run: Duration) -> Duration {
        let slices = Slices::new(1);
        slices.set(&[throttle]);
        let began = Instant::now();
        slices.rest(0, &mut ran_for(run), &AtomicBool::new(false));
        began.elapsed()
    }

    #[test]
    fn a_rest_is_in_proportion_to_what_was_run_and_not_to_the_slice() {
        let run = SLICE * 5;
        assert!(rests(Throttle::percent(75), run) >= run * 3);
        assert!(rests(Throttle::percent(50), run * 2) >= run * 2);
    }

    #[test]
    fn who_runs_as_it_likes_has_no_slice_that_ends() {
        let slices = Slices::new(2);
        let leave = AtomicBool::new(false);
        let mut slice = ran_for(LONG / 50);
        slices.rest(0, &mut slice, &leave);
        assert!(slice.0.is_none());
        slices.set(&[Throttle::NONE, Throttle::MOST]);
        slices.rest(0, &mut slice, &leave);
        assert!(slice.0.is_none() && slices.state().ends == [None, None]);
        slices.rest(1, &mut slice, &leave);
        assert!(slice.0.is_some() && slices.state().ends[1].is_some());
    }

    /// Rests for ten seconds, unless `woken` ends that.
    fn a_rest_ends_when(woken: impl FnOnce(&Slices, &AtomicBool)) {
        let (slices, leave) = (Slices::new(1), AtomicBool::new(false));
        slices.set(&[Throttle::MOST]);
        let (sender, rested) = mpsc::channel();
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut slice = ran_for(LONG / 50);
                sender.send(None).unwrap();
                slices.rest(0, &mut slice, &leave);
                sender.send(Some(slice)).unwrap();
            });
            assert!(rested.recv().unwrap().is_none());
            woken(&slices, &leave);
            let slice = rested.recv_timeout(LONG).unwrap().unwrap();
            assert!(slice.0.is_none());
        });
    }

    #[test]
    fn a_rest_ends_at_once_when_the_processor_is_to_stand_and_when_it_may_run_as_it_likes() {
        a_rest_ends_when(|slices, leave| {
            leave.store(true, Ordering::SeqCst);
            slices.interrupt();
        });
        a_rest_ends_when(|slices, _| slices.set(&[Throttle::NONE]));
    }

    #[test]
    fn who_is_slowed_down_is_kicked_when_its_slice_is_over_and_nobody_else() {
        let slices = Slices::new(3);
        let throttles = [Throttle::NONE, Throttle::percent(50), Throttle::NONE];
        slices.set(&throttles);
        let (sender, kicked) = mpsc::channel();
        thread::scope(|scope| {
            scope.spawn(|| slices.keep(|cpu| sender.send(cpu).unwrap()));
            let leave = AtomicBool::new(false);
            for cpu in [0, 1, 2] {
                let began = Instant::now();
                slices.rest(cpu, &mut Slice::default(), &leave);
                if cpu == 1 {
                    assert_eq!(kicked.recv_timeout(LONG), Ok(1));
                    assert!(began.elapsed() >= SLICE);
                }
            }
            slices.end();
        });
        assert!(kicked.try_recv().is_err());
    }
}
