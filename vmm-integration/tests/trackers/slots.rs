//! Memory slots that come, go and change.

use std::io;
use std::sync::Arc;

use kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES;
use memferry::chunk::ChunkSize;
use memferry::dirty::DirtyTracker;
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_integration::kvm::{DirtyLog, DirtyRing, Slot, Slots, SlotsError, TrackError};

use crate::machine::{Machine, PAGE, Shape};

/// Two regions of 64 pages, each in two slots.
fn machine() -> Machine {
    Machine::new(&Shape {
        regions: vec![64 * PAGE; 2],
        slots_a_region: 2,
        ..Shape::of(0)
    })
}

/// The slots of a machine as a VMM that made them itself hands them over.
fn adopted(machine: &Machine) -> Result<Arc<Slots>, SlotsError> {
    let slots = machine.slots.iter().cloned().collect();
    Slots::adopt(machine.vm.clone(), machine.memory.clone(), slots)
}

fn numbers(machine: &Machine) -> Vec<u32> {
    machine.slots.iter().map(|slot| slot.number).collect()
}

/// Whether KVM logs a slot.
fn is_logged(machine: &Machine, number: u32) -> bool {
    let len = usize::try_from(64 * PAGE).unwrap();
    machine.vm.get_dirty_log(number, len).is_ok()
}

