//! Machines that are not alike are refused by the name of what differs, before anything is copied.

use std::io::{Read, Write};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use guest_test::tiny::TinyGuest;
use memferry::transport::{Listener, Pairing};
use serde_json::json;
use vmm_integration::{Arrival, RamBuilder, Vmm as Subject, VmmError};

use crate::vmm::{LONG, Shape, Vmm};

const MEMORY: u64 = 32 << 20;

/// What the source says when the machine that waits is of another shape.
fn refused_by(shape: Shape) -> String {
    let source = Vmm::boot(Shape::default(), TinyGuest::stomper(64), 16);
    let destination = Vmm::awaiting(shape);
    let (pairing, receiving) = destination.receive("127.0.0.1:0");
    let error = source
        .migrate(&pairing, &json!({}))
        .end(|_| {})
        .unwrap_err();
    receiving.end(|_| {}).unwrap_err();
    assert_eq!(
        (&*source.stage(), &*destination.stage()),
        ("running", "waiting")
    );
    error
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn a_machine_with_other_memory_or_other_processors_is_refused_by_name() {
    let other = Shape {
        cpus: 2,
        ..Shape::default()
    };
    let error = refused_by(other);
    assert!(
        error.contains("processors is 1 at the source, and 2 here"),
        "{error}"
    );
    let other = Shape {
        memory: "64M",
        ..Shape::default()
    };
    let error = refused_by(other);
    assert!(
        error.contains("32 MiB") || error.contains("0x2000000") || error.contains("33554432"),
        "{error}"
    );
}

/// A machine that says of itself what it is told to.
#[derive(Debug)]
struct Pretended {
    facts: Vec<(String, String)>,
}

impl Subject for Pretended {
    fn kind(&self) -> &'static str {
        "minivmm"
    }

    fn facts(&self) -> Vec<(String, String)> {
        self.facts.clone()
    }

    fn suspend(&mut self, _: Instant) -> Result<(), VmmError> {
        unreachable!("it never leaves")
    }

    fn save(&mut self, _: &mut dyn Write, _: Instant) -> Result<(), VmmError> {
        unreachable!("it never leaves")
    }

    fn load(&mut self, _: &mut dyn Read, _: Instant) -> Result<(), VmmError> {
        unreachable!("it is refused before")
    }

    fn resume(&mut self, _: Instant) -> Result<(), VmmError> {
        unreachable!("it is refused before")
    }
}

/// What the source says when the machine that waits says this of itself, by the names that the source compares.
fn refused_for(fact: &str, value: &str) -> String {
    let source = Vmm::boot(Shape::default(), TinyGuest::stomper(64), 16);
    let memory = Arc::new(RamBuilder::new(MEMORY).in_memory::<()>().unwrap());
    let listener = Listener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let pairing = Pairing::new(listener.local_addr().unwrap().to_string()).unwrap();
    let sending = source.migrate(&pairing.to_string(), &json!({}));
    let silence = Duration::from_secs(10);
    let session = listener
        .accept(&pairing, silence, LONG, || true, |_, _| {})
        .unwrap();
    let mut pretended = Pretended {
        facts: vec![(fact.to_owned(), value.to_owned())],
    };
    let arrival = Arrival::new(memory).unwrap();
    arrival.run(&session, &mut pretended).unwrap_err();
    let error = sending.end(|_| {}).unwrap_err();
    assert_eq!(source.stage(), "running");
    error
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn the_state_of_another_version_is_refused_before_anything_is_copied() {
    let error = refused_for("version of the state", "2");
    let expected = "version of the state is 1 at the source, and 2 here";
    assert!(error.contains(expected), "{error}");
}

/// A machine that waits, as root without `CAP_SYS_PTRACE`; `prepared` by a script of the shell that has mounts of its own.
fn awaiting_without_the_privilege(prepared: &str) -> Vmm {
    let allowed = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap();
    assert_eq!(allowed.trim(), "0", "on this machine everybody may");
    let script =
        format!("set -e; {prepared}; exec setpriv --bounding-set -sys_ptrace \"$0\" \"$@\"");
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", &script]);
    command.arg(Vmm::command().get_program());
    Vmm::awaiting_in(Shape::default(), command, &[])
}

/// Root may open its devices, but for those on a file system where there are none.
const WITHOUT_DEVICE: &str = "device=/dev/userfaultfd; if [ -e $device ]; then mount --bind $device $device; \
                              mount -o remount,bind,nodev $device; fi";

#[test]
#[ignore = "kvm: needs /dev/kvm, and root to give up a privilege"]
fn who_may_not_watch_memory_is_told_what_would_allow_it_and_receives_without_post_copy() {
    let destination = awaiting_without_the_privilege(WITHOUT_DEVICE);
    let listen = "127.0.0.1:0";
    let error = destination
        .ask(&json!({"do": "receive", "listen": listen}))
        .unwrap_err();
    for way in [
        "CAP_SYS_PTRACE",
        "vm.unprivileged_userfaultfd=1",
        "read access to /dev/userfaultfd",
        "forbid post-copy",
    ] {
        assert!(error.contains(way), "{way} is not in: {error}");
    }

    let source = Vmm::boot(Shape::default(), TinyGuest::stomper(64), 16);
    let (pairing, receiving) = destination.receive_as(&json!({
        "do": "receive", "listen": listen, "without_post_copy": true
    }));
    let plan = json!({"downtime": 1000});
    let sent = source.migrate(&pairing, &plan).end(|_| {}).unwrap();
    receiving.end(|_| {}).unwrap();
    assert_eq!(sent["post_copy"], false);
    assert_eq!(destination.stage(), "running");
}

#[test]
#[ignore = "kvm: needs /dev/kvm, /dev/userfaultfd (Linux 6.1), and root to give up a privilege"]
fn who_may_open_the_device_receives_by_post_copy_without_the_privilege() {
    let destination = awaiting_without_the_privilege("true");
    let source = Vmm::boot(Shape::default(), TinyGuest::stomper(64), 16);
    let (pairing, receiving) = destination.receive("127.0.0.1:0");
    let plan = json!({"post_copy": "after-one-pass"});
    let sent = source.migrate(&pairing, &plan).end(|_| {}).unwrap();
    receiving.end(|_| {}).unwrap();
    assert_eq!(sent["post_copy"], true);
    assert_eq!(destination.stage(), "running");
}
