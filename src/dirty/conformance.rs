//! What every tracker promises, as tests that each of them runs.
//!
//! Write here, expect there. A test of a tracker brings memory that it tracks ([`Tracked`]), in this process or in
//! another one, and calls [`run_all`], or has one test a promise made for it by `conformance!`.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::DirtyTracker;
use crate::chunk::{ChunkBitmap, ChunkSize};

/// A region, all holes at first, that somebody writes and a tracker watches. Its methods panic when they fail.
pub trait Tracked: Send + Sync {
    /// The tracker, not started.
    fn tracker(&self) -> &dyn DirtyTracker;

    /// Writes, as the program whose memory it is.
    fn write(&self, offset: u64, bytes: &[u8]);

    /// Reads, as the one who copies the region would: without allocating holes.
    fn read(&self, offset: u64, buf: &mut [u8]);

    /// How many bytes the region takes up.
    fn allocated(&self) -> u64;
}

/// A promise, as a test over memory that the given function makes: so many bytes, in chunks of that size.
pub type Promise<T> = fn(fn(u64, ChunkSize) -> T);

/// Checks every promise, one after the other, and says which one it is at.
///
/// # Panics
/// If the tracker breaks one.
pub fn run_all<T: Tracked>(make: fn(u64, ChunkSize) -> T) {
    let promises: [(&str, Promise<T>); 10] = [
        (
            "a write is named once",
            a_write_is_named_by_the_next_take_and_by_it_alone,
        ),
        ("take goes on tracking", a_take_never_stops_tracking),
        ("before start", what_was_written_before_the_start_is_no_news),
        (
            "restore",
            what_is_put_back_is_named_again_beside_what_is_new,
        ),
        ("holes", holes_are_never_touched),
        ("short region", a_region_shorter_than_a_chunk_works),
        (
            "short last chunk",
            a_length_that_is_no_multiple_of_the_chunk_works,
        ),
        (
            "large chunks",
            a_chunk_of_many_pages_is_named_for_any_of_them,
        ),
        ("concurrent writer", no_write_is_lost_while_the_writer_runs),
        ("stop", stopping_twice_is_no_error_and_starting_again_works),
    ];
    for (name, promise) in promises {
        eprintln!("promise: {name}");
        promise(make);
    }
}

const PAGE: u64 = 4096;

/// What a page holds.
type Page = [u8; 4096];

fn large() -> ChunkSize {
    ChunkSize::new(64 << 10).expect("a power of two")
}

fn take(memory: &impl Tracked) -> ChunkBitmap {
    memory.tracker().take().expect("take")
}

fn start(memory: &impl Tracked) {
    memory.tracker().start().expect("start");
}

fn stop(memory: &impl Tracked) {
    memory.tracker().stop().expect("stop");
}

fn named(chunks: &ChunkBitmap) -> Vec<u64> {
    chunks.runs().flat_map(|run| run.range()).collect()
}

/// A write between two takes is named by the second. A tracker may name more, but with nobody else about, none of
/// ours does, and one that named everything would make the rounds of a migration useless.
pub fn a_write_is_named_by_the_next_take_and_by_it_alone<T: Tracked>(
    make: fn(u64, ChunkSize) -> T,
) {
    let memory = make(64 * PAGE, ChunkSize::PAGE);
    start(&memory);
    assert_eq!(named(&take(&memory)), [0_u64; 0], "nothing was written yet");
    memory.write(3 * PAGE + 17, &[1]);
    memory.write(6 * PAGE - 1, &[1, 1]);
    memory.write(63 * PAGE, &[1]);
    assert_eq!(named(&take(&memory)), [3, 5, 6, 63]);
    assert_eq!(
        named(&take(&memory)),
        [0_u64; 0],
        "nothing was written since"
    );
    stop(&memory);
}

