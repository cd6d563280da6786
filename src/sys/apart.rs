//! What a process must not do with its files open.
//!
//! A process that serves a file system or a device, and has the kernel write back what is cached of it, waits for itself: harmless while
//! other threads serve. If it is killed, its files are closed, and with them what the kernel asks it by, only once the last of
//! the threads that share them has ended; and the one inside such a call, which nothing can interrupt, waits for just that.

use std::io;
use std::path::Path;
use std::thread;

/// Does `work` on a thread that shares no open file with this process, so that it does not keep any from being closed.
///
/// `work` is given `path` and has nothing else: no descriptor of the caller's means anything on that thread. Standard input, output
/// and error stay. Blocks until it is done. Linux before 5.9 cannot part them, and does it all the same.
///
/// # Errors
/// What `work` says; [`io::ErrorKind::OutOfMemory`] or [`io::ErrorKind::WouldBlock`] if there can be no further thread.
pub fn apart<T: Send>(path: &Path, work: fn(&Path) -> io::Result<T>) -> io::Result<T> {
    thread::scope(|scope| {
        let thread = thread::Builder::new()
            .name("apart".to_owned())
            .spawn_scoped(scope, move || {
                part();
                work(path)
            })?;
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Gives the calling thread a table of files of its own, with the standard ones alone in it.
fn part() {
    let (from, to): (libc::c_uint, libc::c_uint) = (3, libc::c_uint::MAX);
    // SAFETY: the table that descriptors are closed in is a copy that this thread alone has, or nothing is closed: the call takes a
    // copy before it closes, and fails if it cannot. The thread has just begun and holds no descriptor.
    let _shared_where_it_cannot =
        unsafe { libc::syscall(libc::SYS_close_range, from, to, libc::CLOSE_RANGE_UNSHARE) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};
    use std::io::Read;
    use std::os::fd::AsRawFd;

    #[test]
    fn who_works_apart_has_none_of_the_files_and_closes_none() {
        let mut file = File::open("/proc/self/comm").unwrap();
        let name = format!("/proc/thread-self/fd/{}", file.as_raw_fd());
        assert!(fs::symlink_metadata(&name).is_ok());
        let there = apart(Path::new(&name), |path| {
            Ok(fs::symlink_metadata(path).is_ok())
        });
        assert!(!there.unwrap());
        let mut read = String::new();
        file.read_to_string(&mut read).unwrap();
        assert!(!read.is_empty());
    }

    #[test]
    fn what_the_work_says_is_returned() {
        let error = apart(Path::new("/nonexistent"), |path| File::open(path)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
