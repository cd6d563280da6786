//! Pages that somebody waits for and that could not be had yet.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::Timespec;

/// A page that could not be had is tried again after this, and after twice as long each time, up to [`LONGEST_PAUSE`].
pub(super) const FIRST_PAUSE: Duration = Duration::from_millis(20);
pub(super) const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// How long a program may take to give pages back once it was told that it may.
const SOON: Duration = Duration::from_millis(1);

/// Pages to be tried again, and when.
#[derive(Debug, Default)]
pub(super) struct Retries(Mutex<List>);

#[derive(Debug, Default)]
struct List {
    next: u64,
    waiting: Vec<(u64, Retry)>,
    /// Those that are being tried.
    trying: Vec<(u64, Retry)>,
}

/// Pages to be tried again.
#[derive(Debug, Clone)]
pub(super) struct Retry {
    pub(super) pages: Range<u64>,
    pub(super) at: Instant,
    pub(super) pause: Duration,
    /// Since when somebody waits for them.
    pub(super) since: Instant,
    /// Why they could not be had; `None` if only events were to be read first.
    pub(super) error: Option<String>,
}

/// Pages that somebody waits for, because they cannot be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// How many they are.
    pub pages: u64,
    /// Since when the first of them is waited for.
    pub since: Instant,
    /// What the storage says.
    pub error: String,
}

impl Retry {
    /// Pages that could not be installed before events are read, which any thread does before it tries again.
    pub(super) fn soon(pages: Range<u64>, since: Instant) -> Self {
        Self {
            pages,
            at: Instant::now() + SOON,
            pause: FIRST_PAUSE,
            since,
            error: None,
        }
    }
}

impl Retries {
    pub(super) fn add(&self, retry: Retry) {
        let mut list = self.locked();
        list.next += 1;
        let number = list.next;
        list.waiting.push((number, retry));
    }

    /// Takes one that is due; its number is told to [`tried`](Self::tried).
    pub(super) fn take_due(&self) -> Option<(u64, Retry)> {
        let mut list = self.locked();
        if list.waiting.is_empty() {
            return None;
        }
        let now = Instant::now();
        let due = list.waiting.iter().position(|(_, retry)| retry.at <= now)?;
        let taken = list.waiting.swap_remove(due);
        list.trying.push(taken.clone());
        Some(taken)
    }

    /// What was taken has been tried, and is to be tried again as `again` says, if at all.
    pub(super) fn tried(&self, number: u64, again: Option<Retry>) {
        let mut list = self.locked();
        list.trying.retain(|&(tried, _)| tried != number);
        if let Some(retry) = again {
            list.waiting.push((number, retry));
        }
    }

    /// How long it is until one is due.
    pub(super) fn until_next(&self) -> Option<Timespec> {
        let list = self.locked();
        let next = list.waiting.iter().map(|(_, retry)| retry.at).min()?;
        let left = next.saturating_duration_since(Instant::now());
        // Not before its time: rounded up to what the kernel counts in.
        Timespec::try_from(left + Duration::from_millis(1)).ok()
    }

    /// What cannot be had at this moment, if anything.
    pub(super) fn waiting(&self) -> Option<Waiting> {
        let list = self.locked();
        let failed = || {
            let all = list.waiting.iter().chain(&list.trying);
            all.map(|(_, retry)| retry)
                .filter(|retry| retry.error.is_some())
        };
        let first = failed().min_by_key(|retry| retry.since)?;
        Some(Waiting {
            pages: failed()
                .map(|retry| retry.pages.end - retry.pages.start)
                .sum(),
            since: first.since,
            error: first.error.clone().unwrap_or_default(),
        })
    }

    fn locked(&self) -> MutexGuard<'_, List> {
        // No statement leaves it half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_storage_refused_is_waited_for_in_vain() {
        let retries = Retries::default();
        let now = Instant::now();
        retries.add(Retry::soon(0..4, now));
        assert_eq!(retries.waiting(), None);
        for (pages, since) in [(10..12, now + SOON), (20..21, now)] {
            let error = Some(format!("no {}", pages.start));
            retries.add(Retry {
                error,
                at: now,
                ..Retry::soon(pages, since)
            });
        }
        let waiting = retries.waiting().unwrap();
        assert_eq!((waiting.pages, waiting.since), (3, now));
        assert_eq!(waiting.error, "no 20");
        // Also while it is being tried.
        while retries.take_due().is_some() {}
        retries.add(Retry::soon(0..1, now));
        assert_eq!(retries.waiting(), Some(waiting));
    }

    #[test]
    fn what_is_due_is_taken_once() {
        let retries = Retries::default();
        assert!(retries.until_next().is_none() && retries.take_due().is_none());
        let now = Instant::now();
        let at = |at| Retry {
            at,
            ..Retry::soon(0..1, now)
        };
        retries.add(at(now + Duration::from_secs(60)));
        retries.add(at(now));
        assert!(retries.until_next().is_some_and(|left| left.tv_sec == 0));
        let (number, retry) = retries.take_due().unwrap();
        assert!(retries.take_due().is_none());
        retries.tried(number, Some(retry));
        let (number, _) = retries.take_due().unwrap();
        retries.tried(number, None);
        assert!(retries.take_due().is_none());
        assert!(retries.until_next().is_some_and(|left| left.tv_sec > 50));
    }
}
