//! What every [`ChunkStore`] promises.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::{random, times};
use crate::chunk::{ChunkIndex, ChunkRun, ChunkSize, ChunkStore};

/// Makes a store of chunks of that size, so many bytes long, all of them missing.
pub type Make<'a> = &'a dyn Fn(ChunkSize, u64) -> Arc<dyn ChunkStore>;

/// A promise, as a test of the stores that the given function makes.
pub type Promise = fn(Make<'_>);

/// Checks every promise, one after the other, and says which one it is at.
///
/// # Panics
/// If the store breaks one.
pub fn run_all(make: Make<'_>) {
    let promises: [(&str, Promise); 8] = [
        ("batches", a_batch_is_answered_chunk_by_chunk),
        ("missing", missing_is_not_zero),
        ("length", a_chunk_of_another_length_is_refused),
        ("outside", a_chunk_that_does_not_exist_is_refused),
        ("short", a_short_last_chunk_is_as_short_as_it_is),
        ("remove", what_is_removed_is_missing),
        ("map", it_behaves_like_a_map),
        (
            "old or new",
            a_reader_sees_a_chunk_old_or_new_and_never_a_mixture,
        ),
    ];
    for (name, promise) in promises {
        eprintln!("promise: {name}");
        promise(make);
    }
}

const PAGE: u64 = 4096;

fn get(store: &dyn ChunkStore, chunks: &[u64]) -> Vec<Option<Vec<u8>>> {
    let chunks: Vec<ChunkIndex> = chunks.iter().copied().map(ChunkIndex).collect();
    let mut answers = vec![None; chunks.len()];
    let got = store.get(&chunks, &mut |place, bytes| {
        let before = answers[place].replace(bytes.map(<[u8]>::to_vec));
        assert!(before.is_none(), "place {place} was answered twice");
    });
    got.unwrap_or_else(|error| panic!("get {chunks:?}: {error}"));
    let answers = answers.into_iter();
    answers
        .map(|answer| answer.expect("every place is answered"))
        .collect()
}

fn put(store: &dyn ChunkStore, chunks: &[(u64, &[u8])]) {
    let chunks: Vec<_> = chunks.iter().map(|&(n, b)| (ChunkIndex(n), b)).collect();
    store.put(&chunks).expect("put");
}

fn remove(store: &dyn ChunkStore, chunks: &[u64]) {
    let chunks: Vec<ChunkIndex> = chunks.iter().copied().map(ChunkIndex).collect();
    store.remove(&chunks).expect("remove");
}

fn present(store: &dyn ChunkStore, start: u64, count: u64) -> Vec<u64> {
    let present = store.present(ChunkRun::new(start, count)).expect("present");
    assert_eq!(
        present.chunks(),
        store.chunk_size().chunks_in(store.len()),
        "the set's space is all chunks"
    );
    let within = ChunkRun::new(start, count);
    let inside = present.runs_within(within).flat_map(|run| run.range());
    inside.collect()
}

/// Once each, with its place in the batch, in whatever order; a chunk may be asked for twice.
pub fn a_batch_is_answered_chunk_by_chunk(make: Make<'_>) {
    let store = make(ChunkSize::PAGE, 600 * PAGE);
    assert_eq!(
        (store.chunk_size(), store.len()),
        (ChunkSize::PAGE, 600 * PAGE)
    );
    let page = |n: u64| vec![u8::try_from(n % 251).expect("below 251"); 4096];
    let pages: Vec<_> = (0..600)
        .filter(|n| n % 3 != 0)
        .map(|n| (n, page(n)))
        .collect();
    let batch: Vec<_> = pages.iter().map(|(n, page)| (*n, &page[..])).collect();
    put(&*store, &batch);
    let asked: Vec<u64> = (0..600).rev().chain([5, 6, 5]).collect();
    for (answer, n) in get(&*store, &asked).into_iter().zip(&asked) {
        assert_eq!(answer, (n % 3 != 0).then(|| page(*n)), "chunk {n}");
    }
    put(&*store, &[]);
    remove(&*store, &[]);
    assert_eq!(get(&*store, &[]), []);
    store.flush().expect("flush");
    store.flush().expect("flush");
    assert_eq!(get(&*store, &[1]), [Some(page(1))]);
}

/// Zeros that were put are there; what was not put is not.
pub fn missing_is_not_zero(make: Make<'_>) {
    let store = make(ChunkSize::PAGE, 10 * PAGE);
    assert_eq!(present(&*store, 0, 10), [0_u64; 0]);
    put(&*store, &[(3, &[0; 4096])]);
    assert_eq!(get(&*store, &[2, 3]), [None, Some(vec![0; 4096])]);
    assert_eq!(present(&*store, 0, 10), [3]);
    assert_eq!(present(&*store, 4, u64::MAX), [0_u64; 0]);
    assert_eq!(present(&*store, 100, 5), [0_u64; 0]);
}

/// `InvalidInput`, and what was there stays.
pub fn a_chunk_of_another_length_is_refused(make: Make<'_>) {
    let store = make(ChunkSize::PAGE, 2 * PAGE + 100);
    put(&*store, &[(0, &[1; 4096]), (2, &[1; 100])]);
    for (chunk, len) in [(0, 4095), (0, 4097), (0, 0), (2, 4096), (2, 99), (1, 100)] {
        let refused = store.put(&[(ChunkIndex(chunk), &vec![2; len])]);
        let error = refused.expect_err("a chunk of another length");
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{error}");
    }
    assert_eq!(
        get(&*store, &[0, 1, 2]),
        [Some(vec![1; 4096]), None, Some(vec![1; 100])]
    );
}

/// Neither read nor written nor removed.
pub fn a_chunk_that_does_not_exist_is_refused(make: Make<'_>) {
    let store = make(ChunkSize::PAGE, 2 * PAGE + 100);
    for chunk in [3, 4, u64::MAX].map(ChunkIndex) {
        let got = store.get(&[chunk], &mut |_, _| panic!("there is no such chunk"));
        let error = got.expect_err("there is no such chunk");
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{error}");
        assert!(store.put(&[(chunk, &[1; 4096])]).is_err());
    }
    assert_eq!(present(&*store, 0, u64::MAX), [0_u64; 0]);
}

/// Also where it is the only one.
pub fn a_short_last_chunk_is_as_short_as_it_is(make: Make<'_>) {
    let large = ChunkSize::new(64 << 10).expect("a power of two");
    for len in [1, 100, 65_535, 65_537, 3 * 65_536] {
        let store = make(large, len);
        let last = (len - 1) / 65_536;
        let short = vec![7; usize::try_from(len - last * 65_536).expect("short")];
        put(&*store, &[(last, &short)]);
        assert_eq!(get(&*store, &[last]), [Some(short)], "length {len}");
        assert_eq!(present(&*store, 0, u64::MAX), [last]);
    }
}

/// Twice, too, and it can be put again.
pub fn what_is_removed_is_missing(make: Make<'_>) {
    let store = make(ChunkSize::PAGE, 10 * PAGE);
    put(
        &*store,
        &[(1, &[1; 4096]), (2, &[2; 4096]), (3, &[3; 4096])],
    );
    remove(&*store, &[1, 3, 5]);
    remove(&*store, &[1]);
    assert_eq!(get(&*store, &[1, 2, 3]), [None, Some(vec![2; 4096]), None]);
    assert_eq!(present(&*store, 0, 10), [2]);
    put(&*store, &[(1, &[4; 4096])]);
    store.flush().expect("flush");
    remove(&*store, &[2]);
    store.flush().expect("flush");
    assert_eq!(get(&*store, &[1, 2]), [Some(vec![4; 4096]), None]);
}

/// Operations by chance, each compared with what a map would do.
pub fn it_behaves_like_a_map(make: Make<'_>) {
    const CHUNKS: u64 = 40;
    let mut random = random();
    let len = CHUNKS * PAGE - 1000;
    let len_of = |chunk: u64| usize::try_from(PAGE.min(len - chunk * PAGE)).expect("a page");
    let store = make(ChunkSize::PAGE, len);
    let mut map: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
    for _ in 0..times(200) {
        let start = random.below(CHUNKS);
        let step = usize::try_from(1 + start % 3).expect("small");
        let mut batch: Vec<u64> = (start..CHUNKS).step_by(step).collect();
        batch.truncate(usize::try_from(random.below(9)).expect("few"));
        match random.below(4) {
            0 | 1 => {
                for &chunk in &batch {
                    let mut bytes = vec![0; len_of(chunk)];
                    random.fill(&mut bytes);
                    map.insert(chunk, bytes);
                }
                let batch: Vec<_> = batch.iter().map(|n| (*n, &map[n][..])).collect();
                put(&*store, &batch);
            }
            2 => {
                remove(&*store, &batch);
                map.retain(|chunk, _| !batch.contains(chunk));
            }
            _ => {
                let expected: Vec<_> = batch.iter().map(|n| map.get(n).cloned()).collect();
                assert_eq!(get(&*store, &batch), expected, "chunks {batch:?}");
                let inside = map.range(start..).map(|(&n, _)| n).collect::<Vec<_>>();
                assert_eq!(present(&*store, start, CHUNKS - start), inside);
            }
        }
    }
    store.flush().expect("flush");
    let all: Vec<u64> = (0..CHUNKS).collect();
    let expected: Vec<_> = all.iter().map(|n| map.get(n).cloned()).collect();
    assert_eq!(get(&*store, &all), expected);
}

/// Also while chunks are removed.
pub fn a_reader_sees_a_chunk_old_or_new_and_never_a_mixture(make: Make<'_>) {
    let store = make(ChunkSize::PAGE, 4 * PAGE);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            for round in 1..=times(200) {
                let byte = u8::try_from(round).expect("few rounds");
                put(&*store, &[(1, &[byte; 4096]), (2, &[byte; 4096])]);
                if round % 10 == 0 {
                    remove(&*store, &[1]);
                }
            }
            done.store(true, Ordering::Relaxed);
        });
        // The writer makes so many rounds and no more, so this ends.
        while !done.load(Ordering::Relaxed) {
            for bytes in get(&*store, &[1, 2]).into_iter().flatten() {
                assert_eq!(bytes.len(), 4096);
                assert!(bytes.iter().all(|&byte| byte == bytes[0]), "a mixture");
            }
            if cfg!(miri) {
                thread::yield_now();
            }
        }
    });
}

/// Makes a test of each promise, of the stores that `$make` makes: a `fn(ChunkSize, u64) -> Arc<dyn ChunkStore>`.
#[doc(hidden)]
#[macro_export]
macro_rules! chunk_store_conformance {
    ($make:expr) => {
        $crate::chunk::conformance::store_conformance!(
            $make =>
            a_batch_is_answered_chunk_by_chunk,
            missing_is_not_zero,
            a_chunk_of_another_length_is_refused,
            a_chunk_that_does_not_exist_is_refused,
            a_short_last_chunk_is_as_short_as_it_is,
            what_is_removed_is_missing,
            it_behaves_like_a_map,
            a_reader_sees_a_chunk_old_or_new_and_never_a_mixture,
        );
    };
    ($make:expr => $($promise:ident),* $(,)?) => {
        $(
            #[test]
            fn $promise() {
                $crate::chunk::conformance::store::$promise(&$make);
            }
        )*
    };
}
pub use chunk_store_conformance as store_conformance;
