//! Both ends of a mount: a server with a region in memory, the link to it, and what is mounted here.

use std::fs::{File, OpenOptions};
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use memferry::backend::MemoryStorage;
use memferry::backend::nbd::{NbdUrl, Remote, RemoteOptions};
use memferry::chunk::Storage;
use memferry::frontend::nbd::{Device, DeviceOptions, Export, Listener, Server, ServerOptions};
use memferry::frontend::{FuseFile, FuseOptions, Slice, SliceOptions};
use memferry::mount::{Managed, ManagedOptions};
use tempfile::TempDir;

use super::link::Shape;
use super::options::{FrontEnd, Way};
use super::pattern::Pattern;
use super::route::{By, Route};
use super::serial::Serial;

/// A region in the memory of this process, filled with a pattern.
pub(super) fn region(size: u64, pattern: Pattern) -> Result<Arc<MemoryStorage>> {
    let region = MemoryStorage::new(size);
    let mut buffer = vec![0; STEP];
    for (offset, count) in steps(size) {
        pattern.fill(&mut buffer[..count], offset);
        region.write_all_at(&buffer[..count], offset)?;
    }
    Ok(Arc::new(region))
}

/// Pieces in which everything is read, written and compared: as a program would that is not in a hurry.
pub(super) const STEP: usize = 1 << 20;

/// Offsets and lengths of a region's pieces, in order.
pub(super) fn steps(size: u64) -> impl Iterator<Item = (u64, usize)> {
    let step = STEP as u64;
    (0..size.div_ceil(step)).map(move |index| {
        let offset = index * step;
        let count = usize::try_from(step.min(size - offset)).unwrap_or(STEP);
        (offset, count)
    })
}

/// A server and the link to it.
#[derive(Debug)]
pub(super) struct Far {
    server: Server,
    route: Route,
}

const EXPORT: &str = "region";
/// For what a server still has to answer when nobody listens any more.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(5);

impl Far {
    /// Serves a region; without a shape, next door.
    pub(super) fn serve(region: Arc<dyn Storage>, shape: Option<Shape>, by: By) -> Result<Self> {
        let server = Server::new(ServerOptions::default());
        server.add(Export::new(EXPORT, region)?)?;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?;
        server.listen(Listener::Tcp(listener))?;
        Ok(Self {
            server,
            route: Route::new(address, shape, by)?,
        })
    }

    /// The region as storage of this end.
    pub(super) fn connect(&self) -> Result<Remote> {
        let address = self.route.address();
        let url = NbdUrl::tcp(&address.ip().to_string(), address.port(), EXPORT)?;
        Ok(Remote::connect(&url, &RemoteOptions::default())?)
    }
}

impl Drop for Far {
    fn drop(&mut self) {
        let _cut_off = self.server.shutdown(Instant::now() + SHUTDOWN_LIMIT);
    }
}

/// A region that is mounted here.
#[derive(Debug)]
pub(super) struct Mounted {
    front_end: Front,
    managed: Option<Arc<Managed>>,
}

/// How the program sees it; what is a file is opened as programs do.
#[derive(Debug)]
enum Front {
    Fuse {
        file: File,
        mount: FuseFile,
        _place: TempDir,
    },
    Uffd(Slice),
    Nbd {
        file: File,
        device: Device,
    },
    Serial {
        file: File,
        device: Serial,
    },
}

/// For what was written and did not leave yet.
const CLOSE_LIMIT: Duration = Duration::from_secs(60);
/// What a device reads ahead, where nothing else does: as a file of ours, what 1 Gbit/s carries in a round trip of 30 ms.
pub(super) const READ_AHEAD: u64 = 4 << 20;

impl Mounted {
    /// Opens all of it: the connection, the mount, the file. Everything is as it is without options.
    pub(super) fn open(far: &Far, way: Way, front_end: FrontEnd) -> Result<Self> {
        let remote: Arc<dyn Storage> = Arc::new(far.connect()?);
        let managed = match way {
            Way::Direct => None,
            Way::Managed => {
                let local = Arc::new(MemoryStorage::new(remote.len()));
                let remote = Arc::clone(&remote);
                let options = ManagedOptions::default();
                Some(Arc::new(Managed::open(remote, local, &options)?))
            }
        };
        let storage = match &managed {
            None => remote,
            Some(managed) => Arc::clone(managed) as _,
        };
        Ok(Self {
            front_end: Front::open(storage, front_end)?,
            managed,
        })
    }

    pub(super) fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        match &self.front_end {
            Front::Fuse { file, .. } | Front::Nbd { file, .. } | Front::Serial { file, .. } => {
                file.read_exact_at(buf, offset)
            }
            Front::Uffd(slice) => slice.load(buf, offset),
        }
    }

    pub(super) fn write(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        match &self.front_end {
            Front::Fuse { file, .. } | Front::Nbd { file, .. } | Front::Serial { file, .. } => {
                file.write_all_at(buf, offset)
            }
            Front::Uffd(slice) => slice.write_all_at(buf, offset),
        }
    }

    /// Returns when the server has everything.
    pub(super) fn sync(&self) -> io::Result<()> {
        match &self.front_end {
            Front::Fuse { file, .. } | Front::Nbd { file, .. } | Front::Serial { file, .. } => {
                file.sync_all()
            }
            Front::Uffd(slice) => slice.sync(),
        }
    }

    pub(super) fn close(self) -> Result<()> {
        match self.front_end {
            Front::Fuse { file, mount, .. } => {
                drop(file);
                mount.unmount()?;
            }
            Front::Uffd(slice) => drop(slice),
            Front::Nbd { file, mut device } => {
                drop(file);
                device.detach(CLOSE_LIMIT)?;
            }
            Front::Serial { file, device } => {
                drop(file);
                drop(device);
            }
        }
        if let Some(managed) = self.managed {
            managed.close(CLOSE_LIMIT)?;
        }
        Ok(())
    }
}

impl Front {
    fn open(storage: Arc<dyn Storage>, front_end: FrontEnd) -> Result<Self> {
        match front_end {
            FrontEnd::Fuse => {
                let place = tempfile::tempdir()?;
                let mount = FuseFile::mount(storage, place.path(), &FuseOptions::default())?;
                Ok(Self::Fuse {
                    file: opened(mount.path())?,
                    mount,
                    _place: place,
                })
            }
            FrontEnd::Uffd => Ok(Self::Uffd(Slice::new(storage, &SliceOptions::default())?)),
            FrontEnd::Nbd => {
                let options = DeviceOptions {
                    read_ahead: Some(READ_AHEAD),
                    ..DeviceOptions::default()
                };
                let device = Device::attach(storage, &options)?;
                Ok(Self::Nbd {
                    file: opened(device.path())?,
                    device,
                })
            }
            FrontEnd::NbdSerial => {
                let device = Serial::attach(storage)?;
                device.read_ahead()?;
                Ok(Self::Serial {
                    file: device.open()?,
                    device,
                })
            }
        }
    }
}

fn opened(path: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .with_context(|| path.display().to_string())
}
