use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use super::*;
use crate::backend::FileStorage;
use crate::dirty::conformance::{self, Tracked, conformance};
use crate::dirty::{Discards, Union};
use crate::sys::mapping::Mapping;
use crate::sys::uffd::Scope;

/// Memory of this process, written through its mapping and tracked by page.
#[derive(Debug)]
struct OwnMemory {
    memory: Mapping,
    tracker: WriteProtect,
}

/// As the other, but holes are left alone.
fn own_sparse_memory(len: u64, chunk_size: ChunkSize) -> OwnMemory {
    let OwnMemory { memory, tracker } = own_memory(len, chunk_size);
    let tracker = tracker.sparse(memory.file().try_clone().unwrap());
    OwnMemory { memory, tracker }
}

/// Needs no privilege: a userfaultfd for user mode.
fn own_memory(len: u64, chunk_size: ChunkSize) -> OwnMemory {
    own_memory_in(Scope::UserModeOnly, len, chunk_size)
}

fn own_memory_for_kernel_faults(len: u64, chunk_size: ChunkSize) -> OwnMemory {
    own_memory_in(Scope::UserAndKernel, len, chunk_size)
}

fn own_memory_in(scope: Scope, len: u64, chunk_size: ChunkSize) -> OwnMemory {
    let memory = Mapping::anonymous(len).unwrap();
    let tracker = tracker_of(&[&memory], scope, len, chunk_size);
    OwnMemory { memory, tracker }
}

fn tracker_of(
    mappings: &[&Mapping],
    scope: Scope,
    len: u64,
    chunk_size: ChunkSize,
) -> WriteProtect {
    let areas = mappings
        .iter()
        .map(|mapping| Area {
            address: mapping.addresses(),
            offset: 0,
        })
        .collect();
    let uffd = Uffd::create(scope, Features::TRACKING).unwrap();
    let pagemap = Pagemap::of_this_process().unwrap();
    WriteProtect::new(uffd, pagemap, areas, len, chunk_size).unwrap()
}

impl Tracked for OwnMemory {
    fn tracker(&self) -> &dyn DirtyTracker {
        &self.tracker
    }

    fn write(&self, offset: u64, bytes: &[u8]) {
        self.memory.write(offset, bytes).unwrap();
    }

    fn read(&self, offset: u64, buf: &mut [u8]) {
        let range = offset..offset + buf.len() as u64;
        self.memory.read(range, buf).unwrap();
    }

    fn allocated(&self) -> u64 {
        self.memory.file().metadata().unwrap().blocks() * 512
    }
}

conformance!(own_memory);

mod sparse {
    use super::*;

    conformance!(own_sparse_memory);

    #[test]
    fn a_block_that_gets_data_is_named_by_its_data_alone_and_page_by_page_from_then_on() {
        let memory = own_sparse_memory(64 << 20, ChunkSize::PAGE);
        memory.write(0, &[1]);
        memory.tracker.start().unwrap();
        let take = || {
            let taken = memory.tracker.take().unwrap();
            taken.runs().flat_map(|run| run.range()).collect::<Vec<_>>()
        };
        memory.write(5 << 20, &[1]);
        memory.write((5 << 20) + 8192, &[1]);
        assert_eq!(take(), [1280, 1282]);
        memory.write((5 << 20) + 8192, &[2]);
        memory.write((5 << 20) + 4096, &[2]);
        assert_eq!(take(), [1281, 1282]);
        assert_eq!(take(), [0_u64; 0]);
    }

    #[test]
    fn holes_get_no_page_tables() {
        let memory = own_sparse_memory(1 << 40, ChunkSize::PAGE);
        memory.write(1 << 39, &[1]);
        // Would take seconds, and 2 GiB of page tables, if it protected every page.
        let start = std::time::Instant::now();
        memory.tracker.start().unwrap();
        memory.write((1 << 40) - 1, &[1]);
        let taken = memory.tracker.take().unwrap();
        assert!(taken.contains((1 << 28) - 1));
        assert_eq!(taken.count(), 1);
        memory.tracker.stop().unwrap();
        assert!(start.elapsed().as_secs() < 2, "{:?}", start.elapsed());
    }
}

#[test]
#[ignore = "privileged: needs CAP_SYS_PTRACE (userfaultfd for kernel faults)"]
fn a_userfaultfd_for_kernel_faults_keeps_the_promises_too() {
    conformance::run_all(own_memory_for_kernel_faults);
}

