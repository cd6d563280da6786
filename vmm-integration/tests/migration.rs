//! A guest from one VMM to another by one call at each end. The vCPU is a thread, so this runs everywhere.
#![allow(clippy::unwrap_used, reason = "a test may panic, helpers too")]

use std::fmt;
use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use memferry::chunk::ChunkSize;
use memferry::dirty::{Digest, DirtyTracker};
use memferry::migrate::{
    Budget, LeechError, LeechOutcome, Micros, PostCopy, SeedError, SeedOptions, SeedOutcome,
};
use memferry::transport::{Listener, Pairing, Session};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap, GuestRegionMmap,
};
use vmm_integration::{
    Arrival, ArrivingRam, Departure, GuestRam, RamBuilder, Throttle, Vmm, VmmError,
};

type Memory = GuestMemoryMmap<AtomicBitmap>;

const LEN: u64 = 16 << 20;
const PAGE: u64 = 4096;
const PAGES: u64 = LEN / PAGE;
const LONG: Duration = Duration::from_secs(20);

/// A VMM with one vCPU, which stamps pages in turn and finds the stamp of the last time there.
struct Machine {
    memory: Arc<Memory>,
    vcpu: Option<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
    /// Pages written in the guest's whole life: the state of the vCPU.
    written: Arc<AtomicU64>,
    wrong: Arc<AtomicU64>,
    version: &'static str,
    /// How many pages a thousandth of a second it writes.
    pace: u64,
}

impl Machine {
    fn new() -> Self {
        Self {
            memory: Arc::new(RamBuilder::new(LEN).in_memory().unwrap()),
            vcpu: None,
            stop: Arc::default(),
            written: Arc::default(),
            wrong: Arc::default(),
            version: "1",
            pace: 50,
        }
    }

    fn run(&mut self) {
        if self.vcpu.is_some() {
            return;
        }
        self.stop.store(false, Ordering::Relaxed);
        let (memory, stop) = (Arc::clone(&self.memory), Arc::clone(&self.stop));
        let (written, wrong) = (Arc::clone(&self.written), Arc::clone(&self.wrong));
        let pace = self.pace;
        self.vcpu = Some(thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                for _ in 0..pace {
                    let now = written.load(Ordering::Relaxed);
                    // The first quarter is written all the time, the rest once.
                    let page = if now < PAGES { now } else { now % (PAGES / 4) };
                    let address = GuestAddress(page * PAGE + 8 * (page % 500));
                    let last: u64 = memory.read_obj(address).unwrap();
                    let expected = match now {
                        _ if now < PAGES => 0,
                        _ if now < PAGES + PAGES / 4 => page + 1,
                        _ => now + 1 - PAGES / 4,
                    };
                    wrong.fetch_add(u64::from(last != expected), Ordering::Relaxed);
                    memory.write_obj(now + 1, address).unwrap();
                    written.store(now + 1, Ordering::Relaxed);
                }
                thread::park_timeout(Duration::from_millis(1));
            }
        }));
    }

    fn await_pages(&self, more: u64) {
        let until = self.written.load(Ordering::Relaxed) + more;
        let deadline = Instant::now() + LONG;
        while self.written.load(Ordering::Relaxed) < until {
            assert!(Instant::now() < deadline, "the guest does not run");
            thread::park_timeout(Duration::from_millis(1));
        }
    }

    fn trackers(&self) -> Vec<Arc<dyn DirtyTracker>> {
        let rams = GuestRam::regions(&self.memory).into_iter();
        rams.map(|ram| Arc::new(Digest::new(Arc::new(ram), ChunkSize::PAGE)) as _)
            .collect()
    }

    fn departure(&self) -> Departure<Memory> {
        Departure::new(Arc::clone(&self.memory), self.trackers()).mapped_shared()
    }
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Machine")
    }
}

impl Vmm for Machine {
    fn kind(&self) -> &'static str {
        "threads"
    }

    fn facts(&self) -> Vec<(String, String)> {
        vec![("state version".to_owned(), self.version.to_owned())]
    }

    fn suspend(&mut self, _: Instant) -> Result<(), VmmError> {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(vcpu) = self.vcpu.take() {
            vcpu.thread().unpark();
            vcpu.join().unwrap();
        }
        Ok(())
    }

    fn save(&mut self, state: &mut dyn Write, _: Instant) -> Result<(), VmmError> {
        let written = self.written.load(Ordering::Relaxed);
        Ok(state.write_all(&written.to_le_bytes())?)
    }

    fn load(&mut self, state: &mut dyn Read, _: Instant) -> Result<(), VmmError> {
        let mut bytes = [0; 8];
        state.read_exact(&mut bytes)?;
        let written = u64::from_le_bytes(bytes);
        self.written.store(written, Ordering::Relaxed);
        Ok(())
    }

    fn resume(&mut self, _: Instant) -> Result<(), VmmError> {
        self.run();
        Ok(())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.suspend(Instant::now());
    }
}

/// Runs both ends.
fn migrate(
    departure: Departure<Memory>,
    source: &mut Machine,
    arrival: &Arrival<Memory>,
    destination: &mut Machine,
) -> (
    Result<SeedOutcome, SeedError>,
    Result<LeechOutcome, LeechError>,
) {
    let listener = Listener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let pairing = Pairing::new(listener.local_addr().unwrap().to_string()).unwrap();
    thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            let session = listener
                .accept(&pairing, LONG, LONG, || true, |_, _| {})
                .unwrap();
            arrival.run(&session, destination)
        });
        let session = Session::connect(&pairing, 2, LONG, Instant::now() + LONG).unwrap();
        let sent = departure.run(&session, source);
        (sent, receiving.join().unwrap())
    })
}

