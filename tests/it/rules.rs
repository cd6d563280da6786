//! Rules that were paid for by others, each a test by its name, over the layers as they are put together.
//!
//! | rule | held here, and by |
//! |---|---|
//! | a missing chunk reads as zeros | `chunk::conformance`, `chunk::chunked` |
//! | write, then mark; take, then read; the last take is after quiesce | `dirty::conformance`, loom models in `dirty::tracked` |
//! | locking waits for what is in flight | `chunk::gate`, and its loom models |
//! | a late chunk never overwrites a newer write | `chunk::residency`, and its loom models |
//! | what fails, fails the operation that asked | each layer's tests with `chunk::Faulty` |
//! | any size works, also one below a chunk | `chunk::conformance` |
//! | progress counts states | `chunk::residency` |
//! | a dirty set of millions of chunks exceeds no limit | here, and `migrate-proto` for any set |
//! | a device is claimed, and released on every way out | the lab |
//! | a length of a peer's is checked before anything is allocated | `nbd`, `migrate-proto`, and their fuzzers |
//! | nobody waits for ever | here, and wherever there is a deadline |

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use memferry::backend::MemoryStorage;
use memferry::chunk::conformance::MapStore;
use memferry::chunk::{
    ChunkBitmap, ChunkIndex, ChunkRun, ChunkSize, ChunkState, ChunkStore, Chunked, Cow, Fault,
    Faults, Faulty, FaultyStore, Gate, Operation, Storage, Synced,
};
use memferry::dirty::{DirtyTracker, Tracked};
use migrate_proto::limits::MAX_BODY;
use migrate_proto::{DirtyPage, Message};

const PAGE: u64 = 4096;
const LONG: Duration = Duration::from_secs(30);

fn memory(len: u64) -> Arc<dyn Storage> {
    Arc::new(MemoryStorage::new(len))
}

fn faulty(storage: Arc<dyn Storage>) -> (Arc<dyn Storage>, Faults) {
    let faulty = Faulty::new(storage);
    let faults = faulty.faults();
    (Arc::new(faulty), faults)
}

fn synced(remote: Arc<dyn Storage>, local: Arc<dyn Storage>, patience: Duration) -> Arc<Synced> {
    let synced = Synced::new(remote, local, ChunkSize::PAGE, patience, Arc::new(()));
    Arc::new(synced.unwrap())
}

/// Each layer over a medium that errs when it is told to.
fn layers(len: u64) -> Vec<(&'static str, Arc<dyn Storage>, Faults)> {
    let mut layers = Vec::new();
    let mut add = |name, make: &dyn Fn(Arc<dyn Storage>) -> Arc<dyn Storage>| {
        let (medium, faults) = faulty(memory(len));
        layers.push((name, make(medium), faults));
    };
    add("gate", &|medium| Arc::new(Gate::new(medium)));
    add("tracked", &|medium| {
        Arc::new(Tracked::new(medium, ChunkSize::PAGE))
    });
    add("overlay", &|medium| {
        Arc::new(Cow::new(memory(len), medium, ChunkSize::PAGE).unwrap())
    });
    add("local", &|medium| {
        let synced = synced(memory(len), medium, LONG);
        // Chunks that are here; those that are not need nothing of the local storage to be read.
        synced.zero(0..len).unwrap();
        synced
    });
    add("all", &|medium| {
        let synced = synced(memory(len), medium, LONG);
        synced.zero(0..len).unwrap();
        Arc::new(Gate::new(Arc::new(Tracked::new(synced, ChunkSize::PAGE))))
    });
    let store = FaultyStore::new(Arc::new(MapStore::new(ChunkSize::PAGE, len)));
    let faults = store.faults();
    layers.push(("chunked", Arc::new(Chunked::new(Arc::new(store))), faults));
    layers
}

#[test]
fn a_missing_chunk_reads_as_zeros_through_all_layers() {
    let store = MapStore::new(ChunkSize::PAGE, 10 * PAGE);
    store
        .put(&[(ChunkIndex(4), &[4; 4096]), (ChunkIndex(6), &[6; 4096])])
        .unwrap();
    let chunked = Arc::new(Chunked::new(Arc::new(store)));
    let synced = synced(chunked, memory(10 * PAGE), LONG);
    let region = Gate::new(Arc::new(Tracked::new(synced, ChunkSize::PAGE)));
    for _ in 0..2 {
        let mut buf = vec![0xEE; 4 * 4096];
        region.read_exact_at(&mut buf, 4 * PAGE - 100).unwrap();
        let chunk = |byte| vec![byte; 4096];
        let expected = [vec![0; 100], chunk(4), chunk(0), chunk(6), vec![0; 3996]].concat();
        assert!(buf == expected);
    }
}

