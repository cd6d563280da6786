//! A userfaultfd, of this process or of another one.
//!
//! Addresses are `u64`, not pointers: they belong to the process whose memory the descriptor was made in, and only
//! the kernel follows them.

mod create;
mod event;
mod features;
mod initialised;

pub use create::{CreateError, Scope, unused};
pub use event::Event;
pub use features::Features;
pub use initialised::Pages;

use std::io;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;

use linux_raw_sys::general as raw;
use linux_raw_sys::ioctl;
use rustix::fs::OFlags;
use rustix::io::Errno;

/// A userfaultfd that has agreed on its features. Never blocks; closing it releases every registration, wakes who
/// waits, and lifts all write protection.
#[derive(Debug)]
pub struct Uffd {
    fd: OwnedFd,
    features: Features,
}

/// What is to be reported of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Mode {
    /// Accesses to pages that are not there.
    pub missing: bool,
    /// Writes to pages that are write-protected.
    pub wp: bool,
    /// Accesses to pages that are there and not mapped.
    pub minor: bool,
}

/// What an installation achieved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Installed {
    /// Bytes that this call made present.
    pub bytes: u64,
    /// Bytes dealt with, from the start: made present, or found present and left alone.
    pub done: u64,
    /// Why it stopped short of the end; `None` if it did not.
    pub stopped: Option<Stop>,
}

/// Why an installation stopped before its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// The process is changing its mappings: read the events, then go on from `done`.
    Changing,
    /// No registered mapping has the page after those that are done.
    Unmapped,
    /// The process has exited.
    Exited,
    /// There is no memory, or the file system of the memory's file is full.
    NoRoom,
}

/// The kernel does not offer what was asked of a userfaultfd. Inside an [`io::Error`] of kind
/// [`Unsupported`](io::ErrorKind::Unsupported).
#[derive(Debug, thiserror::Error)]
pub enum FeatureError {
    /// These are not offered.
    #[error(
        "the kernel's userfaultfd lacks {0}; use a kernel that has it (6.7 or later has all that tracking needs), \
         or another way to track or to fetch pages"
    )]
    Lacks(Features),
    /// One of these is not offered, or the descriptor was initialised before.
    #[error(
        "the kernel's userfaultfd lacks one of {0}, or the descriptor was in use already; use a kernel that has \
         them, or a fresh descriptor"
    )]
    LacksOneOf(Features),
}

impl Uffd {
    /// Makes a userfaultfd for the memory of this process, with `features`.
    ///
    /// # Errors
    /// A [`CreateError`] inside, of kind [`io::ErrorKind::PermissionDenied`], without what `scope` needs; a
    /// [`FeatureError`] inside if the kernel lacks a feature.
    pub fn create(scope: Scope, features: Features) -> io::Result<Self> {
        let fd = unused(scope)?;
        Self::adopt(fd, features)
    }

