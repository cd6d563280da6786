//! Guest RAM on a mapped file or device of ours, which moves live: a program that maps it through `vm-memory` and writes like a guest, tracked by the
//! writes that reach our storage.
#![allow(clippy::unwrap_used, reason = "a test may panic, helpers too")]

mod guest;

use std::fmt;
use std::io::{Read, Write};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use guest::Guest;
use memferry::backend::memfd_storage;
use memferry::chunk::{Caches, ChunkSize};
use memferry::frontend::nbd::{Device, DeviceOptions};
use memferry::frontend::{FuseFile, FuseOptions};
use memferry::migrate::{
    Budget, Leecher, PostCopy, Region, SeedOptions, SeedReport, Seeder, Verify,
};
use memferry::subject::{Description, Incoming, Outgoing, SubjectError};
use memferry::transport::{Listener, Pairing, Session};

const LEN: u64 = 16 << 20;
const LONG: Duration = Duration::from_secs(30);

/// A place where a guest may run: its RAM as a file or a device of this machine.
struct Host {
    region: Arc<Region>,
    ram: Arc<dyn Front>,
    /// The guest that runs here, if it does.
    guest: Arc<Mutex<Option<Guest>>>,
}

/// What shows a region to a program.
trait Front: Caches {
    fn path(&self) -> &Path;
}

impl Front for FuseFile {
    fn path(&self) -> &Path {
        self.path()
    }
}

impl Front for Device {
    fn path(&self) -> &Path {
        self.path()
    }
}

impl Host {
    fn new<F: Front + 'static>(region: Region, show: impl FnOnce(Arc<Region>) -> F) -> Self {
        let region = Arc::new(region);
        let ram = Arc::new(show(region.clone()));
        region.attach(ram.clone());
        Self {
            region,
            ram,
            guest: Arc::default(),
        }
    }

    /// Begins a guest, all of whose memory is zero.
    fn boot(&self) {
        let pages = usize::try_from(LEN / 4096).unwrap();
        let guest = Guest::start(self.ram.path(), &vec![0; pages]);
        *self.guest.lock().unwrap() = Some(guest);
    }

    fn with_guest<R>(&self, body: impl FnOnce(&mut Guest) -> R) -> R {
        body(self.guest.lock().unwrap().as_mut().expect("it runs here"))
    }

    fn subject(&self) -> Machine {
        Machine {
            guest: self.guest.clone(),
            ram: self.ram.clone(),
            stamps: Vec::new(),
        }
    }
}

/// A guest as a subject: how often it has written each page is the state of its devices.
struct Machine {
    guest: Arc<Mutex<Option<Guest>>>,
    ram: Arc<dyn Front>,
    stamps: Vec<u64>,
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Machine")
    }
}

const KIND: &str = "test guest";

impl Outgoing for Machine {
    fn describe(&self) -> Description {
        Description {
            kind: KIND.into(),
            attributes: Vec::new(),
        }
    }

    fn suspend(&mut self, _deadline: Instant) -> Result<(), SubjectError> {
        self.stamps = self.guest.lock().unwrap().as_mut().unwrap().suspend();
        Ok(())
    }

    fn save(&mut self, sink: &mut dyn Write, _deadline: Instant) -> Result<(), SubjectError> {
        let state: Vec<u8> = self.stamps.iter().flat_map(|n| n.to_le_bytes()).collect();
        sink.write_all(&state)
            .map_err(|error| SubjectError::because("cannot write the state", error))
    }

    fn resume(&mut self, _deadline: Instant) -> Result<(), SubjectError> {
        self.guest.lock().unwrap().as_mut().unwrap().resume();
        Ok(())
    }

    fn release(&mut self) {
        *self.guest.lock().unwrap() = None;
    }
}

impl Incoming for Machine {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn accept(&self, _source: &Description) -> Result<(), SubjectError> {
        Ok(())
    }