/// A chunk that was taken is named again when it is written again.
pub fn a_take_never_stops_tracking<T: Tracked>(make: fn(u64, ChunkSize) -> T) {
    let memory = make(8 * PAGE, ChunkSize::PAGE);
    start(&memory);
    for round in 1..=5 {
        memory.write(2 * PAGE, &[round]);
        assert_eq!(named(&take(&memory)), [2], "round {round}");
    }
    stop(&memory);
}

/// What is there at the start is for the first pass; the tracker names what comes after.
pub fn what_was_written_before_the_start_is_no_news<T: Tracked>(make: fn(u64, ChunkSize) -> T) {
    let memory = make(8 * PAGE, ChunkSize::PAGE);
    memory.write(2 * PAGE, &[1]);
    assert!(memory.tracker().take().is_err(), "take needs start");
    start(&memory);
    assert_eq!(named(&take(&memory)), [0_u64; 0]);
    memory.write(2 * PAGE, &[2]);
    assert_eq!(named(&take(&memory)), [2]);
    stop(&memory);
}

/// After an attempt that failed, the next take has what it took, and what was written since.
pub fn what_is_put_back_is_named_again_beside_what_is_new<T: Tracked>(
    make: fn(u64, ChunkSize) -> T,
) {
    let memory = make(8 * PAGE, ChunkSize::PAGE);
    start(&memory);
    memory.write(PAGE, &[1]);
    let taken = take(&memory);
    memory.write(4 * PAGE, &[1]);
    memory.tracker().restore(&taken).expect("restore");
    assert_eq!(named(&take(&memory)), [1, 4]);
    assert_eq!(
        named(&take(&memory)),
        [0_u64; 0],
        "put back once, named once"
    );
    stop(&memory);
}

/// A sparse region stays as sparse as it was, from start to stop.
pub fn holes_are_never_touched<T: Tracked>(make: fn(u64, ChunkSize) -> T) {
    let memory = make(1024 * PAGE, ChunkSize::PAGE);
    memory.write(100 * PAGE, &[1; 4096]);
    let before = memory.allocated();
    start(&memory);
    take(&memory);
    take(&memory);
    stop(&memory);
    assert_eq!(memory.allocated(), before);
}

/// One chunk, and not all of it.
pub fn a_region_shorter_than_a_chunk_works<T: Tracked>(make: fn(u64, ChunkSize) -> T) {
    let memory = make(5000, large());
    start(&memory);
    memory.write(4999, &[1]);
    let taken = take(&memory);
    assert_eq!((taken.chunks(), named(&taken)), (1, vec![0]));
    stop(&memory);
}

/// The last chunk is short, and is tracked to its last byte.
pub fn a_length_that_is_no_multiple_of_the_chunk_works<T: Tracked>(make: fn(u64, ChunkSize) -> T) {
    let len = 3 * (64 << 10) + 5 * PAGE + 1;
    let memory = make(len, large());
    start(&memory);
    memory.write(len - 1, &[1]);
    let taken = take(&memory);
    assert_eq!((taken.chunks(), named(&taken)), (4, vec![3]));
    stop(&memory);
}

/// Chunks larger than a page: any page of one names it, and none of its neighbours.
pub fn a_chunk_of_many_pages_is_named_for_any_of_them<T: Tracked>(make: fn(u64, ChunkSize) -> T) {
    let memory = make(16 * (64 << 10), large());
    start(&memory);
    for page in [0_u8, 7, 15] {
        memory.write(5 * (64 << 10) + u64::from(page) * PAGE, &[page + 1]);
        assert_eq!(named(&take(&memory)), [5], "page {page} of the chunk");
    }
    stop(&memory);
}

