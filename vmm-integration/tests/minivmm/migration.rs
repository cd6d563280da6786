//! A guest moves from one process to another while it runs, and notices nothing but the time.

use std::time::{Duration, Instant};

use guest_test::tiny::report::Logbook;
use guest_test::tiny::{FREE, Timer, TinyGuest};
use serde_json::{Value, json};

use crate::vmm::{Shape, Vmm, migrate};

/// A plan that ends whatever the guest writes.
fn plan(post_copy: &str) -> Value {
    json!({"post_copy": post_copy, "downtime": 1000})
}

/// Moves a guest once it has ticked so often; then it has to tick as often again. What it printed, on both machines.
fn moved(shape: Shape, guest: TinyGuest, post_copy: &str, ticks: u64) -> Logbook {
    let mut source = Vmm::boot(shape, guest, 16);
    let mut destination = Vmm::awaiting(shape);
    let mut book = Logbook::default();
    source.read_until(&mut book, "it runs", |book| {
        book.least(shape.cpus, "ticks") >= ticks
    });
    let (sent, _) = migrate(&source, &destination, &plan(post_copy));
    assert_eq!(sent["verified"]["different"], 0, "{sent}");
    assert_eq!(sent["post_copy"], post_copy != "never", "{sent}");
    assert_eq!(
        (&*source.stage(), &*destination.stage()),
        ("gone", "running")
    );
    source.read_console(&mut book);
    let there = book.least(shape.cpus, "ticks");
    destination.read_until(&mut book, "it runs there", |book| {
        book.least(shape.cpus, "ticks") >= there + ticks
    });
    // It is over where it was.
    let lines = book.lines();
    source.read_console(&mut book);
    assert_eq!(book.lines(), lines);
    book
}