    fn load(
        &mut self,
        state: &mut (dyn Read + Send),
        _deadline: Instant,
    ) -> Result<(), SubjectError> {
        let mut bytes = Vec::new();
        state.read_to_end(&mut bytes).unwrap();
        let numbers = bytes.as_chunks::<8>().0.iter();
        self.stamps = numbers.map(|number| u64::from_le_bytes(*number)).collect();
        Ok(())
    }

    fn resume(&mut self, _deadline: Instant) -> Result<(), SubjectError> {
        *self.guest.lock().unwrap() = Some(Guest::start(self.ram.path(), &self.stamps));
        Ok(())
    }
}

/// Moves the guest, which never stops for longer than the hand-over takes.
fn ferry(from: &Host, to: &Host, post_copy: PostCopy) -> SeedReport {
    let listener = Listener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let pairing = Pairing::new(listener.local_addr().unwrap().to_string()).unwrap();
    let silence = Duration::from_secs(10);
    let (here, there) = std::thread::scope(|scope| {
        let there = scope.spawn(|| listener.accept(&pairing, silence, LONG, || true, |_, _| {}));
        let here = Session::connect(&pairing, 2, silence, Instant::now() + LONG).unwrap();
        (here, there.join().unwrap().unwrap())
    });
    let options = SeedOptions {
        budget: Budget {
            post_copy,
            ..Budget::default()
        },
        verify: Verify::After,
        ..SeedOptions::default()
    };
    let seeding = Seeder::new([("ram", from.region.clone())])
        .options(options)
        .subject(from.subject());
    let seeding = seeding.open(here).unwrap();
    let leeching = Leecher::new([("ram", to.region.clone())]).subject(to.subject());
    let finalized = leeching.open(there).unwrap().finalize().unwrap();
    to.with_guest(Guest::assert_writes_on);
    finalized.release().unwrap();
    let report = seeding.released().unwrap().close().unwrap();
    assert_eq!(report.verified.unwrap().different, 0);
    to.with_guest(|guest| {
        guest.assert_writes_on();
        guest.assert_memory_is_right();
    });
    assert!(from.guest.lock().unwrap().is_none(), "it runs twice");
    report
}

/// There and back, twice: what a front end has cached of the first stay must not be seen in the second.
fn there_and_back(a: &Host, b: &Host) {
    a.boot();
    a.with_guest(Guest::assert_writes_on);
    for post_copy in [PostCopy::Always, PostCopy::Auto] {
        for (from, to) in [(a, b), (b, a)] {
            let report = ferry(from, to, post_copy);
            println!(
                "{post_copy:?}: {:.1} ms without a guest, {} bytes on the wire, {} kept, {} rounds, {} faults",
                report.blackout * 1000.0,
                report.traffic.wire_bytes,
                report.traffic.kept_bytes,
                report.rounds,
                report.faults
            );
        }
    }
}

#[test]
#[ignore = "privileged: needs root and /dev/fuse"]
fn guest_ram_on_a_mapped_file_moves_live_and_comes_back() {
    let places = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let show = |place: &Path| {
        let place = place.to_owned();
        move |region: Arc<Region>| FuseFile::mount(region, &place, &FuseOptions::default()).unwrap()
    };
    let local = || Arc::new(memfd_storage("guest-ram", LEN).unwrap());
    let a = Region::new(local(), ChunkSize::PAGE).unwrap();
    let a = Host::new(a, show(places[0].path()));
    let b = Region::empty(local(), ChunkSize::PAGE).unwrap();
    let b = Host::new(b, show(places[1].path()));
    there_and_back(&a, &b);
}

#[test]
#[ignore = "kernel: needs nbd"]
fn guest_ram_on_a_mapped_device_moves_live_and_comes_back() {
    let host = || {
        let local = Arc::new(memfd_storage("guest-ram", LEN).unwrap());
        let region = Region::new(local, ChunkSize::PAGE).unwrap();
        Host::new(region, |region| {
            Device::attach(region, &DeviceOptions::default()).unwrap()
        })
    };
    let (a, b) = (host(), host());
    // The kernel has looked for partitions.
    b.region.vacate().unwrap();
    there_and_back(&a, &b);
}
