use std::sync::Weak;
use std::sync::mpsc::channel;
use std::thread;

use super::*;
use crate::backend::MemoryStorage;
use crate::chunk::{ChunkBitmap, Fault, Faulty, Install, Operation, Place};

const PAGE: u64 = 4096;
const SHORT: Duration = Duration::from_millis(30);

fn region(len: u64, make: fn(Arc<dyn Storage>, ChunkSize) -> io::Result<Region>) -> Region {
    make(Arc::new(MemoryStorage::new(len)), ChunkSize::PAGE).unwrap()
}

/// A region of which everything is remote, and what the engine sees of it.
fn remote(local: Arc<dyn Storage>, patience: Duration) -> (Arc<Region>, Arrival) {
    let len = local.len();
    let region = Region::empty(local, ChunkSize::PAGE).unwrap();
    let region = Arc::new(region.with_patience(patience));
    region.begin_to_come().unwrap();
    let arrival = Arrival::new(vec![region.clone()], None).unwrap();
    arrival.arm().unwrap();
    arrival.discard(0, 0..len).unwrap();
    region.mark_absent().unwrap();
    region.own();
    (region, arrival)
}

fn at(offset: u64) -> Place {
    Place { region: 0, offset }
}

fn read(region: &Region, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut buf = vec![0; len];
    region.read_exact_at(&mut buf, offset).map(|()| buf)
}

/// The next fault, which comes.
fn fault(arrival: &Arrival) -> Vec<Place> {
    let mut faults = Vec::new();
    let deadline = Instant::now() + PATIENCE;
    while faults.is_empty() {
        assert!(Instant::now() < deadline, "no fault comes");
        let fd = arrival.fault_fd().unwrap();
        let mut polled = [rustix::event::PollFd::new(
            &fd,
            rustix::event::PollFlags::IN,
        )];
        let wait = rustix::event::Timespec {
            tv_sec: 1,
            tv_nsec: 0,
        };
        rustix::event::poll(&mut polled, Some(&wait)).unwrap();
        arrival.faults(&mut faults).unwrap();
    }
    faults
}

mod that_is_used {
    use super::*;

    crate::chunk::conformance::storage_conformance!(|len| Arc::new(region(len, Region::new)) as _);
}

/// Everything is fetched when it is looked at: by a thread that brings zeros, for as long as the region is used.
mod that_arrives {
    use super::*;

    fn served(len: u64) -> Arc<dyn Storage> {
        let (region, arrival) = remote(Arc::new(MemoryStorage::new(len)), PATIENCE);
        let weak: Weak<Region> = Arc::downgrade(&region);
        drop(region);
        // The arrival has one of its own.
        let region = weak.upgrade().unwrap();
        let arrival = Arc::new(arrival);
        thread::spawn(move || {
            let mut faults = Vec::new();
            // The test's, and the one in `arrival`.
            while weak.strong_count() > 1 {
                arrival.faults(&mut faults).unwrap();
                for fault in faults.drain(..) {
                    arrival.install(fault, &[0; 1]).unwrap();
                    arrival.install_zeros(fault, PAGE).unwrap();
                }
                thread::park_timeout(Duration::from_micros(100));
            }
        });
        region
    }

    crate::chunk::conformance::storage_conformance!(|len| served(len));
}

#[test]
fn nobody_sees_a_byte_before_the_region_belongs_here() {
    let region = Arc::new(region(4 * PAGE, Region::empty).with_patience(SHORT));
    let timed_out = |region: &Region| {
        let error = read(region, 0, 1).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let error = region.write_all_at(&[1], 0).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(!region.is_at_hand(0..1));
    };
    timed_out(&region);
    region.begin_to_come().unwrap();
    let arrival = Arrival::new(vec![region.clone()], None).unwrap();
    arrival.write(at(0), &[7; 4096]).unwrap();
    timed_out(&region);
    arrival.arm().unwrap();
    arrival.discard(0, PAGE..2 * PAGE).unwrap();
    region.mark_absent().unwrap();
    timed_out(&region);
    region.own();
    assert_eq!(read(&region, 0, 1).unwrap(), [7]);
    assert!(region.is_at_hand(0..PAGE) && !region.is_at_hand(0..PAGE + 1));
    assert_eq!(region.missing(), PAGE);
}

