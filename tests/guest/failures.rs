//! Bad input to the two commands: refused with the reason, and the guest runs on.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use rustix::process::Signal;

use crate::ferry::{Ferry, assert_free, assert_unharmed, migrate, userfaultfds};
use crate::qemu::{Options, Vm};

/// Slow enough that pre-copy lasts for some seconds.
pub(crate) const SLOW: [&str; 2] = ["--max-bandwidth", "200KB"];

pub(crate) fn running() -> Vm {
    let mut vm = Vm::source();
    drop(vm.qmp());
    vm.wait_until_it_counts();
    vm
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn two_commands_move_a_guest() {
    let (vm, mut to) = (running(), Vm::destination());
    migrate(&vm, &mut to);
    for vm in [&vm, &to] {
        assert_free(vm);
        assert_eq!(userfaultfds(vm), 0);
    }
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_dry_run_changes_nothing_and_leaves_the_pairing_string_good() {
    let (vm, mut to) = (running(), Vm::destination());
    let (mut receive, pairing) = Ferry::receive(&mut to, &[]);
    let mut send = Ferry::send(&vm, &pairing, &["--dry-run"]);
    let forecast = send.event("a forecast", |event| event["event"] == "forecast");
    assert!(forecast["dirty_rate"].as_u64().unwrap() > 0, "{forecast}");
    send.ends(0, &[]);
    vm.wait_until_it_counts();
    assert_eq!(userfaultfds(&vm), 0);
    let mut send = Ferry::send(&vm, &pairing, &[]);
    send.ends(0, &[]);
    receive.ends(0, &[]);
    to.wait_until_it_counts();
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_wrong_pairing_string_is_refused_and_the_right_one_still_works() {
    let (vm, mut to) = (running(), Vm::destination());
    let (mut receive, pairing) = Ferry::receive(&mut to, &[]);
    let last = if pairing.ends_with('0') { "1" } else { "0" };
    let wrong = format!("{}{last}", &pairing[..pairing.len() - 1]);
    Ferry::send(&vm, &wrong, &[]).ends(1, &["the pairing string is wrong"]);
    Ferry::send(&vm, "memferry1:127.0.0.1", &[]).ends(2, &["incomplete"]);
    Ferry::send(&vm, &pairing, &[]).ends(0, &[]);
    receive.ends(0, &[]);
    to.wait_until_it_counts();
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_pairing_string_that_was_used_is_refused() {
    let (mut vm, mut to) = (running(), Vm::destination());
    let (_receive, pairing) = Ferry::receive(&mut to, &[]);
    Ferry::send(&vm, &pairing, &[]).ends(0, &[]);
    // The first one has moved; this is another guest.
    vm = running();
    Ferry::send(&vm, &pairing, &[]).ends(1, &["cannot connect", "still waiting there"]);
    assert_unharmed(&mut vm);
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_pairing_string_that_is_being_used_is_refused_at_once() {
    let (vm, mut to) = (running(), Vm::destination());
    let (mut receive, pairing) = Ferry::receive(&mut to, &[]);
    let mut send = Ferry::send(&vm, &pairing, &SLOW);
    send.well_within("pre-copy");
    let mut other = running();
    Ferry::send(&other, &pairing, &[]).ends(1, &["was used already"]);
    assert_unharmed(&mut other);
    send.ends(0, &[]);
    receive.ends(0, &[]);
}

/// What a pairing string names.
fn address(pairing: &str) -> &str {
    let (_, rest) = pairing.split_once(':').unwrap();
    rest.split_once('#').unwrap().0
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_receiver_turns_away_garbage_and_other_versions_and_still_takes_the_source() {
    let (vm, mut to) = (running(), Vm::destination());
    let (mut receive, pairing) = Ferry::receive(&mut to, &[]);
    for opening in [
        &b"GET / HTTP/1.1\r\nHost: there\r\n\r\n    "[..],
        b"MFRY\x63",
    ] {
        let mut stream = TcpStream::connect(address(&pairing)).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        stream.write_all(opening).unwrap();
        let _ = stream.shutdown(std::net::Shutdown::Write);
        // It hangs up, with or without a reset.
        let _ = stream.read(&mut [0; 100]);
    }
    Ferry::send(&vm, &pairing, &[]).ends(0, &[]);
    receive.ends(0, &[]);
}

/// A receiver that answers with `greeting`.
fn impostor(greeting: &'static [u8]) -> (String, std::thread::JoinHandle<()>) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let thread = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(greeting).unwrap();
        let _ = stream.read(&mut [0; 100]);
    });
    let pairing = format!("memferry1:{address}#{}.{}", "5".repeat(16), "7".repeat(32));
    (pairing, thread)
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_receiver_of_another_version_is_named_and_the_guest_runs_on() {
    let mut vm = running();
    let (pairing, thread) = impostor(b"MFRY\x63...................................");
    Ferry::send(&vm, &pairing, &[]).ends(1, &["version 99", "same release on both hosts"]);
    thread.join().unwrap();
    let (pairing, thread) = impostor(b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3\r\n");
    Ferry::send(&vm, &pairing, &[]).ends(1, &["does not speak memferry's protocol"]);
    thread.join().unwrap();
    assert_unharmed(&mut vm);
}

/// A destination that does not fit is refused with the reason, on both sides.
#[track_caller]
fn is_refused(options: &Options<'_>, words: &[&str]) {
    let mut vm = running();
    let mut to = Vm::start(options);
    let (mut receive, pairing) = Ferry::receive(&mut to, &[]);
    Ferry::send(&vm, &pairing, &[]).ends(1, &[words, &["the guest runs on"]].concat());
    receive.ends(1, words);
    assert_unharmed(&mut vm);
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_destination_with_less_memory_is_refused_with_both_sizes() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let backend = format!(
        "memory-backend-file,id=m0,size=32M,share=on,mem-path={}",
        folder.path().join("other").display()
    );
    is_refused(
        &Options {
            backend: &backend,
            more: &["-m", "32", "-incoming", "defer", "-S"],
            ..Options::default()
        },
        &["m0", "33554432", "67108864"],
    );
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_destination_of_another_machine_is_refused_by_name() {
    is_refused(
        &Options {
            machine: "q35",
            more: &["-incoming", "defer", "-S"],
            ..Options::default()
        },
        &["q35"],
    );
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_destination_that_runs_is_refused_before_it_prints_a_string() {
    let mut to = running();
    Ferry::try_receive(&mut to, &[]).ends(1, &["-incoming defer"]);
    to.wait_until_it_counts();
    assert_eq!(userfaultfds(&to), 0);
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn an_address_off_loopback_is_refused_on_both_sides_without_insecure() {
    let (mut vm, mut to) = (running(), Vm::destination());
    let listen = ["--listen", "0.0.0.0:0"];
    Ferry::try_receive(&mut to, &listen).ends(1, &["is not loopback", "--insecure"]);
    let pairing = format!(
        "memferry1:192.0.2.1:9#{}.{}",
        "5".repeat(16),
        "7".repeat(32)
    );
    Ferry::send(&vm, &pairing, &[]).ends(1, &["is not loopback", "--insecure"]);
    assert_unharmed(&mut vm);
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn ctrl_c_in_pre_copy_gives_up_and_the_guest_runs_on() {
    let (mut vm, mut to) = (running(), Vm::destination());
    let (mut receive, pairing) = Ferry::receive(&mut to, &[]);
    let mut send = Ferry::send(&vm, &pairing, &SLOW);
    send.well_within("pre-copy");
    send.signal(Signal::INT);
    send.ends(1, &["cancelled by the user", "the guest runs on"]);
    receive.ends(1, &["cancelled by the user"]);
    assert_unharmed(&mut vm);
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn ctrl_c_at_the_receiver_in_pre_copy_gives_up_and_the_guest_runs_on() {
    let (mut vm, mut to) = (running(), Vm::destination());
    let (mut receive, pairing) = Ferry::receive(&mut to, &[]);
    let mut send = Ferry::send(&vm, &pairing, &SLOW);
    receive.well_within("pre-copy");
    receive.signal(Signal::INT);
    receive.ends(1, &["cancelled by the user"]);
    send.ends(1, &["cancelled by the user", "the guest runs on"]);
    assert_unharmed(&mut vm);
}