#[test]
fn what_the_kernel_writes_for_the_process_is_tracked() {
    use std::io::Write;
    use std::os::fd::AsFd;
    let memory = own_memory(1 << 20, ChunkSize::PAGE);
    memory.tracker.start().unwrap();
    let (read, mut write) = io::pipe().unwrap();
    write.write_all(&[1; 10]).unwrap();
    let spans = [4095..4100, 40_960..40_965];
    let count = memory.memory.read_vectored_from(read.as_fd(), &spans);
    assert_eq!(count.unwrap(), 10);
    let taken = memory.tracker.take().unwrap();
    let named: Vec<_> = taken.runs().flat_map(|run| run.range()).collect();
    assert_eq!(named, [0, 1, 10]);
}

#[test]
fn a_region_that_is_mapped_twice_is_tracked_through_both() {
    let len = 16 * 4096;
    let one = Mapping::anonymous(len).unwrap();
    let other = Mapping::new(one.file().try_clone().unwrap(), len).unwrap();
    let tracker = tracker_of(&[&one, &other], Scope::UserModeOnly, len, ChunkSize::PAGE);
    tracker.start().unwrap();
    one.write(4096, &[1]).unwrap();
    other.write(3 * 4096, &[1]).unwrap();
    other.write(4096, &[2]).unwrap();
    let taken = tracker.take().unwrap();
    assert_eq!(
        (taken.count(), taken.contains(1), taken.contains(3)),
        (2, true, true)
    );
    assert!(tracker.take().unwrap().is_empty());
}

#[test]
fn an_area_in_the_middle_of_a_region_names_the_chunks_there() {
    let part = Mapping::anonymous(4 * 4096).unwrap();
    let area = Area {
        address: part.addresses(),
        offset: 8 * 4096,
    };
    let uffd = Uffd::create(Scope::UserModeOnly, Features::TRACKING).unwrap();
    let pagemap = Pagemap::of_this_process().unwrap();
    let tracker = WriteProtect::new(uffd, pagemap, vec![area], 16 * 4096, ChunkSize::PAGE).unwrap();
    tracker.start().unwrap();
    part.write(4096, &[1]).unwrap();
    let taken = tracker.take().unwrap();
    assert_eq!(
        (taken.chunks(), taken.count(), taken.contains(9)),
        (16, 1, true)
    );
}

/// The kernel keeps the protection over the hole and does not call it a write. `Discards` sees it.
#[test]
fn a_page_that_became_a_hole_is_named_only_with_the_help_of_discards() {
    let memory = own_memory(16 * 4096, ChunkSize::PAGE);
    memory.write(5 * 4096, &[1; 4096]);
    let file = memory.memory.file().try_clone().unwrap();
    let file = Arc::new(FileStorage::new(file).unwrap());
    let discards = Discards::new(file.clone(), ChunkSize::PAGE);
    discards.start().unwrap();
    memory.tracker.start().unwrap();
    file.punch(5 * 4096..6 * 4096).unwrap();
    assert!(memory.tracker.take().unwrap().is_empty());
    let both = Union(memory.tracker, discards);
    assert!(both.take().unwrap().contains(5));
}

#[test]
fn a_scattered_region_of_more_ranges_than_the_kernel_reports_at_once_is_named_whole() {
    let pages = 40_000;
    let memory = own_memory(pages * 4096, ChunkSize::PAGE);
    memory.memory.populate(0..pages * 4096).unwrap();
    memory.tracker.start().unwrap();
    for page in (0..pages).step_by(2) {
        memory.write(page * 4096, &[1]);
    }
    let taken = memory.tracker.take().unwrap();
    assert_eq!(taken.count(), pages / 2);
    assert!((0..pages).step_by(2).all(|page| taken.contains(page)));
    assert!(memory.tracker.take().unwrap().is_empty());
}

#[test]
fn a_failed_take_keeps_everything_of_its_area_for_the_next() {
    let len = 16 * 4096;
    let memory = Mapping::anonymous(len).unwrap();
    let tracker = tracker_of(&[&memory], Scope::UserModeOnly, len, ChunkSize::PAGE);
    tracker.start().unwrap();
    memory.write(4096, &[1]).unwrap();
    tracker.uffd.unregister(memory.addresses()).unwrap();
    assert!(
        tracker.take().is_err(),
        "the kernel refuses what is not registered"
    );
    let wp = Mode {
        wp: true,
        ..Mode::default()
    };
    tracker.uffd.register(memory.addresses(), wp).unwrap();
    assert_eq!(tracker.take().unwrap().count(), 16);
}

