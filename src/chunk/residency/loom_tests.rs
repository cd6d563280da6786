//! Every interleaving of a few threads on a few chunks.

use std::io;
use std::time::{Duration, Instant};

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;

use super::*;

const CHUNK: ChunkRun = ChunkRun::new(0, 1);

/// A residency of two chunks and the bytes of the first, which the states alone make visible.
#[derive(Debug)]
struct Region {
    residency: Residency,
    local: AtomicU64,
}

impl Region {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            residency: Residency::new(2),
            local: AtomicU64::new(0),
        })
    }

    fn put(&self, value: u64) {
        self.local.store(value, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.local.load(Ordering::Relaxed)
    }
}

fn far() -> Instant {
    Instant::now() + Duration::from_secs(3600)
}

const FETCHED: u64 = 1;
const WRITTEN: u64 = 2;

#[test]
fn a_late_chunk_never_overwrites_a_newer_write() {
    loom::model(|| {
        let region = Region::new();
        let fetcher = {
            let region = Arc::clone(&region);
            thread::spawn(move || {
                if let Some(claim) = region.residency.claim(CHUNK, 1) {
                    let writing = claim.land();
                    if !writing.runs().is_empty() {
                        region.put(FETCHED);
                        let _ = writing.done();
                    }
                }
            })
        };
        let writing = region.residency.overwrite(CHUNK, far()).unwrap();
        region.put(WRITTEN);
        let _ = writing.done();
        fetcher.join().unwrap();
        assert_eq!(region.get(), WRITTEN);
        assert!(region.residency.is_resident(CHUNK));
    });
}

#[test]
fn one_claims_and_what_is_seen_to_be_here_is_here() {
    loom::model(|| {
        let region = Region::new();
        let fetch = |region: &Region| {
            let Some(claim) = region.residency.claim(CHUNK, 1) else {
                return false;
            };
            let writing = claim.land();
            assert_eq!(writing.runs(), [CHUNK]);
            region.put(FETCHED);
            let _ = writing.done();
            true
        };
        let other = {
            let region = Arc::clone(&region);
            thread::spawn(move || fetch(&region))
        };
        let here = fetch(&region);
        if region.residency.is_resident(CHUNK) {
            assert_eq!(region.get(), FETCHED);
        }
        assert!(other.join().unwrap() != here);
    });
}

#[test]
fn a_waiter_does_not_sleep_through_what_comes() {
    loom::model(|| {
        let region = Region::new();
        let waiter = {
            let region = Arc::clone(&region);
            thread::spawn(move || {
                region.residency.wait(ChunkIndex(0), far()).unwrap();
                assert_eq!(region.get(), FETCHED);
            })
        };
        let writing = region.residency.fill(CHUNK);
        region.put(FETCHED);
        let _ = writing.done();
        waiter.join().unwrap();
    });
}

#[test]
fn a_waiter_is_told_of_a_failure_or_finds_the_chunk_remote() {
    loom::model(|| {
        let region = Region::new();
        let claim = region.residency.claim(CHUNK, 1).unwrap();
        let waiter = {
            let region = Arc::clone(&region);
            thread::spawn(move || region.residency.settle(ChunkIndex(0), far()))
        };
        claim.fail(&io::Error::other("no"));
        if let Ok(state) = waiter.join().unwrap() {
            assert_eq!(state, ChunkState::Remote);
        }
    });
}

#[test]
fn what_was_asked_for_before_a_cut_over_never_lands_after_it() {
    loom::model(|| {
        let region = Region::new();
        let fetcher = {
            let region = Arc::clone(&region);
            thread::spawn(move || {
                // The bytes of before the cut-over.
                if let Some(claim) = region.residency.claim(CHUNK, 1) {
                    let writing = claim.land();
                    if !writing.runs().is_empty() {
                        region.put(FETCHED);
                        let _ = writing.done();
                    }
                }
            })
        };
        let mut set = ChunkBitmap::empty(2);
        set.insert(0);
        region.residency.mark_remote(&set, far()).unwrap();
        // What is claimed now brings the bytes of after it.
        if let Some(claim) = region.residency.claim(CHUNK, 1) {
            let writing = claim.land();
            if !writing.runs().is_empty() {
                region.put(WRITTEN);
                let _ = writing.done();
                assert_eq!(region.get(), WRITTEN);
            }
        }
        fetcher.join().unwrap();
    });
}

#[test]
fn two_who_overwrite_one_chunk_take_turns() {
    loom::model(|| {
        let region = Region::new();
        let other = {
            let region = Arc::clone(&region);
            thread::spawn(move || drop(region.residency.overwrite(CHUNK, far()).unwrap()))
        };
        let writing = region.residency.overwrite(CHUNK, far()).unwrap();
        assert!(writing.runs().len() <= 1);
        let _ = writing.done();
        other.join().unwrap();
        assert!(region.residency.is_resident(CHUNK));
    });
}