    /// Takes over a userfaultfd that was made, and not used yet, by this process or another one, and agrees with the
    /// kernel on `features`.
    ///
    /// # Errors
    /// A [`FeatureError`] inside if the kernel lacks a feature; the descriptor is closed then.
    pub fn adopt(fd: OwnedFd, features: Features) -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
        let uffd = Self { fd, features };
        match uffd.handshake(features) {
            Ok(_) => Ok(uffd),
            Err(Errno::INVAL) => {
                let error = match offered() {
                    Ok(offered) if !offered.contains(features) => {
                        FeatureError::Lacks(features.without(offered))
                    }
                    _ => FeatureError::LacksOneOf(features),
                };
                Err(io::Error::new(io::ErrorKind::Unsupported, error))
            }
            Err(Errno::PERM) => Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                format!("userfaultfd with {features} needs CAP_SYS_PTRACE"),
            )),
            Err(errno) => Err(errno.into()),
        }
    }

    /// The features that were agreed on.
    #[must_use]
    pub fn features(&self) -> Features {
        self.features
    }

    /// Starts to report what `mode` says of `range`, which begins and ends at pages. Registering a range again
    /// replaces its mode.
    ///
    /// # Errors
    /// `EINVAL` if nothing is mapped there or the mapping is of a kind that cannot be watched, `EBUSY` if another
    /// userfaultfd watches it, `ENOMEM` if the process has exited, `EPERM` if its file may not be written.
    pub fn register(&self, range: Range<u64>, mode: Mode) -> io::Result<()> {
        self.registered(range, mode).map(|_| ())
    }

    /// Registers a range; says which ioctls its pages take, a bit each.
    fn registered(&self, range: Range<u64>, mode: Mode) -> io::Result<u64> {
        let bit = |wanted: bool, bit: u32| if wanted { u64::from(bit) } else { 0 };
        let mut register = raw::uffdio_register {
            range: raw_range(&range)?,
            mode: bit(mode.missing, raw::UFFDIO_REGISTER_MODE_MISSING)
                | bit(mode.wp, raw::UFFDIO_REGISTER_MODE_WP)
                | bit(mode.minor, raw::UFFDIO_REGISTER_MODE_MINOR),
            ioctls: 0,
        };
        self.ioctl::<{ ioctl::UFFDIO_REGISTER }, _>(&mut register)?;
        Ok(register.ioctls)
    }

    /// Stops to report on `range`: wakes who waits there and lifts its write protection.
    ///
    /// # Errors
    /// `EINVAL` if nothing is mapped there, `ENOMEM` if the process has exited.
    pub fn unregister(&self, range: Range<u64>) -> io::Result<()> {
        self.ioctl::<{ ioctl::UFFDIO_UNREGISTER }, _>(&mut raw_range(&range)?)?;
        Ok(())
    }

    /// Wakes the threads that wait on pages of `range`: they look again.
    ///
    /// # Errors
    /// `EINVAL` if the range does not begin and end at pages.
    pub fn wake(&self, range: Range<u64>) -> io::Result<()> {
        self.ioctl::<{ ioctl::UFFDIO_WAKE }, _>(&mut raw_range(&range)?)?;
        Ok(())
    }

    /// Makes the pages from `address` on present with `data`, each at once with all its bytes, and wakes who waits on
    /// them. A page that is present already keeps what it has: the first writer wins.
    ///
    /// `page_size` is the page size of the mapping in bytes (4096 but for hugetlbfs), and `data` is whole pages. Short
    /// progress is continued; one call may take many system calls where pages are present already.
    ///
    /// # Errors
    /// What no [`Stop`] describes: `EINVAL` if the range is not registered whole pages, `EFAULT` beyond the end of the
    /// memory's file.
    pub fn install(&self, address: u64, data: &[u8], page_size: u64) -> io::Result<Installed> {
        self.copy(address, data, page_size, 0)
    }

    /// As [`install`](Self::install), and the pages that become present are write-protected, atomically: a write that comes
    /// right after is told of, or remembered. The range is registered with [`Mode::wp`].
    ///
    /// # Errors
    /// As [`install`](Self::install).
    pub fn install_protected(
        &self,
        address: u64,
        data: &[u8],
        page_size: u64,
    ) -> io::Result<Installed> {
        self.copy(address, data, page_size, raw::UFFDIO_COPY_MODE_WP.into())
    }

    fn copy(&self, address: u64, data: &[u8], page_size: u64, mode: u64) -> io::Result<Installed> {
        self.fill(address, data.len() as u64, page_size, |done, len| {
            let place = |at: u64| usize::try_from(at).expect("within the slice");
            let part = &data[place(done)..place(done + len)];
            let mut copy = raw::uffdio_copy {
                dst: address + done,
                src: part.as_ptr().expose_provenance() as u64,
                len,
                mode,
                copy: 0,
            };
            let result = self.ioctl::<{ ioctl::UFFDIO_COPY }, _>(&mut copy);
            (result, copy.copy)
        })
    }

    /// Makes the missing pages of `range` kill who accesses them, by `SIGBUS`, as a broken memory does; for pages whose bytes
    /// cannot be had. Needs [`Features::POISON`]. Such a page counts as missing: installing its bytes heals it.
    ///
    /// # Errors
    /// As [`install`](Self::install).
    pub fn poison(&self, range: Range<u64>, page_size: u64) -> io::Result<Installed> {
        self.fill_range(&range, page_size, |range| {
            let mut poison = raw::uffdio_poison {
                range,
                mode: 0,
                updated: 0,
            };
            let result = self.ioctl::<UFFDIO_POISON, _>(&mut poison);
            (result, poison.updated)
        })
    }

    /// Makes the missing pages of `range` present with zeros and wakes who waits on them; like
    /// [`install`](Self::install). Not for hugetlbfs.
    ///
    /// # Errors
    /// As [`install`](Self::install).
    pub fn zero(&self, range: Range<u64>, page_size: u64) -> io::Result<Installed> {
        self.fill_range(&range, page_size, |range| {
            let mut zero = raw::uffdio_zeropage {
                range,
                mode: 0,
                zeropage: 0,
            };
            let result = self.ioctl::<{ ioctl::UFFDIO_ZEROPAGE }, _>(&mut zero);
            (result, zero.zeropage)
        })
    }

    /// Maps pages of `range` that the memory's file has, after minor faults, and wakes who waits on them.
    ///
    /// # Errors
    /// As [`install`](Self::install); `EFAULT` where the file has no page.
    pub fn map_present(&self, range: Range<u64>, page_size: u64) -> io::Result<Installed> {
        self.fill_range(&range, page_size, |range| {
            let mut present = raw::uffdio_continue {
                range,
                mode: 0,
                mapped: 0,
            };
            let result = self.ioctl::<{ ioctl::UFFDIO_CONTINUE }, _>(&mut present);
            (result, present.mapped)
        })
    }

    /// Write-protects `range`, registered with [`Mode::wp`], or lifts the protection and wakes who waits.
    ///
    /// # Errors
    /// `ENOENT` if it is not registered so, `EAGAIN` while the process changes its mappings, `ESRCH` if it has exited.
    pub fn write_protect(&self, range: Range<u64>, protect: bool) -> io::Result<()> {
        let mut argument = raw::uffdio_writeprotect {
            range: raw_range(&range)?,
            mode: u64::from(protect), // UFFDIO_WRITEPROTECT_MODE_WP is 1
        };
        self.ioctl::<{ ioctl::UFFDIO_WRITEPROTECT }, _>(&mut argument)?;
        Ok(())
    }

    /// Most events that [`read_events`](Self::read_events) reads at once: 2 KiB of stack. With as many faults waiting as a large guest has
    /// vCPUs, one read takes them all.
    pub const MOST_EVENTS: usize = 64;

    /// Appends the events that wait to be read, at most [`MOST_EVENTS`](Self::MOST_EVENTS) of them, by one system call; says how many.
    /// Zero if there are none: never blocks, so poll the descriptor for reading first.
    ///
    /// # Errors
    /// What the kernel says; no event is lost then.
    pub fn read_events(&self, events: &mut Vec<Event>) -> io::Result<usize> {
        const BATCH: usize = Uffd::MOST_EVENTS;
        events.reserve(BATCH);
        let mut messages = [const { MaybeUninit::<event::Message>::zeroed() }; BATCH];
        // SAFETY: the kernel writes at most the given number of bytes, which is the size of the array.
        let read = unsafe {
            libc::read(
                self.fd.as_raw_fd(),
                messages.as_mut_ptr().cast(),
                size_of_val(&messages),
            )
        };
        let Ok(len) = usize::try_from(read) else {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(0),
                _ => Err(error),
            };
        };
        let count = len / event::MESSAGE_LEN;
        for message in &messages[..count] {
            // SAFETY: zeroed when it was made, and overwritten by the kernel: all of it is initialised, and any bits
            // are valid.
            let message = unsafe { message.assume_init_ref() };
            events.push(event::decode(message));
        }
        Ok(count)
    }

    fn handshake(&self, features: Features) -> Result<Features, Errno> {
        let mut api = raw::uffdio_api {
            api: raw::UFFD_API.into(),
            features: features.bits(),
            ioctls: 0,
        };
        self.ioctl::<{ ioctl::UFFDIO_API }, _>(&mut api)?;
        Ok(Features::from_bits(api.features))
    }

    /// Runs `step`, which gets the bytes that are done and how many are next, and answers with what the kernel returned and
    /// wrote back, until `len` bytes are done or something stops it.
    ///
    /// The kernel fills nothing if a call reaches beyond one of its mappings, and says the same as where there is none. What was
    /// one `mmap` may be many of them: each `mprotect` of a part makes some. So less is asked for, and more again.
    fn fill(
        &self,
        address: u64,
        len: u64,
        page_size: u64,
        mut step: impl FnMut(u64, u64) -> (Result<(), Errno>, i64),
    ) -> io::Result<Installed> {
        if !page_size.is_power_of_two() || !len.is_multiple_of(page_size) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{len} bytes are no whole pages of {page_size} bytes"),
            ));
        }
        let mut installed = Installed {
            bytes: 0,
            done: 0,
            stopped: None,
        };
        let mut most = len;
        while installed.done < len {
            let next = most.min(len - installed.done);
            let (result, written) = step(installed.done, next);
            // What is written back is a count, or an error that `result` holds as well.
            let progress = u64::try_from(written).unwrap_or(0);
            match result {
                Ok(()) | Err(Errno::AGAIN) if progress > 0 => {
                    installed.bytes += progress;
                    installed.done += progress;
                    most = most.saturating_mul(2);
                }
                Err(Errno::EXIST) => {
                    // Who waits there was not woken by whoever made the page present with a plain write.
                    let page = address + installed.done;
                    self.wake(page..page + page_size)?;
                    installed.done += page_size;
                }
                Err(Errno::INTR) => {}
                Ok(()) | Err(Errno::AGAIN) => installed.stopped = Some(Stop::Changing),
                Err(Errno::NOENT) if next > page_size => {
                    most = (next / page_size).div_ceil(2) * page_size;
                }
                Err(Errno::NOENT) => installed.stopped = Some(Stop::Unmapped),
                Err(Errno::SRCH) => installed.stopped = Some(Stop::Exited),
                Err(Errno::NOSPC | Errno::NOMEM) => installed.stopped = Some(Stop::NoRoom),
                Err(errno) => return Err(errno.into()),
            }
            if installed.stopped.is_some() {
                break;
            }
        }
        Ok(installed)
    }

    /// The same, where `step` gets the part of `range` that is next.
    fn fill_range(
        &self,
        range: &Range<u64>,
        page_size: u64,
        mut step: impl FnMut(raw::uffdio_range) -> (Result<(), Errno>, i64),
    ) -> io::Result<Installed> {
        let whole = raw_range(range)?;
        self.fill(whole.start, whole.len, page_size, |done, len| {
            step(raw::uffdio_range {
                start: whole.start + done,
                len,
            })
        })
    }

    /// Runs ioctl `NUMBER`, whose argument is a `T`.
    fn ioctl<const NUMBER: u32, T: Argument>(&self, argument: &mut T) -> Result<(), Errno> {
        const {
            assert!(
                size_of::<T>() as u64 == (NUMBER >> 16 & 0x3fff) as u64,
                "an ioctl number holds the size of its argument"
            );
        }
        // SAFETY: the number says that the argument has the size of a `T`, and `T` is a struct of the userfaultfd
        // interface; the kernel reads and writes that only. What it does to memory is confined to the pages of
        // registered mappings: it makes missing ones present and changes whether present ones may be written, and
        // never changes the bytes of a present page.
        let result = unsafe {
            libc::ioctl(
                self.fd.as_raw_fd(),
                NUMBER as libc::Ioctl,
                ptr::from_mut(argument),
            )
        };
        if result < 0 {
            Err(last_errno())
        } else {
            Ok(())
        }
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// What the running kernel offers; it answers the same for every process.
///
/// # Errors
/// If this process may not make a userfaultfd at all.
pub fn offered() -> io::Result<Features> {
    let uffd = Uffd {
        fd: unused(Scope::UserModeOnly)?,
        features: Features::none(),
    };
    Ok(uffd.handshake(Features::none())?)
}

/// Whether a descriptor, which may have come from anybody, is one of a userfaultfd. Asks the descriptor's file nothing.
#[must_use]
pub fn is_userfaultfd(fd: BorrowedFd<'_>) -> bool {
    let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
    std::fs::read_link(link).is_ok_and(|name| name.as_os_str() == "anon_inode:[userfaultfd]")
}

fn raw_range(range: &Range<u64>) -> io::Result<raw::uffdio_range> {
    let len = range.end.checked_sub(range.start).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidInput,
            "a range of memory ends before it starts",
        )
    })?;
    Ok(raw::uffdio_range {
        start: range.start,
        len,
    })
}