/// In r3map the lock was let go before the operation ran, and a write that was under way when the subject had been
/// suspended was in neither the last dirty set nor the copy.
#[test]
fn the_last_take_is_after_quiesce_and_names_what_was_in_flight() {
    let (medium, faults) = faulty(memory(4 * PAGE));
    let tracked = Arc::new(Tracked::new(medium, ChunkSize::PAGE));
    tracked.start().unwrap();
    let gate = Gate::new(tracked.clone()).with_patience(LONG);
    faults.add(Fault::stall(LONG).on(Operation::Write));
    thread::scope(|scope| {
        let write = scope.spawn(|| gate.write_all_at(&[1; 10], 2 * PAGE));
        faults.await_stalled(1, LONG);
        assert!(tracked.take().unwrap().is_empty(), "write, then mark");
        let quiesce = scope.spawn(|| gate.close("a cut-over", Instant::now() + LONG));
        faults.clear();
        let closed = quiesce.join().unwrap().unwrap();
        let last = tracked.take().unwrap();
        assert_eq!((last.count(), last.contains(2)), (1, true));
        let mut buf = [0; 10];
        closed.storage().read_exact_at(&mut buf, 2 * PAGE).unwrap();
        assert_eq!(buf, [1; 10]);
        write.join().unwrap().unwrap();
    });
}

#[test]
fn a_chunk_that_comes_late_never_overwrites_a_newer_write() {
    let remote = memory(4 * PAGE);
    remote.write_all_at(&[1; 4 * 4096], 0).unwrap();
    let (remote, faults) = faulty(remote);
    let region = synced(remote, memory(4 * PAGE), LONG);
    faults.add(Fault::stall(LONG).on(Operation::Read).times(1));
    thread::scope(|scope| {
        let slow = scope.spawn(|| {
            let mut buf = vec![0; 3 * 4096];
            region.read_ahead_at(&mut buf, 0).map(|()| buf)
        });
        faults.await_stalled(1, LONG);
        region.write_all_at(&[2; 4096], PAGE).unwrap();
        faults.release();
        slow.join().unwrap().unwrap();
    });
    let mut buf = vec![0; 4 * 4096];
    region.read_exact_at(&mut buf, 0).unwrap();
    assert!(buf == [vec![1; 4096], vec![2; 4096], vec![1; 2 * 4096]].concat());
}

