//! How long a restore takes, and its faults: `cargo test --release --test privileged measure_restores -- --ignored --nocapture`.

use std::time::{Duration, Instant};

use super::rig::{Link, Rig};
use super::stand_in::Machine;
use crate::victim::wait_until;

const PAGES: u64 = 128 << 10;

#[test]
#[ignore = "measurement"]
fn measure_restores() {
    let rig = Rig::new(PAGES);
    let (_peer, address) = rig.peer("127.0.0.1:0");
    println!(
        "{} MiB, three quarters of it data; 2000 accesses at random by one thread meanwhile",
        PAGES / 256
    );
    let rounds: [(&str, Option<u64>, &[&str]); 6] = [
        ("file of this machine", None, &[]),
        ("file, accesses only", None, &["--no-populate"]),
        ("peer, no delay", Some(0), &[]),
        ("peer, 10 ms round trip", Some(5), &[]),
        ("peer, 30 ms round trip", Some(15), &[]),
        ("peer, 30 ms, accesses only", Some(15), &["--no-populate"]),
    ];
    for (name, delay, more) in rounds {
        let link = delay.map(|delay| Link::to(address, Duration::from_millis(delay)));
        let from = link.as_ref().map_or_else(|| rig.memory(), Link::url);
        let mut handler = rig.handler(&from, more);
        let machine = Machine::of(PAGES);
        let mut vmm = machine.start(&rig.socket());
        handler.event("serving");
        let begun = Instant::now();
        let count = if more.is_empty() { 2000 } else { 300 };
        vmm.tell(&format!("measure {count}"));
        let answer = vmm.answer();
        let accessed = begun.elapsed();
        if !more.is_empty() {
            println!(
                "{name:28} first, median, 99 %, longest access in µs: {answer}; {count} in {accessed:.2?}"
            );
            continue;
        }
        let mut progress = serde_json::Value::Null;
        wait_until("all is there", || {
            progress = handler.event("progress");
            let field = |name: &str| progress[name].as_u64().unwrap();
            field("resident") + field("zeros") == field("bytes")
        });
        handler.event("complete");
        println!(
            "{name:28} first, median, 99 %, longest access in µs: {answer}; {count} in {accessed:.2?}; all in {:.2?}; faults {}, {} µs",
            begun.elapsed(),
            progress["faults"],
            progress["fault_micros"],
        );
        handler.ends_with(0);
        vmm.must("all");
    }
}
