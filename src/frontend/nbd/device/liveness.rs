//! Whether the process that serves a device is alive.

use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};

/// What the kernel is told of whose a device is: `memferry-PID-START-N`, where `START` is when the process began, so that another one that got the same
/// number later is not taken for it.
pub(super) fn identifier() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let pid = std::process::id();
    let start = start_of(pid).unwrap_or(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("{PREFIX}{pid}-{start}-{count}")
}

const PREFIX: &str = "memferry-";

/// Whether the device of this identifier is one of ours, and its process is alive; `None` if it is none of ours.
pub(super) fn is_alive(identifier: &str) -> Option<bool> {
    let mut numbers = identifier.strip_prefix(PREFIX)?.split('-');
    let pid = numbers.next()?.parse().ok()?;
    let start: u64 = numbers.next()?.parse().ok()?;
    Some(start_of(pid) == Some(start))
}

/// When a process began, in ticks since the machine did. `None` if there is no such process, or it is only waiting to be buried.
fn start_of(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name is in brackets and may hold anything, also brackets.
    let (_, after_name) = stat.rsplit_once(") ")?;
    let mut words = after_name.split(' ');
    if matches!(words.next()?, "Z" | "X") {
        return None;
    }
    // The state is the third word of all, the start the twenty-second.
    words.nth(18)?.parse().ok()
}

/// Whether a process number of the kernel's is one of ours: in another PID namespace than the first, it is not.
pub(super) fn sees_all_processes() -> bool {
    /// The kernel's fixed number of the first PID namespace.
    const FIRST: &str = "pid:[4026531836]";
    fs::read_link("/proc/self/ns/pid").is_ok_and(|namespace| namespace.as_os_str() == FIRST)
}

/// Whether there is a thread of this number.
pub(super) fn exists(pid: u32) -> bool {
    start_of(pid).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_devices_are_alive_and_those_of_a_process_that_ended_are_not() {
        assert_eq!(is_alive(&identifier()), Some(true));
        assert_ne!(identifier(), identifier());
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id();
        child.wait().unwrap();
        assert_eq!(is_alive(&format!("memferry-{pid}-12-0")), Some(false));
        // The number was given to another process.
        let me = std::process::id();
        assert_eq!(is_alive(&format!("memferry-{me}-1-0")), Some(false));
        assert_eq!(is_alive("somebody"), None);
        assert_eq!(is_alive("memferry-x-1-0"), None);
        assert!(exists(me));
    }
}