#[test]
fn a_start_that_fails_leaves_nothing_tracked() {
    let len = 16 * 4096;
    let memory = Mapping::anonymous(len).unwrap();
    let gone = Mapping::anonymous(len).unwrap();
    let tracker = tracker_of(&[&memory, &gone], Scope::UserModeOnly, len, ChunkSize::PAGE);
    let rival = tracker_of(&[&gone], Scope::UserModeOnly, len, ChunkSize::PAGE);
    rival.start().unwrap();
    assert!(
        tracker.start().is_err(),
        "another userfaultfd has the second area"
    );
    assert!(tracker.take().is_err());
    let third = tracker_of(&[&memory], Scope::UserModeOnly, len, ChunkSize::PAGE);
    third.start().expect("the first area was let go");
}

#[test]
fn a_userfaultfd_without_the_features_is_refused_by_their_names() {
    let uffd = Uffd::create(Scope::UserModeOnly, Features::WRITE_PROTECT).unwrap();
    let pagemap = Pagemap::of_this_process().unwrap();
    let refused = WriteProtect::new(uffd, pagemap, vec![], 0, ChunkSize::PAGE).unwrap_err();
    assert!(refused.to_string().contains("WP_ASYNC"), "{refused}");
}

#[test]
fn stopping_after_the_memory_is_gone_is_no_error() {
    let OwnMemory { memory, tracker } = own_memory(4096, ChunkSize::PAGE);
    tracker.start().unwrap();
    drop(memory);
    tracker.stop().unwrap();
}

#[test]
fn takes_from_several_threads_name_each_write_once() {
    let memory = Arc::new(own_memory(64 * 4096, ChunkSize::PAGE));
    memory.tracker.start().unwrap();
    (0..64).for_each(|page| memory.write(page * 4096, &[1]));
    let takers: Vec<_> = (0..4)
        .map(|_| {
            let memory = Arc::clone(&memory);
            std::thread::spawn(move || memory.tracker.take().unwrap().count())
        })
        .collect();
    let named: u64 = takers.into_iter().map(|taker| taker.join().unwrap()).sum();
    assert_eq!(named, 64);
}

#[test]
#[ignore = "measurement"]
fn measure_the_scans_of_a_gib() {
    use std::time::Instant;
    const GIB: u64 = 1 << 30;
    let memory = own_memory(GIB, ChunkSize::PAGE);
    memory.memory.populate(0..GIB).unwrap();
    let mut figures: Vec<(&str, Vec<f64>)> = [
        "start",
        "clean",
        "all dirty",
        "every other page",
        "10 % scattered",
        "store, armed (µs)",
    ]
    .map(|name| (name, Vec::new()))
    .into();
    for _ in 0..7 {
        let mut figure = 0;
        let mut timed = |expected: Option<u64>, work: &dyn Fn() -> Option<u64>| {
            let start = Instant::now();
            assert_eq!(work(), expected);
            figures[figure].1.push(start.elapsed().as_secs_f64() * 1e3);
            figure += 1;
        };
        let take = || Some(memory.tracker.take().unwrap().count());
        let dirty = |step: usize| {
            for page in (0..GIB / 4096).step_by(step) {
                memory.write(page * 4096, &[1]);
            }
        };
        let pages = GIB / 4096;
        timed(None, &|| {
            memory.tracker.start().unwrap();
            None
        });
        timed(Some(0), &take);
        dirty(1);
        timed(Some(pages), &take);
        dirty(2);
        timed(Some(pages / 2), &take);
        dirty(10);
        timed(Some(pages.div_ceil(10)), &take);
        let start = Instant::now();
        dirty(1);
        let each = start.elapsed().as_secs_f64() * 1e6 / pages as f64;
        figures[5].1.push(each);
        memory.tracker.take().unwrap();
        memory.tracker.stop().unwrap();
    }
    for (name, mut values) in figures {
        values.sort_by(f64::total_cmp);
        println!(
            "{name}: median {:.2} ms/GiB, {:.2} to {:.2}",
            values[3], values[0], values[6]
        );
    }
}

#[test]
#[ignore = "measurement"]
fn measure_a_sparse_region() {
    for make in [own_sparse_memory, own_memory] {
        measure_64_gib_of_holes(&make(64 << 30, ChunkSize::PAGE));
    }
}

fn measure_64_gib_of_holes(memory: &OwnMemory) {
    let tables = || {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status
            .lines()
            .find(|line| line.starts_with("VmPTE"))
            .unwrap();
        line.to_owned()
    };
    let before = tables();
    let start = std::time::Instant::now();
    memory.tracker.start().unwrap();
    let started = start.elapsed();
    memory.tracker.take().unwrap();
    let taken = start.elapsed() - started;
    let after = tables();
    println!("64 GiB of holes: start {started:?}, take {taken:?}; {before}, then {after}");
}
