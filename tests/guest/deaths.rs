//! Processes that die in the middle of a migration. Before Release the guest runs on at the source; after it, nobody
//! sees memory that is not the guest's, and both sides say what to do.

use std::fs::File;
use std::io::IoSliceMut;
use std::os::unix::fs::MetadataExt as _;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use rustix::process::Signal;

use crate::failures::{SLOW, running};
use crate::ferry::{
    Ferry, assert_free, assert_unharmed, migrate, ram_address, userfaultfds, write_pages,
};
use crate::qemu::{Options, RAM, Vm, soon};

const MIB: u64 = 1 << 20;

/// A migration under way.
struct Journey {
    vm: Vm,
    to: Vm,
    send: Ferry,
    receive: Ferry,
}

/// A migration that goes through pre-copy in some seconds.
fn slow_pre_copy() -> Journey {
    let (vm, mut to) = (running(), Vm::destination());
    let (receive, pairing) = Ferry::receive(&mut to, &[]);
    let send = Ferry::send(&vm, &pairing, &SLOW);
    send.well_within("pre-copy");
    receive.well_within("pre-copy");
    Journey {
        vm,
        to,
        send,
        receive,
    }
}

/// A migration whose guest stands still, suspended and saved, for some seconds: so much was written at the end.
fn slow_cut_over() -> Journey {
    late_writes(&[
        "--post-copy=never",
        "--downtime-limit=100s",
        "--max-bandwidth=1MB",
    ])
}

/// A migration whose guest runs at the destination and for some seconds lacks memory there, which it does not look at.
fn slow_post_copy() -> Journey {
    let journey = late_writes(&["--post-copy=always", "--max-bandwidth=1MB"]);
    journey.send.well_within("post-copy");
    journey.receive.phase("post-copy");
    journey.to.wait_until_it_counts();
    journey
}

/// Writes 8 MiB while the first pass is sent.
fn late_writes(options: &[&str]) -> Journey {
    late_writes_to(Vm::destination(), options)
}

