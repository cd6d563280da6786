//! A guest boots, stops, runs on and ends; and what the program says when it cannot.

use guest_test::tiny::report::Logbook;
use guest_test::tiny::{FREE, Timer, TinyGuest};
use serde_json::json;

use crate::vmm::{Shape, Vmm};

/// Boots `guest` and reads until each of its processors has ticked so often.
fn runs(guest: TinyGuest, cpus: u64, ticks: u64) -> Logbook {
    let shape = Shape {
        cpus,
        ..Shape::default()
    };
    let mut vmm = Vmm::boot(shape, guest, ticks / 4);
    let mut book = Logbook::default();
    vmm.read_until(&mut book, "the guest ticks", |book| {
        book.least(cpus, "ticks") >= ticks
    });
    book
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn a_stomper_finds_every_stamp_of_earlier_on_one_two_and_four_processors() {
    for cpus in [1, 2, 4] {
        let shape = Shape {
            cpus,
            ..Shape::default()
        };
        let mut vmm = Vmm::boot(shape, TinyGuest::stomper(256), 64);
        let mut book = Logbook::default();
        vmm.read_until(&mut book, "all pages were checked twice", |book| {
            book.least(cpus, "sweeps") >= 2
        });
    }
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn timers_interrupt_and_clocks_only_go_on() {
    for timer in [Timer::LocalApic, Timer::Pit] {
        let tick_micros = 1000;
        let book = runs(TinyGuest::Timer { tick_micros, timer }, 2, 200);
        assert!(book.least(2, "clock") > 0);
    }
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn vector_registers_keep_what_is_put_there() {
    runs(TinyGuest::Registers { idle: 100 }, 2, 200);
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn memory_that_nobody_touched_is_zero() {
    let guest = TinyGuest::Toucher {
        pages: 128,
        base: FREE,
        idle: 0,
    };
    let book = runs(guest, 2, 128);
    assert_eq!(book.least(2, "touched"), 64);
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn a_paused_guest_does_nothing_and_runs_on_when_it_is_resumed() {
    let shape = Shape {
        cpus: 2,
        ..Shape::default()
    };
    let mut vmm = Vmm::boot(shape, TinyGuest::stomper(64), 16);
    let mut book = Logbook::default();
    vmm.read_until(&mut book, "it runs", |book| book.least(2, "ticks") > 0);
    vmm.ask(&json!({"do": "pause"})).unwrap();
    assert_eq!(vmm.stage(), "paused");
    let before = vmm.status()["exits"].clone();
    vmm.read_console(&mut book);
    let lines = book.lines();
    assert_eq!(vmm.status()["exits"], before);
    vmm.read_console(&mut book);
    assert_eq!(book.lines(), lines);
    vmm.ask(&json!({"do": "resume"})).unwrap();
    vmm.read_until(&mut book, "it runs on", |book| book.lines() > lines + 4);
    assert_eq!(vmm.stage(), "running");
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn a_machine_that_is_told_to_quit_ends_well_and_removes_its_socket() {
    let vmm = Vmm::boot(Shape::default(), TinyGuest::stomper(64), 16);
    let socket = vmm.socket();
    vmm.ask(&json!({"do": "quit"})).unwrap();
    assert!(vmm.wait().success());
    assert!(!socket.exists());
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn a_guest_that_asks_for_its_end_gives_the_exit_code() {
    // A first word that no guest has.
    let place = tempfile::tempdir().unwrap();
    let image = place.path().join("image");
    std::fs::write(&image, guest_test::tiny::image()).unwrap();
    let mut command = Vmm::command();
    let command = command.args(["boot", "--words", "99", "--flat"]).arg(image);
    assert_eq!(command.status().unwrap().code(), Some(1));
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn a_guest_that_kvm_cannot_run_ends_the_machine_with_the_instruction_that_was_at_fault() {
    let place = tempfile::tempdir().unwrap();
    let image = place.path().join("image");
    // An undefined instruction where no handler is.
    std::fs::write(&image, [0x0f, 0x0b]).unwrap();
    let mut command = Vmm::command();
    let output = command
        .args(["boot", "--flat"])
        .arg(image)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(3));
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(error.contains("processor 0 ended"), "{error}");
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn what_makes_no_sense_now_is_refused_and_says_so() {
    let vmm = Vmm::awaiting(Shape::default());
    let error = vmm.ask(&json!({"do": "resume"})).unwrap_err();
    assert_eq!(error, "a machine that is waiting cannot resume");
    let error = vmm
        .ask(&json!({"do": "migrate", "pairing": "x"}))
        .unwrap_err();
    assert_eq!(error, "a machine that is waiting cannot migrate");
    let error = vmm.ask(&json!({"do": "dance"})).unwrap_err();
    assert!(
        error.contains("this is no request: unknown variant `dance`"),
        "{error}"
    );
    let vmm = Vmm::boot(Shape::default(), TinyGuest::stomper(64), 16);
    let error = vmm
        .ask(&json!({"do": "migrate", "pairing": "x"}))
        .unwrap_err();
    assert!(error.contains("this is no pairing string"), "{error}");
    assert_eq!(vmm.stage(), "running");
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn the_client_prints_the_answer_and_its_exit_code_says_whether_it_was_done() {
    let vmm = Vmm::boot(Shape::default(), TinyGuest::stomper(64), 16);
    let ask = |what: &str| {
        let mut command = Vmm::command();
        let command = command.arg("control").arg(vmm.socket()).arg(what);
        command.output().unwrap()
    };
    let status = ask("status");
    assert!(status.status.success());
    let answer: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
    assert_eq!(answer["done"]["stage"], "running");
    let refused = ask("cancel");
    assert_eq!(refused.status.code(), Some(1));
    let answer = String::from_utf8_lossy(&refused.stdout).into_owned();
    assert!(answer.contains("cannot cancel"), "{answer}");
}
