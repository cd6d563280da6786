use std::sync::{Mutex, PoisonError};

use proptest::prelude::*;

use super::super::{ChunkIndex, Fault, Faults, Faulty, Operation};
use super::*;
use crate::backend::MemoryStorage;

const PAGE: u64 = 4096;
const PATIENCE: Duration = Duration::from_secs(20);

/// Notes what is asked of it.
#[derive(Debug)]
struct Noting {
    storage: Arc<dyn Storage>,
    reads: Mutex<Vec<(u64, u64)>>,
}

impl Noting {
    fn reads(&self) -> Vec<(u64, u64)> {
        std::mem::take(&mut self.reads.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Storage for Noting {
    fn len(&self) -> u64 {
        self.storage.len()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.reads
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push((offset, offset + buf.len() as u64));
        self.storage.read_exact_at(buf, offset)
    }

    fn write_all_at(&self, _: &[u8], _: u64) -> io::Result<()> {
        panic!("nothing is written to the remote end");
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn data_ranges(&self, within: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        self.storage.data_ranges(within)
    }
}

#[derive(Debug, Default)]
struct Heard {
    arrived: Mutex<Vec<ChunkRun>>,
    wanted: Mutex<Vec<ChunkRun>>,
}

impl Listener for Heard {
    fn arrived(&self, run: ChunkRun) {
        self.arrived.lock().unwrap().push(run);
    }

    fn wanted(&self, run: ChunkRun) {
        self.wanted.lock().unwrap().push(run);
    }
}

struct Region {
    synced: Synced,
    remote: Arc<Noting>,
    remote_faults: Faults,
    local_faults: Faults,
    local: Arc<MemoryStorage>,
    heard: Arc<Heard>,
    bytes: Vec<u8>,
}

fn content(len: u64) -> Vec<u8> {
    (0..len)
        .map(|at| u8::try_from((at / PAGE * 7 + at % 251) % 256).unwrap() | 1)
        .collect()
}

fn region(len: u64, chunk: u32) -> Region {
    let memory = Arc::new(MemoryStorage::new(len));
    let bytes = content(len);
    memory.write_all_at(&bytes, 0).unwrap();
    let faulty = Faulty::new(memory);
    let remote_faults = faulty.faults();
    let remote = Arc::new(Noting {
        storage: Arc::new(faulty),
        reads: Mutex::default(),
    });
    let local = Arc::new(MemoryStorage::new(len));
    let faulty = Faulty::new(local.clone());
    let local_faults = faulty.faults();
    let heard = Arc::new(Heard::default());
    let synced = Synced::new(
        remote.clone(),
        Arc::new(faulty),
        ChunkSize::new(chunk).unwrap(),
        PATIENCE,
        heard.clone(),
    )
    .unwrap();
    Region {
        synced,
        remote,
        remote_faults,
        local_faults,
        local,
        heard,
        bytes,
    }
}

impl Region {
    fn read(&self, range: Range<u64>) -> io::Result<Vec<u8>> {
        let mut buf = vec![0xEE; length(&range)];
        self.synced.read_exact_at(&mut buf, range.start)?;
        Ok(buf)
    }

    #[track_caller]
    fn check(&self, range: Range<u64>) {
        let places = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
        assert!(self.read(range).unwrap() == self.bytes[places]);
    }

    fn resident(&self) -> u64 {
        let residency = self.synced.residency();
        residency.count(residency.all_chunks(), ChunkState::Resident)
    }
}

mod pages {
    use super::*;

    crate::chunk::conformance::storage_conformance!(|len| {
        let (remote, local) = (MemoryStorage::new(len), MemoryStorage::new(len));
        let (remote, local) = (Arc::new(remote), Arc::new(local));
        Arc::new(Synced::new(remote, local, ChunkSize::PAGE, PATIENCE, Arc::new(())).unwrap()) as _
    });
}

mod large_chunks {
    use super::*;

    crate::chunk::conformance::storage_conformance!(|len| {
        let (remote, local) = (MemoryStorage::new(len), MemoryStorage::new(len));
        let (remote, local) = (Arc::new(remote), Arc::new(local));
        let size = ChunkSize::new(64 << 10).unwrap();
        Arc::new(Synced::new(remote, local, size, PATIENCE, Arc::new(())).unwrap()) as _
    });
}

#[test]
fn a_short_read_asks_for_just_its_bytes_and_wants_the_chunk() {
    let region = region(10 << 20, 64 << 10);
    region.check(100_000..104_096);
    assert_eq!(region.remote.reads(), [(100_000, 104_096)]);
    assert_eq!(*region.heard.wanted.lock().unwrap(), [ChunkRun::new(1, 1)]);
    assert_eq!(region.resident(), 0);
}

#[test]
fn a_read_of_many_chunks_costs_one_round_trip_and_keeps_the_whole_ones() {
    let region = region(1 << 20, 4096);
    region.check(10_000..500_000);
    assert_eq!(region.remote.reads(), [(10_000, 500_000)]);
    assert_eq!(region.resident(), 119);
    // Some are here, some are not: the same.
    region.check(0..600_000);
    assert_eq!(region.remote.reads(), [(0, 12_288), (499_712, 600_000)]);
    region.check(0..1 << 20);
    region.remote.reads();
    region.check(0..1 << 20);
    assert_eq!(region.remote.reads(), []);
    assert_eq!(
        region
            .heard
            .arrived
            .lock()
            .unwrap()
            .iter()
            .map(|run| run.count)
            .sum::<u64>(),
        256
    );
}

#[test]
fn chunks_that_are_here_between_others_are_bridged_and_not_undone() {
    let mut region = region(1 << 20, 4096);
    for page in (0..200).step_by(2) {
        region
            .synced
            .write_all_at(&[0xAB; 4096], page * PAGE)
            .unwrap();
        let at = usize::try_from(page * PAGE).unwrap();
        region.bytes[at..at + 4096].fill(0xAB);
    }
    assert_eq!(region.remote.reads(), []);
    region.check(0..200 * PAGE);
    assert_eq!(region.remote.reads(), [(PAGE, 200 * PAGE)]);
    assert_eq!(region.resident(), 200);
    region.check(0..200 * PAGE);
}

#[test]
fn writing_whole_chunks_fetches_nothing_and_a_part_fetches_its_chunk() {
    let region = region(PAGE * 10 + 5, 4096);
    region.synced.write_all_at(&[1; 8192], PAGE).unwrap();
    region.synced.zero(4 * PAGE..6 * PAGE).unwrap();
    // The last chunk is short, and so whole.
    region.synced.write_all_at(&[1; 5], 10 * PAGE).unwrap();
    assert_eq!(region.remote.reads(), []);
    assert_eq!(region.resident(), 5);
    region
        .synced
        .write_all_at(&[2; 10], 8 * PAGE + 100)
        .unwrap();
    assert_eq!(region.remote.reads(), [(8 * PAGE, 9 * PAGE)]);
    // Both ends of it, in one go.
    region
        .synced
        .write_all_at(&[3; 4096], 6 * PAGE + 1)
        .unwrap();
    assert_eq!(region.remote.reads(), [(6 * PAGE, 8 * PAGE)]);
    let mut expected = region.bytes.clone();
    let page = |at: usize| at * 4096;
    expected[page(1)..page(3)].fill(1);
    expected[page(4)..page(6)].fill(0);
    expected[page(10)..].fill(1);
    expected[page(8) + 100..page(8) + 110].fill(2);
    expected[page(6) + 1..page(7) + 1].fill(3);
    assert!(region.read(0..PAGE * 10 + 5).unwrap() == expected);
}

#[test]
fn a_region_smaller_than_a_chunk_works() {
    let region = region(100, 64 << 10);
    region.check(10..20);
    assert_eq!(region.resident(), 0);
    region.check(0..100);
    assert_eq!(region.resident(), 1);
    region.synced.write_all_at(&[9; 100], 0).unwrap();
    assert_eq!(region.read(0..100).unwrap(), [9; 100]);
}

#[test]
fn data_is_written_before_the_chunk_is_here() {
    let region = region(PAGE * 4, 4096);
    region
        .local_faults
        .add(Fault::stall(PATIENCE).on(Operation::Write));
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| region.check(0..PAGE));
        region.local_faults.await_stalled(1, PATIENCE);
        assert_eq!(
            region.synced.residency().state(ChunkIndex(0)),
            ChunkState::Writing
        );
        // Nobody else waits for it.
        region.check(0..PAGE);
        region.check(0..2048);
        region.local_faults.clear();
        reader.join().unwrap();
    });
    assert!(region.synced.residency().is_resident(ChunkRun::new(0, 1)));
}

#[test]
fn a_short_read_overtakes_a_fetch_and_a_long_one_waits_for_it() {
    let region = region(1 << 20, 4096);
    let all = region.synced.residency().all_chunks();
    let claim = region.synced.residency().claim(all, 100).unwrap();
    region.check(0..PAGE);
    assert_eq!(region.remote.reads(), [(0, PAGE)]);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| region.check(0..1 << 20));
        while region.synced.residency().waiting() == 0 {
            std::thread::yield_now();
        }
        region.synced.fetch(claim, &mut Vec::new()).unwrap();
        reader.join().unwrap();
    });
    let mut reads = region.remote.reads();
    reads.sort_unstable();
    assert_eq!(reads, [(0, 100 * PAGE), (100 * PAGE, 1 << 20)]);
}