#[test]
fn a_late_chunk_never_overwrites_a_newer_write() {
    let (region, arrival) = remote(Arc::new(MemoryStorage::new(4 * PAGE + 10)), PATIENCE);
    region.write_all_at(&[1; 8192], PAGE).unwrap();
    region.zero(4 * PAGE..4 * PAGE + 10).unwrap();
    let mut none = Vec::new();
    arrival.faults(&mut none).unwrap();
    assert_eq!(none, [], "what is written whole is not fetched");
    arrival.install(at(0), &[2; 4 * 4096 + 10]).unwrap();
    let all = read(&region, 0, 4 * 4096 + 10).unwrap();
    let expected = [vec![2; 4096], vec![1; 8192], vec![2; 4096], vec![0; 10]].concat();
    assert!(all == expected);
    assert_eq!(region.missing(), 0);
}

/// The first of several lanes marked what is absent, and the others did not wait for that: they took it for resident, dropped what they
/// had, and a program read zeros.
#[test]
fn lanes_that_install_at_once_all_find_what_is_absent_marked() {
    const LANES: u64 = 4;
    const PAGES: u64 = 64;
    for _ in 0..200 {
        let region = region(LANES * PAGES * PAGE, Region::empty).with_patience(PATIENCE);
        let region = Arc::new(region);
        region.begin_to_come().unwrap();
        let arrival = Arrival::new(vec![region.clone()], None).unwrap();
        arrival.arm().unwrap();
        arrival.discard(0, 0..region.len()).unwrap();
        let lanes = usize::try_from(LANES).unwrap();
        let barrier = std::sync::Barrier::new(lanes + 1);
        thread::scope(|scope| {
            let (arrival, barrier) = (&arrival, &barrier);
            for lane in 0..LANES {
                scope.spawn(move || {
                    barrier.wait();
                    arrival
                        .install(at(lane * PAGES * PAGE), &[7; 4096])
                        .unwrap();
                });
            }
            barrier.wait();
            region.mark_absent().unwrap();
            region.own();
        });
        assert_eq!(region.missing(), (LANES * PAGES - LANES) * PAGE);
        for lane in 0..LANES {
            assert_eq!(read(&region, lane * PAGES * PAGE, 1).unwrap(), [7]);
        }
    }
}

/// A fault that an earlier session left in the queue, or one that came early, had what was absent marked before the last of it was
/// discarded; the rest was zeros that seemed to be here.
#[test]
fn what_is_discarded_after_something_was_installed_is_remote_too() {
    let region = Arc::new(region(4 * PAGE, Region::empty).with_patience(SHORT));
    region.begin_to_come().unwrap();
    let arrival = Arrival::new(vec![region.clone()], None).unwrap();
    arrival.write(at(0), &[5; 4 * 4096]).unwrap();
    arrival.arm().unwrap();
    arrival.discard(0, 0..PAGE).unwrap();
    arrival.install(at(0), &[6; 4096]).unwrap();
    arrival.discard(0, 0..2 * PAGE).unwrap();
    arrival.install(at(0), &[7; 4096]).unwrap();
    region.mark_absent().unwrap();
    region.own();
    assert_eq!(region.missing(), PAGE);
    assert_eq!(read(&region, 0, 1).unwrap(), [7]);
    let error = read(&region, PAGE, 1).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    assert_eq!(read(&region, 2 * PAGE, 1).unwrap(), [5]);
}

#[test]
fn what_was_asked_for_in_vain_is_forgotten() {
    let (region, arrival) = remote(Arc::new(MemoryStorage::new(64 * PAGE)), SHORT);
    let mut faults = Vec::new();
    read(&region, 0, 2 * 4096).unwrap_err();
    region.lose();
    arrival.faults(&mut faults).unwrap();
    assert_eq!(faults, []);
    // Nobody brings what is asked for now.
    read(&region, 0, 60 * 4096).unwrap_err();
    arrival.faults(&mut faults).unwrap();
    assert_eq!(faults, []);
}

#[test]
fn what_comes_again_after_it_was_discarded_is_here() {
    let region = Arc::new(region(4 * PAGE, Region::empty).with_patience(SHORT));
    region.begin_to_come().unwrap();
    let arrival = Arrival::new(vec![region.clone()], None).unwrap();
    arrival.arm().unwrap();
    arrival.discard(0, 0..2 * PAGE).unwrap();
    arrival.write(at(PAGE), &[7; 4096]).unwrap();
    region.mark_absent().unwrap();
    region.own();
    assert_eq!(region.missing(), PAGE);
    assert_eq!(read(&region, PAGE, 1).unwrap(), [7]);
}

