//! Waiting for what the kernel does not announce.

use std::time::{Duration, Instant};

use rustix::event::{Timespec, poll};

/// Between two looks. Waiting longer would show in how long attaching takes, looking more often in what it costs.
const MOMENT: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 500_000,
};

/// Lets a moment pass.
pub(super) fn a_moment() {
    // A signal only makes it shorter.
    let _passed = poll(&mut [], Some(&MOMENT));
}

/// Looks until `look` has found what it looks for; `None` if that is not by the deadline.
pub(super) fn until<T>(deadline: Instant, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    loop {
        if let Some(found) = look() {
            return Some(found);
        }
        if Instant::now() >= deadline {
            return None;
        }
        a_moment();
    }
}

/// What is left of `limit` since `start`, as a deadline.
pub(super) fn within(limit: Duration) -> Instant {
    Instant::now() + limit
}
