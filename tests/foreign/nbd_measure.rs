//! What our client makes of servers of others, beside a client of others.

use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use memferry::backend::nbd::{Remote, RemoteOptions};
use memferry::chunk::Storage;

use crate::nbd_servers::Foreign;

const MIB: usize = 1 << 20;

/// How many MiB a second are read in sequence, opening included, by so many threads that each take the next `step`.
fn ours(server: &Foreign, len: usize, step: usize, threads: usize) -> f64 {
    let begun = Instant::now();
    let remote = &Remote::connect(&server.url(), &RemoteOptions::default()).unwrap();
    let next = &AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(move || {
                let mut buf = vec![0; step];
                loop {
                    let offset = next.fetch_add(step, Ordering::Relaxed);
                    if offset >= len {
                        return;
                    }
                    remote.read_ahead_at(&mut buf, offset as u64).unwrap();
                }
            });
        }
    });
    rate(len, begun.elapsed())
}

fn nbdcopy(server: &Foreign, len: usize) -> f64 {
    let begun = Instant::now();
    let status = Command::new("nbdcopy")
        .args([&server.url().to_string(), "null:"])
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());
    rate(len, begun.elapsed())
}

fn rate(len: usize, time: Duration) -> f64 {
    (len / MIB) as f64 / time.as_secs_f64()
}

#[test]
#[ignore = "measurement"]
fn a_sequential_read_beside_nbdcopy() {
    let len = 1024 * MIB;
    // No holes, which the one skips and the other reads.
    let server = Foreign::nbdkit(&["--filter=noextents", "pattern", "1G"]);
    for round in 0..3 {
        let copy = nbdcopy(&server, len);
        for (threads, step) in [(1, 32 * MIB), (4, MIB), (4, 4 * MIB)] {
            let ours = ours(&server, len, step, threads);
            println!(
                "{round}: nbdcopy {copy:.0} MiB/s, {threads} threads by {} MiB {ours:.0} MiB/s, ratio {:.2}",
                step / MIB,
                ours / copy
            );
        }
    }
}

#[test]
#[ignore = "measurement"]
fn a_sequential_read_of_what_is_30_ms_away_at_1_gbit() {
    let len = 512 * MIB;
    let server = Foreign::nbdkit(&[
        "-t",
        "128",
        "--filter=delay",
        "--filter=rate",
        "--filter=noextents",
        "pattern",
        "512M",
        "rdelay=30ms",
        "rate=1000M",
        // Without it all of it would come in one burst.
        "burstiness=0.1",
    ]);
    for (threads, step) in [(1, 64 * MIB), (4, MIB), (8, MIB), (4, 4 * MIB)] {
        let ours = ours(&server, len, step, threads);
        let link = 1e9 / 8.0 / MIB as f64;
        println!(
            "{threads} threads by {} MiB: {ours:.1} MiB/s, {:.2} of the link",
            step / MIB,
            ours / link
        );
    }
}
