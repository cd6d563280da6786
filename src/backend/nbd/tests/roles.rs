//! Many callers on one connection: who reads for whom.

use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::fake::{Fake, Manner, byte_at, bytes_at, data, request, simple};
use crate::chunk::Storage;
use crate::nbd::Command;

const SOON: Duration = Duration::from_secs(20);
const SIZE: u64 = 1 << 30;

/// Answers in an order of its own: always the newest of those that have come, of up to so many.
fn shuffles(most: usize) -> Fake {
    Fake::new(Manner::new(SIZE), move |_, stream| {
        let mut held = Vec::new();
        let mut turn = 0_usize;
        loop {
            // With nothing held one has to wait; else only if more has come already.
            let more = held.is_empty() || {
                stream.set_nonblocking(true)?;
                let more = stream.peek(&mut [0]).is_ok_and(|len| len > 0);
                stream.set_nonblocking(false)?;
                more && held.len() < most
            };
            if more {
                held.push(request(stream)?.0);
                continue;
            }
            turn = turn.wrapping_mul(31).wrapping_add(7);
            let asked = held.swap_remove(turn % held.len());
            let answer = match asked.command {
                Command::Read => {
                    let bytes = bytes_at(asked.offset, asked.len as usize);
                    data(asked.cookie, asked.offset, &bytes, true)
                }
                _ => simple(asked.cookie, None),
            };
            stream.write_all(&answer)?;
        }
    })
}

/// Small and large reads of many threads at once, answered in any order; none waits for ever, and each gets its own.
fn all_get_theirs(server: &Fake, threads: u64, rounds: u64) {
    let remote = &server.connect(SOON);
    let done = &AtomicUsize::new(0);
    thread::scope(|scope| {
        for number in 0..threads {
            scope.spawn(move || {
                for round in 0..rounds {
                    let len = match (number + round) % 4 {
                        0 => 1,
                        1 => 4096,
                        2 => 40 << 10,
                        _ => 600 << 10,
                    };
                    let offset = (number * 7_919 + round * 104_729) % (SIZE - len);
                    let mut buf = vec![0; len as usize];
                    remote.read_exact_at(&mut buf, offset).unwrap();
                    let differs = (offset..)
                        .zip(&buf)
                        .find(|(at, byte)| **byte != byte_at(*at));
                    assert_eq!(differs, None, "thread {number}, round {round}");
                    done.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    assert_eq!(done.load(Ordering::Relaxed) as u64, threads * rounds);
    assert_eq!(server.connections(), 1, "nothing was asked twice");
}

#[test]
fn every_caller_gets_its_own_bytes_whoever_reads_them() {
    all_get_theirs(&shuffles(1), 3, 60);
    all_get_theirs(&shuffles(5), 8, 30);
    all_get_theirs(&shuffles(100), 2, 100);
}

#[test]
fn a_reader_that_is_done_passes_the_role_on() {
    // The second caller waits while the first one reads; the first one's answer comes first, and nobody else would read the second's.
    let server = Fake::new(Manner::new(SIZE), |_, stream| {
        loop {
            let (first, _) = request(stream)?;
            let (second, _) = request(stream)?;
            for asked in [first, second] {
                let bytes = bytes_at(asked.offset, asked.len as usize);
                stream.write_all(&data(asked.cookie, asked.offset, &bytes, true))?;
            }
        }
    });
    let remote = &server.connect(SOON);
    let begun = Instant::now();
    for _ in 0..300 {
        thread::scope(|scope| {
            for offset in [0, 70_000] {
                scope.spawn(move || {
                    let mut buf = [0; 100];
                    remote.read_exact_at(&mut buf, offset).unwrap();
                    assert_eq!(buf[..], bytes_at(offset, 100));
                });
            }
        });
    }
    assert!(
        begun.elapsed() < SOON,
        "somebody waited for a role that was lost"
    );
}

#[test]
fn a_server_that_stops_to_receive_until_it_is_read_from_is_no_deadlock() {
    // One thread that answers before it reads on, as many servers are: with large writes and large reads on one connection both sides' buffers
    // fill up, and only who reads while it cannot send gets on.
    let server = Fake::new(Manner::new(SIZE), |_, stream| {
        loop {
            let (asked, _) = request(stream)?;
            let answer = match asked.command {
                Command::Read => {
                    let bytes = vec![3; asked.len as usize];
                    data(asked.cookie, asked.offset, &bytes, true)
                }
                _ => simple(asked.cookie, None),
            };
            stream.write_all(&answer)?;
        }
    });
    let remote = &server.connect(SOON);
    let begun = Instant::now();
    thread::scope(|scope| {
        for writer in 0..2 {
            scope.spawn(move || {
                let bytes = vec![1; 12 << 20];
                remote.write_all_at(&bytes, writer << 28).unwrap();
            });
            scope.spawn(move || {
                let mut buf = vec![0; 24 << 20];
                remote.read_exact_at(&mut buf, writer << 27).unwrap();
                assert!(buf.iter().all(|&byte| byte == 3));
            });
        }
    });
    assert!(begun.elapsed() < SOON / 2, "{:?}", begun.elapsed());
    assert_eq!(server.connections(), 1);
}

#[test]
fn writes_that_overlap_are_carried_out_one_after_the_other() {
    // A server that carries out whatever it has in any order: two writes of the same bytes must never be under way together.
    let server = Fake::new(Manner::new(SIZE), |_, stream| {
        let (first, _) = request(stream)?;
        // The second one comes only once the first was answered.
        stream.set_nonblocking(true)?;
        let early = stream.peek(&mut [0]).is_ok();
        stream.set_nonblocking(false)?;
        assert!(!early, "both were sent");
        stream.write_all(&simple(first.cookie, None))?;
        loop {
            let (asked, _) = request(stream)?;
            stream.write_all(&simple(asked.cookie, None))?;
        }
    });
    let remote = &server.connect(SOON);
    thread::scope(|scope| {
        for offset in [0, 50] {
            scope.spawn(move || remote.write_all_at(&[1; 100], offset).unwrap());
        }
    });
}
