//! A region as a block device of this machine.
//!
//! ```text
//!  programs      the kernel                            this process
//! ┌────────┐    ┌──────────┐  sockets, one a queue   ┌──────────────┐
//! │ mount, │    │ /dev/    │◄───────────────────────►│ a thread for │──► Export ──► Storage
//! │ mmap,  │───►│  nbdN    │◄───────────────────────►│ each, workers│
//! │ read … │    └────▲─────┘                         └──────┬───────┘
//! └────────┘         │ connect, replace, disconnect         │ "mine has died"
//!                    └──────────── supervisor ◄─────────────┘
//! ```
//!
//! The kernel chooses the device, so nobody guesses which one is free. It belongs to this process: when that ends, however it does, the
//! device is disconnected, or, where somebody else has it open, answers with errors until he closes it.

mod error;
mod holders;
mod kernel;
mod list;
mod liveness;
mod options;
mod padded;
mod supervisor;
mod sysfs;
mod wait;

pub use error::{AttachError, DetachError};
pub use holders::Holder;
pub use list::{DeviceState, Force, FreeError, ListedDevice, devices, free};
pub use options::{Control, DeviceOptions, Readiness};

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{Advice, Mode, OFlags, major, minor};
use rustix::io::Errno;

use super::{Export, WorkerOptions, Workers};
use crate::chunk::{Caches, Storage};
use crate::nbd::TransmissionFlags;
use crate::sys::mapping::Mapping;
use crate::sys::reclaim::become_io_flusher;
use crate::sys::uevent::Uevents;
use kernel::Wanted;
use padded::Padded;
use supervisor::{Plan, Supervisor};
use sysfs::{Shown, Sysfs};

/// A region as `/dev/nbdN`, from attaching to detaching.
///
/// What is written to the device reaches the storage when the kernel writes its page cache back: at the latest on `fsync`, `msync`, or
/// [`detach`](Self::detach). Dropping a device saves what it can and disconnects it, and tells nobody whether that worked.
#[derive(Debug)]
pub struct Device {
    path: PathBuf,
    shown: Shown,
    number: (u32, u32),
    len: u64,
    /// What it was before, if we changed it.
    read_ahead: Option<u64>,
    supervisor: Supervisor,
    /// The first failure to save: the kernel tells it once, and forgets it.
    unsaved: Mutex<Option<String>>,
    /// Nothing once it is detached.
    file: Option<File>,
}

impl Device {
    /// Makes `storage` a block device. Blocks until it can be opened.
    ///
    /// Needs `CAP_SYS_ADMIN`, and better has `CAP_SYS_RESOURCE`: see [`is_safe_when_memory_is_short`](Self::is_safe_when_memory_is_short).
    ///
    /// # Errors
    /// [`AttachError`]; nothing is left of the attempt then.
    pub fn attach(storage: Arc<dyn Storage>, options: &DeviceOptions) -> Result<Self, AttachError> {
        let workers = Workers::new(&WorkerOptions {
            limit: options.limit(),
            in_flight: IN_FLIGHT,
            in_flight_each: IN_FLIGHT / 2,
            on_start: Some(Arc::new(|| {
                // Without the right to, the device works as long as there is memory.
                let _permitted = become_io_flusher();
            })),
            ..WorkerOptions::default()
        });
        Self::attach_with(storage, options, &workers)
    }

