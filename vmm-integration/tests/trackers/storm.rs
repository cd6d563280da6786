//! No write is lost while several vCPUs write as fast as they can.

use std::sync::Arc;
use std::time::Instant;

use memferry::chunk::{ChunkBitmap, ChunkSize};
use memferry::dirty::DirtyTracker;
use vmm_integration::kvm::{DirtyLog, DirtyRates, DirtyRing};

use crate::machine::{LONG, Machine, Mode, PAGE, STAMPS, Shape, Stamper, Stamping};

/// Two regions, of which the second is smaller.
const REGIONS: [u64; 2] = [8 << 20, 4 << 20];
/// Stamps without a rest.
const FAST: u8 = 1;
/// Stamps every 40 instructions: KVM has been seen to emulate a thousand before it looks whether a ring is full, which
/// is to have room for 64 entries then.
const SLOW: u8 = 17;
/// Bytes that are stamped once.
const PASS: u64 = 4 << 20;
/// How often that is tried.
const PASSES: usize = 5;
/// Takes while the guest writes.
const ROUNDS: usize = 60;

/// What a migration has at the destination: each region, as it was when a take last named each chunk.
struct Copy {
    chunk_size: ChunkSize,
    regions: Vec<Vec<u8>>,
}

impl Copy {
    fn of(machine: &Machine, chunk_size: ChunkSize) -> Self {
        let regions = REGIONS.iter().enumerate().map(|(region, &len)| {
            let mut bytes = vec![0; usize::try_from(len).unwrap()];
            machine.read(region, 0, &mut bytes);
            bytes
        });
        Self {
            chunk_size,
            regions: regions.collect(),
        }
    }

    fn update(&mut self, machine: &Machine, region: usize, named: &ChunkBitmap) {
        let size = u64::from(self.chunk_size.bytes());
        let bytes = &mut self.regions[region];
        for run in named.runs() {
            let start = usize::try_from(run.start.0 * size).unwrap();
            let end = usize::try_from(run.end() * size).unwrap().min(bytes.len());
            machine.read(region, run.start.0 * size, &mut bytes[start..end]);
        }
    }

    /// The chunks of a region that are not what the guest has.
    fn stale(&self, machine: &Machine, region: usize) -> Vec<u64> {
        let now = Self::of(machine, self.chunk_size);
        let size = usize::try_from(self.chunk_size.bytes()).unwrap();
        let (old, new) = (
            self.regions[region].chunks(size),
            now.regions[region].chunks(size),
        );
        let differ = (0..).zip(old.zip(new)).filter(|(_, (old, new))| old != new);
        differ.map(|(chunk, _)| chunk).collect()
    }
}

/// Two vCPUs in the first region, whose stamps meet in every page, and one in the second.
fn storm(machine: &Machine, pause: u8) -> [Stamper; 3] {
    let stamper = |region, first, step, stamp| {
        let how = Stamping {
            len: None,
            first,
            step,
            stamp,
            pause,
        };
        machine.stamper(region, how)
    };
    [
        stamper(0, 0, 0x003d_1a74, 0),
        stamper(0, 0x20_0000, 0x0001_0014, 0x4000_0000),
        stamper(1, 0, 0x0000_5e0c, 0x8000_0000),
    ]
}

