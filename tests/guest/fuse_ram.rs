//! An unmodified QEMU whose RAM is a region of ours, shown as a file: it moves as any program does that uses a region.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use memferry::backend::memfd_storage;
use memferry::chunk::{ChunkSize, Storage};
use memferry::frontend::{FuseFile, FuseOptions};
use memferry::migrate::{Budget, Leecher, PostCopy, Region, SeedOptions, Seeder, Standing, Verify};
use memferry::subject::qemu::{IncomingQemu, OutgoingQemu};
use memferry::transport::{Listener, Pairing, Session};
use tempfile::TempDir;

use crate::qemu::{COUNTER, Options, RAM, Vm, soon};

/// RAM of a guest.
struct Ram {
    region: Arc<Region>,
    file: Arc<FuseFile>,
    _place: TempDir,
}

impl Ram {
    fn new() -> Self {
        let place = tempfile::tempdir().unwrap();
        let local = Arc::new(memfd_storage("guest-ram", RAM).unwrap());
        let region = Arc::new(Region::new(local, ChunkSize::PAGE).unwrap());
        let options = FuseOptions {
            name: "ram".into(),
            ..FuseOptions::default()
        };
        let file = FuseFile::mount(region.clone(), place.path(), &options).unwrap();
        let file = Arc::new(file);
        region.attach(file.clone());
        Self {
            region,
            file,
            _place: place,
        }
    }

    fn path(&self) -> &Path {
        self.file.path()
    }

    fn qemu(&self, more: &[&str]) -> Vm {
        let backend = format!(
            "memory-backend-file,id=m0,size=64M,share=on,mem-path={}",
            self.path().display()
        );
        Vm::start(&Options {
            backend: &backend,
            more,
            ..Options::default()
        })
    }

    /// What the guest has counted to, as its host sees it.
    fn count(&self) -> u32 {
        let mut bytes = [0; 4];
        let ram = File::open(self.path()).unwrap();
        ram.read_exact_at(&mut bytes, COUNTER).unwrap();
        u32::from_le_bytes(bytes)
    }

    fn wait_until_it_counts(&self) -> u32 {
        let (from, deadline) = (self.count(), soon());
        while self.count() < from.saturating_add(5000) {
            assert!(Instant::now() < deadline, "the guest does not count");
            std::thread::yield_now();
        }
        self.count()
    }
}

fn moves(post_copy: PostCopy) {
    let (a, b) = (Ram::new(), Ram::new());
    let mut source = a.qemu(&[]);
    let mut destination = b.qemu(&["-incoming", "defer", "-S"]);
    let counted = a.wait_until_it_counts();
    let (qmp, machine) = source.inspected();
    let outgoing = OutgoingQemu::new(qmp, machine).unwrap();
    let (qmp, machine) = destination.inspected();
    let incoming = IncomingQemu::new(qmp, machine, soon()).unwrap();
    // It has written its firmware there.
    b.region.vacate().unwrap();

    let listener = Listener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let pairing = Pairing::new(listener.local_addr().unwrap().to_string()).unwrap();
    let (silence, patience) = (Duration::from_secs(10), Duration::from_secs(20));
    let (here, there) = std::thread::scope(|scope| {
        let there =
            scope.spawn(|| listener.accept(&pairing, silence, patience, || true, |_, _| {}));
        let here = Session::connect(&pairing, 2, silence, soon()).unwrap();
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
    let seeding = Seeder::new([("m0", a.region.clone())])
        .options(options)
        .subject(outgoing);
    let seeding = seeding.open(here).unwrap();
    let receiving = Leecher::new([("m0", b.region.clone())])
        .subject(incoming)
        .looking_while_loading()
        .open(there)
        .unwrap();
    let finalized = receiving.finalize().unwrap();
    let there = b.wait_until_it_counts();
    assert!(there >= counted, "{there} after {counted}");
    finalized.release().unwrap();
    let report = seeding.released().unwrap().close().unwrap();
    assert_eq!(report.verified.unwrap().different, 0);
    println!(
        "{post_copy:?}: {:.1} ms of blackout, {} bytes on the wire, {} faults",
        report.blackout * 1000.0,
        report.traffic.wire_bytes,
        report.faults
    );
    b.wait_until_it_counts();
    assert_eq!(
        (a.region.standing(), b.region.standing()),
        (Standing::Moved, Standing::Owner)
    );
    assert_eq!(a.region.len(), RAM);
    // Before their files go away.
    source.kill();
    destination.kill();
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_guest_whose_ram_is_a_mounted_region_moves() {
    moves(PostCopy::Never);
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_guest_whose_ram_is_a_mounted_region_moves_with_post_copy() {
    moves(PostCopy::Always);
}
