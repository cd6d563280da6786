//! `memferry uffd-handler`, with a stand-in for Firecracker.

mod measure;
mod rig;
mod stand_in;

use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use memferry::sys::uffd::Scope;
use rustix::process::Signal;

use crate::victim::{NOBODY, PATIENCE, wait_until};
use rig::{Link, Rig, is_there};
use stand_in::Machine;

pub(crate) use stand_in::{ROLE, be_a_vmm};

const PAGES: u64 = 4096;

#[test]
fn a_vmm_has_all_of_its_memory_and_then_nobody_needs_the_handler() {
    let rig = Rig::new(PAGES);
    let mut handler = rig.handler(&rig.memory(), &[]);
    let mode = std::fs::metadata(rig.socket())
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o7777, 0o600);
    let mut vmm = Machine::of(PAGES).start(&rig.socket());
    let serving = handler.event("serving");
    assert_eq!(serving["pid"], vmm.pid());
    assert_eq!(serving["bytes"], PAGES * 4096);
    assert!(!is_there(&rig.socket()));
    vmm.must("all");
    handler.event("complete");
    handler.ends_with(0);
    vmm.must("all");
    // Nobody reads events any more, and nobody has to.
    vmm.must("discard 100 300");
    vmm.must("churn 20000");
    vmm.must("all");
    assert!(vmm.runs());
}

#[test]
fn what_is_given_back_is_zeros_whatever_comes_meanwhile() {
    let rig = Rig::new(PAGES);
    let (_peer, address) = rig.peer("127.0.0.1:0");
    let link = Link::to(address, Duration::from_millis(1));
    for more in [&[][..], &["--no-populate"], &["--cache", "memory"]] {
        let mut handler = rig.handler(&link.url(), more);
        let mut vmm = Machine {
            piece: 7,
            ..Machine::of(PAGES)
        }
        .start(&rig.socket());
        // Before anything else can have come.
        vmm.must("discard 1000 1010");
        vmm.must("churn 1500");
        handler.signal(Signal::TERM);
        vmm.must("churn 1500");
        vmm.must("all");
        handler.event("complete");
        handler.ends_with(0);
        vmm.must("all");
        vmm.must("churn 1500");
    }
}

/// As for memory that is plugged in and not in use yet: the kernel fills no two of its mappings by one call.
#[test]
fn what_is_one_mapping_to_the_vmm_may_be_many_to_the_kernel() {
    for more in [&[][..], &["--no-populate"]] {
        let rig = Rig::new(PAGES);
        let (_peer, address) = rig.peer("127.0.0.1:0");
        let link = Link::to(address, Duration::from_millis(5));
        let mut handler = rig.handler(&link.url(), more);
        let machine = Machine {
            protected: vec![(100, 101), (700, 800), (2047, 2049), (3000, 3071)],
            ..Machine::of(PAGES)
        };
        let mut vmm = machine.start(&rig.socket());
        // Faults in a sequence across the borders, which are read ahead and installed together.
        for page in (690..710).chain(2040..2055) {
            vmm.must(&format!("touch {page}"));
        }
        if more.is_empty() {
            handler.event("complete");
            handler.ends_with(0);
        }
        vmm.must("all");
        vmm.must("protect 700 800 1");
        vmm.must("all");
        if !more.is_empty() {
            handler.signal(Signal::TERM);
            handler.event("complete");
            handler.ends_with(0);
            vmm.must("all");
        }
    }
}

#[test]
fn a_fault_comes_over_the_network_before_the_rest_has() {
    let rig = Rig::new(PAGES);
    let (_peer, address) = rig.peer("127.0.0.1:0");
    let link = Link::to(address, Duration::from_millis(5));
    let mut handler = rig.handler(&link.url(), &["--window", "64KiB"]);
    let mut vmm = Machine::of(PAGES).start(&rig.socket());
    handler.event("serving");
    vmm.must(&format!("touch {}", PAGES - 1));
    let progress = handler.event("progress");
    assert!(progress["resident"].as_u64() < Some(PAGES * 4096));
    vmm.must("all");
    handler.event("complete");
    handler.ends_with(0);
}