fn last_errno() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// The argument structs of the userfaultfd interface: plain integers, no pointers that the kernel writes through.
trait Argument {}
impl Argument for raw::uffdio_api {}
impl Argument for raw::uffdio_range {}
impl Argument for raw::uffdio_register {}
impl Argument for raw::uffdio_copy {}
impl Argument for raw::uffdio_zeropage {}
impl Argument for raw::uffdio_continue {}
impl Argument for raw::uffdio_writeprotect {}
impl Argument for raw::uffdio_poison {}

/// `_IOWR(0xAA, 8, struct uffdio_poison)`, which the definitions we use lack.
const UFFDIO_POISON: u32 = 0xc020_aa08;

// The numbers are ABI. They are spelled out because the sizes above only hold them half.
#[cfg(any(
    target_arch = "x86_64",
    target_arch = "aarch64",
    target_arch = "riscv64"
))]
const _: () = {
    assert!(ioctl::UFFDIO_API == 0xc018_aa3f);
    assert!(ioctl::UFFDIO_REGISTER == 0xc020_aa00);
    assert!(ioctl::UFFDIO_UNREGISTER == 0x8010_aa01);
    assert!(ioctl::UFFDIO_WAKE == 0x8010_aa02);
    assert!(ioctl::UFFDIO_COPY == 0xc028_aa03);
    assert!(ioctl::UFFDIO_ZEROPAGE == 0xc020_aa04);
    assert!(ioctl::UFFDIO_WRITEPROTECT == 0xc018_aa06);
    assert!(ioctl::UFFDIO_CONTINUE == 0xc020_aa07);
};

#[cfg(test)]
mod tests;
