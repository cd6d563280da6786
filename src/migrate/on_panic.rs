//! What a thread of a session leaves behind if it panics.

/// Calls its function when it is dropped by a panic, and only then: a session of which one thread is gone must end, and
/// not wait for it for ever with the subject suspended.
pub(super) struct OnPanic<F: Fn()>(pub(super) F);

impl<F: Fn()> Drop for OnPanic<F> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            (self.0)();
        }
    }
}
