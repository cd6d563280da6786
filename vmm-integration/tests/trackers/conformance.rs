//! Every promise of a tracker, kept for the writes of a guest.

use std::sync::Arc;

use memferry::chunk::ChunkSize;
use memferry::dirty::conformance::{self, Tracked};
use memferry::dirty::{DirtyTracker, Union};
use vmm_integration::VmmWrites;
use vmm_integration::kvm::{Clearing, DirtyLog, DirtyRing};

use crate::machine::{Machine, Mode, PAGE, Shape, Writer};

/// The only region of a machine that is tracked, and a vCPU that writes to it.
struct Guest {
    // Ended first.
    writer: Writer,
    tracker: Arc<dyn DirtyTracker>,
    machine: Machine,
}

impl Guest {
    fn new(shape: &Shape, track: impl FnOnce(&Machine) -> Arc<dyn DirtyTracker>) -> Self {
        let machine = Machine::new(shape);
        Self {
            writer: machine.writer(),
            tracker: track(&machine),
            machine,
        }
    }
}

impl Tracked for Guest {
    fn tracker(&self) -> &dyn DirtyTracker {
        &self.tracker
    }

    fn write(&self, offset: u64, bytes: &[u8]) {
        let address = self.machine.address(0) + offset;
        self.writer.write(address, bytes);
    }

    fn read(&self, offset: u64, buf: &mut [u8]) {
        self.machine.read(0, offset, buf);
    }

    fn allocated(&self) -> u64 {
        self.machine.allocated(0)
    }
}

fn shape(len: u64, chunk_size: ChunkSize) -> Shape {
    Shape {
        chunk_size,
        // A guest's memory is whole pages.
        ..Shape::of(len.next_multiple_of(PAGE))
    }
}

fn logged(len: u64, chunk_size: ChunkSize) -> Guest {
    Guest::new(&shape(len, chunk_size), |machine| {
        let mut logs = DirtyLog::regions(&machine.slots, chunk_size).unwrap();
        assert_eq!(logs[0].clearing(), Clearing::InRanges);
        Arc::new(logs.remove(0))
    })
}

fn logged_and_cleared_with_read(len: u64, chunk_size: ChunkSize) -> Guest {
    Guest::new(&shape(len, chunk_size), |machine| {
        let logs = DirtyLog::regions_cleared_with_read(&machine.slots, chunk_size);
        Arc::new(logs.unwrap().remove(0))
    })
}

fn logged_in_two_slots(len: u64, chunk_size: ChunkSize) -> Guest {
    let shape = Shape {
        slots_a_region: if len > PAGE { 2 } else { 1 },
        ..shape(len, chunk_size)
    };
    Guest::new(&shape, |machine| {
        let mut logs = DirtyLog::regions(&machine.slots, chunk_size).unwrap();
        Arc::new(logs.remove(0))
    })
}

fn in_rings(len: u64, chunk_size: ChunkSize) -> Guest {
    let shape = Shape {
        rings: Some(1024),
        ..shape(len, chunk_size)
    };
    Guest::new(&shape, |machine| {
        let rings = machine.rings.as_ref().unwrap();
        DirtyRing::trackers(rings).remove(0)
    })
}

/// A guest whose instructions KVM may emulate.
fn logged_and_emulated(len: u64, chunk_size: ChunkSize) -> Guest {
    let shape = Shape {
        mode: Mode::Flat,
        ..shape(len, chunk_size)
    };
    Guest::new(&shape, |machine| {
        let mut logs = DirtyLog::regions(&machine.slots, chunk_size).unwrap();
        Arc::new(logs.remove(0))
    })
}

fn in_rings_and_emulated(len: u64, chunk_size: ChunkSize) -> Guest {
    let shape = Shape {
        rings: Some(1 << 16),
        mode: Mode::Flat,
        ..shape(len, chunk_size)
    };
    Guest::new(&shape, |machine| {
        let rings = machine.rings.as_ref().unwrap();
        DirtyRing::trackers(rings).remove(0)
    })
}

/// As a VMM has it: what the guest and what the VMM itself writes.
fn joined(len: u64, chunk_size: ChunkSize) -> Guest {
    Guest::new(&shape(len, chunk_size), |machine| {
        let guests = DirtyLog::regions(&machine.slots, chunk_size).unwrap();
        let vmms = VmmWrites::regions(&machine.memory, chunk_size).unwrap();
        let mut joined = guests.into_iter().zip(vmms);
        let (guest, vmm) = joined.next().unwrap();
        Arc::new(Union(guest, vmm))
    })
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn the_log_keeps_every_promise() {
    conformance::run_all(logged);
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn the_log_that_is_cleared_with_the_read_keeps_every_promise() {
    conformance::run_all(logged_and_cleared_with_read);
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn the_log_of_a_region_in_two_slots_keeps_every_promise() {
    conformance::run_all(logged_in_two_slots);
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn the_rings_keep_every_promise() {
    conformance::run_all(in_rings);
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn the_log_and_the_marks_of_the_vmm_together_keep_every_promise() {
    conformance::run_all(joined);
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn both_keep_every_promise_for_a_guest_that_may_be_emulated() {
    conformance::run_all(logged_and_emulated);
    conformance::run_all(in_rings_and_emulated);
}