fn options(post_copy: PostCopy) -> SeedOptions {
    SeedOptions {
        budget: Budget {
            post_copy,
            // A busy machine may move 4 MiB in no less.
            downtime: Micros::from_millis(5000),
            ..Budget::default()
        },
        ..SeedOptions::default()
    }
}

fn moved(post_copy: PostCopy, arriving: fn(Arc<Memory>) -> ArrivingRam<Memory>) {
    let (mut source, mut destination) = (Machine::new(), Machine::new());
    source.run();
    source.await_pages(PAGES + PAGES / 4);
    let departure = source.departure().options(options(post_copy));
    let arrival = Arrival::into_ram(arriving(Arc::clone(&destination.memory)));
    let (sent, received) = migrate(departure, &mut source, &arrival, &mut destination);
    let SeedOutcome::Moved(report) = sent.unwrap() else {
        panic!("it was no dry run");
    };
    assert!(matches!(received.unwrap(), LeechOutcome::Moved(_)));
    assert_eq!(report.post_copy, post_copy == PostCopy::Always);
    let verdict = report.verified.unwrap();
    assert_eq!((verdict.compared > 0, verdict.different), (true, 0));
    assert!(source.vcpu.is_none(), "it never runs at the source again");
    // Once around, so that every stamp is looked at.
    destination.await_pages(PAGES);
    assert_eq!(destination.wrong.load(Ordering::Relaxed), 0);
}

#[test]
fn a_guest_moves_without_a_privilege() {
    moved(PostCopy::Never, |memory| {
        ArrivingRam::without_faults(memory).unwrap()
    });
}

#[test]
#[ignore = "privileged: needs CAP_SYS_PTRACE (userfaultfd that sees the kernel's faults)"]
fn a_guest_runs_at_the_destination_before_its_memory_is_there() {
    moved(PostCopy::Always, |memory| ArrivingRam::new(memory).unwrap());
}

/// A migration that is given up, and for which reason; the guest runs on.
fn given_up(departure: Departure<Memory>, source: &mut Machine, version: &'static str) -> String {
    let mut destination = Machine::new();
    destination.version = version;
    let ram = ArrivingRam::without_faults(Arc::clone(&destination.memory)).unwrap();
    let arrival = Arrival::into_ram(ram);
    let (sent, received) = migrate(departure, source, &arrival, &mut destination);
    assert!(matches!(received, Err(LeechError::Aborted { .. })));
    source.await_pages(PAGES);
    assert_eq!(source.wrong.load(Ordering::Relaxed), 0);
    assert!(destination.vcpu.is_none());
    match sent {
        Err(SeedError::Aborted { cause }) => cause.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_vmm_whose_state_is_of_another_version_is_refused_and_the_guest_runs_on() {
    let mut source = Machine::new();
    source.run();
    let departure = source.departure();
    let reason = given_up(departure, &mut source, "2");
    assert!(reason.contains("state version is 1"), "{reason}");
}

#[test]
fn memory_that_is_plugged_in_ends_the_migration_and_the_guest_runs_on() {
    let mut source = Machine::new();
    source.run();
    let space = GuestMemoryAtomic::new((*source.memory).clone());
    let departure = source.departure().in_space(space.clone());
    let more = GuestRegionMmap::from_range(GuestAddress(1 << 32), 4096, None).unwrap();
    let grown = space.memory().insert_region(Arc::new(more)).unwrap();
    space.lock().unwrap().replace(grown);
    let reason = given_up(departure, &mut source, "1");
    assert!(reason.contains("plugged"), "{reason}");
}

#[test]
fn a_guest_that_writes_faster_than_the_link_moves_is_slowed_down_until_it_can_move() {
    let mut source = Machine::new();
    source.pace = 200;
    source.run();
    source.await_pages(PAGES + PAGES / 4);
    let mut options = options(PostCopy::Never);
    // Some 4 MiB are dirty all the time.
    options.bandwidth = Some(8 << 20);
    options.budget.downtime = Micros::from_millis(100);
    options.budget.rounds = 60;
    let seen = Arc::new(Mutex::new(Vec::new()));
    let noted = Arc::clone(&seen);
    let departure = source.departure().options(options);
    let departure =
        departure.throttling(move |policy| noted.lock().unwrap().push(policy.throttle()));
    let mut destination = Machine::new();
    let ram = ArrivingRam::without_faults(Arc::clone(&destination.memory)).unwrap();
    let arrival = Arrival::into_ram(ram);
    // Nothing is really slowed down here: what is asked for grows until it is given up.
    let (sent, _) = migrate(departure, &mut source, &arrival, &mut destination);
    assert!(matches!(sent, Err(SeedError::Aborted { .. })), "{sent:?}");
    let seen = seen.lock().unwrap();
    let (last, before) = seen.split_last().unwrap();
    assert_eq!(*last, Throttle::NONE, "it is released at the end");
    assert!(!before.is_empty() && before.is_sorted() && before[0] > Throttle::NONE);
}
