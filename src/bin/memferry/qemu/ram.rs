//! A QEMU guest's RAM: as regions to read and track, and as memory to fill.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use anyhow::{Context, ensure};
use memferry::attach::{AttachError, Keep, Target};
use memferry::backend::FileStorage;
use memferry::chunk::{ChunkSize, Place, Storage};
use memferry::dirty::{Area, Digest, DirtyTracker, Discards, Halt, SoftDirty, WriteProtect};
use memferry::frontend::{FaultArea, FileRam, Watch};
use memferry::migrate::SourceRegion;
use memferry::subject::qemu::Machine;
use memferry::sys::pagemap::Pagemap;
use memferry::sys::uffd::{Features, Mode, Uffd};

/// The regions of a running guest, and how its writes are tracked.
pub(super) struct SourceRam {
    pub(super) regions: Vec<SourceRegion>,
    /// What is said about the way its writes are tracked, if it is not the best one.
    pub(super) remark: Option<String>,
}

/// Opens the RAM of `machine` for sending, with the best tracker that this host has:
///
/// 1. write protection by a userfaultfd that QEMU is made to create (some microseconds of one thread);
/// 2. soft-dirty bits, where the kernel keeps them and there is one backend: every round halts QEMU for a moment;
/// 3. digests: reads all of the memory in every round.
pub(super) fn source(machine: &Machine, chunk_size: ChunkSize) -> anyhow::Result<SourceRam> {
    let files = open(machine)?;
    let alone = files.len() == 1;
    let target = Target::open(machine.pid).map(Arc::new);
    let mut remark = None;
    let mut regions = Vec::new();
    for (name, file) in files {
        let file_storage = Arc::new(FileStorage::new(file.try_clone()?)?);
        let mut storage: Arc<dyn Storage> = file_storage.clone();
        let ram = Ram {
            file,
            len: storage.len(),
            chunk_size,
        };
        // The kernel does not count a page that the guest gives back as written.
        let discards: Arc<dyn DirtyTracker> =
            Arc::new(Discards::new(file_storage.clone(), chunk_size));
        let protected = match &target {
            Ok(target) => ram.write_protect(target),
            Err(error) => Err(anyhow::anyhow!("{error}")),
        };
        let (tracker, late): (Arc<dyn DirtyTracker>, _) = match protected {
            Ok(writes) => (Arc::new(writes), Some(discards)),
            Err(error) => match &target {
                Ok(target) if alone && let Ok(writes) = ram.soft_dirty(target) => {
                    remark.get_or_insert_with(|| format!(
                        "tracking by soft-dirty bits, which halts QEMU for a moment in every round: {error:#}"
                    ));
                    (Arc::new(writes), Some(discards))
                }
                _ => {
                    remark.get_or_insert_with(|| format!(
                        "finding writes by reading all of the memory in every round, which is slow: {error:#}"
                    ));
                    let tracker = Arc::new(Digest::new(file_storage.clone(), chunk_size));
                    storage = tracker.observed();
                    (tracker, None)
                }
            },
        };
        regions.push(SourceRegion {
            name,
            storage,
            tracker,
            late,
        });
    }
    Ok(SourceRam { regions, remark })
}

/// One backend of the source.
struct Ram {
    file: File,
    len: u64,
    chunk_size: ChunkSize,
}

impl Ram {
    fn write_protect(&self, target: &Target) -> anyhow::Result<WriteProtect> {
        let areas = self.areas(target)?;
        let stolen = target.userfaultfd(Keep::Close)?;
        let uffd = Uffd::adopt(stolen.fd, Features::TRACKING)?;
        for area in &areas {
            probe(&uffd, &area.address, WRITES)?;
        }
        let pagemap = Pagemap::open(target.pid())?;
        let tracker = WriteProtect::new(uffd, pagemap, areas, self.len, self.chunk_size)?;
        Ok(tracker.sparse(self.file.try_clone()?))
    }

    fn soft_dirty(&self, target: &Arc<Target>) -> anyhow::Result<SoftDirty> {
        let halt = Box::new(Threads(Arc::clone(target)));
        let areas = self.areas(target)?;
        let tracker = SoftDirty::new(target.pid(), areas, self.len, self.chunk_size, halt)?;
        Ok(tracker)
    }