    /// As [`attach`](Self::attach), served by threads and with memory that are shared with others, whose limit on how long a storage may take
    /// goes before [`DeviceOptions::timeout`].
    ///
    /// # Errors
    /// As [`attach`](Self::attach).
    pub fn attach_with(
        storage: Arc<dyn Storage>,
        options: &DeviceOptions,
        workers: &Workers,
    ) -> Result<Self, AttachError> {
        if let Some(complaint) = options.complaint() {
            return Err(AttachError::Options(complaint));
        }
        let len = storage.len();
        let padded = Padded::new(storage, options.block_size).filter(|padded| !padded.is_empty());
        let padded = padded.ok_or(AttachError::Length(len))?;
        let size = padded.len();
        let export = Export::new("", Arc::new(padded)).expect("no name at all is a good one");
        let export = if options.read_only {
            export.read_only()
        } else {
            export
        };
        // The descriptor is lower than those of the sockets; the supervisor says why that matters.
        let mut place = OwnedFd::from(File::open("/dev/null").map_err(AttachError::Resources)?);
        let events = match options.readiness {
            Readiness::Poll => None,
            Readiness::Uevent => Some(Uevents::listen().map_err(AttachError::Resources)?),
        };
        let deadline = wait::within(options.attach_limit);
        let wanted = Wanted {
            size,
            flags: announced(&export).0,
            identifier: liveness::identifier(),
            options: options.clone(),
        };
        let plan = Plan {
            wanted: wanted.clone(),
            export,
            workers: workers.clone(),
            above: place.as_raw_fd(),
        };
        let supervisor = Supervisor::start(plan, options.attach_limit)?;
        let shown = Sysfs::default().device(supervisor.index);
        let path = sysfs::node(supervisor.index);
        await_ready(&shown, size, events.as_ref(), options, deadline)?;
        check_ours(&shown, &path, &wanted)?;
        let opened = open(&path, options, deadline)?;
        let number = check_node(&shown, &path, &opened)?;
        rustix::io::dup3(&opened, &mut place, rustix::io::DupFlags::CLOEXEC)
            .map_err(|errno| AttachError::Resources(errno.into()))?;
        drop(opened);
        supervisor.opened(deadline).map_err(AttachError::Connect)?;
        let mut read_ahead = None;
        if let Some(bytes) = options.read_ahead {
            read_ahead = shown.read_ahead().map_err(AttachError::Resources)?;
            shown
                .set_read_ahead(bytes)
                .map_err(AttachError::Resources)?;
        }
        Ok(Self {
            path,
            shown,
            number,
            len: size,
            read_ahead,
            supervisor,
            unsaved: Mutex::new(None),
            file: Some(File::from(place)),
        })
    }

    /// The node: `/dev/nbdN`.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The number in its name.
    #[must_use]
    pub fn index(&self) -> u32 {
        self.shown.index
    }

    /// Its length in bytes: that of the region, rounded up to whole blocks.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no bytes; never, since an empty region is not attached.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The device, open, until it is detached.
    ///
    /// # Panics
    /// If it is detached.
    #[must_use]
    pub fn file(&self) -> &File {
        self.file.as_ref().expect("the device is attached")
    }

    /// The whole device as memory, shared with everybody who reads or writes it. Counts as a use: drop it before detaching.
    ///
    /// # Errors
    /// What the kernel says; a read-only device cannot be mapped for writing.
    ///
    /// # Panics
    /// If it is detached.
    pub fn map(&self) -> io::Result<Mapping> {
        Mapping::new(self.file().try_clone()?, self.len)
    }

