//! A guest moves from one host to another: two network namespaces with a wire between them.

use std::process::Command;

use guest_test::tiny::TinyGuest;
use guest_test::tiny::report::Logbook;
use serde_json::json;

use crate::vmm::{Shape, Vmm};

/// Two namespaces, each with an end of a wire. Removed on drop.
struct Hosts {
    names: [String; 2],
}

/// Where each of them is.
const ADDRESSES: [&str; 2] = ["10.231.77.1", "10.231.77.2"];

fn ip(arguments: &str) -> bool {
    let mut command = Command::new("ip");
    command
        .args(arguments.split(' '))
        .status()
        .unwrap()
        .success()
}

impl Hosts {
    fn new() -> Self {
        let names = ["a", "b"].map(|end| format!("mv{}{end}", std::process::id()));
        let hosts = Self { names };
        let [a, b] = &hosts.names;
        for name in &hosts.names {
            assert!(ip(&format!("netns add {name}")));
        }
        assert!(ip(&format!(
            "-n {a} link add wire type veth peer name wire netns {b}"
        )));
        for (name, address) in hosts.names.iter().zip(ADDRESSES) {
            assert!(ip(&format!("-n {name} addr add {address}/24 dev wire")));
            assert!(ip(&format!("-n {name} link set wire up")));
        }
        hosts
    }

    /// Runs a minivmm on one of them.
    fn command(&self, host: usize) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.names[host]]);
        command.arg(Vmm::command().get_program());
        command
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for name in &self.names {
            // The other end of the wire goes with the first.
            ip(&format!("netns del {name}"));
        }
    }
}

#[test]
#[ignore = "kvm: needs /dev/kvm, and root for network namespaces"]
fn a_guest_moves_to_another_host_and_back() {
    let hosts = Hosts::new();
    let cpus = 2;
    let shape = Shape {
        cpus,
        ..Shape::default()
    };
    let guest = TinyGuest::stomper(256);
    let mut machines = [
        Vmm::boot_in(shape, guest, 16, hosts.command(0), &[]),
        Vmm::awaiting_in(shape, hosts.command(1), &[]),
    ];
    let mut book = Logbook::default();
    for (here, there) in [(0, 1), (1, 0)] {
        let sweeps = book.least(cpus, "sweeps");
        machines[here].read_until(&mut book, "all pages are looked at", |book| {
            book.least(cpus, "sweeps") >= sweeps + 2
        });
        let (pairing, receiving) = machines[there].receive(&format!("{}:0", ADDRESSES[there]));
        let plan = json!({"post_copy": "after-one-pass"});
        machines[here].migrate(&pairing, &plan).end(|_| {}).unwrap();
        receiving.end(|_| {}).unwrap();
        machines[here].read_console(&mut book);
    }
    let sweeps = book.least(cpus, "sweeps");
    machines[0].read_until(&mut book, "all pages are looked at", |book| {
        book.least(cpus, "sweeps") >= sweeps + 2
    });
}
