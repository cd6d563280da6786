//! The user's wish to move now.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Asks a migration that waits for it to cut over. Cloning gives another handle on the same wish.
///
/// Until then rounds go on, a few a second, so that little is left to send when it comes. Either end may have the source wait
/// ([`SeedOptions::hold`](super::SeedOptions::hold), [`LeechOptions::hold`](super::LeechOptions::hold)), and either may ask. The wish is noticed within a tenth of a second, and the budget says what follows from it.
#[derive(Debug, Clone, Default)]
pub struct CutOver(Arc<AtomicBool>);

impl CutOver {
    /// Asks. It cannot be taken back but by [`Cancel`](super::Cancel).
    pub fn ask(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether somebody asked.
    #[must_use]
    pub fn is_asked(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
