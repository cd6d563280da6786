//! The system calls that the standard library does not have.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// How a process ended.
pub(crate) enum Ended {
    /// With this exit code.
    Exited(i32),
    /// By this signal.
    Killed(i32),
}

/// Mounts a kernel file system.
pub(crate) fn mount(kind: &str, at: &str) -> io::Result<()> {
    let (kind, at) = (CString::new(kind)?, CString::new(at)?);
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

/// Loads a module of the kernel, with its own defaults; one that is there already is no error.
pub(crate) fn load_module(file: &File) -> io::Result<()> {
    // SAFETY: the descriptor is open, and the parameters are an empty string that ends with a zero.
    let done = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
    match check(done) {
        Err(reason) if reason.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        other => other,
    }
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

/// Waits until some child of this process has ended, and reaps it.
pub(crate) fn wait_for_any() -> io::Result<(u32, Ended)> {
    let mut status = 0;
    // SAFETY: `status` is valid for writes.
    let process = unsafe { libc::waitpid(-1, &mut status, 0) };
    let process = u32::try_from(process).map_err(|_| io::Error::last_os_error())?;
    let ended = if libc::WIFSIGNALED(status) {
        Ended::Killed(libc::WTERMSIG(status))
    } else {
        Ended::Exited(libc::WEXITSTATUS(status))
    };
    Ok((process, ended))
}

/// Kills every process but this one, and the kernel's own.
pub(crate) fn kill_all_others() {
    // SAFETY: no memory is involved. It fails where there is nobody else.
    let _nobody = unsafe { libc::kill(-1, libc::SIGKILL) };
}

/// Does nothing for as long as the machine is on.
pub(crate) fn wait_for_ever() -> ! {
    loop {
        // SAFETY: no memory is involved.
        unsafe { libc::pause() };
    }
}

fn check(returned: impl Into<i64>) -> io::Result<()> {
    if returned.into() == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
