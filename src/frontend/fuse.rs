//! A region as one file of a file system of its own.
//!
//! ```text
//!  a program          kernel                       threads of ours
//! ┌──────────┐   ┌───────────────┐            ┌──────────────────────┐
//! │ pread    │──►│               │  /dev/fuse │ RegionFile           │   ┌─────────┐
//! │ pwrite   │◄──│  page cache   │◄──────────►│  a request becomes   │──►│ Storage │
//! │ mmap     │──►│               │   × n      │  a call of the other │◄──│         │
//! └──────────┘   └───────────────┘            └──────────────────────┘   └─────────┘
//! ```
//!
//! `mountpoint.rs` takes the place and gives it back, whatever became of us; `filesystem.rs` answers requests.

mod filesystem;
mod mountpoint;
mod unsaved;

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use fuser::{Config, Notifier, Session, SessionACL};

use self::filesystem::RegionFile;
use self::mountpoint::{Mountpoint, Shape, Wish};
use self::unsaved::Unsaved;
use crate::chunk::{Caches, Storage};
use crate::sys::apart::apart;

/// How long a mount that is taken away may take to end. Its threads wait for nothing but the storage, which has deadlines.
const PATIENCE: Duration = Duration::from_secs(10);

/// The unit of what the kernel caches.
const PAGE: u64 = 4096;

/// What the kernel may read ahead for who reads in sequence: what 1 Gbit/s carries in a round trip of 30 ms.
const READ_AHEAD: u64 = 4 << 20;

/// A region as a file, for as long as this value lives.
///
/// Programs read, write and map it (shared, too) as any file; its length is the region's and never changes. `fsync`, `msync` and
/// the closing of a file that was written to are a [`flush`](Storage::flush) of the storage, whose failure they report. Punching a
/// hole or zeroing a range is a [`zero`](Storage::zero). `SEEK_DATA` and `SEEK_HOLE` are
/// [`data_ranges`](Storage::data_ranges) with [`Cache::Direct`]; with [`Cache::Writeback`] everything counts as data. Making it longer or
/// shorter, `O_TRUNC` included, is refused with `EPERM`; a write behind the end with `ENOSPC` (with `Writeback`, by `fsync` or `close`).
/// A storage that fails is `EIO`, as soon as it fails: no request takes longer than the storage's deadline.
///
/// Where this process dies, however, whoever waits gets an error at once, and the mount is removed by `fusermount3` if
/// [`FuseOptions::unmount_after_crash`] could be granted; if not, the next mount at the same place removes it.
///
/// **What would hang.** A thread that answers requests must never wait for one: the storage must not touch the mounted file, and
/// this process had better not map it. A child that was forked and has not executed a program holds our descriptors, so that
/// programs hang instead of failing if we die while it lives: fork before mounting, or execute at once.
#[derive(Debug)]
pub struct FuseFile {
    mountpoint: Mountpoint,
    shape: Shape,
    path: PathBuf,
    len: u64,
    notifier: Notifier,
    unsaved: Arc<Unsaved>,
    ended: Arc<Ended>,
}

/// What is kept in the page cache of this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Cache {
    /// What was read and what is written, until it is written back some time (`fsync`: now). Quick; read-ahead works.
    #[default]
    Writeback,
    /// Nothing that is read or written by system calls: each is a request of its own. Only mappings are cached. Shared ones need
    /// Linux 6.6.
    Direct,
}

/// How a [`FuseFile`] is mounted.
#[derive(Debug, Clone)]
pub struct FuseOptions {
    /// What the file is called, if the mount point is a directory. `region` by default.
    pub name: OsString,
    /// What is cached.
    pub cache: Cache,
    /// Refuses to write.
    pub read_only: bool,
    /// So many requests are answered at once, each in a thread of its own. By default 16: what keeps 1 Gbit/s at 30 ms of round
    /// trip busy with requests of 1 MiB, four times over.
    pub threads: usize,
    /// Lets other users open it; else only the one who mounts may, not even root.
    pub everyone: bool,
    /// Asks `fusermount3`, where it is installed, to unmount if this process dies without doing so.
    pub unmount_after_crash: bool,
}

impl Default for FuseOptions {
    fn default() -> Self {
        Self {
            name: OsString::from("region"),
            cache: Cache::default(),
            read_only: false,
            threads: 16,
            everyone: false,
            unmount_after_crash: true,
        }
    }
}