/// Every way to move, by every tracker, with so many processors. All pages are looked at at both ends.
fn every_way(cpus: u64) {
    for tracker in ["log", "ring"] {
        for post_copy in ["never", "after-one-pass", "at-once"] {
            let shape = Shape {
                cpus,
                tracker,
                ..Shape::default()
            };
            let pages = 256;
            let guest = TinyGuest::stomper(pages);
            let book = moved(shape, guest, post_copy, 2 * pages / cpus);
            assert!(book.least(cpus, "sweeps") >= 2);
        }
    }
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn one_processor_moves_by_every_plan_and_tracker_and_finds_its_stamps() {
    every_way(1);
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn two_processors_move_by_every_plan_and_tracker_and_find_their_stamps() {
    every_way(2);
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn four_processors_move_by_every_plan_and_tracker_and_find_their_stamps() {
    every_way(4);
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn memory_on_both_sides_of_the_hole_moves() {
    let shape = Shape {
        cpus: 2,
        memory: "4G",
        ..Shape::default()
    };
    let guest = TinyGuest::Stomper {
        pages: 256,
        base: 1 << 32,
        random: true,
        idle: 0,
        lopsided: false,
    };
    moved(shape, guest, "after-one-pass", 256);
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn vector_registers_move() {
    let shape = Shape {
        cpus: 2,
        ..Shape::default()
    };
    for post_copy in ["never", "at-once"] {
        moved(shape, TinyGuest::Registers { idle: 200 }, post_copy, 64);
    }
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn what_nobody_touched_is_zero_at_the_destination_too() {
    let shape = Shape {
        cpus: 2,
        ..Shape::default()
    };
    for post_copy in ["never", "after-one-pass", "at-once"] {
        let guest = TinyGuest::Toucher {
            pages: 2048,
            base: FREE,
            idle: 0,
        };
        let book = moved(shape, guest, post_copy, 128);
        assert!(book.least(2, "touched") >= 256);
    }
}

/// How far the guest's clocks may be off, over a migration: what printing a line takes, on a busy machine, and not more.
const CLOCKS: Duration = Duration::from_millis(100);

/// What a processor said last of its two clocks, in nanoseconds.
fn clocks(book: &Logbook, cpu: u64, khz: u64) -> (i128, i128) {
    let report = book.last().find(|report| report.cpu == cpu).unwrap();
    let tsc = i128::from(report.tsc) * 1_000_000 / i128::from(khz);
    (tsc, i128::from(report.more["clock"]))
}

/// A guest's clocks stand still while it does: they go on from where they were, together, and never faster than time.
#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn timers_go_on_and_clocks_go_on_together_from_where_they_stood() {
    for timer in [Timer::LocalApic, Timer::Pit] {
        for post_copy in ["never", "at-once"] {
            let shape = Shape {
                cpus: 2,
                ..Shape::default()
            };
            let guest = TinyGuest::Timer {
                tick_micros: 2000,
                timer,
            };
            let mut source = Vmm::boot(shape, guest, 16);
            let mut destination = Vmm::awaiting(shape);
            let khz = source.status()["tsc_khz"].as_u64().unwrap();
            let mut book = Logbook::default();
            source.read_until(&mut book, "it ticks", |book| book.least(2, "ticks") >= 100);
            let began = Instant::now();
            let before = [0, 1].map(|cpu| clocks(&book, cpu, khz));
            migrate(&source, &destination, &plan(post_copy));
            source.read_console(&mut book);
            let ticks = book.least(2, "ticks");
            destination.read_until(&mut book, "it ticks there", |book| {
                book.least(2, "ticks") >= ticks + 100
            });
            let took = i128::try_from((began.elapsed() + CLOCKS).as_nanos()).unwrap();
            let apart = i128::try_from(CLOCKS.as_nanos()).unwrap();
            for (cpu, before) in (0..).zip(before) {
                let after = clocks(&book, cpu, khz);
                let (tsc, clock) = (after.0 - before.0, after.1 - before.1);
                assert!((tsc - clock).abs() < apart, "{tsc} and {clock} ns");
                assert!(tsc < took && clock < took, "{tsc}, {clock} in {took} ns");
                // What 100 ticks take at least, a half allowed for those that a late timer joins.
                assert!(clock > 100_000_000, "{clock} ns");
            }
        }
    }
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn a_guest_moves_fifty_times_around_a_ring_of_three_machines_by_the_dirty_log() {
    around_a_ring("log");
}

/// This machine's KVM emulates, and overruns the rings of a guest that does nothing but write: over and over.
#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn a_guest_moves_fifty_times_around_a_ring_of_three_machines_by_dirty_rings() {
    around_a_ring("ring");
}

fn around_a_ring(tracker: &'static str) {
    const HOPS: usize = 50;
    let cpus = 2;
    let shape = Shape {
        cpus,
        tracker,
        ..Shape::default()
    };
    let pages = 64;
    let mut ring = [
        Vmm::boot(shape, TinyGuest::stomper(pages), 8),
        Vmm::awaiting(shape),
        Vmm::awaiting(shape),
    ];
    let mut book = Logbook::default();
    for hop in 0..HOPS {
        let (here, there) = (hop % 3, (hop + 1) % 3);
        // Every page is looked at after each hop.
        let sweeps = book.least(cpus, "sweeps");
        ring[here].read_until(&mut book, "all pages are looked at", |book| {
            book.least(cpus, "sweeps") >= sweeps + 2
        });
        let post_copy = ["never", "after-one-pass", "at-once"][hop % 3];
        migrate(&ring[here], &ring[there], &plan(post_copy));
        ring[here].read_console(&mut book);
    }
    let sweeps = book.least(cpus, "sweeps");
    ring[HOPS % 3].read_until(&mut book, "all pages are looked at", |book| {
        book.least(cpus, "sweeps") >= sweeps + 2
    });
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn a_guest_that_was_paused_arrives_paused() {
    let mut source = Vmm::boot(Shape::default(), TinyGuest::stomper(64), 8);
    let mut destination = Vmm::awaiting(Shape::default());
    let mut book = Logbook::default();
    source.read_until(&mut book, "it runs", |book| book.lines() > 2);
    source.ask(&json!({"do": "pause"})).unwrap();
    migrate(&source, &destination, &plan("never"));
    assert_eq!(destination.stage(), "paused");
    source.read_console(&mut book);
    let lines = book.lines();
    destination.read_console(&mut book);
    assert_eq!(book.lines(), lines);
    destination.ask(&json!({"do": "resume"})).unwrap();
    destination.read_until(&mut book, "it runs on", |book| book.lines() > lines + 2);
}
