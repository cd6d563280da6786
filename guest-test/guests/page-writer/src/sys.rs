//! The system calls that the standard library does not have.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

/// Mounts a kernel file system.
pub(crate) fn mount(kind: &CStr, at: &CStr) -> io::Result<()> {
    // SAFETY: both strings end with a zero and outlive the call; these file systems take no data.
    let done = unsafe {
        libc::mount(
            kind.as_ptr(),
            at.as_ptr(),
            kind.as_ptr(),
            0,
            std::ptr::null(),
        )
    };
    check(done)
}

/// Puts the calling thread before every ordinary one, so that a busy writer never delays it.
pub(crate) fn run_first() -> io::Result<()> {
    let priority = libc::sched_param { sched_priority: 10 };
    // SAFETY: `priority` is valid for reads during the call; 0 is the calling thread.
    let done = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &priority) };
    check(done)
}

/// Makes a terminal pass bytes on unchanged: no echo, no carriage returns.
pub(crate) fn make_raw(terminal: &File) -> io::Result<()> {
    let mut settings = std::mem::MaybeUninit::<libc::termios>::uninit();
    // SAFETY: the descriptor is open and `settings` has room for a termios.
    check(unsafe { libc::tcgetattr(terminal.as_raw_fd(), settings.as_mut_ptr()) })?;
    // SAFETY: tcgetattr succeeded, so it filled the whole structure.
    let mut settings = unsafe { settings.assume_init() };
    // SAFETY: `settings` is a valid termios.
    unsafe { libc::cfmakeraw(&mut settings) };
    // SAFETY: the descriptor is open and `settings` is a valid termios.
    check(unsafe { libc::tcsetattr(terminal.as_raw_fd(), libc::TCSANOW, &settings) })
}

/// Waits until the terminal has sent what was written to it.
pub(crate) fn drain(terminal: &File) -> io::Result<()> {
    // SAFETY: the descriptor is open.
    check(unsafe { libc::tcdrain(terminal.as_raw_fd()) })
}

/// The guest's monotonic clock, in nanoseconds.
pub(crate) fn monotonic() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` is valid for writes; the clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Sleeps until the monotonic clock shows `deadline` nanoseconds.
pub(crate) fn sleep_until(deadline: u64) {
    let deadline = Duration::from_nanos(deadline);
    let until = libc::timespec {
        tv_sec: deadline.as_secs() as libc::time_t,
        tv_nsec: libc::c_long::from(deadline.subsec_nanos() as i32),
    };
    // SAFETY: `until` is valid for reads; the remaining time is not asked for with an absolute deadline.
    unsafe {
        libc::clock_nanosleep(
            libc::CLOCK_MONOTONIC,
            libc::TIMER_ABSTIME,
            &until,
            std::ptr::null_mut(),
        )
    };
}

fn check(returned: libc::c_int) -> io::Result<()> {
    if returned == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