/// Why a region could not be mounted.
#[derive(Debug, thiserror::Error)]
pub enum FuseMountError {
    /// There is no FUSE.
    #[error(
        "/dev/fuse cannot be opened ({source}): load the module `fuse`, or give this process the device"
    )]
    NoDevice {
        /// What opening said.
        source: io::Error,
    },
    /// The mount point cannot be used.
    #[error(
        "{path} cannot be mounted on ({source}): it has to be a directory or a regular file that exists"
    )]
    MountPoint {
        /// The mount point.
        path: PathBuf,
        /// What was wrong.
        source: io::Error,
    },
    /// A region that somebody serves is mounted there.
    #[error(
        "a region is mounted at {path} already, and served: unmount it, or choose another place"
    )]
    Taken {
        /// The mount point.
        path: PathBuf,
    },
    /// Mounting needs a right that this process lacks, and there is no `fusermount3` that has it.
    #[error(
        "mounting at {path} needs CAP_SYS_ADMIN or the program fusermount3, which cannot be run ({source}): install fuse3, or run as \
         root"
    )]
    NoRight {
        /// The mount point.
        path: PathBuf,
        /// Why the program could not be run.
        source: io::Error,
    },
    /// The kernel, or `fusermount3`, refused.
    #[error(
        "mounting at {path} was refused: {source}; other users' access also needs `user_allow_other` in /etc/fuse.conf"
    )]
    Refused {
        /// The mount point.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// The kernel and we did not agree, or there was no thread.
    #[error("the mount at {path} could not be served: {source}")]
    Serve {
        /// The mount point.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Why a region is still mounted.
#[derive(Debug, thiserror::Error)]
pub enum FuseUnmountError {
    /// Somebody has it open or mapped.
    #[error(
        "{path} is in use: end the programs that have it open (`fuser -vm {path}` names them), or detach it"
    )]
    Busy {
        /// The mount point.
        path: PathBuf,
    },
    /// Something else.
    #[error("{path} could not be unmounted: {source}")]
    Failed {
        /// The mount point.
        path: PathBuf,
        /// What was said.
        source: io::Error,
    },
}

/// Whether the file system has ended, and somebody who waits for it.
#[derive(Debug, Default)]
struct Ended {
    ended: Mutex<bool>,
    changed: Condvar,
}

impl FuseFile {
    /// Shows `storage` as a file: `at` itself if that is a file, else the file [`FuseOptions::name`] in the directory `at`. What was
    /// there is hidden meanwhile.
    ///
    /// A mount that a process of ours left there when it was killed is removed first.
    ///
    /// # Errors
    /// See [`FuseMountError`]; nothing is mounted then.
    pub fn mount(
        storage: Arc<dyn Storage>,
        at: &Path,
        options: &FuseOptions,
    ) -> Result<Self, FuseMountError> {
        let (at, shape) = mountpoint::prepare(at)?;
        let wish = Wish {
            read_only: options.read_only,
            everyone: options.everyone,
            unmount_after_crash: options.unmount_after_crash,
        };
        let (mountpoint, requests) = Mountpoint::take(at, shape, wish)?;
        let path = match shape {
            Shape::Directory => mountpoint.path().join(&options.name),
            Shape::File => mountpoint.path().to_owned(),
        };
        let len = storage.len();
        let mut config = Config::default();
        config.n_threads = Some(options.threads.max(2));
        config.clone_fd = true;
        config.acl = if options.everyone {
            SessionACL::All
        } else {
            SessionACL::Owner
        };
        let ended = Arc::new(Ended::default());
        let file = RegionFile::new(storage, shape, options);
        let unsaved = Arc::clone(file.unsaved());
        let served = Session::from_fd(file, requests, config.acl, config)
            .and_then(|session| serve(session, Arc::clone(&ended)));
        let ready = served.and_then(|notifier| {
            if shape == Shape::File && !options.read_only && options.cache == Cache::Writeback {
                // With write-back the length is the kernel's, which takes that of a root for zero until it is told.
                File::options().write(true).open(&path)?.set_len(len)?;
            }
            Ok(notifier)
        });
        match ready {
            Ok(notifier) => {
                mountpoint.set_read_ahead(READ_AHEAD);
                Ok(Self {
                    mountpoint,
                    shape,
                    path,
                    len,
                    notifier,
                    unsaved,
                    ended,
                })
            }
            Err(source) => {
                // Whoever looked at it in this moment fails, instead of keeping it.
                mountpoint.abort();
                Err(FuseMountError::Serve {
                    path: mountpoint.path().to_owned(),
                    source,
                })
            }
        }
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the kernel forget what it has cached of `range`, because the storage's bytes have changed and nobody wrote them
    /// through the file. Reads that begin after this see what the storage has.
    ///
    /// To be called after the storage was changed. Pages of the range that were written through the file and not written back yet
    /// are written to the storage first; those that could not be written when they had to be are given up. Waits for reads of the range that are under way: so it must not be called by who has to
    /// answer them.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotConnected`] if it is not mounted any more.
    pub fn invalidate(&self, range: Range<u64>) -> io::Result<()> {
        let end = range.end.min(self.len);
        if self.has_ended() {
            return Err(not_mounted());
        }
        if range.start >= end {
            return Ok(());
        }
        // Whole pages are forgotten. What cannot be saved during it stays known.
        let given_up = self.unsaved.give_up(whole_pages(range.start..end));
        let signed = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        let inode = RegionFile::inode(self.shape);
        self.notifier
            .inval_inode(inode, signed(range.start), signed(end - range.start))
            .inspect_err(|_| self.unsaved.keep(given_up))
            .map_err(|error| match error.raw_os_error() {
                Some(libc::ENODEV | libc::ENOTCONN) => not_mounted(),
                _ => error,
            })
    }

    /// Writes back what the kernel has cached, mappings included, and flushes the storage.
    ///
    /// The kernel tries to write back once, and tells those who have the file open. This fails until what could not be written is
    /// written again, by a program, or given up by [`invalidate`](Self::invalidate).
    ///
    /// # Errors
    /// What the storage says, as an error of the file; that something could not be written back, now or earlier; otherwise
    /// [`io::ErrorKind::NotConnected`] if it is not mounted any more.
    pub fn sync(&self) -> io::Result<()> {
        if self.has_ended() {
            // The kernel has written back what it could.
            self.unsaved.check()?;
            return Err(not_mounted());
        }
        apart(&self.path, |path| File::open(path)?.sync_data())?;
        // A file that is opened anew is told only what nobody has been told yet.
        self.unsaved.check()
    }

    /// Unmounts it, after everything was written back. Once it is unmounted, doing so again does nothing.
    ///
    /// # Errors
    /// [`FuseUnmountError::Busy`] if somebody has it open; it stays mounted then, and served.
    pub fn unmount(&self) -> Result<(), FuseUnmountError> {
        self.mountpoint.unmount(false)
    }

    /// Takes it away from its place at once. Those who have it open are served until they close it, or this value is dropped:
    /// [`wait`](Self::wait) says when.
    ///
    /// # Errors
    /// [`FuseUnmountError::Failed`] if the kernel refuses.
    pub fn detach(&self) -> Result<(), FuseUnmountError> {
        self.mountpoint.unmount(true)
    }

    /// Takes it away from whoever uses it, at once: what waits for an answer fails, also a [`sync`](Self::sync) of this process,
    /// which could not end otherwise if the process ended. What the kernel has not written back is lost.
    ///
    /// One that was [detached](Self::detach) before can be aborted only where the kernel's control file system is mounted.
    pub fn abort(&self) {
        self.mountpoint.abort();
    }

    /// Waits until it is unmounted, by us or by anybody, and no longer used; says whether it is.
    #[must_use]
    pub fn wait(&self, at_most: Duration) -> bool {
        self.ended.wait(at_most)
    }

    /// Whether it is unmounted and no longer used.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.wait(Duration::ZERO)
    }
}