#[test]
fn who_waited_for_a_fetch_that_failed_asks_itself() {
    let region = region(1 << 20, 4096);
    let all = region.synced.residency().all_chunks();
    let claim = region.synced.residency().claim(all, 100).unwrap();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| region.check(0..1 << 20));
        while region.synced.residency().waiting() == 0 {
            std::thread::yield_now();
        }
        claim.fail(&io::Error::other("no"));
        reader.join().unwrap();
    });
    assert_eq!(region.resident(), 256);
}

#[test]
fn an_error_goes_to_who_asked_and_the_next_read_asks_again() {
    let region = region(1 << 20, 4096);
    region
        .remote_faults
        .add(Fault::error(io::ErrorKind::ConnectionReset).within(0..PAGE));
    let error = region.read(0..2 * PAGE).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(region.resident(), 0);
    region.check(PAGE..3 * PAGE);
    assert!(region.synced.write_all_at(&[1], 5).is_err());
    // A part of the chunk that was not fetched is not written either.
    assert_eq!(region.local.allocated() > 0, region.resident() > 0);
    region.remote_faults.clear();
    region.check(0..2 * PAGE);
}

#[test]
fn a_reply_that_was_cut_short_leaves_no_chunk_behind() {
    let region = region(1 << 20, 4096);
    region
        .remote_faults
        .add(Fault::partly(5000, io::ErrorKind::BrokenPipe).times(1));
    assert!(region.read(0..100_000).is_err());
    assert_eq!(region.resident(), 0);
    region.check(0..100_000);
}

