//! A migration that is called off, or whose other side dies: the guest runs where it is owned, and nothing is lost.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};

use guest_test::tiny::TinyGuest;
use guest_test::tiny::report::Logbook;
use serde_json::{Value, json};

use crate::vmm::{Question, Shape, Vmm, migrate, pipe_at, until};

const CPUS: u64 = 2;

fn shape() -> Shape {
    Shape {
        cpus: CPUS,
        ..Shape::default()
    }
}

/// A guest that has written all of its pages, and a machine for it.
fn pair(guest: TinyGuest) -> (Vmm, Vmm, Logbook) {
    let mut source = Vmm::boot(shape(), guest, 16);
    let destination = Vmm::awaiting(shape());
    let mut book = Logbook::default();
    source.read_until(&mut book, "all pages are written", |book| {
        book.least(CPUS, "sweeps") >= 1
    });
    (source, destination, book)
}

/// 4 MiB, written in order.
fn stomper() -> TinyGuest {
    let TinyGuest::Stomper { pages, base, .. } = TinyGuest::stomper(1024) else {
        unreachable!("a stomper is one");
    };
    TinyGuest::Stomper {
        pages,
        base,
        random: false,
        idle: 0,
        lopsided: false,
    }
}

/// So slow that there is time for everything.
fn slowly(post_copy: &str) -> Value {
    json!({"post_copy": post_copy, "downtime": 20_000, "bandwidth": 4 << 20, "verify": "off"})
}

/// Whether a piece of news is this event, or the begin of the phase of this name.
fn is(news: &Value, event: &str) -> bool {
    news["event"] == event || (news["event"] == "phase" && news["phase"] == event)
}

/// Migrates, and calls `then` when this event is told by the source.
fn migrate_until(
    source: &Vmm,
    destination: &Vmm,
    plan: &Value,
    event: &str,
    then: impl FnOnce(),
) -> (Result<Value, String>, Question) {
    let (pairing, receiving) = destination.receive("127.0.0.1:0");
    let mut then = Some(then);
    let sent = source.migrate(&pairing, plan).end(|news| {
        if is(news, event)
            && let Some(then) = then.take()
        {
            then();
        }
    });
    assert!(then.is_none(), "nobody told of {event}");
    (sent, receiving)
}

