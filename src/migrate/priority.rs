//! Which threads go first where processors are scarce.

/// How far ahead of others a thread goes that little work and many wait for; as `nice` counts.
const AHEAD: i32 = -10;

/// How far behind others a thread stays that nobody waits for.
const BEHIND: i32 = 10;

/// Lets the calling thread go only where a processor is idle, or nearly so. It stays so: use a thread that ends.
pub(super) fn go_last() {
    let _ = rustix::process::setpriority_process(None, BEHIND);
}

/// Lets the calling thread go before those that move bulk data: the guest stands still while it waits for a processor.
///
/// An unprivileged user may not ask for that; then it waits like others.
pub(super) fn go_first() {
    // On Linux, and only there, this is the priority of one thread.
    let _ = rustix::process::setpriority_process(None, AHEAD);
}
