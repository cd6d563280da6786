//! Makes one thread of the target execute a system call or two, so that the target survives our death at any
//! moment. `docs/decisions/0003-injection-survives-its-own-death.md` has the reasoning.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{PidfdGetfdFlags, pidfd_getfd};

use super::arch::{Call, Frame, Gadgets, Registers};
use super::code::Code;
use super::inspect::{self, Prepared};
use super::mappings::{self, Mapping};
use super::tracee::{self, Tracee};
use super::{AttachError, process};
use crate::sys::ptrace::{self, Resume};

pub(super) const CLOEXEC_NONBLOCK: u32 = 0x8_0800;
/// Only faults of user code are reported. Needs no privilege, and write-protection that the kernel resolves by
/// itself does not report any.
const USER_MODE_ONLY: u32 = 1;

/// What was just done to the target: each is a moment at which we may die.
#[doc(hidden)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    Seized,
    Interrupted,
    Stopped,
    Inspected,
    FrameWritten,
    Armed,
    SignalsBlocked,
    RunningToEntry,
    AtEntry,
    Redirected,
    RunningToExit,
    AtExit,
    Stolen,
    CloseArmed,
    CloseRunningToEntry,
    CloseAtEntry,
    CloseRunningToExit,
    CloseAtExit,
    InterruptedAgain,
    RunningToTrap,
    Trapped,
    SignalsRestored,
    RegistersRestored,
    Detached,
}

/// What is to be done in the target.
#[derive(Debug, Clone, Copy)]
pub(super) enum Job<'a> {
    /// Create a userfaultfd and take it.
    Create {
        /// Whether the target's own descriptor stays open.
        keep: bool,
        /// Whether one that reports user faults only will do.
        user_mode_will_do: bool,
    },
    /// Close descriptors.
    Close(&'a [u32]),
}

/// What was done.
#[derive(Debug)]
pub(super) struct Outcome {
    /// The userfaultfd, if one was to be created.
    pub(super) created: Option<Created>,
    /// How long the thread did not run.
    pub(super) stopped: Duration,
}

#[derive(Debug)]
pub(super) struct Created {
    pub(super) fd: OwnedFd,
    pub(super) remote: u32,
    pub(super) user_mode_only: bool,
}

/// What injection is told of its target.
#[derive(Debug, Clone, Copy)]
pub(super) struct Site<'a> {
    pub(super) pid: u32,
    pub(super) pidfd: BorrowedFd<'a>,
    pub(super) limit: Duration,
    pub(super) overrule_seccomp: bool,
    /// Where the gadgets were the last time.
    pub(super) gadgets: &'a Mutex<Option<Gadgets>>,
}

/// Does `job` in some thread of the target. On failure the target was let go, unharmed.
///
/// In a thread of its own: ptrace binds the target to the thread that traces it, and should we give up on a thread
/// that does not stop, the end of our thread is what lets it go.
pub(super) fn inject(
    site: Site<'_>,
    job: Job<'_>,
    on_step: &mut (dyn FnMut(Step) + Send),
) -> Result<Outcome, AttachError> {
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("memferry-inject".to_owned())
            .spawn_scoped(scope, || in_some_thread(site, job, on_step))
            .map_err(|source| AttachError::Refused {
                pid: site.pid,
                what: "start the thread that injects",
                source,
            })?
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn in_some_thread(
    site: Site<'_>,
    job: Job<'_>,
    on_step: &mut (dyn FnMut(Step) + Send),
) -> Result<Outcome, AttachError> {
    let pid = site.pid;
    let started = Instant::now();
    let threads = threads_to_stop(site, started)?;
    let mappings = mappings::of_process(pid)?; // after the threads, so that it has their stacks
    let code = {
        let mut known = site.gadgets.lock().unwrap_or_else(PoisonError::into_inner);
        let code = Code::find(pid, &mappings, *known)?;
        *known = Some(code.gadgets);
        code
    };
    let mut last = None;
    for tid in threads {
        let mut injection = Injection {
            tracee: Tracee {
                pid,
                tid: tid.cast_signed(),
                pidfd: site.pidfd,
                started,
                limit: site.limit,
            },
            site,
            mappings: &mappings,
            code: &code,
            on_step,
        };
        match injection.run(job) {
            Err(error) if error.depends_on_the_thread() => last = Some(error),
            result => return result,
        }
    }
    Err(last.expect("there was a thread, and it was refused"))
}

/// The threads to try, of which there is one at least. Waits while none can be stopped.
fn threads_to_stop(site: Site<'_>, started: Instant) -> Result<Vec<u32>, AttachError> {
    loop {
        let threads = process::threads(site.pid)?;
        if !threads.is_empty() {
            return Ok(threads);
        }
        tracee::tick(site.pidfd, site.pid, site.pid, started, site.limit)?;
    }
}

/// One attempt in one thread.
struct Injection<'a> {
    tracee: Tracee<'a>,
    site: Site<'a>,
    mappings: &'a [Mapping],
    code: &'a Code,
    on_step: &'a mut (dyn FnMut(Step) + Send),
}