#[track_caller]
fn assert_changed(result: io::Result<impl std::fmt::Debug>) {
    let told = result.unwrap_err().downcast::<TrackError>();
    assert!(matches!(told, Ok(TrackError::Changed)), "{told:?}");
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn only_what_is_tracked_is_logged_and_only_from_start_to_stop() {
    let machine = machine();
    let slots = numbers(&machine);
    let logged = || {
        slots
            .iter()
            .map(|&slot| is_logged(&machine, slot))
            .collect::<Vec<_>>()
    };
    let trackers = DirtyLog::regions(&machine.slots, ChunkSize::PAGE).unwrap();
    assert_eq!(logged(), [false; 5]);
    trackers[1].start().unwrap();
    assert_eq!(logged(), [false, false, true, true, false]);
    trackers[1].stop().unwrap();
    assert_eq!(logged(), [false; 5]);
    trackers[0].start().unwrap();
    drop(trackers);
    assert_eq!(logged(), [false; 5], "a tracker that is dropped stops");
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn a_slot_that_the_vmm_logs_for_itself_is_logged_after_a_stop() {
    let machine = machine();
    let mut slots: Vec<Slot> = machine.slots.iter().cloned().collect();
    slots[0].flags = KVM_MEM_LOG_DIRTY_PAGES;
    let memory = machine.memory.clone();
    let slots = Slots::adopt(machine.vm.clone(), memory, slots).unwrap();
    let trackers = DirtyLog::regions(&slots, ChunkSize::PAGE).unwrap();
    trackers[0].start().unwrap();
    trackers[0].stop().unwrap();
    let numbers = numbers(&machine);
    assert!(is_logged(&machine, numbers[0]));
    assert!(!is_logged(&machine, numbers[1]));
    // Written before the start, and still in the VMM's own log.
    let writer = machine.writer();
    writer.write(0, &[1]);
    trackers[0].start().unwrap();
    assert!(trackers[0].take().unwrap().is_empty());
    writer.write(PAGE, &[1]);
    assert_eq!(trackers[0].take().unwrap().count(), 1);
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn takes_fail_once_the_vmm_says_that_memory_has_changed() {
    let machine = machine();
    let trackers = DirtyLog::regions(&machine.slots, ChunkSize::PAGE).unwrap();
    trackers[0].start().unwrap();
    machine.slots.memory_changed(&[]).unwrap();
    assert_changed(trackers[0].take());
    assert_changed(trackers[1].start());
    trackers[0].stop().unwrap();
    assert!(
        !numbers(&machine)
            .iter()
            .any(|&slot| is_logged(&machine, slot))
    );
    // Over the same memory, asked anew, it works.
    let slots = adopted(&machine).unwrap();
    let trackers = DirtyLog::regions(&slots, ChunkSize::PAGE).unwrap();
    trackers[0].start().unwrap();
    trackers[0].take().unwrap();
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn the_rings_fail_their_takes_too_once_memory_has_changed() {
    let machine = Machine::new(&Shape {
        rings: Some(1024),
        ..Shape::of(64 * PAGE)
    });
    let tracker = DirtyRing::trackers(machine.rings.as_ref().unwrap()).remove(0);
    let _vcpu = machine.writer();
    tracker.start().unwrap();
    machine.slots.memory_changed(&numbers(&machine)).unwrap();
    assert_changed(tracker.take());
    tracker.stop().unwrap();
    assert!(adopted(&machine).is_err(), "what is gone is not made anew");
    assert_changed(tracker.start());
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn a_slot_that_goes_behind_our_back_fails_the_take_and_is_not_made_anew() {
    let machine = machine();
    let slots = adopted(&machine).unwrap();
    let trackers = DirtyLog::regions(&slots, ChunkSize::PAGE).unwrap();
    trackers[0].start().unwrap();
    let second = numbers(&machine)[1];
    machine.slots.memory_changed(&[second]).unwrap();
    assert_changed(trackers[0].take());
    trackers[0].stop().unwrap();
    // One that is refused leaves nothing behind: its first slot is there and is not logged.
    assert_changed(trackers[0].start());
    assert!(!is_logged(&machine, numbers(&machine)[0]));
    let refused = adopted(&machine).unwrap_err();
    assert!(matches!(refused, SlotsError::Missing { number, .. } if number == second));
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn a_slot_that_grows_behind_our_back_fails_the_take_and_overwrites_nothing() {
    let machine = machine();
    let slots = adopted(&machine).unwrap();
    let trackers = DirtyLog::regions(&slots, ChunkSize::PAGE).unwrap();
    trackers[0].start().unwrap();
    let first = numbers(&machine)[0];
    machine.slots.memory_changed(&numbers(&machine)).unwrap();
    // Its log has 64 KiB, of which one page has room.
    let larger: usize = 2 << 30;
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), larger)]).unwrap();
    let memory = Arc::new(memory);
    let mut slot = Slot::one_a_region(&*memory, first);
    slot[0].flags = KVM_MEM_LOG_DIRTY_PAGES;
    let _grown = Slots::register(machine.vm, memory, slot).unwrap();
    assert_changed(trackers[0].take());
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn slots_that_were_made_go_and_slots_that_were_adopted_stay() {
    let machine = machine();
    let writer = machine.writer();
    drop(adopted(&machine).unwrap());
    writer.write(5 * PAGE, b"there");
    let mut seen = [0; 5];
    machine.read(0, 5 * PAGE, &mut seen);
    assert_eq!(&seen, b"there");
    drop(writer);
    let (vm, memory) = (machine.vm.clone(), machine.memory.clone());
    let slots: Vec<Slot> = machine.slots.iter().cloned().collect();
    drop(machine);
    let refused = Slots::adopt(vm, memory, slots).unwrap_err();
    assert!(matches!(refused, SlotsError::Missing { .. }), "{refused}");
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn a_slot_that_kvm_refuses_leaves_none_of_the_others() {
    let machine = machine();
    let ranges = [
        (GuestAddress(1 << 32), 0x4000),
        (GuestAddress((1 << 32) + 0x4000), 0x4000),
    ];
    let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap());
    let slots = Slot::one_a_region(&*memory, 20);
    let taken = Slots::register(machine.vm.clone(), memory.clone(), slots[1..].to_vec()).unwrap();
    let mut again = slots.clone();
    again[1].number += 10;
    let refused = Slots::register(machine.vm.clone(), memory.clone(), again).unwrap_err();
    assert!(
        matches!(refused, SlotsError::Refused { number: 31, .. }),
        "{refused}"
    );
    let first = Slots::adopt(machine.vm, memory, slots[..1].to_vec());
    assert!(matches!(first, Err(SlotsError::Missing { number: 20, .. })));
    drop(taken);
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn what_is_no_part_of_the_memory_is_refused() {
    let machine = machine();
    let refused = |slots: &[Slot]| {
        let memory = machine.memory.clone();
        Slots::register(machine.vm.clone(), memory, slots.to_vec()).unwrap_err()
    };
    let slot = Slot {
        number: 50,
        region: 0,
        offset: 0,
        len: 64 * PAGE,
        flags: 0,
    };
    let changes: [fn(&mut Slot); 7] = [
        |slot| slot.region = 3,
        |slot| slot.offset = PAGE,
        |slot| slot.offset = u64::MAX - PAGE + 1,
        |slot| slot.len += PAGE,
        |slot| slot.len -= 1,
        |slot| slot.len = 0,
        |slot| slot.offset = 1,
    ];
    for change in changes {
        let mut wrong = slot.clone();
        change(&mut wrong);
        let error = refused(&[wrong]);
        assert!(matches!(error, SlotsError::NoMemory { .. }), "{error}");
    }
    let other = Slot { number: 51, ..slot };
    let twice = refused(&[slot.clone(), other]);
    assert!(
        matches!(twice, SlotsError::Twice { one: 50, other: 51 }),
        "{twice}"
    );
    let same_number = Slot { region: 1, ..slot };
    let twice = refused(&[slot, same_number]);
    assert!(
        matches!(twice, SlotsError::Twice { one: 50, other: 50 }),
        "{twice}"
    );
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn the_log_of_a_vm_with_rings_is_refused_and_leaves_nothing() {
    let machine = Machine::new(&Shape {
        rings: Some(1024),
        ..Shape::of(64 * PAGE)
    });
    for logs in [
        DirtyLog::regions(&machine.slots, ChunkSize::PAGE),
        DirtyLog::regions_cleared_with_read(&machine.slots, ChunkSize::PAGE),
    ] {
        let error = logs.unwrap()[0].start().unwrap_err();
        let told = error.downcast::<TrackError>();
        assert!(matches!(told, Ok(TrackError::HasRings)), "{told:?}");
    }
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn rings_come_before_vcpus_and_only_once() {
    let machine = machine();
    let _writer = machine.writer();
    let late = DirtyRing::enable(&machine.slots, 1024, ChunkSize::PAGE).unwrap_err();
    let told = late.downcast::<TrackError>();
    assert!(matches!(told, Ok(TrackError::NoRings { .. })), "{told:?}");
    let machine = Machine::new(&Shape {
        rings: Some(1024),
        ..Shape::of(64 * PAGE)
    });
    assert!(DirtyRing::enable(&machine.slots, 1024, ChunkSize::PAGE).is_err());
}
