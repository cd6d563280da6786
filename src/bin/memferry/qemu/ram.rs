//! A QEMU guest's RAM: as regions to read and track, and as memory to fill.

use std::fs::File;
use std::sync::Arc;

use anyhow::Context;
use memferry::attach::{AttachError, Keep, Target};
use memferry::backend::FileStorage;
use memferry::chunk::{ChunkSize, Place, Storage};
use memferry::dirty::{Area, Digest, DirtyTracker, Discards, Union, WriteProtect};
use memferry::frontend::{FaultArea, FileRam, Watch};
use memferry::migrate::SourceRegion;
use memferry::subject::qemu::Machine;
use memferry::sys::pagemap::Pagemap;
use memferry::sys::uffd::{Features, Uffd};

/// The regions of a running guest, and how its writes are tracked.
pub(super) struct SourceRam {
    pub(super) regions: Vec<SourceRegion>,
    /// Why writes are found by reading all of the memory, if they are.
    pub(super) slow: Option<anyhow::Error>,
}

/// Opens the RAM of `machine` for sending. Attaches to QEMU for some microseconds; if that is not possible, the memory is
/// compared with itself instead, which is correct and slow.
pub(super) fn source(machine: &Machine, chunk_size: ChunkSize) -> anyhow::Result<SourceRam> {
    let files = open(machine)?;
    let target = Target::open(machine.pid);
    let mut slow = None;
    let mut regions = Vec::new();
    for (name, file) in files {
        let storage = Arc::new(FileStorage::new(file.try_clone()?)?);
        let tracked = match &target {
            Ok(target) => track(target, file, storage.len(), chunk_size),
            Err(error) => Err(anyhow::anyhow!("{error}")),
        };
        let tracker: Arc<dyn DirtyTracker> = match tracked {
            // The kernel does not count a page that the guest gives back as written.
            Ok(writes) => Arc::new(Union(writes, Discards::new(storage.clone(), chunk_size))),
            Err(error) => {
                slow.get_or_insert(error);
                Arc::new(Digest::new(storage.clone(), chunk_size))
            }
        };
        regions.push(SourceRegion {
            name,
            storage,
            tracker,
        });
    }
    Ok(SourceRam { regions, slow })
}

fn track(
    target: &Target,
    file: File,
    len: u64,
    chunk_size: ChunkSize,
) -> anyhow::Result<WriteProtect> {
    let areas = target
        .mappings_of(&file)?
        .into_iter()
        .filter(|mapping| mapping.shared)
        .map(|mapping| Area {
            address: mapping.address,
            offset: mapping.offset,
        })
        .collect();
    let stolen = target.userfaultfd(Keep::Close)?;
    let uffd = Uffd::adopt(stolen.fd, Features::TRACKING)?;
    let pagemap = Pagemap::open(target.pid())?;
    Ok(WriteProtect::new(uffd, pagemap, areas, len, chunk_size)?.sparse(file))
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
        memory: FileRam::new(files, watch).context("cannot map the guest's RAM")?,
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
        Some(Err(error)) => Err(std::io::Error::other(error)),
    };
    Ok(Watch {
        uffd: Uffd::adopt(stolen.fd, Features::MISSING_SHMEM)?,
        areas,
        release: Box::new(release),
    })
}

fn open(machine: &Machine) -> anyhow::Result<Vec<(String, File)>> {
    machine
        .backends
        .iter()
        .map(|backend| {
            let file = backend
                .open(machine.pid)
                .with_context(|| format!("cannot open the RAM of {}", backend.id))?;
            Ok((backend.id.clone(), file))
        })
        .collect()
}
