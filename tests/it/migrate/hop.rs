//! Regions, two ends of a session for them, and a move from one to the other.

use std::sync::Arc;
use std::time::{Duration, Instant};

use memferry::backend::MemoryStorage;
use memferry::chunk::{ChunkSize, Storage};
use memferry::migrate::{
    Budget, LeechReport, Leecher, PostCopy, Region, SeedOptions, SeedReport, Seeder, Standing,
    Verify,
};
use memferry::transport::{Listener, Pairing, Session};

use super::proxy::{Proxy, Trap};
use super::source::{LONG, scramble};

pub(crate) const PAGE: usize = 4096;
pub(crate) const MIB: u64 = 1 << 20;

/// Two ends of a session over loopback, the source's first; with a trap, over a network that breaks there.
pub(crate) fn sessions(trap: Option<Trap>) -> (Session, Session, Option<Proxy>) {
    let listener = Listener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let upstream = listener.local_addr().unwrap();
    let mut pairing = Pairing::new(upstream.to_string()).unwrap();
    let waiting = pairing.clone();
    let proxy = trap.map(|trap| Proxy::new(upstream, Some(trap)));
    if let Some(proxy) = &proxy {
        pairing.address = proxy.address().to_string();
    }
    let silence = Duration::from_secs(10);
    std::thread::scope(|scope| {
        let there = scope.spawn(|| {
            listener
                .accept(&waiting, silence, LONG, || true, |_, _| {})
                .unwrap()
        });
        let here = Session::connect(&pairing, 2, silence, Instant::now() + LONG).unwrap();
        (here, there.join().unwrap(), proxy)
    })
}

pub(crate) fn memory(len: u64) -> Arc<dyn Storage> {
    Arc::new(MemoryStorage::new(len))
}

pub(crate) fn owner(len: u64) -> Arc<Region> {
    Arc::new(Region::new(memory(len), ChunkSize::PAGE).unwrap())
}

pub(crate) fn empty(len: u64) -> Arc<Region> {
    Arc::new(Region::empty(memory(len), ChunkSize::PAGE).unwrap())
}

/// Fills a region with bytes without pattern.
pub(crate) fn fill(region: &Region, seed: u64) {
    let mut page = [0; PAGE];
    for number in 0..region.len().div_ceil(PAGE as u64) {
        for (index, word) in page.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            *word = scramble(seed << 40 ^ number << 12 ^ index as u64).to_le_bytes();
        }
        let len = (region.len() - number * PAGE as u64).min(PAGE as u64);
        let len = usize::try_from(len).unwrap();
        region
            .write_all_at(&page[..len], number * PAGE as u64)
            .unwrap();
    }
}

pub(crate) fn bytes(region: &Region) -> Vec<u8> {
    let mut all = vec![0; usize::try_from(region.len()).unwrap()];
    region.read_exact_at(&mut all, 0).unwrap();
    all
}

pub(crate) fn plan(post_copy: PostCopy) -> SeedOptions {
    SeedOptions {
        budget: Budget {
            post_copy,
            ..Budget::default()
        },
        verify: Verify::After,
        ..SeedOptions::default()
    }
}

/// Moves one region, and returns when all of it is there.
pub(crate) fn hop(
    from: &Arc<Region>,
    to: &Arc<Region>,
    options: SeedOptions,
) -> (SeedReport, LeechReport) {
    let (here, there, _) = sessions(None);
    let seeding = Seeder::new([("ram", from.clone())]).options(options);
    let seeding = seeding.open(here).unwrap();
    let leeching = Leecher::new([("ram", to.clone())]).open(there).unwrap();
    let finalized = leeching.finalize().unwrap();
    assert_ne!(from.standing(), Standing::Owner, "two owners");
    let there = finalized.release().unwrap();
    let here = seeding.released().unwrap().close().unwrap();
    assert_eq!(here.verified.map_or(0, |verdict| verdict.different), 0);
    assert_eq!(
        (from.standing(), to.standing()),
        (Standing::Moved, Standing::Owner)
    );
    (here, there)
}
