//! Why a process could not be attached to, and what its operator can do about it.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Why a process could not be attached to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AttachError {
    /// Nothing has this pid.
    #[error("there is no process {pid}; check the pid, which must be of this pid namespace")]
    NoSuchProcess {
        /// The pid asked for.
        pid: u32,
    },
    /// The process ended, before or during what was asked.
    #[error("process {pid} has exited")]
    Exited {
        /// The process.
        pid: u32,
    },
    /// The process has ended and waits for its parent.
    #[error("process {pid} is a zombie: it has ended, and only waits for its parent to notice")]
    Zombie {
        /// The process.
        pid: u32,
    },
    /// The pid is a thread of the kernel.
    #[error("process {pid} is a thread of the kernel and has no memory of its own")]
    KernelThread {
        /// The pid.
        pid: u32,
    },
    /// The pid is a thread, not a process.
    #[error("{pid} is a thread of process {process}; name the process")]
    Thread {
        /// The pid asked for.
        pid: u32,
        /// Whose thread it is.
        process: u32,
    },
    /// Another program traces the process.
    #[error(
        "process {pid} is traced by process {tracer} ({name}); end or detach that debugger first"
    )]
    Traced {
        /// The process.
        pid: u32,
        /// Its tracer.
        tracer: u32,
        /// The tracer's name.
        name: String,
    },
    /// The process, or one of its threads, runs 32-bit code.
    #[error("process {pid} runs 32-bit code; only 64-bit processes can be attached to")]
    Bits32 {
        /// The process.
        pid: u32,
    },
    /// The process is the caller.
    #[error("process {pid} is this one; a process cannot attach to itself")]
    OurOwnProcess {
        /// Our pid.
        pid: u32,
    },
    /// The kernel does not let us trace the process.
    #[error(
        "no permission to attach to process {pid}; run as root or with CAP_SYS_PTRACE, which a \
         non-dumpable process, one of another user, and kernel.yama.ptrace_scope above 0 all require"
    )]
    Permission {
        /// The process.
        pid: u32,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// This build is for a CPU that injection was not ported to.
    #[error(
        "attaching to a running process is not supported on {}",
        std::env::consts::ARCH
    )]
    Architecture,
    /// The thread has a seccomp filter and we may not suspend it.
    #[error(
        "thread {tid} has a seccomp filter, which only a process with CAP_SYS_ADMIN and without a \
         filter of its own may suspend; run as root, outside a sandbox"
    )]
    SeccompNeedsAdmin {
        /// The thread.
        tid: u32,
    },
    /// A seccomp filter would do harm if we died at the wrong moment.
    #[error(
        "a seccomp filter of thread {tid} does not allow {call}, but {action}; {}",
        seccomp_advice(*.overrulable)
    )]
    SeccompForbids {
        /// The thread.
        tid: u32,
        /// The system call.
        call: &'static str,
        /// What the filter does.
        action: &'static str,
        /// Whether [`overrule_seccomp`](super::Target::overrule_seccomp) would go on.
        overrulable: bool,
    },
    /// The thread has a hardware feature or a mode in which its frame could not be unwound.
    #[error("thread {tid} {mode}; injecting into it could crash it, so it was left alone")]
    Unsafe {
        /// The thread.
        tid: u32,
        /// What is in the way.
        mode: &'static str,
    },
    /// No thread had a stack that is certain to have room.
    #[error(
        "thread {tid} of process {pid} does not run on a stack that is known to have room below (a \
         guard page or [stack]); try again at another moment"
    )]
    NoStack {
        /// The process.
        pid: u32,
        /// The last thread that was tried.
        tid: u32,
    },
    /// The process called exec(2) meanwhile.
    #[error(
        "process {pid} executed another program meanwhile; if that is the one meant, try again"
    )]
    Replaced {
        /// The process.
        pid: u32,
    },
    /// The target's code lacks instructions that injection needs.
    #[error("process {pid} has no code with {names}; it uses no known C library or runtime")]
    NoGadget {
        /// The process.
        pid: u32,
        /// What was looked for.
        names: &'static str,
    },
    /// No thread did what it was asked to by the deadline.
    #[error(
        "thread {tid} of process {pid} did not stop within {limit:?} (state {state}); it was let go. It is \
         waiting in the kernel, for a disk or a network file system perhaps: try again"
    )]
    Deadline {
        /// The process.
        pid: u32,
        /// The thread.
        tid: u32,
        /// Its state letter in `/proc`.
        state: char,
        /// How long we waited.
        limit: Duration,
    },
    /// The target may not create a userfaultfd.
    #[error(
        "process {pid} may not create a userfaultfd; {}",
        userfaultfd_advice(.source)
    )]
    Userfaultfd {
        /// The process.
        pid: u32,
        /// What the call returned in the target.
        #[source]
        source: io::Error,
    },
    /// The descriptor to close is not what it was.
    #[error("descriptor {fd} of process {pid} is no userfaultfd any more; it was left alone")]
    NotUserfaultfd {
        /// The process.
        pid: u32,
        /// Its descriptor.
        fd: u32,
    },
    /// A file of `/proc` could not be read.
    #[error("reading {path} failed", path = .path.display())]
    Proc {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel refused a step. The target goes on, untouched or through its own frame.
    #[error("cannot {what} in process {pid}; it was let go and runs on")]
    Refused {
        /// The process.
        pid: u32,
        /// What was attempted.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

impl AttachError {
    /// Whether a different thread of the process may be in a better state.
    pub(super) fn depends_on_the_thread(&self) -> bool {
        matches!(
            self,
            Self::NoStack { .. } | Self::Unsafe { .. } | Self::SeccompForbids { .. }
        )
    }
}

fn seccomp_advice(overrulable: bool) -> &'static str {
    if overrulable {
        "should this program be killed in the microsecond of that call, the target dies of it: allow \
         userfaultfd in the filter, or accept that risk"
    } else {
        "allow it in the target's filter"
    }
}

fn userfaultfd_advice(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EPERM) => "set vm.unprivileged_userfaultfd=1, or give it CAP_SYS_PTRACE",
        Some(libc::ENOSYS) => "this kernel is built without CONFIG_USERFAULTFD",
        Some(libc::EMFILE) => {
            "its limit of open files (RLIMIT_NOFILE) is reached: raise it with prlimit(1)"
        }
        _ => "see the cause",
    }
}
