//! A workload that needs no QEMU: a process that writes, and checks, memory that it maps; migrated to another one.
//!
//! It is a migration like that of a guest: the writes are tracked from outside, what is missing is faulted in, and the
//! versions of the pages travel as device state. Only what runs is simpler.

mod worker;

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use memferry::attach::{Keep, Target};
use memferry::backend::FileStorage;
use memferry::chunk::{ChunkSize, Place, Storage};
use memferry::dirty::{Area, Digest, DirtyTracker, WriteProtect};
use memferry::frontend::{FaultArea, FileRam, Watch};
use memferry::migrate::{
    Cancel, LeechOptions, LeechOutcome, LeechReport, SeedOptions, SeedOutcome, SeedReport,
    SourceRegion, leech, seed,
};
use memferry::sys::memfd::memfd;
use memferry::sys::pagemap::Pagemap;
use memferry::sys::uffd::{Features, Uffd};
use memferry::transport::{Listener, Pairing, Session};

pub use worker::{Status, Worker, serve};

/// Names the file and the length of the memory that a process of this binary is to work on.
pub const MEMORY: &str = "MEMFERRY_EMBEDDED_MEMORY";

/// How long anything but the copying may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// How a migration of the embedded workload went.
#[derive(Debug)]
pub struct Moved {
    /// What the source tells.
    pub sent: SeedReport,
    /// What the destination tells.
    pub received: LeechReport,
    /// How long nobody worked, as the workload's own clock shows.
    pub blackout: Duration,
    /// What the workload says of itself at the destination.
    pub status: Status,
    /// Whether the process at the source stands still.
    pub source_stopped: bool,
    /// How the writes were tracked.
    pub tracking: &'static str,
    /// Whether what was missing could be faulted in.
    pub faults: bool,
}

/// Starts the workload on `len` bytes of memory in one process and migrates it to another one while it runs.
/// `program` is this binary, or one that calls [`serve`] when [`MEMORY`] is set.
///
/// # Errors
/// If a process cannot be started, or the migration fails.
pub fn run(program: impl Fn() -> Command, len: u64) -> Result<Moved> {
    let start = || -> Result<(Worker, File)> {
        let memory = memfd("memferry-embedded", len)?;
        let path = format!("/proc/{}/fd/{}", std::process::id(), memory.as_raw_fd());
        let mut program = program();
        program.env(MEMORY, format!("{path}:{len}"));
        Ok((Worker::start(&mut program)?, memory))
    };
    let (mut source, source_memory) = start()?;
    let (mut destination, destination_memory) = start()?;
    source.fill(Instant::now() + PATIENCE * 6)?;
    source.run()?;

    let (region, tracking) = region(source.pid(), &source_memory, len)?;
    let watch = watch(destination.pid(), &destination_memory);
    let faults = watch.is_ok();
    let ram = FileRam::new(vec![destination_memory], watch.ok())?;
    let listener = Listener::bind(([127, 0, 0, 1], 0).into())?;
    let pairing = Pairing::new(listener.local_addr()?.to_string())?;
    let (sent, received) = thread::scope(|scope| {
        let receiving = scope.spawn(|| -> Result<LeechReport> {
            let give_up = Instant::now() + PATIENCE;
            let waiting = || Instant::now() < give_up;
            let session = listener.accept(&pairing, PATIENCE, PATIENCE, waiting, |_, _| {})?;
            let options = LeechOptions::default();
            let names = ["memory".to_owned()];
            let cancel = Cancel::default();
            match leech(
                &session,
                &names,
                &ram,
                &mut destination,
                &options,
                None,
                &cancel,
            )? {
                LeechOutcome::Moved(report) => Ok(report),
                LeechOutcome::DryRun => Err(anyhow!("nobody asked for a dry run")),
            }
        });
        let sending = || -> Result<SeedReport> {
            let session = Session::connect(&pairing, 2, PATIENCE, Instant::now() + PATIENCE)?;
            let options = SeedOptions::default();
            let cancel = Cancel::default();
            match seed(&session, &[region], &mut source, &options, None, &cancel)? {
                SeedOutcome::Moved(report) => Ok(report),
                SeedOutcome::Forecast(_) => Err(anyhow!("nobody asked for a dry run")),
            }
        };
        let sent = sending();
        let received = receiving
            .join()
            .map_err(|_| anyhow!("the receiving side panicked"))?;
        Ok::<_, anyhow::Error>((sent?, received?))
    })?;
    let before = source.status()?;
    // Every page is looked at at least once more.
    let status = destination.await_clean_pass(Instant::now() + PATIENCE * 6)?;
    let after = source.status()?;
    ensure!(
        status.errors == 0,
        "the workload found {} wrong pages",
        status.errors
    );
    Ok(Moved {
        sent,
        received,
        blackout: Duration::from_nanos(status.blackout_nanos),
        status,
        source_stopped: before.ticks == after.ticks && !after.running,
        tracking,
        faults,
    })
}

/// The memory with the best tracker that this user may use, and what that is called.
fn region(pid: u32, memory: &File, len: u64) -> Result<(SourceRegion, &'static str)> {
    let storage = Arc::new(FileStorage::new(memory.try_clone()?)?);
    let protect = || -> Result<WriteProtect> {
        let target = Target::open(pid)?;
        let areas = target
            .mappings_of(memory)?
            .into_iter()
            .map(|mapping| Area {
                address: mapping.address,
                offset: mapping.offset,
            })
            .collect();
        let stolen = target.userfaultfd(Keep::Close)?;
        let uffd = Uffd::adopt(stolen.fd, Features::TRACKING)?;
        let pagemap = Pagemap::open(pid)?;
        Ok(WriteProtect::new(
            uffd,
            pagemap,
            areas,
            len,
            ChunkSize::PAGE,
        )?)
    };
    let region = |storage: Arc<dyn Storage>, tracker: Arc<dyn DirtyTracker>| SourceRegion {
        name: "memory".into(),
        storage,
        tracker,
        late: None,
    };
    Ok(match protect() {
        Ok(tracker) => (
            region(storage, Arc::new(tracker)),
            "write protection, attached from outside",
        ),
        Err(_) => {
            let tracker = Arc::new(Digest::new(storage, ChunkSize::PAGE));
            (
                region(tracker.observed(), tracker),
                "digests, since this user may not attach",
            )
        }
    })
}

fn watch(pid: u32, memory: &File) -> Result<Watch> {
    let target = Target::open(pid)?;
    let areas = target
        .mappings_of(memory)?
        .into_iter()
        .map(|mapping| FaultArea {
            addresses: mapping.address,
            place: Place {
                region: 0,
                offset: mapping.offset,
            },
        })
        .collect();
    let stolen = target.userfaultfd(Keep::Keep)?;
    let remote = stolen.remote.context("it was to be kept")?;
    Ok(Watch {
        uffd: Uffd::adopt(stolen.fd, Features::MISSING_SHMEM)?,
        areas,
        release: Box::new(move || target.close_remote(remote).map_err(io::Error::other)),
    })
}