fn late_writes_to(mut to: Vm, options: &[&str]) -> Journey {
    let vm = running();
    write_pages(&vm, MIB, 1);
    let (receive, pairing) = Ferry::receive(&mut to, &[]);
    let send = Ferry::send(&vm, &pairing, options);
    send.well_within("pre-copy");
    write_pages(&vm, 8 * MIB, 2);
    if options.contains(&"--post-copy=never") {
        send.well_within("cut-over");
    }
    Journey {
        vm,
        to,
        send,
        receive,
    }
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn the_guest_runs_on_when_the_sender_is_killed_in_pre_copy() {
    let mut journey = slow_pre_copy();
    journey.send.kill();
    journey
        .receive
        .ends(1, &["the guest runs on at the source"]);
    assert_unharmed(&mut journey.vm);
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn the_guest_runs_on_when_the_receiver_is_killed_in_pre_copy() {
    let mut journey = slow_pre_copy();
    journey.receive.kill();
    journey.send.ends(1, &["the guest runs on"]);
    assert_unharmed(&mut journey.vm);
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn the_guest_runs_on_when_the_sender_is_killed_while_it_stands_still() {
    let mut journey = slow_cut_over();
    let counted = journey.vm.count();
    assert_eq!(journey.vm.count(), counted, "it stands still");
    journey.send.kill();
    let (_, said) = journey.send.end();
    assert!(
        said.contains("the sender has ended before hand-over"),
        "{said}"
    );
    journey
        .receive
        .ends(1, &["the guest runs on at the source"]);
    assert_unharmed(&mut journey.vm);
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn the_guest_runs_on_when_the_receiver_is_killed_while_it_stands_still() {
    let mut journey = slow_cut_over();
    journey.receive.kill();
    journey.send.ends(1, &["the guest runs on"]);
    assert_unharmed(&mut journey.vm);
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn ctrl_c_while_the_guest_stands_still_lets_it_run_on() {
    let mut journey = slow_cut_over();
    journey.send.signal(Signal::INT);
    journey
        .send
        .ends(1, &["cancelled by the user", "the guest runs on"]);
    journey.receive.ends(1, &["cancelled by the user"]);
    assert_unharmed(&mut journey.vm);
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_second_ctrl_c_says_what_is_waited_for() {
    let mut journey = slow_post_copy();
    journey.send.signal(Signal::INT);
    journey.send.says("cancelling");
    journey.send.signal(Signal::INT);
    journey.send.says("still waiting");
    journey.send.ends(0, &["the rest of its memory"]);
    journey.receive.ends(0, &[]);
}

/// Either of two guests counts; which is told.
fn who_counts<'a>(one: &'a Vm, other: &'a Vm) -> &'a Vm {
    let from = (one.count(), other.count());
    let deadline = soon();
    loop {
        assert!(Instant::now() < deadline, "neither counts on");
        if one.count() > from.0 + 5000 {
            return one;
        }
        if other.count() > from.1 + 5000 {
            return other;
        }
        std::thread::yield_now();
    }
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn one_guest_runs_whenever_in_cut_over_the_sender_is_killed() {
    for delay in [0, 4, 8, 14, 20, 30] {
        let (mut vm, mut to) = (running(), Vm::destination());
        let (mut receive, pairing) = Ferry::receive(&mut to, &[]);
        let mut send = Ferry::send(&vm, &pairing, &[]);
        send.phase("cut-over");
        spin(delay);
        send.kill();
        let (_, said) = send.end();
        let (code, _) = receive.end();
        let at_source = std::ptr::eq(who_counts(&vm, &to), &raw const vm);
        println!("killed after {delay} ms: at the source {at_source}, exit {code:?}, {said}");
        let (still, counted) = if at_source {
            (&to, to.count())
        } else {
            (&vm, vm.count())
        };
        (if at_source { &vm } else { &to }).wait_until_it_counts();
        assert_eq!(still.count(), counted, "both run");
        if at_source {
            assert_free(&vm);
            assert_eq!(userfaultfds(&vm), 0);
        }
        if at_source && delay == 14 {
            assert_unharmed(&mut vm);
        }
    }
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn never_two_guests_run_whenever_in_cut_over_the_receiver_is_killed() {
    for delay in [5, 15, 25, 35, 50] {
        let (mut vm, mut to) = (running(), Vm::destination());
        let (mut receive, pairing) = Ferry::receive(&mut to, &[]);
        let mut send = Ferry::send(&vm, &pairing, &[]);
        send.phase("cut-over");
        spin(delay);
        receive.kill();
        let (code, said) = send.end();
        println!("killed after {delay} ms: exit {code:?}, {said}");
        match code {
            Some(1) => {
                let counted = to.count();
                vm.wait_until_it_counts();
                assert_eq!(to.count(), counted, "both run");
            }
            // It may be that it was killed before it let the guest run: then both stand still, and the sender says so.
            Some(0 | 3) => {
                let counted = vm.count();
                drop(vm.qmp());
                assert_eq!(vm.count(), counted, "the source runs after hand-over");
            }
            _ => panic!("{code:?}: {said}"),
        }
    }
}

fn spin(milliseconds: u64) {
    let moment = Instant::now() + Duration::from_millis(milliseconds);
    while Instant::now() < moment {
        std::hint::spin_loop();
    }
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn the_settings_of_a_sender_that_was_killed_are_put_back() {
    let capabilities = |vm: &mut Vm| {
        let mut qmp = vm.qmp();
        qmp.execute(
            "query-migrate-capabilities",
            &serde_json::Value::Null,
            soon(),
        )
        .unwrap()
    };
    let (mut vm, mut to) = (running(), Vm::destination());
    let before = capabilities(&mut vm);
    let (mut receive, pairing) = Ferry::receive(&mut to, &[]);
    let mut send = Ferry::send(&vm, &pairing, &SLOW);
    send.well_within("pre-copy");
    send.kill();
    send.end();
    receive.end();
    assert_eq!(capabilities(&mut vm), before);
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_source_qemu_that_dies_in_pre_copy_is_told_on_both_sides() {
    let mut journey = slow_pre_copy();
    journey.vm.kill();
    journey
        .send
        .ends(3, &["if it still exists", "it has exited or was killed"]);
    journey.receive.ends(1, &[]);
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_source_qemu_that_dies_while_it_is_suspended_is_told_on_both_sides() {
    let (mut vm, mut to) = (running(), Vm::destination());
    let (mut receive, pairing) = Ferry::receive(&mut to, &[]);
    let mut send = Ferry::send(&vm, &pairing, &[]);
    send.phase("cut-over");
    vm.kill();
    // It may have been saved already: then its memory is all that is left of it, and it moves.
    let (code, said) = send.end();
    let (there, _) = receive.end();
    match code {
        Some(0) => to.wait_until_it_counts(),
        code => {
            assert_eq!((code, there), (Some(3), Some(1)), "{said}");
            assert!(said.contains("it has exited or was killed"), "{said}");
        }
    }
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn the_guest_runs_on_when_the_destination_qemu_is_gone_before_it_begins() {
    let (mut vm, mut to) = (running(), Vm::destination());
    let (mut receive, pairing) = Ferry::receive(&mut to, &[]);
    to.kill();
    let mut send = Ferry::send(&vm, &pairing, &[]);
    send.ends(1, &["the guest runs on"]);
    receive.ends(1, &[]);
    assert_unharmed(&mut vm);
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn the_guest_runs_on_when_the_destination_qemu_dies_in_pre_copy() {
    let mut journey = slow_pre_copy();
    journey.to.kill();
    journey.send.ends(1, &["the guest runs on"]);
    journey.receive.ends(1, &[]);
    assert_unharmed(&mut journey.vm);
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn the_guest_runs_on_when_the_destination_qemu_dies_while_it_stands_still() {
    let mut journey = slow_cut_over();
    journey.to.kill();
    journey.send.ends(1, &["the guest runs on"]);
    journey.receive.ends(1, &[]);
    assert_unharmed(&mut journey.vm);
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_destination_whose_receiver_was_killed_in_pre_copy_can_receive_again() {
    let mut journey = slow_pre_copy();
    journey.receive.kill();
    journey.send.ends(1, &["the guest runs on"]);
    assert!(userfaultfds(&journey.to) > 0, "what it left behind");
    migrate(&journey.vm, &mut journey.to);
    assert_eq!(userfaultfds(&journey.to), 0);
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64 and root (mounts a small tmpfs)"]
fn a_destination_whose_file_system_is_too_small_says_so_and_the_guest_runs_on() {
    for post_copy in ["--post-copy=never", "--post-copy=always"] {
        let mut vm = running();
        write_pages(&vm, 16 * MIB, 3);
        let small = SmallFileSystem::mount(8);
        let backend = format!(
            "memory-backend-file,id=m0,size=64M,share=on,mem-path={}",
            small.0.path().join("ram").display()
        );
        let mut to = Vm::start(&Options {
            backend: &backend,
            more: &["-incoming", "defer", "-S"],
            ..Options::default()
        });
        let (mut receive, pairing) = Ferry::receive(&mut to, &[]);
        let mut send = Ferry::send(&vm, &pairing, &[post_copy]);
        send.ends(1, &["no room", "the guest runs on"]);
        receive.ends(1, &["no room"]);
        assert_unharmed(&mut vm);
        drop(to);
    }
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64 and root (mounts a small tmpfs)"]
fn a_destination_without_room_for_what_would_follow_says_so_before_hand_over() {
    // What follows after hand-over would find no room when it is too late to give up.
    let small = SmallFileSystem::mount(6);
    let backend = format!(
        "memory-backend-file,id=m0,size=64M,share=on,mem-path={}",
        small.0.path().join("ram").display()
    );
    let to = Vm::start(&Options {
        backend: &backend,
        more: &["-incoming", "defer", "-S"],
        ..Options::default()
    });
    let mut journey = late_writes_to(to, &["--post-copy=always", "--max-bandwidth=1MB"]);
    journey.send.ends(1, &["no room", "the guest runs on"]);
    journey.receive.ends(1, &["no room"]);
    assert_unharmed(&mut journey.vm);
    drop(journey);
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_source_qemu_that_hangs_is_told_and_gets_its_guest_back_when_it_is_back() {
    let (mut vm, mut to) = (running(), Vm::destination());
    let (mut receive, pairing) = Ferry::receive(&mut to, &[]);
    let mut send = Ferry::send(
        &vm,
        &pairing,
        &[&SLOW[..], &["--guest-timeout=1s"]].concat(),
    );
    send.well_within("pre-copy");
    vm.signal(Signal::STOP);
    let (code, said) = send.leaves();
    assert_eq!(code, Some(3), "{said}");
    send.says("could not be resumed");
    receive.ends(1, &["the guest runs on at the source"]);
    vm.signal(Signal::CONT);
    send.says("the guest runs on at the source");
    assert_unharmed(&mut vm);
}

/// A file system in memory, gone with this.
struct SmallFileSystem(tempfile::TempDir);

impl SmallFileSystem {
    fn mount(mebibytes: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let options = std::ffi::CString::new(format!("size={mebibytes}M")).unwrap();
        rustix::mount::mount(
            "memferry-test",
            folder.path(),
            "tmpfs",
            rustix::mount::MountFlags::empty(),
            Some(options.as_c_str()),
        )
        .unwrap();
        Self(folder)
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        let detach = rustix::mount::UnmountFlags::DETACH;
        let _ = rustix::mount::unmount(self.0.path(), detach);
    }
}

/// Reads a page that is absent at the destination, as its QEMU would, and tells when it has it.
fn read_absent(to: &Vm) -> mpsc::Receiver<Option<u8>> {
    let ram = File::open(to.ram_path()).unwrap();
    let hole = rustix::fs::seek(&ram, rustix::fs::SeekFrom::Hole(RAM / 2)).unwrap();
    assert!(hole < RAM / 2 + 8 * MIB, "all of it is there");
    // The last of them is the last to come.
    let address = usize::try_from(ram_address(to) + RAM / 2 + 8 * MIB - 4096).unwrap();
    let pid = nix::unistd::Pid::from_raw(i32::try_from(to.pid()).unwrap());
    let (done, read) = mpsc::channel();
    std::thread::spawn(move || {
        let mut byte = [0xee];
        // It faults on behalf of QEMU, and waits as a thread of QEMU does.
        let remote = RemoteIoVec {
            base: address,
            len: 1,
        };
        let read = process_vm_readv(pid, &mut [IoSliceMut::new(&mut byte)], &[remote]);
        let _ = done.send(read.map(|_| byte[0]).ok());
    });
    read
}

/// Who reads absent memory there waits: it gets nothing, and nothing is made of nothing in its place.
#[track_caller]
fn assert_waits(to: &Vm) {
    let before = std::fs::metadata(to.ram_path()).unwrap().blocks();
    let read = read_absent(to);
    let got = read.recv_timeout(Duration::from_millis(300));
    assert_eq!(got, Err(mpsc::RecvTimeoutError::Timeout));
    let after = std::fs::metadata(to.ram_path()).unwrap().blocks();
    assert_eq!(before, after);
    assert!(userfaultfds(to) > 0, "its own copy keeps it waiting");
}

/// The guest runs at the destination, waits where memory is missing, and never runs at the source again.
fn assert_owned_there_and_waiting(journey: &mut Journey) {
    assert_waits(&journey.to);
    assert_free(&journey.to);
    let counted = journey.vm.count();
    journey.to.wait_until_it_counts();
    assert_eq!(journey.vm.count(), counted, "the source never runs again");
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_guest_whose_receiver_was_killed_in_post_copy_waits_and_the_sender_says_what_to_do() {
    let mut journey = slow_post_copy();
    journey.receive.kill();
    journey.send.ends(
        3,
        &[
            "lost after hand-over",
            "Do not resume",
            "The destination owns the guest",
            "By hand: ",
        ],
    );
    assert_owned_there_and_waiting(&mut journey);
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_guest_whose_sender_was_killed_in_post_copy_waits_and_the_receiver_says_what_to_do() {
    let mut journey = slow_post_copy();
    journey.send.kill();
    journey.receive.ends(
        3,
        &[
            "lost after hand-over",
            "Do not resume the guest at the source",
        ],
    );
    assert_owned_there_and_waiting(&mut journey);
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_destination_qemu_that_dies_in_post_copy_is_told_there() {
    let mut journey = slow_post_copy();
    journey.to.kill();
    // The source has let go of the guest and of its memory, all of which came.
    journey
        .receive
        .ends(3, &["does not answer any more", "Never both"]);
    let counted = journey.vm.count();
    let (code, said) = journey.send.end();
    assert!(matches!(code, Some(0 | 3)), "{code:?}: {said}");
    assert_eq!(journey.vm.count(), counted, "the source never runs again");
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_source_qemu_that_dies_in_post_copy_leaves_its_memory_to_the_sender() {
    let mut journey = slow_post_copy();
    journey.vm.kill();
    journey.send.ends(0, &[]);
    journey.receive.ends(0, &[]);
    journey.to.wait_until_it_counts();
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_guest_waits_in_post_copy_for_what_it_reads_and_gets_it() {
    let mut journey = slow_post_copy();
    let read = read_absent(&journey.to);
    assert_eq!(read.recv_timeout(Duration::from_secs(5)), Ok(Some(2)));
    journey.send.ends(0, &[]);
    journey.receive.ends(0, &[]);
    assert_eq!(userfaultfds(&journey.to), 0);
}
