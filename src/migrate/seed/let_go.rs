//! The gate between letting go of the subject and telling the destination so.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

/// Holds Release back until the subject was let go, so that nothing here can run it once the message is on its way.
#[derive(Debug, Default)]
pub(super) struct LetGo {
    done: Mutex<bool>,
    changed: Condvar,
}

impl LetGo {
    /// The subject was let go.
    pub(super) fn done(&self) {
        *self.done.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }

    /// Whether the subject was let go within `patience`. Nothing but a driver that panicked takes so long.
    pub(super) fn wait(&self, patience: Duration) -> bool {
        let done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        let (done, _) = self
            .changed
            .wait_timeout_while(done, patience, |done| !*done)
            .unwrap_or_else(PoisonError::into_inner);
        *done
    }
}
