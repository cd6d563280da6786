//! Many at once.

use super::*;

/// Bytes that one writer owns in a row: no multiple of anything, so that chunks have several owners.
const STRIPE: u64 = 1500;
const WRITERS: u64 = 4;

/// Writes and reads its own stripes at random, and knows what they hold.
fn write_and_read(mount: &Mount, writer: u64, seed: u64) -> Vec<u8> {
    let len = mount.managed.len();
    let mut model = mount.bytes.clone();
    let mut random = seed.wrapping_add(writer);
    let mut next = move |below: u64| {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % below
    };
    let stripes = len / STRIPE / WRITERS;
    for turn in 0..300_u64 {
        let start = (next(stripes) * WRITERS + writer) * STRIPE + next(STRIPE / 2);
        let count = 1 + next(STRIPE / 2);
        let at = usize::try_from(start).unwrap();
        let places = at..at + usize::try_from(count).unwrap();
        match next(4) {
            0 => {
                let mut buf = vec![0xEE; places.len()];
                if mount.managed.read_exact_at(&mut buf, start).is_ok() {
                    assert!(buf == model[places], "what was written is read");
                }
            }
            1 if mount.managed.zero(start..start + count).is_ok() => model[places].fill(0),
            2 if turn % 16 == 0 => drop(mount.managed.flush()),
            _ => {
                let byte = u8::try_from(next(255)).unwrap();
                let written = mount.managed.write_all_at(&vec![byte; places.len()], start);
                // It fails only if its chunk cannot be fetched, and then nothing of it is written.
                if written.is_ok() {
                    model[places].fill(byte);
                }
            }
        }
    }
    model
}

#[test]
fn writers_of_the_same_chunks_do_not_undo_each_other_whatever_the_remote_end_does() {
    for (chunk, seed) in [(4096, 1), (4096, 2), (32 << 10, 3), (32 << 10, 4)] {
        let options = ManagedOptions {
            chunk_size: ChunkSize::new(chunk).unwrap(),
            push: Push::Every(Duration::from_millis(1)),
            ..ManagedOptions::default()
        };
        let mount = mount_with(100 * STRIPE * WRITERS + 3, &options, |remote, _| {
            remote.add(Fault::error(io::ErrorKind::ConnectionReset).by_chance(1, 6, seed));
            remote.add(Fault::partly(2000, io::ErrorKind::BrokenPipe).by_chance(1, 9, !seed));
        });
        let models: Vec<Vec<u8>> = thread::scope(|scope| {
            let mount = &mount;
            let writers: Vec<_> = (0..WRITERS)
                .map(|writer| scope.spawn(move || write_and_read(mount, writer, seed)))
                .collect();
            writers
                .into_iter()
                .map(|writer| writer.join().unwrap())
                .collect()
        });
        mount.remote_faults.clear();
        mount.managed.close(LONG).unwrap();
        let saved = all_of(&*mount.remote).unwrap();
        for (at, &byte) in saved.iter().enumerate() {
            let owner = usize::try_from(at as u64 / STRIPE % WRITERS).unwrap();
            assert_eq!(
                byte, models[owner][at],
                "byte {at}, of writer {owner}, seed {seed}"
            );
        }
    }
}

/// What a mount adds to the first read of a page.
#[test]
#[ignore = "measurement"]
fn a_first_read_costs_little_more_than_the_remote_end() {
    const PAGES: u64 = 1 << 15;
    let (remote, _) = filled(PAGES * PAGE);
    let local = Arc::new(MemoryStorage::new(PAGES * PAGE));
    // Whatever the first touch of memory costs is not what is measured.
    local
        .write_all_at(&vec![1; usize::try_from(PAGES * PAGE).unwrap()], 0)
        .unwrap();
    let options = ManagedOptions {
        read_ahead: true,
        ..quiet()
    };
    let managed = Managed::open(remote.clone(), local, &options).unwrap();
    let time = |storage: &dyn Storage| {
        let before = Instant::now();
        let mut buf = [0; 4096];
        for page in 0..PAGES {
            storage
                .read_exact_at(&mut buf, page * 27_191 % PAGES * PAGE)
                .unwrap();
        }
        before.elapsed() / u32::try_from(PAGES).unwrap()
    };
    println!(
        "remote {:?}, first {:?}, again {:?}",
        time(&*remote),
        time(&managed),
        time(&managed)
    );
}
