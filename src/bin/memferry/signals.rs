//! Ctrl-C and SIGTERM: the first one cancels, a second one says what is waited for.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver};

use memferry::migrate::Cancel;

use crate::output::warn;

/// A wish to cancel that the user's signals express.
///
/// # Errors
/// If the process cannot handle signals.
pub(crate) fn cancel_on_signal() -> anyhow::Result<Cancel> {
    let cancel = Cancel::default();
    let handle = cancel.clone();
    let count = AtomicUsize::new(0);
    ctrlc::set_handler(move || {
        let before = count.fetch_add(1, Ordering::Relaxed);
        handle.cancel();
        if before == 0 {
            warn(
                &"memferry: cancelling; the guest runs on at the source if ownership has not passed yet",
            );
        } else {
            warn(
                &"memferry: still waiting: until hand-over for QEMU to answer, so that the guest can run on; after \
                 hand-over for the rest of its memory, which only the source has. If this process is killed now, the \
                 guest may be left suspended, or waiting for memory",
            );
        }
    })?;
    Ok(cancel)
}

/// Something comes when the user's signals ask to end. `first` is said then, `again` at every further signal.
///
/// # Errors
/// If the process cannot handle signals.
pub(crate) fn stop_on_signal(
    first: &'static str,
    again: &'static str,
) -> anyhow::Result<Receiver<()>> {
    let (sender, receiver) = mpsc::channel();
    let count = AtomicUsize::new(0);
    ctrlc::set_handler(move || {
        let before = count.fetch_add(1, Ordering::Relaxed);
        // Before anything is said, which may take long. Who does not listen any more is ending already.
        let _ = sender.send(());
        warn(&format_args!(
            "memferry: {}",
            if before == 0 { first } else { again }
        ));
    })?;
    Ok(receiver)
}