/// The order that loses nothing, played through: start, copy all; take, copy what it named, many times, while a
/// thread stamps chunks; the writer ends, take, copy. Then the copy is the memory.
pub fn no_write_is_lost_while_the_writer_runs<T: Tracked>(make: fn(u64, ChunkSize) -> T) {
    const CHUNKS: u64 = 256;
    const ROUNDS_WITH_WRITES: u32 = 100;
    let memory = make(CHUNKS * PAGE, ChunkSize::PAGE);
    let read = |chunk: u64| {
        let mut page: Page = [0; 4096];
        memory.read(chunk * PAGE, &mut page);
        page
    };
    let ending = AtomicBool::new(false);
    let mut copy: BTreeMap<u64, Page> = BTreeMap::new();
    let deadline = Instant::now() + Duration::from_secs(20);
    let rounds_with_writes = thread::scope(|scope| {
        scope.spawn(|| {
            // A stamp never comes twice, so an older one in the copy cannot pass for the last.
            let mut stamp = 0_u64;
            let mut place = 1_u64;
            // The deadline is for a take that panics: the writer ends all the same.
            while !ending.load(Ordering::Relaxed) && Instant::now() < deadline {
                stamp += 1;
                place = place
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                let offset = (place >> 33) % (CHUNKS * PAGE / 8) * 8;
                memory.write(offset, &stamp.to_le_bytes());
            }
        });
        start(&memory);
        copy.extend((0..CHUNKS).map(|chunk| (chunk, read(chunk))));
        let mut with_writes = 0;
        while with_writes < ROUNDS_WITH_WRITES && Instant::now() < deadline {
            let taken = named(&take(&memory));
            with_writes += u32::from(!taken.is_empty());
            copy.extend(taken.into_iter().map(|chunk| (chunk, read(chunk))));
        }
        ending.store(true, Ordering::Relaxed);
        with_writes
    });
    copy.extend(
        named(&take(&memory))
            .into_iter()
            .map(|chunk| (chunk, read(chunk))),
    );
    let lost: Vec<u64> = (0..CHUNKS)
        .filter(|chunk| copy[chunk] != read(*chunk))
        .collect();
    assert_eq!(lost, [0_u64; 0], "chunks whose last write no take covered");
    assert_eq!(
        rounds_with_writes, ROUNDS_WITH_WRITES,
        "rounds in which the writer and the takes met, within 20 s"
    );
    stop(&memory);
}

/// Stop is for every way out, so it may come twice, or without a start; and an aborted migration is tried again.
pub fn stopping_twice_is_no_error_and_starting_again_works<T: Tracked>(
    make: fn(u64, ChunkSize) -> T,
) {
    let memory = make(8 * PAGE, ChunkSize::PAGE);
    stop(&memory);
    start(&memory);
    memory.write(PAGE, &[1]);
    stop(&memory);
    stop(&memory);
    assert!(memory.tracker().take().is_err(), "nothing is tracked");
    assert!(memory.tracker().restore(&ChunkBitmap::empty(8)).is_err());
    memory.write(2 * PAGE, &[1]);
    start(&memory);
    memory.write(3 * PAGE, &[1]);
    assert_eq!(named(&take(&memory)), [3]);
    stop(&memory);
}

/// Makes a test of each promise, over memory that `$make` makes.
#[cfg(test)]
macro_rules! conformance {
    ($make:path) => {
        $crate::dirty::conformance::conformance!(
            $make:
            a_write_is_named_by_the_next_take_and_by_it_alone,
            a_take_never_stops_tracking,
            what_was_written_before_the_start_is_no_news,
            what_is_put_back_is_named_again_beside_what_is_new,
            holes_are_never_touched,
            a_region_shorter_than_a_chunk_works,
            a_length_that_is_no_multiple_of_the_chunk_works,
            a_chunk_of_many_pages_is_named_for_any_of_them,
            no_write_is_lost_while_the_writer_runs,
            stopping_twice_is_no_error_and_starting_again_works,
        );
    };
    ($make:path: $($promise:ident),* $(,)?) => {
        $(
            #[test]
            fn $promise() {
                $crate::dirty::conformance::$promise($make);
            }
        )*
    };
}
#[cfg(test)]
pub(super) use conformance;
