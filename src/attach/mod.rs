//! A running process from outside: its mappings, and a userfaultfd of its address space.
//!
//! The kernel gives a userfaultfd only to a process that asks for its own memory, so [`Target`] makes one of the
//! process's threads ask, and takes the descriptor. The thread is stopped for a fraction of a millisecond, the
//! others not at all; no code is written, no system call of the process fails because of it, and we may be killed
//! at any moment without harm to the process.

mod arch;
mod code;
mod error;
mod halt;
mod inject;
mod inspect;
mod mappings;
mod process;
mod seccomp;
mod tracee;

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;
use std::time::Duration;

use rustix::event::Timespec;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

pub use error::AttachError;
#[doc(hidden)]
pub use inject::Step;
use inject::{Job, Outcome, Site};
pub use mappings::{Mapping, Permissions};

/// How long a thread may take to do what it is asked to, altogether.
const LIMIT: Duration = Duration::from_secs(2);

/// A running process that is attached to. Holding one does nothing to the process.
#[derive(Debug)]
pub struct Target {
    pid: u32,
    pidfd: OwnedFd,
    overrule_seccomp: bool,
    gadgets: Mutex<Option<arch::Gadgets>>,
}

/// Whether the target's own descriptor of its userfaultfd stays open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// It is closed. When our copy is closed, or we die, the registrations vanish: right for dirty tracking. One that
    /// reports the faults of user code only will do, since asynchronous write-protection reports none.
    Close,
    /// It stays open until [`Target::close_remote`]. If we die, a thread of the target that touches a missing page
    /// waits, instead of reading zeroes: right for post-copy. It reports every fault, which the kernel may refuse to
    /// an unprivileged target.
    Keep,
}

/// A descriptor in the target, by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RemoteFd(u32);

impl RemoteFd {
    /// Its number in the target.
    #[must_use]
    pub fn number(self) -> u32 {
        self.0
    }
}

/// A userfaultfd of the target's address space, before `UFFDIO_API`.
#[derive(Debug)]
pub struct Stolen {
    /// Ours. Non-blocking and close-on-exec.
    pub fd: OwnedFd,
    /// The target's own, if it is still open there.
    pub remote: Option<RemoteFd>,
    /// Whether it was created with `UFFD_USER_MODE_ONLY`, as an unprivileged process may: then faults that the
    /// kernel takes for the process (KVM's too) are not reported but fail. Only with [`Keep::Close`].
    pub user_mode_only: bool,
    /// How long the one thread did not run.
    pub stopped: Duration,
}

impl Target {
    /// Finds a process and checks that it can be attached to. Does not block, and does nothing to it.
    ///
    /// # Errors
    /// One for each reason to refuse: there is no such process, or it is a zombie, a thread, of the kernel, traced,
    /// 32-bit, this process, or not ours to trace; or injection was not ported to this CPU.
    pub fn open(pid: u32) -> Result<Self, AttachError> {
        if !arch::SUPPORTED {
            return Err(AttachError::Architecture);
        }
        if pid == std::process::id() {
            return Err(AttachError::OurOwnProcess { pid });
        }
        let missing = || AttachError::NoSuchProcess { pid };
        let status = process::Status::of(pid, pid).map_err(|error| match error {
            AttachError::Exited { .. } => missing(),
            other => other,
        })?;
        let process = status.process();
        if process != pid {
            return Err(AttachError::Thread { pid, process });
        }
        let raw = Pid::from_raw(pid.cast_signed()).ok_or_else(missing)?;
        let pidfd = pidfd_open(raw, PidfdFlags::empty()).map_err(|errno| match errno {
            rustix::io::Errno::SRCH => missing(),
            _ => AttachError::Refused {
                pid,
                what: "get a pidfd",
                source: errno.into(),
            },
        })?;
        if process::is_kernel_thread(pid)? {
            return Err(AttachError::KernelThread { pid });
        }
        if tracee::has_exited(pidfd.as_fd(), &Timespec::default()) {
            return Err(AttachError::Zombie { pid });
        }
        if let Some(tracer) = status.tracer() {
            return Err(AttachError::Traced {
                pid,
                tracer,
                name: process::name(tracer),
            });
        }
        if process::is_32_bit(pid)? {
            return Err(AttachError::Bits32 { pid });
        }
        // What tracing is allowed by, allows this too.
        let memory = format!("/proc/{pid}/mem").into();
        File::open(&memory).map_err(|source| process::failed(pid, memory, source))?;
        let target = Self {
            pid,
            pidfd,
            overrule_seccomp: false,
            gadgets: Mutex::new(None),
        };
        // What was read was of the process that the pidfd names, if that still has the pid.
        if target.has_exited() {
            return Err(AttachError::Exited { pid });
        }
        Ok(target)
    }

    /// Its pid.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Readable once the process has ended.
    #[must_use]
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Whether the process has ended.
    #[must_use]
    pub fn has_exited(&self) -> bool {
        tracee::has_exited(self.pidfd(), &Timespec::default())
    }