#[test]
fn only_what_is_accessed_comes_if_the_rest_is_not_wanted_until_the_handler_is_to_end() {
    let rig = Rig::new(PAGES);
    let mut handler = rig.handler(&rig.memory(), &["--no-populate"]);
    let mut vmm = Machine::of(PAGES).start(&rig.socket());
    for page in [0, 1000, 2000] {
        vmm.must(&format!("touch {page}"));
    }
    let mut resident = 0;
    wait_until("three pages are told of", || {
        resident = handler.event("progress")["resident"].as_u64().unwrap();
        resident >= 3 * 4096
    });
    assert_eq!(resident, 3 * 4096);
    handler.signal(Signal::TERM);
    handler.event("ending");
    handler.event("complete");
    handler.ends_with(0);
    vmm.must("all");
}

#[test]
fn a_vmm_that_ends_ends_its_handler() {
    let rig = Rig::new(PAGES);
    let mut handler = rig.handler(&rig.memory(), &["--no-populate"]);
    let mut vmm = Machine::of(PAGES).start(&rig.socket());
    vmm.must("touch 7");
    drop(vmm);
    handler.event("vmm-ended");
    handler.ends_with(0);
}

#[test]
fn a_vmm_that_ends_ends_its_handler_also_while_the_network_says_nothing() {
    let rig = Rig::new(PAGES);
    let (_peer, address) = rig.peer("127.0.0.1:0");
    let link = Link::to(address, Duration::ZERO);
    let mut handler = rig.handler(&link.url(), &["--no-populate", "--deadline", "1h"]);
    let mut vmm = Machine::of(PAGES).start(&rig.socket());
    vmm.must("touch 7");
    link.stall();
    vmm.tell("touch 2000");
    handler.event("stalled");
    drop(vmm);
    handler.event("vmm-ended");
    handler.ends_with(0);
}

#[test]
fn a_vmm_whose_handler_dies_is_killed_unless_it_is_to_wait() {
    for (choice, killed) in [("kill", true), ("wait", false)] {
        let rig = Rig::new(PAGES);
        let more = ["--no-populate", "--on-failure", choice];
        let mut handler = rig.handler(&rig.memory(), &more);
        let mut vmm = Machine::of(PAGES).start(&rig.socket());
        vmm.must("touch 7");
        handler.event("serving");
        handler.signal(Signal::KILL);
        assert_eq!(handler.end(), None);
        if killed {
            assert_eq!(vmm.end().signal(), Some(libc::SIGKILL), "{choice}");
        } else {
            // What is there can be used, and what is not is waited for.
            vmm.must("touch 7");
            vmm.tell("touch 8");
            assert!(vmm.runs() && vmm.is_silent());
        }
    }
}

#[test]
fn a_peer_that_dies_ends_a_vmm_that_needs_it_for_too_long() {
    let rig = Rig::new(PAGES);
    let (peer, address) = rig.peer("127.0.0.1:0");
    let url = format!("nbd://{address}");
    let mut handler = rig.handler(&url, &["--no-populate", "--deadline", "300ms"]);
    let mut vmm = Machine::of(PAGES).start(&rig.socket());
    vmm.must("touch 7");
    drop(peer);
    // What is there can be used for as long as it likes.
    vmm.must("touch 7");
    vmm.tell("touch 2000");
    let error = handler.event("stalled")["error"].clone();
    let error = error.as_str().unwrap();
    assert!(error.contains("cannot connect"), "{error}");
    assert_eq!(vmm.end().signal(), Some(libc::SIGKILL));
    let words = handler.ends_with(3);
    assert!(
        words.contains("did not come") && words.contains(error),
        "{words}"
    );
}

#[test]
#[ignore = "privileged: needs CAP_SYS_PTRACE"]
fn what_the_kernel_accesses_for_the_vmm_never_fails_though_the_peer_is_away() {
    let rig = Rig::new(PAGES);
    let (peer, address) = rig.peer("127.0.0.1:0");
    let url = format!("nbd://{address}");
    let mut handler = rig.handler(&url, &["--no-populate", "--deadline", "300ms"]);
    let mut vmm = Machine {
        scope: Scope::UserAndKernel,
        ..Machine::of(PAGES)
    }
    .start(&rig.socket());
    vmm.must("kernel 7");
    drop(peer);
    // It neither answers with an error nor with zeros: there is no answer.
    vmm.tell("kernel 2000");
    assert_eq!(vmm.end().signal(), Some(libc::SIGKILL));
    handler.ends_with(3);
}