    /// How many of its connections are alive. One that has died is replaced.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.supervisor.connections()
    }

    /// Whether writing to it cannot stop for ever when memory runs short: the threads that serve it are marked for the kernel
    /// (`PR_SET_IO_FLUSHER`). Not so without `CAP_SYS_RESOURCE`. Threads of the storage's own have to do the same, with
    /// [`become_io_flusher`].
    #[must_use]
    pub fn is_safe_when_memory_is_short(&self) -> bool {
        self.supervisor.safe_when_memory_is_short
    }

    /// Writes everything that was written to the device into the storage, and has that flush.
    ///
    /// # Errors
    /// What the kernel says, which is EIO mostly. What could not be saved may be lost: the page cache forgets it. From then on every
    /// `sync`, and [`detach`](Self::detach), fails.
    ///
    /// # Panics
    /// If it is detached.
    pub fn sync(&self) -> io::Result<()> {
        // What is done under the lock leaves it right, whoever panics.
        let mut unsaved = self.unsaved.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(first) = &*unsaved {
            return Err(io::Error::other(first.clone()));
        }
        self.file()
            .sync_all()
            .inspect_err(|error| *unsaved = Some(error.to_string()))
    }

    /// Saves what was written, disconnects the device, and waits until it is free.
    ///
    /// While somebody else uses it this waits for him, for as long as `limit` allows: udev, for example, looks into devices when they change.
    /// Saving takes as long as the storage does, though each request no longer than [`DeviceOptions::timeout`].
    ///
    /// # Errors
    /// [`DetachError`]: it says whether the device is still attached.
    pub fn detach(&mut self, limit: Duration) -> Result<(), DetachError> {
        let deadline = wait::within(limit);
        let path = || self.path.clone();
        if self.file.is_none() {
            return Err(DetachError::Detached { path: path() });
        }
        // Kept until it is over, so that nobody mounts it meanwhile.
        let exclusive = self.await_unused(deadline)?;
        self.sync().map_err(|source| DetachError::Unsaved {
            path: path(),
            source,
        })?;
        self.disconnect(deadline)
            .map_err(|source| DetachError::Disconnect {
                path: path(),
                source,
            })?;
        // The kernel is done with it when nobody has it open.
        self.file = None;
        drop(exclusive);
        let free =
            || (self.shown.size().ok()? == 0 && self.shown.pid().ok()?.is_none()).then_some(());
        wait::until(deadline, free).ok_or_else(|| DetachError::Lingers {
            path: self.path.clone(),
            limit,
            holders: self.holders(None),
        })
    }

    fn disconnect(&self, deadline: Instant) -> io::Result<()> {
        if let Some(read_ahead) = self.read_ahead {
            // It is a hint, and whoever uses the device next may set his own.
            let _restored = self.shown.set_read_ahead(read_ahead);
        }
        self.supervisor.disconnect(deadline)
    }

    /// Waits until nobody else has the device open, and keeps out who wants it for himself.
    fn await_unused(&self, deadline: Instant) -> Result<OwnedFd, DetachError> {
        let mut holders = Vec::new();
        let unused = wait::until(deadline, || {
            let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC;
            let exclusive = rustix::fs::open(&self.path, flags, Mode::empty());
            holders = self.holders(exclusive.as_ref().ok());
            exclusive.ok().filter(|_| holders.is_empty())
        });
        unused.ok_or_else(|| {
            if holders.is_empty() {
                holders.push(Holder::Unknown);
            }
            DetachError::Busy {
                path: self.path.clone(),
                holders,
            }
        })
    }

    fn holders(&self, exclusive: Option<&OwnedFd>) -> Vec<Holder> {
        let mut ours = self.supervisor.descriptors.clone();
        ours.extend(exclusive.map(AsRawFd::as_raw_fd));
        ours.extend(self.file.as_ref().map(AsRawFd::as_raw_fd));
        let mut holders = holders::holders(self.number, &self.path, &ours);
        holders.extend(self.shown.stacked().into_iter().map(Holder::Device));
        holders
    }
}

impl Caches for Device {
    fn write_back(&self) -> io::Result<()> {
        if self.file.is_none() {
            return Err(io::ErrorKind::NotConnected.into());
        }
        self.sync()
    }

    /// Pages that a program still has mapped are kept by the kernel: it must have let go of them.
    fn forget(&self) -> io::Result<()> {
        let Some(file) = &self.file else {
            return Ok(());
        };
        Ok(rustix::fs::fadvise(file, 0, None, Advice::DontNeed)?)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if self.file.is_none() {
            return;
        }
        // Best effort: who wants to know detaches.
        let _saved = self.sync();
        let _disconnected = self.disconnect(wait::within(LAST));
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file().as_fd()
    }
}