#[test]
fn a_full_local_disk_fails_writes_and_no_reads() {
    let region = region(1 << 20, 4096);
    region
        .local_faults
        .add(Fault::error(io::ErrorKind::StorageFull).on(Operation::Write));
    region.check(0..100_000);
    assert_eq!(region.resident(), 0);
    for (bytes, offset) in [(4096, 0), (10, 5)] {
        let error = region
            .synced
            .write_all_at(&vec![1; bytes], offset)
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    }
    // What was not written is what it was.
    region.check(0..100_000);
    region.local_faults.clear();
    region.check(0..100_000);
    assert!(region.resident() > 20);
}

#[test]
fn a_write_that_failed_half_way_over_a_remote_chunk_leaves_the_remote_bytes() {
    let region = region(1 << 20, 4096);
    region.local_faults.add(
        Fault::partly(100, io::ErrorKind::Other)
            .on(Operation::Write)
            .times(1),
    );
    assert!(region.synced.write_all_at(&[1; 4096], 0).is_err());
    region.check(0..PAGE);
}

#[test]
fn nothing_waits_longer_than_its_patience() {
    let remote = Arc::new(MemoryStorage::new(1 << 20));
    let local = Arc::new(MemoryStorage::new(1 << 20));
    let patience = Duration::from_millis(5);
    let synced = Synced::new(remote, local, ChunkSize::PAGE, patience, Arc::new(())).unwrap();
    let _claim = synced.residency().claim(ChunkRun::new(0, 100), 100);
    let error = synced.read_exact_at(&mut vec![0; 1 << 20], 0).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
}

#[test]
fn what_holds_data_is_asked_of_the_end_that_knows() {
    let remote = Arc::new(MemoryStorage::new(1 << 20));
    remote.write_all_at(&[1; 4096], 64 << 10).unwrap();
    remote.write_all_at(&[1; 4096], 128 << 10).unwrap();
    let local = Arc::new(MemoryStorage::new(1 << 20));
    let synced = Synced::new(remote, local, ChunkSize::PAGE, PATIENCE, Arc::new(())).unwrap();
    synced.zero(64 << 10..96 << 10).unwrap();
    synced.write_all_at(&[1; 4096], 0).unwrap();
    assert_eq!(
        synced.data_ranges(0..1 << 20).unwrap(),
        [0..4096, 128 << 10..(128 << 10) + 4096]
    );
    assert!(synced.is_at_hand(0..4096) == synced.local().is_at_hand(0..4096));
    assert!(!synced.is_at_hand(0..8192));
}