/// Start, copy all; take, copy what it named, many times; end the vCPUs, take, copy.
fn no_write_is_lost(
    machine: &Machine,
    trackers: &[Arc<dyn DirtyTracker>],
    chunk_size: ChunkSize,
    pause: u8,
) {
    let mut vcpus = storm(machine, pause);
    vcpus.iter().for_each(|vcpu| vcpu.wait(STAMPS));
    let trackers = &trackers[..REGIONS.len()];
    for tracker in trackers {
        tracker.start().unwrap();
    }
    let mut copy = Copy::of(machine, chunk_size);
    let mut with_writes = 0;
    let deadline = Instant::now() + LONG;
    while with_writes < ROUNDS {
        assert!(
            Instant::now() < deadline,
            "{with_writes} takes named anything"
        );
        for (region, tracker) in trackers.iter().enumerate() {
            let named = tracker.take().unwrap();
            with_writes += usize::from(!named.is_empty());
            copy.update(machine, region, &named);
        }
    }
    vcpus.iter().for_each(|vcpu| vcpu.wait(2 * STAMPS));
    vcpus.iter_mut().for_each(Stamper::stop);
    for (region, tracker) in trackers.iter().enumerate() {
        // So that this would show if it were not so:
        let stale = copy.stale(machine, region);
        assert_ne!(
            stale, [0_u64; 0],
            "the guest wrote after the take before this"
        );
        let named = tracker.take().unwrap();
        copy.update(machine, region, &named);
        let stale = copy.stale(machine, region);
        assert_eq!(
            stale, [0_u64; 0],
            "chunks of region {region} that no take named in time"
        );
        tracker.stop().unwrap();
    }
}

/// Two vCPUs that stamp each page of their regions once, or some times in a row, and never again, while takes follow one
/// another: what one of those leaves out stays out, where in a storm the next write to the page would make up for it.
fn no_write_is_lost_for_good(machine: &Machine, trackers: &[Arc<dyn DirtyTracker>]) {
    for step in [PAGE, 64] {
        passes(machine, &trackers[..REGIONS.len()], step);
    }
}

fn passes(machine: &Machine, trackers: &[Arc<dyn DirtyTracker>], step: u64) {
    let mut vcpus: Vec<Stamper> = (0..REGIONS.len())
        .map(|region| {
            let pass = Stamping {
                len: Some(PASS),
                first: 0,
                step,
                stamp: 0,
                // So that a page is written to for some microseconds.
                pause: 100,
            };
            let mut vcpu = machine.stamper(region, pass);
            vcpu.stop();
            vcpu
        })
        .collect();
    for pass in 0..PASSES {
        trackers.iter().for_each(|tracker| tracker.start().unwrap());
        let mut copy = Copy::of(machine, ChunkSize::PAGE);
        let mut take = || {
            for (region, tracker) in trackers.iter().enumerate() {
                copy.update(machine, region, &tracker.take().unwrap());
            }
        };
        for vcpu in &mut vcpus {
            vcpu.start(PASS / step / STAMPS);
        }
        while vcpus.iter().any(Stamper::is_running) {
            take();
        }
        vcpus.iter_mut().for_each(Stamper::stop);
        take();
        for (region, tracker) in trackers.iter().enumerate() {
            let lost = copy.stale(machine, region);
            assert_eq!(
                lost, [0_u64; 0],
                "of region {region}, in pass {pass}, every {step} bytes"
            );
            tracker.stop().unwrap();
        }
    }
}

fn shape(rings: Option<u32>, chunk_size: ChunkSize, mode: Mode) -> Shape {
    Shape {
        regions: REGIONS.to_vec(),
        slots_a_region: 2,
        rings,
        chunk_size,
        mode,
    }
}

