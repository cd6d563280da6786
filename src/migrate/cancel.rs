//! The user's wish to stop.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Asks a migration to end with the source running on. Cloning gives another handle on the same wish.
///
/// Until ownership passes the wish is granted within a tenth of a second or what a call of the subject takes; from
/// then on it has no effect. A destination that has said Ready may be the owner without knowing it: it waits for the
/// source's answer, which is Release, or that the source has given up.
#[derive(Debug, Clone, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Asks.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether somebody asked.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
