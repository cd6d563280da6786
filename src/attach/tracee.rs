//! One seized thread: stopping it, running it to where we want it, letting it go.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{AttachError, process};
use crate::sys::ptrace::{self, Resume, Stop, Tid};

/// For how long a stop is asked for without sleeping in between: as long as a healthy one takes. Measured, not
/// counted: on a busy machine a single yield can take longer, and one who sleeps is woken sooner.
const EAGER: Duration = Duration::from_micros(60);
/// The sleep between two questions after that. A tracer has no file descriptor to wait on for a stop.
const TICK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 50_000,
};

/// A thread that the calling thread traces.
///
/// It is not let go on drop: a thread that is not stopped cannot be. The end of the calling thread does that, and
/// every state that we leave it in until then is one from which it runs on by itself.
#[derive(Debug)]
pub(super) struct Tracee<'a> {
    pub(super) pid: u32,
    pub(super) tid: Tid,
    pub(super) pidfd: BorrowedFd<'a>,
    pub(super) started: Instant,
    pub(super) limit: Duration,
}

impl Tracee<'_> {
    /// An error of the kernel's as one of ours.
    pub(super) fn refused(&self, what: &'static str) -> impl FnOnce(io::Error) -> AttachError {
        let pid = self.pid;
        move |source| match source.raw_os_error() {
            Some(libc::ESRCH | libc::ECHILD) => AttachError::Exited { pid },
            _ => AttachError::Refused { pid, what, source },
        }
    }

    /// Starts to trace. A tracer of our own process is one that is about to be gone: it is waited for.
    pub(super) fn seize(&self) -> Result<(), AttachError> {
        while let Err(source) = ptrace::seize(self.tid, ptrace::OPTION_SYSGOOD) {
            if source.raw_os_error() != Some(libc::EPERM) {
                return Err(self.refused("trace a thread")(source));
            }
            let status = process::Status::of(self.pid, self.tid.unsigned_abs())?;
            match status.tracer() {
                Some(tracer) if !is_ours(tracer) => {
                    return Err(AttachError::Traced {
                        pid: self.pid,
                        tracer,
                        name: process::name(tracer),
                    });
                }
                Some(_) => self.tick()?,
                None => {
                    // It may have let go between the two calls; a second refusal without a tracer is final.
                    if ptrace::seize(self.tid, ptrace::OPTION_SYSGOOD).is_ok() {
                        break;
                    }
                    let pid = self.pid;
                    return Err(AttachError::Permission { pid, source });
                }
            }
        }
        // Pids are reused: alive now means that what was seized is what the pidfd names.
        self.still_there()
    }

    fn still_there(&self) -> Result<(), AttachError> {
        if has_exited(self.pidfd, &Timespec::default()) {
            return Err(AttachError::Exited { pid: self.pid });
        }
        Ok(())
    }

    fn tick(&self) -> Result<(), AttachError> {
        let tid = self.tid.unsigned_abs();
        tick(self.pidfd, self.pid, tid, self.started, self.limit)
    }

    fn next_stop(&self) -> Result<Stop, AttachError> {
        let asked = Instant::now();
        loop {
            let stop = ptrace::take_stop(self.tid).map_err(self.refused("wait for a thread"))?;
            if let Some(stop) = stop {
                return Ok(stop);
            }
            if asked.elapsed() < EAGER {
                std::thread::yield_now();
            } else {
                self.tick()?;
            }
        }
    }

    pub(super) fn interrupt(&self) -> Result<(), AttachError> {
        ptrace::interrupt(self.tid).map_err(self.refused("interrupt a thread"))
    }

    pub(super) fn resume(&self, how: Resume, signal: i32) -> Result<(), AttachError> {
        ptrace::resume(self.tid, how, signal).map_err(self.refused("resume a thread"))
    }

    /// Waits for the trap that [`interrupt`](Self::interrupt) asked for, which is before the thread's next
    /// instruction. Signals that come first are delivered.
    pub(super) fn wait_for_trap(&self) -> Result<(), AttachError> {
        loop {
            match self.next_stop()? {
                Stop::Event => return Ok(()),
                Stop::Signal(signal) => self.resume(Resume::Run, signal)?,
                Stop::Syscall => self.resume(Resume::Run, 0)?,
            }
        }
    }

    /// Waits for the next entry to or exit from a system call. A SIGSTOP on the way, or its end, is passed on.
    pub(super) fn wait_for_call(&self) -> Result<(), AttachError> {
        loop {
            match self.next_stop()? {
                Stop::Syscall => return Ok(()),
                Stop::Event => self.resume(Resume::ToSyscall, 0)?,
                Stop::Signal(signal) => self.resume(Resume::ToSyscall, signal)?,
            }
        }
    }

    pub(super) fn detach(&self) -> Result<(), AttachError> {
        ptrace::detach(self.tid, 0).map_err(self.refused("let go of a thread"))
    }
}

/// Waits a little, for a process to end at the same time. An error once `limit` has passed since `started`.
pub(super) fn tick(
    pidfd: BorrowedFd<'_>,
    pid: u32,
    tid: u32,
    started: Instant,
    limit: Duration,
) -> Result<(), AttachError> {
    if has_exited(pidfd, &TICK) {
        return Err(AttachError::Exited { pid });
    }
    if started.elapsed() > limit {
        return Err(AttachError::Deadline {
            pid,
            tid,
            state: process::state(pid, tid),
            limit,
        });
    }
    Ok(())
}

/// Whether a process has ended, waiting for it for a while.
pub(super) fn has_exited(pidfd: BorrowedFd<'_>, wait: &Timespec) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(pidfd, PollFlags::IN)];
    matches!(poll(&mut fds, Some(wait)), Ok(1..))
}

/// Whether a tracer is a thread of this process.
fn is_ours(tracer: u32) -> bool {
    std::path::Path::new(&format!("/proc/self/task/{tracer}")).exists()
}