fn logs(logs: Vec<DirtyLog>) -> Vec<Arc<dyn DirtyTracker>> {
    logs.into_iter().map(|log| Arc::new(log) as _).collect()
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn the_log_loses_no_write_of_several_vcpus() {
    for mode in [Mode::User, Mode::Long, Mode::Flat] {
        let machine = Machine::new(&shape(None, ChunkSize::PAGE, mode));
        let trackers = logs(DirtyLog::regions(&machine.slots, ChunkSize::PAGE).unwrap());
        no_write_is_lost(&machine, &trackers, ChunkSize::PAGE, FAST);
    }
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn the_log_that_is_cleared_with_the_read_loses_no_write_of_several_vcpus() {
    let machine = Machine::new(&shape(None, ChunkSize::PAGE, Mode::User));
    let trackers = DirtyLog::regions_cleared_with_read(&machine.slots, ChunkSize::PAGE);
    no_write_is_lost(&machine, &logs(trackers.unwrap()), ChunkSize::PAGE, FAST);
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn the_log_loses_no_write_between_its_being_read_and_its_being_cleared() {
    let page = ChunkSize::PAGE;
    let machine = Machine::new(&shape(None, page, Mode::User));
    let trackers = logs(DirtyLog::regions(&machine.slots, page).unwrap());
    no_write_is_lost_for_good(&machine, &trackers);
    let trackers = DirtyLog::regions_cleared_with_read(&machine.slots, page);
    no_write_is_lost_for_good(&machine, &logs(trackers.unwrap()));
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn the_rings_lose_no_write_between_an_entry_and_its_reset() {
    let page = ChunkSize::PAGE;
    let machine = Machine::new(&shape(Some(1024), page, Mode::User));
    let trackers = DirtyRing::trackers(machine.rings.as_ref().unwrap());
    no_write_is_lost_for_good(&machine, &trackers);
}

/// As fast as they can, or slower than KVM can be late to see that a ring is full.
fn the_rings_lose_no_write(mode: Mode, pause: u8) -> Machine {
    let chunk_size = ChunkSize::new(16 << 10).unwrap();
    let machine = Machine::new(&shape(Some(1024), chunk_size, mode));
    let rings = machine.rings.as_ref().unwrap();
    no_write_is_lost(&machine, &DirtyRing::trackers(rings), chunk_size, pause);
    machine
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn the_rings_lose_no_write_of_several_vcpus() {
    for (mode, pause) in [(Mode::User, FAST), (Mode::Long, SLOW)] {
        let machine = the_rings_lose_no_write(mode, pause);
        let overruns = machine.rings.as_ref().unwrap().overruns();
        assert_eq!(overruns, 0, "{mode:?}: this was to be tried without");
    }
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn the_rings_lose_no_write_of_vcpus_that_overrun_them() {
    the_rings_lose_no_write(Mode::Flat, FAST);
}

/// A ring of 1024 entries has room for fewer than a guest of 2048 pages writes, and nobody takes.
#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn a_vcpu_whose_ring_is_full_goes_on_and_what_it_wrote_is_named() {
    let machine = Machine::new(&Shape {
        rings: Some(1024),
        ..Shape::of(2048 * PAGE)
    });
    let rings = machine.rings.as_ref().unwrap();
    let tracker = DirtyRing::trackers(rings).remove(0);
    let mut vcpu = machine.stamper(0, Stamping::pages());
    vcpu.stop();
    tracker.start().unwrap();
    let mut rates = DirtyRates::new();
    assert_eq!(
        rates.since_last(Instant::now(), &rings.pages_written()),
        None
    );
    vcpu.start(u64::MAX);
    vcpu.wait(4096);
    vcpu.stop();
    assert!(vcpu.times_full() > 0, "the ring was never full");
    assert_eq!(tracker.take().unwrap(), ChunkBitmap::full(2048));
    let written = rings.pages_written();
    // What was harvested when the ring was full and written again since counts again.
    assert!(written[0] >= 2048, "{written:?}");
    let rate = rates.since_last(Instant::now(), &written).unwrap();
    assert!(rate[0] > 0, "{rate:?}");
    tracker.stop().unwrap();
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn each_vcpu_counts_what_it_wrote() {
    let machine = Machine::new(&Shape {
        rings: Some(1024),
        ..Shape::of(256 * PAGE)
    });
    let rings = machine.rings.as_ref().unwrap();
    let tracker = DirtyRing::trackers(rings).remove(0);
    let (one, other) = (machine.writer(), machine.writer());
    tracker.start().unwrap();
    for page in 0..5 {
        one.write(page * PAGE, &[1]);
    }
    other.write(100 * PAGE, &[1]);
    assert_eq!(tracker.take().unwrap().count(), 6);
    assert_eq!(rings.pages_written(), [5, 1]);
    tracker.stop().unwrap();
}