#[test]
fn a_write_of_a_part_waits_for_the_rest_of_its_chunk() {
    let (region, arrival) = remote(Arc::new(MemoryStorage::new(4 * PAGE)), PATIENCE);
    thread::scope(|scope| {
        let writing = scope.spawn(|| region.write_all_at(&[1; 4096 + 20], PAGE - 10));
        assert_eq!(fault(&arrival), [at(0)]);
        arrival.install(at(0), &[2; 4096]).unwrap();
        assert_eq!(fault(&arrival), [at(2 * PAGE)], "page 1 is written whole");
        arrival.install(at(2 * PAGE), &[3; 4096]).unwrap();
        writing.join().unwrap().unwrap();
    });
    let around = read(&region, PAGE - 11, 4096 + 22).unwrap();
    let expected = [vec![2], vec![1; 4096 + 20], vec![3]].concat();
    assert!(around == expected);
}

/// A program's write had a chunk, the chunk came and was dropped for it, and then the write failed: the chunk counted as here
/// and was nothing but zeros. What comes waits for how the write ends.
#[test]
fn a_write_that_fails_does_not_cost_the_chunk_that_came_meanwhile() {
    let local = Arc::new(Faulty::new(Arc::new(MemoryStorage::new(2 * PAGE))));
    let (region, arrival) = remote(local.clone(), PATIENCE);
    let fault = Fault::stall(Duration::from_millis(200)).on(Operation::Write);
    local.faults().add(fault.times(1));
    thread::scope(|scope| {
        let writing = scope.spawn(|| region.write_all_at(&[1; 4096], 0));
        local.faults().await_stalled(1, PATIENCE);
        arrival.install(at(0), &[2; 2 * 4096]).unwrap();
        writing.join().unwrap().unwrap_err();
    });
    assert!(read(&region, 0, 2 * 4096).unwrap() == vec![2; 2 * 4096]);
}

#[test]
fn faults_of_a_read_are_asked_for_at_once_and_once_more_if_nothing_came() {
    let (region, arrival) = remote(Arc::new(MemoryStorage::new(8 * PAGE)), PATIENCE);
    thread::scope(|scope| {
        let reading = scope.spawn(|| read(&region, 0, 5 * 4096));
        let mut asked = Vec::new();
        while asked.len() < 5 {
            asked.extend(fault(&arrival));
        }
        let expected: Vec<_> = [1, 2, 3, 4, 0].iter().map(|n| at(n * PAGE)).collect();
        assert_eq!(asked, expected);
        arrival.wake(at(0), 8 * PAGE).unwrap();
        assert_eq!(fault(&arrival), [at(0)], "who waits looks again");
        arrival.install(at(0), &[5; 5 * 4096]).unwrap();
        assert!(reading.join().unwrap().unwrap() == vec![5; 5 * 4096]);
    });
}

#[test]
fn who_waits_for_a_chunk_gives_up_in_time() {
    let (region, _arrival) = remote(Arc::new(MemoryStorage::new(PAGE)), SHORT);
    let error = read(&region, 0, 1).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
}

#[test]
fn what_will_not_come_is_an_error_at_once_and_what_is_here_is_used() {
    let (region, arrival) = remote(Arc::new(MemoryStorage::new(3 * PAGE)), PATIENCE);
    arrival.install(at(0), &[1; 4096]).unwrap();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| read(&region, 2 * PAGE, 1));
        fault(&arrival);
        region.lose();
        let error = waiting.join().unwrap().unwrap_err();
        assert!(error.to_string().contains("at the source alone"), "{error}");
    });
    assert_eq!(region.standing(), Standing::Lost);
    assert_eq!(read(&region, 0, 1).unwrap(), [1]);
    assert!(read(&region, PAGE, 1).is_err());
    region.write_all_at(&[3; 4096], PAGE).unwrap();
    assert_eq!(read(&region, PAGE, 1).unwrap(), [3]);
    assert_eq!(region.missing(), PAGE);
    let refused = region.take_back().unwrap_err();
    assert!(matches!(refused, RegionError::Standing { .. }), "{refused}");
    region.give_up().unwrap();
    assert_eq!(region.standing(), Standing::Waiting);
    assert!(arrival.old().is_some(), "an old copy is worth something");
}

#[test]
fn a_copy_that_nobody_can_vouch_for_is_used_only_if_an_operator_says_so() {
    let (region, arrival) = remote(Arc::new(MemoryStorage::new(2 * PAGE)), PATIENCE);
    arrival.install(at(0), &[1; 4096]).unwrap();
    region.doubt();
    let error = read(&region, 0, 1).unwrap_err();
    assert!(error.to_string().contains("settle it"), "{error}");
    let refused = region.take_back().unwrap_err();
    assert!(matches!(refused, RegionError::Incomplete { missing: PAGE }));
    let (region, arrival) = remote(Arc::new(MemoryStorage::new(PAGE)), PATIENCE);
    arrival.install(at(0), &[1; 4096]).unwrap();
    region.doubt();
    region.take_back().unwrap();
    assert_eq!(read(&region, 0, 1).unwrap(), [1]);
    assert!(region.give_up().is_err(), "it is used");
}

