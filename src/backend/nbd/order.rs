//! Writes that overlap, one after the other.

use std::io;
use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::wire::left;

/// The ranges that are being written. A write that overlaps one of them waits for it: the server may carry out requests in any order, and one
/// that is sent again after a lost connection would come after what was written since.
#[derive(Debug, Default)]
pub(super) struct Order {
    under_way: Mutex<Vec<Range<u64>>>,
    done: Condvar,
}

/// A range that is being written, until this is dropped.
#[derive(Debug)]
pub(super) struct Turn<'a> {
    order: &'a Order,
    range: Range<u64>,
}

impl Order {
    fn lock(&self) -> MutexGuard<'_, Vec<Range<u64>>> {
        // Nothing under the lock panics half-way.
        self.under_way
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nothing is being written to `range`.
    ///
    /// # Errors
    /// [`io::ErrorKind::TimedOut`].
    pub(super) fn wait(&self, range: Range<u64>, deadline: Instant) -> io::Result<Turn<'_>> {
        let mut under_way = self.lock();
        while under_way
            .iter()
            .any(|other| other.start < range.end && range.start < other.end)
        {
            let left = left(deadline)?;
            under_way = self
                .done
                .wait_timeout(under_way, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        under_way.push(range.clone());
        drop(under_way);
        Ok(Turn { order: self, range })
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut under_way = self.order.lock();
        if let Some(at) = under_way.iter().position(|range| *range == self.range) {
            under_way.swap_remove(at);
        }
        drop(under_way);
        self.order.done.notify_all();
    }
}
