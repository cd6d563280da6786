//! Staying out of the way of memory reclaim.
//!
//! Whoever serves a block device that is written through the page cache is waited for when memory runs short: the kernel writes dirty
//! pages to the device to free them. If the server then needs memory itself, and the kernel waits for the device in order to
//! give it some, neither goes on. So a thread that serves says so, and its memory stays where it is.

use std::fs;
use std::io;

use rustix::io::Errno;
use rustix::mm::MlockAllFlags;

/// Marks the calling thread as one that the kernel waits for when it frees memory: it never waits for block devices in order to get
/// memory, nor for the dirty pages of devices other than the one it writes to. Threads that it starts inherit the mark.
///
/// # Errors
/// [`io::ErrorKind::PermissionDenied`] without `CAP_SYS_RESOURCE`; `EINVAL` on Linux before 5.6.
pub fn become_io_flusher() -> io::Result<()> {
    rustix::process::configure_io_flusher_behavior(true).map_err(|errno| match errno {
        Errno::PERM => io::Error::new(
            io::ErrorKind::PermissionDenied,
            "serving a block device safely when memory is short needs CAP_SYS_RESOURCE: run as root",
        ),
        errno => errno.into(),
    })
}

/// Whether the calling thread is marked.
#[must_use]
pub fn is_io_flusher() -> bool {
    rustix::process::is_io_flusher().unwrap_or(false)
}

/// Keeps all memory of this process in memory once it has been touched: what is there now, and what will be. It is necessary
/// where a device that this process serves is swapped to.
///
/// Mappings count too, also of the device itself, so a program that maps what it serves cannot have them paged out any more.
///
/// # Errors
/// [`io::ErrorKind::PermissionDenied`] or [`io::ErrorKind::OutOfMemory`] where the limit on locked memory (`RLIMIT_MEMLOCK`) does
/// not allow it.
pub fn lock_memory() -> io::Result<()> {
    let flags = MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT;
    Ok(rustix::mm::mlockall(flags)?)
}

/// Undoes [`lock_memory`].
///
/// # Errors
/// What the kernel says.
pub fn unlock_memory() -> io::Result<()> {
    Ok(rustix::mm::munlockall()?)
}

/// Makes this process the last one that the kernel ends when memory runs out: without it whoever waits for its devices would not be helped.
///
/// # Errors
/// [`io::ErrorKind::PermissionDenied`] without `CAP_SYS_RESOURCE`.
pub fn be_spared_when_memory_runs_out() -> io::Result<()> {
    fs::write("/proc/self/oom_score_adj", "-1000")
}
