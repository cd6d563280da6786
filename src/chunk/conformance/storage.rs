//! What every [`Storage`] promises.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::thread;

use super::{random, times};
use crate::chunk::Storage;

/// Makes a storage of so many bytes, all zeros.
pub type Make<'a> = &'a dyn Fn(u64) -> Arc<dyn Storage>;

/// A promise, as a test of the storages that the given function makes.
pub type Promise = fn(Make<'_>);

/// Checks every promise, one after the other, and says which one it is at.
///
/// # Panics
/// If the storage breaks one.
pub fn run_all(make: Make<'_>) {
    let promises: [(&str, Promise); 11] = [
        ("zeros", what_was_never_written_reads_as_zeros),
        ("read back", what_is_written_is_read_back_at_any_place),
        (
            "beyond the end",
            a_range_beyond_the_end_is_refused_and_changes_nothing,
        ),
        ("nothing", an_empty_range_is_no_error),
        ("lengths", any_length_works_to_its_last_byte),
        (
            "zero",
            a_zeroed_range_reads_as_zeros_and_its_neighbours_do_not,
        ),
        ("data ranges", what_lies_outside_of_the_data_ranges_is_zeros),
        ("flush", flushing_changes_no_byte),
        ("array", it_behaves_like_an_array),
        (
            "neighbours",
            writers_of_neighbouring_bytes_do_not_undo_each_other,
        ),
        ("old or new", a_reader_sees_each_byte_old_or_new),
    ];
    for (name, promise) in promises {
        eprintln!("promise: {name}");
        promise(make);
    }
}

/// No multiple of anything, and of a few chunks of 64 KiB.
const LEN: u64 = 3 * (64 << 10) + 4096 + 77;
/// What no test writes: it is in buffers before they are read into.
const NEVER: u8 = 0xEE;

fn read(storage: &dyn Storage, range: Range<u64>) -> Vec<u8> {
    let mut buf = vec![NEVER; size(range.end - range.start)];
    storage
        .read_exact_at(&mut buf, range.start)
        .unwrap_or_else(|error| panic!("read {range:?}: {error}"));
    buf
}

fn write(storage: &dyn Storage, bytes: &[u8], offset: u64) {
    storage
        .write_all_at(bytes, offset)
        .unwrap_or_else(|error| panic!("write {} bytes at {offset}: {error}", bytes.len()));
}

fn zero(storage: &dyn Storage, range: Range<u64>) {
    let zeroed = storage.zero(range.clone());
    zeroed.unwrap_or_else(|error| panic!("zero {range:?}: {error}"));
}

fn size(count: u64) -> usize {
    usize::try_from(count).expect("what a test reads fits the memory")
}

/// Says where two runs of bytes part, which `assert_eq!` buries in megabytes.
fn assert_same(found: &[u8], expected: &[u8], offset: u64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    if found == expected {
        return;
    }
    let differs = found.iter().zip(expected).position(|(a, b)| a != b);
    if let Some(at) = differs {
        panic!(
            "{what}: byte {} is {:#04x} and should be {:#04x}",
            offset + at as u64,
            found[at],
            expected[at]
        );
    }
}

/// The buffer's own bytes never shine through, whatever is beside the range.
pub fn what_was_never_written_reads_as_zeros(make: Make<'_>) {
    let storage = make(LEN);
    let zeros = vec![0; size(LEN)];
    assert_same(&read(&*storage, 0..LEN), &zeros, 0, "nothing was written");
    write(&*storage, &[1; 10], 70_000);
    assert_same(&read(&*storage, 1..70_000), &zeros[1..70_000], 1, "before");
    assert_same(
        &read(&*storage, 70_010..LEN),
        &zeros[70_010..],
        70_010,
        "behind",
    );
    let mut buf = vec![NEVER; 100];
    storage.read_ahead_at(&mut buf, 5).expect("read ahead");
    assert_same(&buf, &zeros[..100], 5, "read ahead");
}

/// Aligned to nothing, across chunks, over what was there.
pub fn what_is_written_is_read_back_at_any_place(make: Make<'_>) {
    let storage = make(LEN);
    let mut random = random();
    for (offset, len) in [
        (0, 1),
        (0, 4096),
        (4095, 2),
        (65_535, 2),
        (65_536, 65_536),
        (60_000, 80_000),
        (1, 200_000),
        (LEN - 1, 1),
        (LEN - 5000, 5000),
        (0, LEN),
    ] {
        let mut bytes = vec![0; size(len)];
        random.fill(&mut bytes);
        write(&*storage, &bytes, offset);
        let what = format!("{len} bytes at {offset}");
        assert_same(
            &read(&*storage, offset..offset + len),
            &bytes,
            offset,
            &what,
        );
        let mut ahead = vec![NEVER; bytes.len()];
        storage
            .read_ahead_at(&mut ahead, offset)
            .expect("read ahead");
        assert_same(&ahead, &bytes, offset, "read ahead");
    }
}

/// `UnexpectedEof`, also where offset and length overflow; a write does not get as far as the end.
pub fn a_range_beyond_the_end_is_refused_and_changes_nothing(make: Make<'_>) {
    let refused = |result: io::Result<()>, what: &str| {
        let error = result.expect_err(what);
        assert_eq!(
            error.kind(),
            io::ErrorKind::UnexpectedEof,
            "{what}: {error}"
        );
    };
    for len in [LEN, 100, 65_536] {
        let storage = make(len);
        write(&*storage, &vec![7; size(len)], 0);
        for offset in [len - 1, len, len + 1, u64::MAX - 1, u64::MAX] {
            let what = format!("2 bytes at {offset} of {len}");
            refused(storage.read_exact_at(&mut [0; 2], offset), &what);
            refused(storage.read_ahead_at(&mut [0; 2], offset), &what);
            refused(storage.write_all_at(&[1; 2], offset), &what);
        }
        refused(storage.zero(len - 1..len + 1), "zero over the end");
        refused(storage.zero(len..u64::MAX), "zero beyond the end");
        #[expect(clippy::reversed_empty_ranges, reason = "that is the question")]
        let reversed = storage.zero(2..1);
        assert!(reversed.is_err(), "a range that ends before it starts");
        let bytes = read(&*storage, 0..len);
        assert_same(&bytes, &vec![7; size(len)], 0, "refused and done");
        assert_eq!(storage.len(), len);
    }
}

/// Nor does it change anything.
pub fn an_empty_range_is_no_error(make: Make<'_>) {
    let storage = make(LEN);
    for offset in [0, 100, LEN] {
        write(&*storage, &[], offset);
        zero(&*storage, offset..offset);
        assert_eq!(read(&*storage, offset..offset), [0_u8; 0]);
        assert_eq!(storage.data_ranges(offset..offset).expect("looks"), []);
    }
    assert!(!storage.is_empty());
    assert_same(
        &read(&*storage, 0..LEN),
        &vec![0; size(LEN)],
        0,
        "nothing was written",
    );
}

/// Shorter than a page, than a chunk; a multiple of neither; one byte more and less.
pub fn any_length_works_to_its_last_byte(make: Make<'_>) {
    for len in [1, 2, 511, 4095, 4096, 4097, 5000, 65_535, 65_537, 200_000] {
        let storage = make(len);
        assert_eq!(storage.len(), len);
        write(&*storage, &[9], len - 1);
        assert_eq!(read(&*storage, len - 1..len), [9], "length {len}");
        let all = vec![5; size(len)];
        write(&*storage, &all, 0);
        assert_same(&read(&*storage, 0..len), &all, 0, &format!("length {len}"));
        check_data(&*storage, &all, 0..u64::MAX);
        zero(&*storage, 0..len);
        let zeros = vec![0; size(len)];
        assert_same(&read(&*storage, 0..len), &zeros, 0, "zeroed whole");
    }
}

/// Whole pages and parts of them, data and holes.
pub fn a_zeroed_range_reads_as_zeros_and_its_neighbours_do_not(make: Make<'_>) {
    let storage = make(LEN);
    let mut expected = vec![3; size(LEN)];
    write(&*storage, &expected, 0);
    for range in [
        4096..8192,
        10_000..10_001,
        20_000..90_000,
        65_536..131_072,
        LEN - 100..LEN,
    ] {
        zero(&*storage, range.clone());
        expected[size(range.start)..size(range.end)].fill(0);
        let what = format!("{range:?} zeroed");
        assert_same(&read(&*storage, 0..LEN), &expected, 0, &what);
        check_data(&*storage, &expected, 0..LEN);
    }
    write(&*storage, &[4; 10], 65_540);
    expected[65_540..65_550].fill(4);
    assert_same(&read(&*storage, 0..LEN), &expected, 0, "written again");
    zero(&*storage, 0..LEN);
    assert_same(&read(&*storage, 0..LEN), &vec![0; size(LEN)], 0, "all");
}

/// In order, apart, cut to what was asked for; looking changes nothing.
pub fn what_lies_outside_of_the_data_ranges_is_zeros(make: Make<'_>) {
    let storage = make(LEN);
    let mut expected = vec![0; size(LEN)];
    for offset in [5000, 70_000, LEN - 1] {
        write(&*storage, &[1], offset);
        expected[size(offset)] = 1;
    }
    for within in [
        0..LEN,
        0..u64::MAX,
        0..5000,
        5000..5001,
        4999..70_001,
        70_001..LEN - 1,
        LEN - 1..LEN + 1,
        LEN..LEN + 100,
        u64::MAX - 1..u64::MAX,
    ] {
        check_data(&*storage, &expected, within);
    }
    assert_same(&read(&*storage, 0..LEN), &expected, 0, "looked at");
}

fn check_data(storage: &dyn Storage, bytes: &[u8], within: Range<u64>) {
    let found = storage.data_ranges(within.clone());
    let found = found.unwrap_or_else(|error| panic!("data in {within:?}: {error}"));
    let mut next = within.start;
    let end = within.end.min(bytes.len() as u64);
    for range in found.iter().chain([&(end.max(next)..end.max(next))]) {
        assert!(
            range.start >= next && range.end >= range.start && range.end <= end.max(next),
            "{found:?} of {within:?} of {} bytes",
            bytes.len()
        );
        let between = &bytes[size(next.min(end))..size(range.start.min(end))];
        let zeros = vec![0; between.len()];
        assert!(between == zeros, "data left out from {next} on: {found:?}");
        next = range.end;
    }
    assert!(found.iter().all(|range| !range.is_empty()), "{found:?}");
}

/// It may come at any time, twice, and with nothing written.
pub fn flushing_changes_no_byte(make: Make<'_>) {
    let storage = make(LEN);
    storage.flush().expect("flush");
    write(&*storage, &[1; 100], 65_500);
    storage.flush().expect("flush");
    storage.flush().expect("flush");
    assert_eq!(read(&*storage, 65_500..65_600), [1; 100]);
}

/// Operations by chance, each compared with what an array would do.
pub fn it_behaves_like_an_array(make: Make<'_>) {
    let mut random = random();
    for len in [LEN, 10_000, 64 << 10] {
        let storage = make(len);
        let mut array = vec![0; size(len)];
        for step in 0..times(300) {
            let offset = random.below(len + 1);
            // Mostly short, as partial chunks are where it goes wrong.
            let longest = if random.below(4) == 0 { len } else { 6000 };
            let end = offset + random.below(longest.min(len - offset) + 1);
            let range = size(offset)..size(end);
            let what = format!("step {step}, {offset}..{end} of {len}");
            match random.below(6) {
                0 | 1 => {
                    random.fill(&mut array[range.clone()]);
                    write(&*storage, &array[range], offset);
                }
                2 => {
                    array[range].fill(0);
                    zero(&*storage, offset..end);
                }
                3 => check_data(&*storage, &array, offset..end),
                4 => {
                    let mut buf = vec![NEVER; range.len()];
                    storage.read_ahead_at(&mut buf, offset).expect(&what);
                    assert_same(&buf, &array[range], offset, &what);
                }
                _ => assert_same(&read(&*storage, offset..end), &array[range], offset, &what),
            }
        }
        storage.flush().expect("flush");
        assert_same(&read(&*storage, 0..len), &array, 0, "in the end");
        check_data(&*storage, &array, 0..len);
    }
}

/// Threads write ranges that share chunks, and none of them loses a byte; what one has written, it reads.
pub fn writers_of_neighbouring_bytes_do_not_undo_each_other(make: Make<'_>) {
    /// Short enough that a page has bytes of all, and no divisor of one.
    const STRIPE: u64 = 700;
    const WRITERS: u64 = 4;
    let len = if cfg!(miri) { 10_000 } else { 150_000 };
    let storage = make(len);
    let stripes = move |writer: u64| {
        let starts = (0..len.div_ceil(STRIPE)).filter(move |n| n % WRITERS == writer);
        starts.map(move |n| n * STRIPE..len.min((n + 1) * STRIPE))
    };
    thread::scope(|scope| {
        for writer in 0..WRITERS {
            let storage = &*storage;
            scope.spawn(move || {
                for round in 0..3 {
                    for stripe in stripes(writer) {
                        let byte = 1 + u8::try_from(writer * 3 + round).expect("few writers");
                        let bytes = vec![byte; size(stripe.end - stripe.start)];
                        if round == 1 {
                            zero(storage, stripe.clone());
                        }
                        write(storage, &bytes, stripe.start);
                        let found = read(storage, stripe.clone());
                        assert_same(&found, &bytes, stripe.start, "what was just written");
                    }
                }
            });
        }
    });
    for writer in 0..WRITERS {
        for stripe in stripes(writer) {
            let byte = 1 + u8::try_from(writer * 3 + 2).expect("few writers");
            let expected = vec![byte; size(stripe.end - stripe.start)];
            let found = read(&*storage, stripe.clone());
            assert_same(&found, &expected, stripe.start, "in the end");
        }
    }
}

/// While it is written, and afterwards new.
pub fn a_reader_sees_each_byte_old_or_new(make: Make<'_>) {
    let storage = make(LEN);
    let range = 60_000..if cfg!(miri) { 67_000 } else { 75_000 };
    let bytes = |round: u8| vec![round; size(range.end - range.start)];
    write(&*storage, &bytes(1), range.start);
    for round in 2..2 + u8::try_from(times(40)).expect("few rounds") {
        thread::scope(|scope| {
            let readers = [(); 2].map(|()| {
                scope.spawn(|| {
                    for _ in 0..3 {
                        let mut found = read(&*storage, range.clone());
                        found.retain(|&byte| byte != round && byte != round - 1);
                        assert_eq!(found, [0_u8; 0], "round {round}");
                    }
                })
            });
            write(&*storage, &bytes(round), range.start);
            let found = read(&*storage, range.clone());
            assert_same(&found, &bytes(round), range.start, "after the write");
            for reader in readers {
                reader.join().expect("the reader saw old or new");
            }
        });
    }
}

/// Makes a test of each promise, of the storages that `$make` makes: a `fn(u64) -> Arc<dyn Storage>`.
#[doc(hidden)]
#[macro_export]
macro_rules! chunk_storage_conformance {
    ($make:expr) => {
        $crate::chunk::conformance::storage_conformance!(
            $make =>
            what_was_never_written_reads_as_zeros,
            what_is_written_is_read_back_at_any_place,
            a_range_beyond_the_end_is_refused_and_changes_nothing,
            an_empty_range_is_no_error,
            any_length_works_to_its_last_byte,
            a_zeroed_range_reads_as_zeros_and_its_neighbours_do_not,
            what_lies_outside_of_the_data_ranges_is_zeros,
            flushing_changes_no_byte,
            it_behaves_like_an_array,
            writers_of_neighbouring_bytes_do_not_undo_each_other,
            a_reader_sees_each_byte_old_or_new,
        );
    };
    ($make:expr => $($promise:ident),* $(,)?) => {
        $(
            #[test]
            fn $promise() {
                $crate::chunk::conformance::storage::$promise(&$make);
            }
        )*
    };
}
pub use chunk_storage_conformance as storage_conformance;