impl Injection<'_> {
    fn run(&mut self, job: Job<'_>) -> Result<Outcome, AttachError> {
        self.tracee.seize()?;
        self.step(Step::Seized);
        self.tracee.interrupt()?;
        self.step(Step::Interrupted);
        self.tracee.wait_for_trap()?;
        let stopped = Instant::now();
        self.step(Step::Stopped);
        let prepared = match self.prepare(job) {
            Ok(prepared) => prepared,
            Err(error) => {
                // Nothing was changed: let it go at once, for another thread may be tried.
                self.tracee.detach()?;
                return Err(error);
            }
        };
        // From here on an error leaves the thread to its frame, which the end of our thread sets off.
        let done = self.perform(job, &prepared)?;
        self.restore(&prepared)?;
        let stopped = stopped.elapsed();
        self.step(Step::Detached);
        Ok(Outcome {
            created: done?,
            stopped,
        })
    }

    fn step(&mut self, step: Step) {
        (self.on_step)(step);
    }

    /// Looks whether the stopped thread can be brought back from anywhere, and writes what does it.
    fn prepare(&mut self, job: Job<'_>) -> Result<Prepared, AttachError> {
        let prepared = inspect::inspect(&self.tracee, self.site, self.mappings, self.code, job)?;
        self.step(Step::Inspected);
        let Frame { address, bytes, .. } = &prepared.frame;
        ptrace::write_memory(self.tracee.tid, *address, bytes).map_err(|_| {
            AttachError::NoStack {
                pid: self.tracee.pid,
                tid: self.tracee.tid.unsigned_abs(),
            }
        })?;
        self.step(Step::FrameWritten);
        Ok(prepared)
    }

    /// Does the job. The outer error is one after which the thread is no longer ours to restore.
    fn perform(
        &mut self,
        job: Job<'_>,
        prepared: &Prepared,
    ) -> Result<Result<Option<Created>, AttachError>, AttachError> {
        self.arm(&Registers::armed(
            &prepared.original,
            &prepared.frame,
            &self.code.gadgets,
        ))?;
        self.step(Step::Armed);
        // Only now: the frame unblocks them, should nobody else.
        ptrace::set_signal_mask(self.tracee.tid, u64::MAX)
            .map_err(self.tracee.refused("block signals"))?;
        self.step(Step::SignalsBlocked);
        match job {
            Job::Create {
                keep,
                user_mode_will_do,
            } => {
                let mut flags = CLOEXEC_NONBLOCK;
                let mut result = self.create(prepared, flags)?;
                if user_mode_will_do && result == -i64::from(libc::EPERM) {
                    flags |= USER_MODE_ONLY;
                    self.arm(&Registers::armed(
                        &prepared.original,
                        &prepared.frame,
                        &self.code.gadgets,
                    ))?;
                    result = self.create(prepared, flags)?;
                }
                self.step(Step::AtExit);
                let Some(remote) = u32::try_from(result).ok().filter(|_| result >= 0) else {
                    let code = i32::try_from(-result).unwrap_or(libc::EIO);
                    return Ok(Err(AttachError::Userfaultfd {
                        pid: self.tracee.pid,
                        source: io::Error::from_raw_os_error(code),
                    }));
                };
                let stolen = pidfd_getfd(
                    self.site.pidfd,
                    remote.cast_signed(),
                    PidfdGetfdFlags::empty(),
                );
                self.step(Step::Stolen);
                if !keep || stolen.is_err() {
                    self.close(prepared, remote)?;
                }
                Ok(match stolen {
                    Ok(fd) => Ok(Some(Created {
                        fd,
                        remote,
                        user_mode_only: flags & USER_MODE_ONLY != 0,
                    })),
                    Err(source) => Err(AttachError::Refused {
                        pid: self.tracee.pid,
                        what: "take the userfaultfd",
                        source: source.into(),
                    }),
                })
            }
            Job::Close(fds) => {
                for &fd in fds {
                    self.close(prepared, fd)?;
                }
                Ok(Ok(None))
            }
        }
    }

    fn arm(&self, registers: &Registers) -> Result<(), AttachError> {
        registers
            .write(self.tracee.tid)
            .map_err(self.tracee.refused("write registers"))
    }

    /// Runs an armed thread to the entry of its `rt_sigreturn`, and there makes it create a userfaultfd instead.
    /// The filters are asked about a call after that stop: so only from there on do they see it.
    fn create(&mut self, prepared: &Prepared, flags: u32) -> Result<i64, AttachError> {
        self.tracee.resume(Resume::ToSyscall, 0)?;
        self.step(Step::RunningToEntry);
        self.tracee.wait_for_call()?;
        self.step(Step::AtEntry);
        let mut registers =
            Registers::read(self.tracee.tid).map_err(self.tracee.refused("read registers"))?;
        registers.redirect(&prepared.frame, Call::userfaultfd(flags));
        self.arm(&registers)?;
        self.step(Step::Redirected);
        self.tracee.resume(Resume::ToSyscall, 0)?;
        self.step(Step::RunningToExit);
        self.tracee.wait_for_call()?;
        let registers =
            Registers::read(self.tracee.tid).map_err(self.tracee.refused("read registers"))?;
        Ok(registers.result())
    }

    /// Makes a thread at the exit of a call, or armed, close a descriptor: by itself, if we die.
    fn close(&mut self, prepared: &Prepared, fd: u32) -> Result<(), AttachError> {
        let close = Call::close(fd);
        self.arm(&Registers::armed_with(
            &prepared.original,
            &prepared.frame,
            &self.code.gadgets,
            close,
        ))?;
        self.step(Step::CloseArmed);
        self.tracee.resume(Resume::ToSyscall, 0)?;
        self.step(Step::CloseRunningToEntry);
        self.tracee.wait_for_call()?;
        self.step(Step::CloseAtEntry);
        self.tracee.resume(Resume::ToSyscall, 0)?;
        self.step(Step::CloseRunningToExit);
        self.tracee.wait_for_call()?;
        self.step(Step::CloseAtExit);
        Ok(())
    }

    /// Puts the thread back exactly as it was stopped, at the place where the kernel decides whether the call
    /// that it was in is restarted, and lets it go.
    fn restore(&mut self, prepared: &Prepared) -> Result<(), AttachError> {
        self.tracee.interrupt()?;
        self.step(Step::InterruptedAgain);
        self.tracee.resume(Resume::Run, 0)?;
        self.step(Step::RunningToTrap);
        self.tracee.wait_for_trap()?;
        self.step(Step::Trapped);
        ptrace::set_signal_mask(self.tracee.tid, prepared.mask)
            .map_err(self.tracee.refused("restore the signal mask"))?;
        self.step(Step::SignalsRestored);
        self.arm(&prepared.original)?;
        self.step(Step::RegistersRestored);
        self.tracee.detach()
    }
}
