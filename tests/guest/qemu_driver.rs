//! The QEMU driver with real QEMUs: whole migrations, rollbacks, deaths and refusals.

use std::io::{self, Write};
use std::time::{Duration, Instant};

use memferry::subject::qemu::{
    IncomingQemu, Machine, OutgoingQemu, QemuError, Qmp, QmpError, Refusal, RunState,
};
use memferry::subject::{Incoming, Outgoing, SubjectError};
use serde_json::{Value, json};

use crate::qemu::{Options, Vm, copy_ram, soon};

/// A source that runs and counts.
fn outgoing(vm: &mut Vm) -> OutgoingQemu {
    vm.wait_until_it_counts();
    let (qmp, machine) = vm.inspected();
    OutgoingQemu::new(qmp, machine).unwrap()
}

fn incoming(vm: &mut Vm) -> IncomingQemu {
    let (qmp, machine) = vm.inspected();
    IncomingQemu::new(qmp, machine, soon()).unwrap()
}

/// Copies all RAM of a suspended guest, by what both QEMUs have mapped.
fn copy_backends(source: &OutgoingQemu, destination: &IncomingQemu) {
    let (from, to) = (source.machine(), destination.machine());
    for (one, other) in from.backends.iter().zip(&to.backends) {
        copy_ram(&one.open(from.pid).unwrap(), &other.open(to.pid).unwrap());
    }
}

/// A whole migration; the guest counts on at the destination when this returns.
fn migrate(mut source: OutgoingQemu, vm: &Vm, to: &mut Vm) {
    let mut destination = incoming(to);
    destination.accept(&source.describe()).unwrap();
    source.suspend(soon()).unwrap();
    let counted = vm.count();
    copy_backends(&source, &destination);
    let mut state = Vec::new();
    source.save(&mut state, soon()).unwrap();
    destination.load(&mut &state[..], soon()).unwrap();
    assert_eq!(
        (vm.count(), to.count()),
        (counted, counted),
        "nobody counts before the release"
    );
    source.release();
    destination.resume(soon()).unwrap();
    to.wait_until_it_counts();
    assert_eq!(vm.count(), counted, "the source never runs again");
}

fn whole_migration(machine: &str) {
    let options = |more| Options {
        machine,
        more,
        ..Options::default()
    };
    let mut vm = Vm::start(&options(&[]));
    let mut to = Vm::start(&options(&["-incoming", "defer", "-S"]));
    migrate(outgoing(&mut vm), &vm, &mut to);
}

/// The deepest error of a chain, by its type.
#[track_caller]
fn cause(error: &SubjectError) -> &QemuError {
    let source = error.source.as_deref().expect("an error with its cause");
    source.downcast_ref().expect("a QemuError")
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_pc_guest_counts_on_at_the_destination() {
    whole_migration("pc");
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_q35_guest_is_saved_and_loaded() {
    // Its firmware finds no boot disk on an IDE bus that q35 does not have, so it does not count.
    let options = |more| Options {
        machine: "q35",
        more,
        ..Options::default()
    };
    let mut vm = Vm::start(&options(&["-device", "VGA"]));
    let mut to = Vm::start(&options(&["-device", "VGA", "-incoming", "defer", "-S"]));
    let (qmp, machine) = vm.inspected();
    let mut source = OutgoingQemu::new(qmp, machine).unwrap();
    let mut destination = incoming(&mut to);
    destination.accept(&source.describe()).unwrap();
    source.suspend(soon()).unwrap();
    copy_backends(&source, &destination);
    let mut state = Vec::new();
    source.save(&mut state, soon()).unwrap();
    destination.load(&mut &state[..], soon()).unwrap();
    source.release();
    destination.resume(soon()).unwrap();
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_destination_without_s_does_not_run_before_it_is_told() {
    let mut vm = Vm::source();
    let mut to = Vm::start(&Options {
        more: &["-incoming", "defer"],
        ..Options::default()
    });
    migrate(outgoing(&mut vm), &vm, &mut to);
}
