//! Against an array, in random order, with random faults.

use proptest::prelude::*;

use super::*;

#[derive(Debug, Clone)]
enum Step {
    Read(u64, u64),
    Write(u64, u64, u8),
    Zero(u64, u64),
    Flush,
    Sick,
    Well,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let len = prop_oneof![1..100_u64, 4000..4200_u64, 1..70_000_u64];
    let step = prop_oneof![
        4 => (any::<u64>(), len.clone()).prop_map(|(at, len)| Step::Read(at, len)),
        4 => (any::<u64>(), len.clone(), any::<u8>()).prop_map(|(at, len, byte)| Step::Write(at, len, byte)),
        1 => (any::<u64>(), len).prop_map(|(at, len)| Step::Zero(at, len)),
        2 => Just(Step::Flush),
        1 => Just(Step::Sick),
        1 => Just(Step::Well),
    ];
    proptest::collection::vec(step, 1..50)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever the remote end does: what is read is right, and what was flushed is there.
    #[test]
    fn it_is_an_array_and_what_was_flushed_is_saved(len in 1..300_000_u64, big in any::<bool>(), seed in any::<u64>(), steps in steps()) {
        let options = ManagedOptions {
            chunk_size: ChunkSize::new(if big { 32 << 10 } else { 4096 }).unwrap(),
            push: Push::Every(Duration::from_millis(1)),
            ..ManagedOptions::default()
        };
        let mount = mount(len, &options);
        let mut model = mount.bytes.clone();
        let fit = |at: u64, count: u64| {
            let start = at % len;
            start..(start + count).min(len)
        };
        let places = |range: &Range<u64>| usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
        for step in steps {
            match step {
                Step::Read(at, count) => {
                    let range = fit(at, count);
                    let mut buf = vec![0xEE; places(&range).len()];
                    if mount.managed.read_exact_at(&mut buf, range.start).is_ok() {
                        prop_assert!(buf == model[places(&range)]);
                    }
                }
                Step::Write(at, count, byte) => {
                    let range = fit(at, count);
                    let bytes = vec![byte; places(&range).len()];
                    // A write fails only before it has changed anything: its chunk cannot be fetched.
                    if mount.managed.write_all_at(&bytes, range.start).is_ok() {
                        model[places(&range)].fill(byte);
                    }
                }
                Step::Zero(at, count) => {
                    let range = fit(at, count);
                    if mount.managed.zero(range.clone()).is_ok() {
                        model[places(&range)].fill(0);
                    }
                }
                Step::Flush => {
                    if mount.managed.flush().is_ok() {
                        let saved = all_of(&*mount.remote).unwrap();
                        prop_assert!(saved == model);
                    }
                }
                Step::Sick => {
                    mount.remote_faults.add(Fault::error(io::ErrorKind::ConnectionReset).by_chance(1, 3, seed));
                    mount.remote_faults.add(Fault::partly(3000, io::ErrorKind::BrokenPipe).by_chance(1, 5, !seed));
                }
                Step::Well => mount.remote_faults.clear(),
            }
        }
        mount.remote_faults.clear();
        mount.managed.close(LONG).unwrap();
        prop_assert!(all_of(&*mount.remote).unwrap() == model);
    }
}