    fn areas(&self, target: &Target) -> anyhow::Result<Vec<Area>> {
        let areas = target
            .mappings_of(&self.file)?
            .into_iter()
            .filter(|mapping| mapping.shared)
            .map(|mapping| Area {
                address: mapping.address,
                offset: mapping.offset,
            })
            .collect();
        Ok(areas)
    }
}

/// The threads of a process, halted by tracing them.
#[derive(Debug)]
struct Threads(Arc<Target>);

impl Halt for Threads {
    fn halted(&self, work: &mut (dyn FnMut() -> io::Result<()> + Send)) -> io::Result<()> {
        self.0.halted(work)
    }
}

/// The RAM of a waiting QEMU, and why it cannot fault if it cannot.
pub(super) struct DestinationRam {
    pub(super) names: Vec<String>,
    pub(super) memory: FileRam,
    pub(super) no_post_copy: Option<anyhow::Error>,
}

/// Opens the RAM of `machine` for receiving. QEMU has to be one that waits for a migration: userfaultfds that an
/// earlier attempt left in it are closed.
pub(super) fn destination(machine: &Machine) -> anyhow::Result<DestinationRam> {
    let (names, files): (Vec<_>, Vec<_>) = open(machine)?.into_iter().unzip();
    let (watch, no_post_copy) = match watch(machine.pid, &files) {
        Ok(watch) => (Some(watch), None),
        Err(error) => (None, Some(error)),
    };
    Ok(DestinationRam {
        names,
        memory: FileRam::new(files, watch).context("cannot use the guest's RAM")?,
        no_post_copy,
    })
}

fn watch(pid: u32, files: &[File]) -> anyhow::Result<Watch> {
    let target = Target::open(pid)?;
    target.reclaim_userfaultfds()?;
    let mut areas = Vec::new();
    for (region, file) in files.iter().enumerate() {
        for mapping in target.mappings_of(file)? {
            areas.push(FaultArea {
                addresses: mapping.address,
                place: Place {
                    region,
                    offset: mapping.offset,
                },
            });
        }
    }
    let stolen = target.userfaultfd(Keep::Keep)?;
    let remote = stolen.remote;
    let release = move || match remote.map(|remote| target.close_remote(remote)) {
        None | Some(Ok(()) | Err(AttachError::Exited { .. })) => Ok(()),
        Some(Err(error)) => Err(io::Error::other(error)),
    };
    let uffd = Uffd::adopt(stolen.fd, Features::MISSING_SHMEM).and_then(|uffd| {
        for area in &areas {
            probe(&uffd, &area.addresses, ABSENT)?;
        }
        Ok(uffd)
    });
    match uffd {
        Ok(uffd) => Ok(Watch {
            uffd,
            areas,
            release: Box::new(release),
        }),
        Err(error) => {
            release()?;
            Err(error.into())
        }
    }
}

const WRITES: Mode = Mode {
    missing: false,
    wp: true,
    minor: false,
};
const ABSENT: Mode = Mode {
    missing: true,
    wp: false,
    minor: false,
};

/// Finds out now, while nothing depends on it, whether memory can be watched: that of an ordinary file cannot.
fn probe(uffd: &Uffd, addresses: &Range<u64>, mode: Mode) -> io::Result<()> {
    uffd.register(addresses.clone(), mode)
        .and_then(|()| uffd.unregister(addresses.clone()))
        .map_err(|error| {
            io::Error::new(
                error.kind(),
                format!("its RAM cannot be watched, is its file on tmpfs? ({error})"),
            )
        })
}

/// What statfs(2) says of hugetlbfs.
const HUGETLBFS: i64 = 0x958458f6;

fn open(machine: &Machine) -> anyhow::Result<Vec<(String, File)>> {
    machine
        .backends
        .iter()
        .map(|backend| {
            let file = backend
                .open(machine.pid)
                .with_context(|| format!("cannot open the RAM of {}", backend.id))?;
            ensure!(
                rustix::fs::fstatfs(&file)?.f_type != HUGETLBFS,
                "the RAM of {} is on hugetlbfs, whose pages memferry cannot move yet: use a file on tmpfs, for example below \
                 /dev/shm",
                backend.id
            );
            Ok((backend.id.clone(), file))
        })
        .collect()
}
