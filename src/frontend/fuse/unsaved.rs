//! What programs wrote into the page cache and could not be brought to the storage.

use std::io;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::chunk::Ranges;

/// The bytes whose write-back has failed. The kernel takes their pages for written from then on: it neither tries again nor tells
/// those who open the file later.
#[derive(Debug, Default)]
pub(super) struct Unsaved(Mutex<Ranges>);

impl Unsaved {
    pub(super) fn failed(&self, range: Range<u64>) {
        self.ranges().add(range);
    }

    /// The storage has what programs see there.
    pub(super) fn saved(&self, range: Range<u64>) {
        self.ranges().remove(range);
    }

    /// What is known of `range` is not known any more; says what was known, for [`keep`](Self::keep).
    pub(super) fn give_up(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let mut ranges = self.ranges();
        let mut known = ranges.to_vec(range.end);
        known.retain_mut(|known| {
            known.start = known.start.max(range.start);
            !known.is_empty()
        });
        ranges.remove(range);
        known
    }

    pub(super) fn keep(&self, known: Vec<Range<u64>>) {
        let mut ranges = self.ranges();
        known.into_iter().for_each(|range| ranges.add(range));
    }

    /// # Errors
    /// If there is something.
    pub(super) fn check(&self) -> io::Result<()> {
        let ranges = self.ranges().to_vec(u64::MAX);
        let Some(first) = ranges.first() else {
            return Ok(());
        };
        let bytes: u64 = ranges.iter().map(|range| range.end - range.start).sum();
        Err(io::Error::other(format!(
            "{bytes} bytes that programs wrote, the first at {}, could not be written back, and the kernel does not try again: have \
             them written again, or give them up by invalidating them or mounting the region anew",
            first.start
        )))
    }

    fn ranges(&self) -> MutexGuard<'_, Ranges> {
        // A set of ranges is right, or too large, after each of its steps.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_failed_is_told_until_all_of_it_is_saved_or_given_up() {
        let unsaved = Unsaved::default();
        unsaved.check().unwrap();
        unsaved.failed(0..8192);
        unsaved.saved(0..4096);
        let told = unsaved.check().unwrap_err().to_string();
        assert!(told.starts_with("4096 bytes") && told.contains("at 4096"));
        assert_eq!(unsaved.give_up(0..4096), []);
        let given_up = unsaved.give_up(6000..u64::MAX);
        assert_eq!(given_up, std::slice::from_ref(&(6000..8192)));
        unsaved.saved(4096..6000);
        unsaved.check().unwrap();
        unsaved.keep(given_up);
        unsaved.check().unwrap_err();
    }
}