    /// Creates userfaultfds even where a seccomp filter of the target answers that call by killing it.
    ///
    /// The filter is suspended for the call, but only while we live: should we be killed between the moment at which
    /// the call is set up and the one, microseconds later, at which the kernel looks at the filter, then the
    /// target dies too. Off at first; a target whose filter allows the call, or answers with an error, needs it not.
    pub fn overrule_seccomp(&mut self, accept_the_risk: bool) {
        self.overrule_seccomp = accept_the_risk;
    }

    /// Its mappings, by address.
    ///
    /// # Errors
    /// If it has exited or `/proc` cannot be read.
    pub fn mappings(&self) -> Result<Vec<Mapping>, AttachError> {
        self.still_there(mappings::of_process(self.pid))
    }

    /// Its mappings of one file, by address. The file is compared, not the name: it may be deleted, a memfd or
    /// in another mount namespace.
    ///
    /// # Errors
    /// If it has exited or `/proc` cannot be read.
    pub fn mappings_of(&self, file: &File) -> Result<Vec<Mapping>, AttachError> {
        self.still_there(mappings::of_file(self.pid, file))
    }

    /// Makes the process create a userfaultfd and takes it. Blocks for 2 s at most.
    ///
    /// # Errors
    /// If no thread can be stopped in time, used safely, or is allowed the call. The process was let go, unharmed.
    pub fn userfaultfd(&self, keep: Keep) -> Result<Stolen, AttachError> {
        self.inject_with_steps(keep, &mut |_| {})
    }

    /// [`userfaultfd`](Self::userfaultfd) with [`Keep::Keep`].
    ///
    /// # Errors
    /// As there.
    pub fn inject_userfaultfd(&self) -> Result<Stolen, AttachError> {
        self.userfaultfd(Keep::Keep)
    }

    /// [`userfaultfd`](Self::userfaultfd), telling of every step: for tests that die at one.
    #[doc(hidden)]
    pub fn inject_with_steps(
        &self,
        keep: Keep,
        on_step: &mut (dyn FnMut(Step) + Send),
    ) -> Result<Stolen, AttachError> {
        let keep = keep == Keep::Keep;
        let job = Job::Create {
            keep,
            user_mode_will_do: !keep,
        };
        let Outcome { created, stopped } = inject::inject(self.site(), job, on_step)?;
        let created = created.expect("a job that creates returns what it created");
        Ok(Stolen {
            fd: created.fd,
            remote: keep.then_some(RemoteFd(created.remote)),
            user_mode_only: created.user_mode_only,
            stopped,
        })
    }

    /// Closes the target's own descriptor of a userfaultfd. Blocks for 2 s at most.
    ///
    /// # Errors
    /// As [`userfaultfd`](Self::userfaultfd); also if the descriptor is not a userfaultfd any more.
    pub fn close_remote(&self, remote: RemoteFd) -> Result<(), AttachError> {
        if !self.has_exited() && !process::is_userfaultfd(self.pid, remote.0) {
            return Err(AttachError::NotUserfaultfd {
                pid: self.pid,
                fd: remote.0,
            });
        }
        inject::inject(self.site(), Job::Close(&[remote.0]), &mut |_| {}).map(drop)
    }

    /// The userfaultfds that are open in the target: its own, those kept open by [`Keep::Keep`], and those that an
    /// injector left which was killed.
    ///
    /// # Errors
    /// If it has exited or `/proc` cannot be read.
    pub fn stale_userfaultfds(&self) -> Result<Vec<RemoteFd>, AttachError> {
        let found = self.still_there(process::userfaultfds(self.pid))?;
        Ok(found.into_iter().map(RemoteFd).collect())
    }

    /// Closes every userfaultfd in the target; returns how many there were. Blocks for 2 s at most.
    ///
    /// For what an injector left that was killed. Only for a target that uses no userfaultfd of its own, and
    /// while nobody serves its faults: what waits for a page then reads zeroes.
    ///
    /// # Errors
    /// As [`userfaultfd`](Self::userfaultfd).
    pub fn reclaim_userfaultfds(&self) -> Result<usize, AttachError> {
        let stale = self.still_there(process::userfaultfds(self.pid))?;
        if !stale.is_empty() {
            inject::inject(self.site(), Job::Close(&stale), &mut |_| {})?;
        }
        Ok(stale.len())
    }

    fn site(&self) -> Site<'_> {
        Site {
            pid: self.pid,
            pidfd: self.pidfd(),
            limit: LIMIT,
            overrule_seccomp: self.overrule_seccomp,
            gadgets: &self.gadgets,
        }
    }

    /// What was read under the pid is the target's if the target still has it.
    fn still_there<T>(&self, read: Result<T, AttachError>) -> Result<T, AttachError> {
        if self.has_exited() {
            return Err(AttachError::Exited { pid: self.pid });
        }
        read
    }
}