/// In r3map a push that failed was told to a channel that nobody read, and the sync said that all was well.
#[test]
fn what_fails_fails_the_operation_that_asked_and_the_next_one_works() {
    for (name, region, faults) in layers(8 * PAGE) {
        region.write_all_at(&[1; 8 * 4096], 0).unwrap();
        region.flush().unwrap();
        let mut buf = vec![0; 5000];
        type Attempt<'a> = &'a mut dyn FnMut() -> io::Result<()>;
        let attempts: [(Operation, Attempt<'_>); 5] = [
            (Operation::Read, &mut || {
                region.read_exact_at(&mut buf, 3000)
            }),
            (Operation::Write, &mut || {
                region.write_all_at(&[2; 5000], 3000)
            }),
            (Operation::Zero, &mut || region.zero(PAGE..3 * PAGE)),
            (Operation::Flush, &mut || region.flush()),
            (Operation::Look, &mut || {
                region.data_ranges(0..PAGE).map(drop)
            }),
        ];
        for (operation, attempt) in attempts {
            for fault in [
                Fault::error(io::ErrorKind::StorageFull),
                Fault::partly(0, io::ErrorKind::StorageFull),
            ] {
                // Nothing is removed that is missing already.
                region.write_all_at(&[1; 8 * 4096], 0).unwrap();
                faults.add(fault.on(operation));
                let error = attempt().expect_err(name);
                assert_eq!(error.kind(), io::ErrorKind::StorageFull, "{name}: {error}");
                faults.clear();
                attempt().unwrap_or_else(|error| panic!("{name}, after {operation:?}: {error}"));
            }
        }
    }
}

#[test]
fn nobody_waits_for_ever_on_a_medium_that_stands_still() {
    for (name, region, faults) in layers(8 * PAGE) {
        region.write_all_at(&[1; 8 * 4096], 0).unwrap();
        faults.add(Fault::stall(Duration::from_millis(20)));
        let late = [
            region.read_exact_at(&mut [0; 10], 0),
            region.write_all_at(&[2; 10], 0),
            region.flush(),
        ];
        for late in late {
            let error = late.expect_err(name);
            assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{name}: {error}");
        }
        faults.clear();
        region.write_all_at(&[3; 10], 0).unwrap();
    }
}

/// A reader that waits for a chunk which another brings has a deadline of its own, whatever that other does.
#[test]
fn nobody_waits_for_ever_for_what_another_fetches() {
    let (remote, faults) = faulty(memory(64 * PAGE));
    let region = synced(remote, memory(64 * PAGE), Duration::from_millis(20));
    faults.add(Fault::stall(LONG).on(Operation::Read).times(1));
    thread::scope(|scope| {
        let slow = scope.spawn(|| region.read_exact_at(&mut [0; 64 * 4096], 0));
        faults.await_stalled(1, LONG);
        let late = region.read_exact_at(&mut [0; 60 * 4096], 0);
        assert_eq!(late.unwrap_err().kind(), io::ErrorKind::TimedOut);
        faults.release();
        slow.join().unwrap().unwrap();
    });
}

/// r3map counted a chunk twice that was dirty and not yet pulled, and waited for the second for ever.
#[test]
fn a_chunk_that_is_dirty_and_not_yet_pulled_is_counted_once() {
    let region = synced(memory(10 * PAGE), memory(10 * PAGE), LONG);
    let residency = region.residency();
    let left =
        || residency.chunks() - residency.count(residency.all_chunks(), ChunkState::Resident);
    region.read_exact_at(&mut [0; 4096 * 4], 0).unwrap();
    assert_eq!(left(), 6);
    let mut dirty = ChunkBitmap::empty(10);
    dirty.insert_run(ChunkRun::new(2, 6));
    residency
        .mark_remote(&dirty, Instant::now() + LONG)
        .unwrap();
    assert_eq!(
        left(),
        8,
        "two of those that were here, and six that never were"
    );
    region.read_exact_at(&mut [0; 10 * 4096], 0).unwrap();
    assert_eq!(left(), 0);
}

/// In r3map a dirty set was a list of numbers in one message, which a few gigabytes of dirty memory made too long, when
/// the subject was suspended already.
#[test]
fn a_dirty_set_of_millions_of_chunks_exceeds_no_message_limit() {
    const CHUNKS: u64 = 8 << 20;
    let tracked = Tracked::new(memory(CHUNKS * PAGE), ChunkSize::PAGE);
    tracked.start().unwrap();
    let mut dirty = ChunkBitmap::empty(CHUNKS);
    for word in 0..usize::try_from(CHUNKS / 64).unwrap() {
        // Neither runs nor full pages: nothing makes it shorter.
        dirty.set_word(word, 0x5AA5_9669_A55A_6996);
    }
    tracked.restore(&dirty).unwrap();
    let taken = tracked.take().unwrap();
    assert!(taken == dirty);
    for message in Message::dirty(1, DirtyPage::pages_of(&taken)) {
        let mut body = Vec::new();
        message.encode(&mut body);
        assert!(body.len() <= usize::try_from(MAX_BODY).unwrap());
    }
}

/// In r3map two writes of parts of one chunk, which it read, changed and wrote, were one after the other only by luck;
/// and a tail was written beyond the end.
#[test]
fn parts_of_one_chunk_are_written_by_many_at_once_up_to_the_last_byte() {
    const LEN: u64 = 3 * PAGE + 1000;
    let large = ChunkSize::new(8192).unwrap();
    let chunked = Chunked::new(Arc::new(MapStore::new(large, LEN)));
    let (base, overlay) = (memory(LEN), Arc::new(chunked));
    let region = Cow::new(base, overlay, ChunkSize::PAGE).unwrap();
    let part = |n: u8| -> Range<u64> { u64::from(n) * LEN / 8..u64::from(n + 1) * LEN / 8 };
    thread::scope(|scope| {
        for n in 0..8 {
            let region = &region;
            scope.spawn(move || {
                for offset in part(n) {
                    region.write_all_at(&[n + 1], offset).unwrap();
                }
            });
        }
    });
    for offset in (0..8).flat_map(|n| part(n).map(move |offset| (n, offset))) {
        let mut byte = [0];
        region.read_exact_at(&mut byte, offset.1).unwrap();
        assert_eq!(byte, [offset.0 + 1], "byte {}", offset.1);
    }
    assert!(region.write_all_at(&[1; 2], LEN - 1).is_err());
}
