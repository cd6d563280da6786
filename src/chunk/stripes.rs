//! Locks of chunks, few for many.

use super::ChunkRun;
use super::sync::{Mutex, MutexGuard};
use std::sync::PoisonError;

/// So many locks: chunk `n` has lock `n % 64`. A bit of a word each.
const STRIPES: u64 = 64;

/// A lock for each chunk, in constant memory: chunks that are 64 apart share one.
#[derive(Debug)]
pub(super) struct Stripes(Vec<Mutex<()>>);

impl Stripes {
    pub(super) fn new() -> Self {
        Self((0..STRIPES).map(|_| Mutex::new(())).collect())
    }

    /// Keeps others out of the chunks of `run` for as long as the guards are held.
    ///
    /// Everybody takes locks in the order of the stripes, so nobody waits in a circle; but who holds some asks for no
    /// more.
    pub(super) fn lock(&self, run: ChunkRun) -> Vec<MutexGuard<'_, ()>> {
        let mut stripes = if run.count >= STRIPES { u64::MAX } else { 0 };
        for chunk in run.start.0..run.start.0 + run.count.min(STRIPES) {
            stripes |= 1 << (chunk % STRIPES);
        }
        let locks = self.0.iter().enumerate();
        locks
            .filter(|(stripe, _)| stripes & (1 << stripe) != 0)
            // There is nothing in the lock that a panic could have left half done.
            .map(|(_, lock)| lock.lock().unwrap_or_else(PoisonError::into_inner))
            .collect()
    }
}