#[test]
fn remote_bytes_may_hold_anything() {
    let (region, arrival) = remote(Arc::new(MemoryStorage::new(6 * PAGE + 5)), PATIENCE);
    let everything = region.data_ranges(0..region.len()).unwrap();
    assert_eq!((everything.len(), everything[0].end), (1, 6 * PAGE + 5));
    arrival.install_zeros(at(PAGE), 3 * PAGE).unwrap();
    let ranges = region.data_ranges(100..6 * PAGE + 5).unwrap();
    let rest: u64 = ranges.iter().map(|range| range.end - range.start).sum();
    assert!(rest >= PAGE - 100 + 2 * PAGE + 5, "{ranges:?}");
    assert_eq!(ranges.first().map(|range| range.start), Some(100));
    assert_eq!(ranges.last().map(|range| range.end), Some(6 * PAGE + 5));
    arrival.disarm().unwrap();
    region.arrive();
    assert_eq!(region.missing(), 0);
    assert_eq!(read(&region, 5 * PAGE, 1).unwrap(), [0]);
}

#[test]
fn a_region_that_was_used_meanwhile_makes_room() {
    let region = Arc::new(region(PAGE, Region::new).with_patience(SHORT));
    region.write_all_at(&[1], 0).unwrap();
    region.vacate().unwrap();
    assert_eq!(region.standing(), Standing::Waiting);
    assert_eq!(
        read(&region, 0, 1).unwrap_err().kind(),
        io::ErrorKind::TimedOut
    );
    assert!(region.vacate().is_err());
    region.begin_to_come().unwrap();
    let arrival = Arrival::new(vec![region], None).unwrap();
    assert!(arrival.old().is_none(), "nothing in it is worth a look");
}

#[test]
fn somebody_who_moves_a_region_is_alone() {
    let region = Arc::new(region(PAGE, Region::new));
    region.begin_to_leave().unwrap();
    assert!(matches!(region.begin_to_leave(), Err(RegionError::Busy)));
    assert!(matches!(region.begin_to_come(), Err(RegionError::Busy)));
    assert!(matches!(region.give_up(), Err(RegionError::Busy)));
    region.end();
    assert!(matches!(
        region.begin_to_come(),
        Err(RegionError::Standing { .. })
    ));
    region.begin_to_leave().unwrap();
}

/// A write that came behind the last take was done at the source and missing at the destination, and nobody knew.
#[test]
fn a_write_behind_the_last_take_waits_and_fails_when_the_region_has_left() {
    let region = region(PAGE, Region::new);
    region.begin_to_leave().unwrap();
    region.stand_still(Instant::now() + PATIENCE).unwrap();
    thread::scope(|scope| {
        let (coming, came) = channel();
        let region = &region;
        let late = scope.spawn(move || {
            coming.send(()).unwrap();
            region.write_all_at(&[1], 0)
        });
        came.recv().unwrap();
        region.leave();
        let error = late.join().unwrap().unwrap_err();
        assert!(error.to_string().contains("another host"), "{error}");
    });
    region.end();
    let mut is = [9];
    region.source().read_exact_at(&mut is, 0).unwrap();
    assert_eq!(is, [0], "nothing was done");
}

#[test]
fn a_write_that_is_under_way_is_in_the_last_take() {
    let region = Arc::new(region(4 * PAGE, Region::new));
    let tracker = region.tracker();
    tracker.start().unwrap();
    region.begin_to_leave().unwrap();
    thread::scope(|scope| {
        let writing = scope.spawn(|| {
            let mut done = 0;
            while region.write_all_at(&[1; 10_000], 0).is_ok() {
                done += 1;
            }
            done
        });
        let mut taken = ChunkBitmap::empty(4);
        while taken.is_empty() {
            taken = tracker.take().unwrap();
        }
        region.stand_still(Instant::now() + PATIENCE).unwrap();
        tracker.take().unwrap();
        let mut before = vec![0; 4 * 4096];
        region.source().read_exact_at(&mut before, 0).unwrap();
        region.leave();
        assert!(writing.join().unwrap() > 0);
        assert!(
            tracker.take().unwrap().is_empty(),
            "nobody has written since"
        );
    });
}
