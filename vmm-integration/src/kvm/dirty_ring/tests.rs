use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::thread;

use kvm_ioctls::Kvm;
use rustix::fs::MemfdFlags;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::*;
use crate::kvm::Slot;

const ENTRIES: u32 = 256;

#[test]
fn rings_leave_room_for_the_sets_of_pages_within_the_bookkeeping() {
    for (gib, vcpus) in [(1, 1), (1, 4), (4, 2), (16, 16), (64, 8), (1024, 128)] {
        let memory = gib << 30;
        let entries = DirtyRing::entries_for(memory, vcpus);
        assert!(entries.is_power_of_two());
        assert!((FEWEST..=MOST).contains(&entries));
        let sets = 2 * memory / 4096 / 8;
        let rings = u64::from(entries) * 16 * u64::from(vcpus);
        assert!(sets + rings <= memory / 5000, "{gib} GiB, {vcpus} vCPUs");
    }
    assert_eq!(DirtyRing::entries_for(1 << 20, 64), FEWEST);
    assert_eq!(DirtyRing::entries_for(u64::MAX, 0), MOST);
}

/// A file that is the ring of a vCPU, filled by a test in place of KVM.
fn filled(entries: &[(u32, u64)]) -> File {
    let file = File::from(rustix::fs::memfd_create("ring", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(u64::from(ENTRIES) * 16).unwrap();
    for (index, (slot, page)) in (0..).zip(entries) {
        let mut entry = Vec::from(1_u32.to_le_bytes());
        entry.extend(slot.to_le_bytes());
        entry.extend(page.to_le_bytes());
        file.write_all_at(&entry, index * 16).unwrap();
    }
    file
}

/// Two regions of 64 and 32 pages, slot 0 and slot 1; both are tracked, by a ring with these entries.
fn rings(entries: &[(u32, u64)]) -> DirtyRing {
    let vm = Arc::new(Kvm::new().unwrap().create_vm().unwrap());
    let ranges = [
        (GuestAddress(0), 64 << 12),
        (GuestAddress(1 << 30), 32 << 12),
    ];
    let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap());
    let slots = Slots::register(vm, memory.clone(), Slot::one_a_region(&*memory, 0)).unwrap();
    let rings = DirtyRing::over(&slots, ENTRIES, ChunkSize::PAGE);
    rings.add_ring(filled(entries).as_fd(), 0).unwrap();
    rings.state().pending = vec![Some(ChunkBitmap::empty(64)), Some(ChunkBitmap::empty(32))];
    rings
}

/// Reads the entries; there is nobody to reset them.
fn collect(rings: &DirtyRing) {
    let mut state = rings.state();
    let failed = rings.harvest_with(&mut state, |rings, found, _| {
        rings.harvest(found, || Err(io::ErrorKind::Unsupported.into()))
    });
    assert_eq!(failed.unwrap_err().kind(), io::ErrorKind::Unsupported);
}

fn pending(rings: &DirtyRing) -> Vec<Vec<u64>> {
    let state = rings.state();
    let sets = state.pending.iter().flatten();
    sets.map(|set| set.runs().flat_map(|run| run.range()).collect())
        .collect()
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn entries_go_to_the_region_of_their_slot_and_are_counted() {
    let rings = rings(&[(0, 3), (1, 31), (0, 63), (0, 3)]);
    collect(&rings);
    assert_eq!(pending(&rings), [vec![3, 63], vec![31]]);
    assert_eq!(rings.pages_written(), [4]);
    assert!(rings.state().unknown.is_none());
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn an_entry_that_no_slot_has_is_told_and_hides_no_other() {
    for (slot, page) in [(2, 0), (0, 64), (1, u64::MAX), (u32::MAX, 0)] {
        let rings = rings(&[(0, 5), (slot, page), (1, 6)]);
        collect(&rings);
        assert_eq!(pending(&rings), [[5], [6]]);
        // All of them are read, or KVM could not go on.
        assert_eq!(rings.pages_written(), [3]);
        let told = rings.state().unknown.take().unwrap();
        let expected = (0, slot, page);
        assert!(
            matches!(told, TrackError::Unknown { vcpu, slot, page } if (vcpu, slot, page) == expected)
        );
    }
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn a_ring_that_is_full_names_everything_and_is_not_read_for_ever() {
    let rings = rings(&[(0, 7); ENTRIES as usize]);
    let mut state = rings.state();
    let harvested = rings.harvest_with(&mut state, |rings, found, _| {
        rings.harvest(found, || Ok(u64::from(ENTRIES)))
    });
    harvested.unwrap();
    drop(state);
    assert_eq!(rings.pages_written(), [u64::from(ENTRIES)]);
    assert_eq!(rings.overruns(), 1);
    let all: [Vec<u64>; 2] = [(0..64).collect(), (0..32).collect()];
    assert_eq!(pending(&rings), all);
}

/// A VM without rings fails whoever harvests, so that who succeeds has not.
#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn a_vcpu_whose_ring_is_full_lets_a_take_make_room_for_it() {
    let rings = rings(&[(0, 1)]);
    rings.takes.fetch_add(1, Ordering::Relaxed);
    thread::scope(|scope| {
        let vcpu = scope.spawn(|| rings.make_room_for(0));
        // The take has its turn, before the vCPU has or while it waits.
        let mut state = rings.state();
        while !vcpu.is_finished() {
            state.harvests += 1;
            rings.taken.notify_all();
            drop(state);
            thread::yield_now();
            state = rings.state();
        }
        vcpu.join().unwrap().unwrap();
    });
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn a_vcpu_whose_ring_is_full_does_not_wait_for_ever_for_a_take() {
    let rings = rings(&[(0, 1)]);
    rings.takes.fetch_add(1, Ordering::Relaxed);
    let error = rings.make_room_for(0).unwrap_err();
    assert!(
        error.raw_os_error().is_some(),
        "{error}: it asked KVM itself"
    );
    assert_eq!(rings.pages_written(), [1]);
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn rings_of_a_size_that_kvm_cannot_have_are_refused_with_what_it_offers() {
    let vm = Arc::new(Kvm::new().unwrap().create_vm().unwrap());
    let ranges = [(GuestAddress(0), 64 << 12)];
    let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap());
    let slots = Slots::register(vm, memory.clone(), Slot::one_a_region(&*memory, 0)).unwrap();
    for entries in [0, 1, 1000, 1 << 30] {
        let error = DirtyRing::enable(&slots, entries, ChunkSize::PAGE).unwrap_err();
        let told = error.downcast::<TrackError>().unwrap();
        assert!(
            matches!(told, TrackError::NoRings { most, .. } if most >= FEWEST),
            "{told:?}"
        );
    }
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn rings_that_no_vcpu_was_added_to_do_not_pass_for_a_guest_that_writes_nothing() {
    let vm = Arc::new(Kvm::new().unwrap().create_vm().unwrap());
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let slots = Slot::one_a_region(&memory, 0);
    let slots = Slots::register(vm, Arc::new(memory), slots).unwrap();
    let rings = DirtyRing::enable(&slots, 1024, ChunkSize::PAGE).unwrap();
    let error = DirtyRing::trackers(&rings)[0].start().unwrap_err();
    assert!(error.to_string().contains("no vCPU"), "{error}");
}