/// The guest goes on at the source, and its memory is right.
fn runs_on(source: &mut Vmm, book: &mut Logbook) {
    assert_eq!(source.stage(), "running");
    let sweeps = book.least(CPUS, "sweeps");
    source.read_until(book, "it runs on", |book| {
        book.least(CPUS, "sweeps") >= sweeps + 2
    });
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn a_migration_that_either_side_calls_off_in_any_phase_leaves_the_guest_running_at_the_source() {
    let (mut source, destination, mut book) = pair(stomper());
    for event in ["agreed", "pre-copy", "round", "cut-over"] {
        for by_the_source in [true, false] {
            let who = if by_the_source { &source } else { &destination };
            let socket = who.socket();
            let (sent, receiving) =
                migrate_until(&source, &destination, &slowly("never"), event, || {
                    let cancel = json!({"do": "cancel"});
                    Question::new(&socket, &cancel).end(|_| {}).unwrap();
                });
            let error = sent.unwrap_err();
            assert!(
                error.contains("the guest runs on at the source"),
                "{event}: {error}"
            );
            receiving.end(|_| {}).unwrap_err();
            runs_on(&mut source, &mut book);
            assert_eq!(destination.stage(), "waiting");
        }
    }
    // After all that it can still leave.
    migrate(&source, &destination, &json!({}));
    assert_eq!(destination.stage(), "running");
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn once_the_guest_is_handed_over_nothing_calls_it_back() {
    let (mut source, mut destination, mut book) = pair(stomper());
    let socket = source.socket();
    let (sent, receiving) = migrate_until(
        &source,
        &destination,
        &slowly("at-once"),
        "post-copy",
        || {
            let cancel = json!({"do": "cancel"});
            Question::new(&socket, &cancel).end(|_| {}).unwrap();
        },
    );
    sent.unwrap();
    receiving.end(|_| {}).unwrap();
    source.read_console(&mut book);
    runs_on(&mut destination, &mut book);
    let error = source.ask(&json!({"do": "resume"})).unwrap_err();
    assert_eq!(error, "a machine that is gone cannot resume");
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn a_destination_that_dies_before_the_hand_over_leaves_the_guest_running_at_the_source() {
    for event in ["pre-copy", "round"] {
        let (mut source, mut destination, mut book) = pair(stomper());
        let (pairing, _receiving) = destination.receive("127.0.0.1:0");
        let mut alive = true;
        let sent = source.migrate(&pairing, &slowly("never")).end(|news| {
            if alive && is(news, event) {
                alive = false;
                destination.kill();
            }
        });
        let error = sent.unwrap_err();
        assert!(
            error.contains("the guest runs on at the source"),
            "{event}: {error}"
        );
        runs_on(&mut source, &mut book);
    }
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn a_source_that_dies_before_the_hand_over_leaves_a_machine_that_waits_for_another_guest() {
    let (mut source, destination, _) = pair(stomper());
    let (pairing, mut receiving) = destination.receive("127.0.0.1:0");
    let _sending = source.migrate(&pairing, &slowly("never"));
    while !is(&receiving.next()["news"], "pre-copy") {}
    source.kill();
    let error = receiving.end(|_| {}).unwrap_err();
    assert!(error.contains("this copy is worthless"), "{error}");
    assert_eq!(destination.stage(), "waiting");
    // What came of the first one is not in the way of the second.
    let (source, _, _) = pair(stomper());
    migrate(&source, &destination, &json!({}));
    assert_eq!(destination.stage(), "running");
}

/// How often a processor has ticked, as it said last.
fn ticks(book: &Logbook, cpu: u64) -> u64 {
    let report = book.last().find(|report| report.cpu == cpu);
    report.map_or(0, |report| report.ticks)
}

/// The first processor works on 16 MiB, of which little has come when the source dies; the other one on a page that has.
#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn a_source_that_dies_in_post_copy_stalls_who_needs_what_is_missing_and_nobody_else() {
    let TinyGuest::Stomper { base, .. } = TinyGuest::stomper(4096) else {
        unreachable!("a stomper is one");
    };
    let guest = TinyGuest::Stomper {
        pages: 4096,
        base,
        random: false,
        idle: 0,
        lopsided: true,
    };
    let (mut source, mut destination, mut book) = pair(guest);
    let (pairing, mut receiving) = destination.receive("127.0.0.1:0");
    let plan = json!({"post_copy": "at-once", "bandwidth": 256 << 10, "verify": "off"});
    let _sending = source.migrate(&pairing, &plan);
    while !is(&receiving.next()["news"], "post-copy") {}
    // Until the other processor has all that it works on.
    source.read_console(&mut book);
    let there = ticks(&book, 1);
    destination.read_until(&mut book, "both run there", |book| {
        ticks(book, 1) > there + 64
    });
    let died = Instant::now();
    source.kill();
    let error = receiving.end(|_| {}).unwrap_err();
    assert!(error.contains("are still at the source"), "{error}");
    // Reported at once, not when somebody's patience ends.
    assert!(
        died.elapsed() < Duration::from_secs(5),
        "{:?}",
        died.elapsed()
    );
    let status = destination.status();
    assert_eq!(status["stage"], "running");
    let advice = status["advice"].as_str().unwrap();
    assert!(advice.contains("never sees wrong data"), "{advice}");
    // What was on its way has come: from now on the first one stands still, unless it has not needed anything yet.
    let mut stalled = ticks(&book, 0);
    until(
        "the first processor stalls and the other one goes on",
        || {
            let other = ticks(&book, 1);
            destination.read_until(&mut book, "the other one goes on", |book| {
                ticks(book, 1) > other + 1000
            });
            let now = ticks(&book, 0);
            std::mem::replace(&mut stalled, now) == now
        },
    );
    // Answers do not wait for the guest.
    let asked = Instant::now();
    let _ = destination.ask(&json!({"do": "pause", "deadline": 300}));
    assert!(asked.elapsed() < Duration::from_secs(5));
}

/// Somebody who does not read the console, until asked to.
struct Console {
    pipe: File,
}

impl Console {
    fn at(path: &Path) -> Self {
        let pipe = pipe_at(path);
        Self { pipe }
    }

    /// Returns when it holds what a pipe can hold, so that a processor that prints has to wait.
    fn wait_until_full(&self) {
        until("the console is full", || {
            rustix::io::ioctl_fionread(&self.pipe).unwrap() == 65536
        });
    }

    fn read_until(&self, book: &mut Logbook, lines: u64) {
        until("the guest runs on", || {
            let mut bytes = [0; 4096];
            let read = (&self.pipe).read(&mut bytes).unwrap();
            book.read(&bytes[..read]).unwrap();
            book.lines() > lines
        });
    }
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn a_processor_that_does_not_stop_in_time_is_named_and_the_guest_runs_on_where_it_is() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("console");
    let console = Console::at(&path);
    let arguments = ["--console", path.to_str().unwrap()];
    let guest = TinyGuest::stomper(64);
    let vmm = Vmm::boot_in(shape(), guest, 1, Vmm::command(), &arguments);
    let destination = Vmm::awaiting(shape());
    console.wait_until_full();

    let error = vmm
        .ask(&json!({"do": "pause", "deadline": 200}))
        .unwrap_err();
    assert!(error.contains("did not stop in time"), "{error}");
    assert_eq!(vmm.stage(), "running");

    let (pairing, receiving) = destination.receive("127.0.0.1:0");
    let plan = json!({"deadline": 200, "downtime": 20_000});
    let error = vmm.migrate(&pairing, &plan).end(|_| {}).unwrap_err();
    assert!(error.contains("did not stop in time"), "{error}");
    assert!(error.contains("the guest runs on at the source"), "{error}");
    receiving.end(|_| {}).unwrap_err();
    assert_eq!(
        (&*vmm.stage(), &*destination.stage()),
        ("running", "waiting")
    );

    // Somebody reads the console again.
    console.read_until(&mut Logbook::default(), 2000);
}