impl Caches for FuseFile {
    fn write_back(&self) -> io::Result<()> {
        self.sync()
    }

    fn forget(&self) -> io::Result<()> {
        match self.invalidate(0..self.len) {
            // Nothing is cached of what is not mounted.
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
            // What was written meanwhile and could not be saved is forgotten, too.
            forgotten => forgotten.map(|()| drop(self.unsaved.give_up(0..u64::MAX))),
        }
    }
}

/// Unmounts. From those who still have it open it is taken away: what they wrote and the kernel has not written back is lost then,
/// which [`FuseFile::unmount`] would have said. One that was [detached](FuseFile::detach) is served on where the kernel's control
/// file system (`/sys/fs/fuse/connections`) is not mounted.
impl Drop for FuseFile {
    fn drop(&mut self) {
        if self.unmount().is_err() || !self.ended.wait(Duration::from_millis(100)) {
            self.mountpoint.abort();
        }
        // What the storage does at this moment, it may finish.
        let _ = self.ended.wait(PATIENCE);
    }
}

impl Ended {
    fn wait(&self, at_most: Duration) -> bool {
        let deadline = Instant::now() + at_most;
        // A flag is never half set.
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        while !*ended {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            ended = self
                .changed
                .wait_timeout(ended, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        true
    }

    fn set(&self) {
        *self.ended.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }
}

/// Answers the kernel's requests until the file system is unmounted.
fn serve(session: Session<RegionFile>, ended: Arc<Ended>) -> io::Result<Notifier> {
    let notifier = session.notifier();
    thread::Builder::new()
        .name("fuse".to_owned())
        .spawn(move || {
            // The threads that it starts inherit it. Without, one that needs memory could wait for dirty pages of this very file to
            // be written back, by itself. Needs CAP_SYS_RESOURCE, and is not worth failing for.
            let _ = rustix::process::configure_io_flusher_behavior(true);
            // It ends with the mount, or with a kernel that makes no sense; in both cases nobody is served any more.
            let _ = session.run();
            ended.set();
        })?;
    Ok(notifier)
}

fn whole_pages(range: Range<u64>) -> Range<u64> {
    let end = range.end.checked_next_multiple_of(PAGE);
    range.start - range.start % PAGE..end.unwrap_or(u64::MAX)
}

fn not_mounted() -> io::Error {
    io::Error::new(
        io::ErrorKind::NotConnected,
        "the region's file is not mounted any more",
    )
}
