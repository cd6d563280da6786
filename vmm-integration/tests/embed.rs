//! The smallest VMM, which users copy from.
#![cfg(feature = "kvm")]
#![allow(clippy::unwrap_used, reason = "a test may panic, helpers too")]

#[path = "../examples/embed.rs"]
mod example;

use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use example::Machine;
use memferry::transport::{Listener, Pairing};

const SOURCE: &str = include_str!("../examples/embed.rs");

/// What a VMM's author may be asked to write.
const MOST: usize = 60;

#[test]
fn migration_adds_at_most_60_lines() {
    let mut inside = false;
    let mut count = 0;
    for line in SOURCE.lines().map(str::trim) {
        match line {
            "// migration {" => inside = true,
            "// }" => inside = false,
            line if inside && !line.is_empty() && !line.starts_with("//") => count += 1,
            _ => {}
        }
    }
    assert!(!inside && count > 0 && count <= MOST, "{count} lines");
}

#[test]
#[ignore = "kvm: needs /dev/kvm, and CAP_SYS_PTRACE for post-copy"]
fn the_guest_counts_on_from_where_it_was() {
    let listener = Listener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let pairing = Pairing::new(listener.local_addr().unwrap().to_string()).unwrap();
    let (mut source, mut destination) = (Machine::new().unwrap(), Machine::new().unwrap());
    source.boot().unwrap();
    await_count(&source, 100);
    thread::scope(|scope| {
        let receiving = scope.spawn(|| destination.receive(&listener, &pairing).unwrap());
        source.send(&pairing).unwrap();
        receiving.join().unwrap();
    });
    let left = source.told.load(Ordering::Relaxed);
    assert!(left >= 100);
    // Each of its machines finds that it counts by one.
    await_count(&destination, left + 100);
    assert_eq!(source.told.load(Ordering::Relaxed), left);
}

fn await_count(machine: &Machine, count: u64) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while machine.told.load(Ordering::Relaxed) < count {
        assert!(Instant::now() < deadline, "the guest does not run");
        thread::park_timeout(Duration::from_millis(1));
    }
}