#[test]
fn a_network_that_says_nothing_any_more_is_told_of_and_then_ends_the_vmm() {
    let rig = Rig::new(PAGES);
    let (_peer, address) = rig.peer("127.0.0.1:0");
    let link = Link::to(address, Duration::ZERO);
    let more = ["--no-populate", "--deadline", "2s", "--on-failure", "kill"];
    let mut handler = rig.handler(&link.url(), &more);
    let mut vmm = Machine::of(PAGES).start(&rig.socket());
    vmm.must("touch 7");
    link.stall();
    vmm.tell("touch 2000");
    // Long before the server's time is over.
    assert_eq!(handler.event("stalled")["error"], "nothing has come yet");
    assert!(vmm.runs());
    assert_eq!(vmm.end().signal(), Some(libc::SIGKILL));
    handler.ends_with(3);
}

#[test]
#[ignore = "privileged: needs root (chown)"]
fn the_socket_is_given_to_the_user_who_runs_the_vmm() {
    let rig = Rig::new(64);
    let _handler = rig.handler(&rig.memory(), &["--owner", "65534:65534"]);
    let metadata = std::fs::metadata(rig.socket()).unwrap();
    assert_eq!((metadata.uid(), metadata.gid()), (NOBODY, NOBODY));
    assert_eq!(metadata.permissions().mode() & 0o7777, 0o600);
}

#[test]
fn a_vmm_that_waits_goes_on_when_the_peer_is_back() {
    let rig = Rig::new(PAGES);
    let (peer, address) = rig.peer("127.0.0.1:0");
    let more = ["--no-populate", "--on-failure", "wait"];
    let mut handler = rig.handler(&format!("nbd://{address}"), &more);
    let mut vmm = Machine::of(PAGES).start(&rig.socket());
    vmm.must("touch 7");
    drop(peer);
    vmm.tell("touch 2000");
    // Long before anything has failed for good.
    let error = handler.event("stalled")["error"].clone();
    assert!(
        error.as_str().unwrap().contains("cannot connect"),
        "{error}"
    );
    let _peer = rig.peer(&address.to_string());
    assert_eq!(vmm.answer(), "well");
    handler.event("going-on");
    handler.signal(Signal::TERM);
    handler.event("complete");
    handler.ends_with(0);
    vmm.must("all");
}

#[test]
fn a_handler_that_is_forced_to_end_does_with_the_vmm_what_was_asked_for() {
    for (choice, says) in [("kill", "was killed"), ("wait", "end it")] {
        let rig = Rig::new(PAGES);
        let (_peer, address) = rig.peer("127.0.0.1:0");
        // So slow that not all of it comes meanwhile.
        let link = Link::to(address, Duration::from_millis(200));
        let more = ["--no-populate", "--window", "4KiB", "--on-failure", choice];
        let mut handler = rig.handler(&link.url(), &more);
        let mut vmm = Machine::of(PAGES).start(&rig.socket());
        vmm.must("touch 7");
        handler.signal(Signal::INT);
        handler.event("ending");
        handler.signal(Signal::INT);
        let words = handler.ends_with(3);
        assert!(words.contains(says), "{words}");
        if choice == "kill" {
            assert_eq!(vmm.end().signal(), Some(libc::SIGKILL));
            continue;
        }
        vmm.must("touch 7");
        vmm.tell("touch 4000");
        assert!(vmm.runs() && vmm.is_silent());
    }
}

#[test]
fn who_is_no_vmm_is_turned_away_and_a_vmm_that_comes_then_is_served() {
    let rig = Rig::new(PAGES);
    let mut handler = rig.handler(&rig.memory(), &[]);
    let long = vec![b' '; 2 << 20];
    let garbage: [&[u8]; 6] = [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"[]",
        br#"[{"base_host_virt_addr":4096,"size":4096,"offset":0,"page_size":4096}]"#,
        br#"[{"base_host_virt_addr":4096,"size":4096,"#,
        &long,
    ];
    for bytes in garbage {
        let mut stream = UnixStream::connect(rig.socket()).unwrap();
        // It may have been turned away before all was written.
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        handler.event("turned-away");
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        // It is closed.
        assert!(matches!(stream.read(&mut [0]), Ok(0) | Err(_)));
    }
    let mut vmm = Machine::of(PAGES).start(&rig.socket());
    vmm.must("all");
    handler.ends_with(0);
}