/// What is held of requests at most: the kernel sends up to 128 at once over each connection, and what they are held in has to be there when memory is
/// short.
const IN_FLIGHT: u64 = 64 << 20;

/// How long dropping a device tries to disconnect it.
const LAST: Duration = Duration::from_secs(10);

/// What the kernel is told that our server can: all that the kernel knows of it.
fn announced(export: &Export) -> TransmissionFlags {
    use TransmissionFlags as Flags;
    let known = Flags::HAS_FLAGS
        .with(Flags::READ_ONLY)
        .with(Flags::SEND_FLUSH)
        .with(Flags::SEND_FUA)
        .with(Flags::SEND_TRIM)
        .with(Flags::SEND_WRITE_ZEROES)
        .with(Flags::CAN_MULTI_CONN);
    export.flags(false).without(Flags::ALL.without(known))
}

/// Waits until the device has its size.
fn await_ready(
    shown: &Shown,
    size: u64,
    events: Option<&Uevents>,
    options: &DeviceOptions,
    deadline: Instant,
) -> Result<(), AttachError> {
    let late = || AttachError::TimedOut {
        what: "waiting for the device to be there",
        limit: options.attach_limit,
    };
    let has_size = || shown.size().is_ok_and(|shown| shown == size);
    let Some(events) = events else {
        return wait::until(deadline, || has_size().then_some(())).ok_or_else(late);
    };
    let name = format!("nbd{}", shown.index);
    loop {
        match events.next(deadline) {
            Ok(Some(event))
                if event.device_name == name && event.action != "remove" && has_size() =>
            {
                return Ok(());
            }
            Ok(Some(_)) => {}
            // Some were lost, maybe ours.
            Err(error) if error.raw_os_error() == Some(Errno::NOBUFS.raw_os_error()) => {
                if has_size() {
                    return Ok(());
                }
            }
            Ok(None) => return Err(late()),
            Err(error) => return Err(AttachError::Resources(error)),
        }
    }
}

/// The kernel says whose device it is, where it is new enough.
fn check_ours(shown: &Shown, path: &Path, wanted: &Wanted) -> Result<(), AttachError> {
    match shown.backend().map_err(AttachError::Resources)? {
        Some(found) if found != wanted.identifier => Err(AttachError::NotOurs {
            path: path.to_owned(),
            found: format!("it is that of {found:?}"),
        }),
        _ => Ok(()),
    }
}

/// Opens the node, which udev may have yet to make. The kernel looks for partitions then, so that reads come before this returns.
fn open(path: &Path, options: &DeviceOptions, deadline: Instant) -> Result<File, AttachError> {
    let mut access = OpenOptions::new();
    access.read(true).write(!options.read_only);
    if options.direct {
        access.custom_flags(i32::try_from(OFlags::DIRECT.bits()).expect("flags fit"));
    }
    let mut last = None;
    let opened = wait::until(deadline, || match access.open(path) {
        Ok(file) => Some(Ok(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            last = Some(error);
            None
        }
        Err(error) => Some(Err(error)),
    });
    opened
        .unwrap_or_else(|| Err(last.unwrap_or_else(|| io::ErrorKind::TimedOut.into())))
        .map_err(|source| AttachError::Open {
            path: path.to_owned(),
            source,
        })
}

/// Makes sure that the node is that of the device, and returns the device's number.
fn check_node(shown: &Shown, path: &Path, node: &File) -> Result<(u32, u32), AttachError> {
    let metadata = node.metadata().map_err(AttachError::Resources)?;
    let found = (major(metadata.rdev()), minor(metadata.rdev()));
    match shown.number().map_err(AttachError::Resources)? {
        Some(number) if number != found => Err(AttachError::NotOurs {
            path: path.to_owned(),
            found: format!(
                "it is device {}:{} and should be {}:{}",
                found.0, found.1, number.0, number.1
            ),
        }),
        _ => Ok(found),
    }
}