#[test]
fn a_local_storage_that_is_too_short_is_refused() {
    let (remote, local) = (MemoryStorage::new(5000), MemoryStorage::new(4999));
    let synced = Synced::new(
        Arc::new(remote),
        Arc::new(local),
        ChunkSize::PAGE,
        PATIENCE,
        Arc::new(()),
    );
    assert_eq!(synced.unwrap_err().kind(), io::ErrorKind::InvalidInput);
}

#[derive(Debug, Clone)]
enum Step {
    Read(u64, u64),
    Write(u64, u64, u8),
    Zero(u64, u64),
    Fetch(u64, u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let len = prop_oneof![1..100_u64, 4000..4200_u64, 1..70_000_u64];
    let step = prop_oneof![
        (any::<u64>(), len.clone()).prop_map(|(at, len)| Step::Read(at, len)),
        (any::<u64>(), len.clone(), any::<u8>())
            .prop_map(|(at, len, byte)| Step::Write(at, len, byte)),
        (any::<u64>(), len.clone()).prop_map(|(at, len)| Step::Zero(at, len)),
        (any::<u64>(), len).prop_map(|(at, len)| Step::Fetch(at, len)),
    ];
    proptest::collection::vec(step, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Against an array, while others fetch and both ends fail now and then: what failed is old or new, what did not is right.
    #[test]
    fn it_is_an_array_whatever_fails(len in 1..200_000_u64, big in any::<bool>(), seed in any::<u64>(), steps in steps()) {
        let region = region(len, if big { 32 << 10 } else { 4096 });
        let mut model = region.bytes.clone();
        // What a write that failed may have left.
        let mut doubtful = vec![None; model.len()];
        region.remote_faults.add(Fault::error(io::ErrorKind::Other).by_chance(1, 5, seed));
        region.local_faults.add(
            Fault::partly(3000, io::ErrorKind::StorageFull).on(Operation::Write).by_chance(1, 9, seed));
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let puller = scope.spawn(|| {
                let residency = region.synced.residency();
                let mut turn = 0;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    turn = (turn + 7) % (residency.chunks() + 1);
                    let within = ChunkRun::new(turn, residency.chunks() - turn);
                    if let Some(claim) = residency.claim(within, 3) {
                        let _ = region.synced.fetch(claim, &mut Vec::new());
                    }
                    std::thread::yield_now();
                }
            });
            let fit = |at: u64, count: u64| {
                let start = at % len;
                start..(start + count).min(len)
            };
            let places = |range: &Range<u64>| usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
            let check = |model: &[u8], doubtful: &[Option<u8>], range: &Range<u64>, bytes: &[u8]| {
                for (at, &byte) in places(range).zip(bytes) {
                    assert!(byte == model[at] || doubtful[at] == Some(byte), "byte {at} is {byte}, not {}", model[at]);
                }
            };
            for step in &steps {
                match *step {
                    Step::Read(at, count) => {
                        let range = fit(at, count);
                        if let Ok(bytes) = region.read(range.clone()) {
                            check(&model, &doubtful, &range, &bytes);
                        }
                    }
                    Step::Write(at, count, byte) => {
                        let range = fit(at, count);
                        match region.synced.write_all_at(&vec![byte; length(&range)], range.start) {
                            Ok(()) => {
                                model[places(&range)].fill(byte);
                                doubtful[places(&range)].fill(None);
                            }
                            // Of two that failed, what the first left may be seen yet: stop there.
                            Err(_) if doubtful[places(&range)].iter().any(Option::is_some) => break,
                            Err(_) => doubtful[places(&range)].fill(Some(byte)),
                        }
                    }
                    Step::Zero(at, count) => {
                        let range = fit(at, count);
                        match region.synced.zero(range.clone()) {
                            Ok(()) => {
                                model[places(&range)].fill(0);
                                doubtful[places(&range)].fill(None);
                            }
                            Err(_) if doubtful[places(&range)].iter().any(Option::is_some) => break,
                            Err(_) => doubtful[places(&range)].fill(Some(0)),
                        }
                    }
                    Step::Fetch(at, count) => {
                        let run = region.synced.chunks_touched(&fit(at, count));
                        if let Some(claim) = region.synced.residency().claim(run, u64::MAX) {
                            let _ = region.synced.fetch(claim, &mut Vec::new());
                        }
                    }
                }
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            puller.join().unwrap();
            region.remote_faults.clear();
            region.local_faults.clear();
            let bytes = region.read(0..len).unwrap();
            if doubtful.iter().all(Option::is_none) {
                assert!(bytes == model);
            }
        });
    }
}