#[test]
fn a_vmm_that_cannot_be_served_is_killed_and_the_reason_told() {
    let check = |machine: &Machine, says: &str| {
        let rig = Rig::new(PAGES);
        let mut handler = rig.handler(&rig.memory(), &[]);
        let vmm = machine.start(&rig.socket());
        assert_eq!(vmm.end().signal(), Some(libc::SIGKILL));
        let words = handler.ends_with(1);
        assert!(words.contains(says), "{words}");
        assert!(words.contains("was killed"), "{words}");
        assert!(!is_there(&rig.socket()));
    };
    check(&Machine::of(PAGES + 64), "another snapshot");
    let lies = |says: &str| Machine {
        says: Some(says.to_owned()),
        ..Machine::of(PAGES)
    };
    check(&lies("no JSON"), "does not describe");
    let nowhere = r#"[{"base_host_virt_addr":4096,"size":4096,"offset":0,"page_size":4096}]"#;
    check(&lies(nowhere), "mapping 0");
    let overlap = r#"[{"base_host_virt_addr":4096,"size":8192,"offset":0,"page_size":4096},
        {"base_host_virt_addr":8192,"size":4096,"offset":8192,"page_size":4096}]"#;
    check(&lies(overlap), "the same addresses");
}

#[test]
fn nobody_comes_or_the_socket_is_taken() {
    let rig = Rig::new(64);
    let mut handler = rig.handler(&rig.memory(), &["--wait", "100ms"]);
    let words = handler.ends_with(1);
    assert!(words.contains("no VMM has come"), "{words}");
    // One that a killed handler has left is replaced.
    let mut killed = rig.handler(&rig.memory(), &[]);
    killed.signal(Signal::KILL);
    killed.end();
    assert!(is_there(&rig.socket()));
    let mut handler = rig.handler(&rig.memory(), &[]);
    let socket = rig.socket().display().to_string();
    let second = std::process::Command::new(env!("CARGO_BIN_EXE_memferry"))
        .args(["uffd-handler", "--socket", &socket, &rig.memory()])
        .output()
        .unwrap();
    assert_eq!(second.status.code(), Some(1));
    handler.signal(Signal::TERM);
    handler.event("ended");
    handler.ends_with(0);
    assert!(!is_there(&rig.socket()));
}

#[test]
#[ignore = "privileged: needs CAP_SYS_PTRACE"]
fn what_the_kernel_accesses_for_the_vmm_comes_too() {
    let rig = Rig::new(PAGES);
    let mut handler = rig.handler(&rig.memory(), &["--no-populate"]);
    let mut vmm = Machine {
        scope: Scope::UserAndKernel,
        ..Machine::of(PAGES)
    }
    .start(&rig.socket());
    for page in [0, 20, 1000, PAGES - 1] {
        vmm.must(&format!("kernel {page}"));
    }
    vmm.must("discard 1000 1001");
    vmm.must("kernel 1000");
    handler.signal(Signal::TERM);
    handler.ends_with(0);
}

/// Huge pages of this machine, as long as this lives.
struct HugePages {
    before: String,
}

const HUGE: &str = "/proc/sys/vm/nr_hugepages";

impl HugePages {
    fn reserve(count: u64) -> Self {
        let before = std::fs::read_to_string(HUGE).unwrap();
        let all = before.trim().parse::<u64>().unwrap() + count;
        // Memory may be in small pieces; not every kernel can do something about it.
        let _ = std::fs::write("/proc/sys/vm/compact_memory", "1");
        std::fs::write(HUGE, all.to_string()).unwrap();
        let reserved = std::fs::read_to_string(HUGE).unwrap();
        assert_eq!(reserved.trim(), all.to_string(), "no memory for huge pages");
        Self { before }
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = std::fs::write(HUGE, &self.before);
    }
}

#[test]
#[ignore = "privileged: needs root (huge pages)"]
fn memory_of_huge_pages_is_served_in_huge_pages() {
    let _pages = HugePages::reserve(16);
    let rig = Rig::new(16 * 512);
    let huge = Machine {
        page_size: 2 << 20,
        claims: 2 << 20,
        ..Machine::of(16 * 512)
    };
    for more in [&[][..], &["--no-populate"]] {
        let mut handler = rig.handler(&rig.memory(), more);
        let mut vmm = huge.start(&rig.socket());
        vmm.must("touch 600");
        vmm.must("discard 1 2");
        vmm.must("all");
        vmm.must("discard 5 6");
        vmm.must("all");
        handler.signal(Signal::TERM);
        handler.ends_with(0);
        vmm.must("discard 7 8");
        vmm.must("all");
    }
    // It says something else than what it has.
    let mut handler = rig.handler(&rig.memory(), &[]);
    let liar = Machine {
        claims: 4096,
        ..huge
    };
    let liar = liar.start(&rig.socket());
    assert_eq!(liar.end().signal(), Some(libc::SIGKILL));
    let words = handler.ends_with(1);
    assert!(words.contains("another size"), "{words}");
}
