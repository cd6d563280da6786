//! The VMM that is served: whether it still runs, and how it is ended if it cannot have its memory.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};

use anyhow::Context;
use nix::sys::socket::{getsockopt, sockopt};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::output::warn;

/// What the watchdog is told when there is nothing to watch over any more.
const RELEASED: u8 = b'.';

/// The VMM at the other end of a socket.
pub(super) struct Vmm {
    pid: Option<Pid>,
    process: Option<OwnedFd>,
    pub(super) socket: UnixStream,
}

impl Vmm {
    pub(super) fn new(socket: UnixStream) -> Self {
        let pid = getsockopt(&socket, sockopt::PeerCredentials)
            .ok()
            .and_then(|peer| Pid::from_raw(peer.pid()));
        // Before Linux 6.5 the number has to do. It is not another's yet: the process has its end of the socket open.
        let by_number = || pidfd_open(pid?, PidfdFlags::empty()).ok();
        let process = getsockopt(&socket, sockopt::PeerPidfd)
            .ok()
            .or_else(by_number);
        Self {
            pid,
            process,
            socket,
        }
    }

    /// Its process number, if its process can be seen from here.
    pub(super) fn pid(&self) -> Option<i32> {
        self.pid.map(Pid::as_raw_pid)
    }

    /// Whether it has ended; where its process cannot be seen, whether it has closed the socket.
    pub(super) fn has_ended(&self) -> bool {
        let (watched, flags) = match &self.process {
            Some(process) => (process.as_fd(), PollFlags::IN),
            // Hanging up is always told of.
            None => (self.socket.as_fd(), PollFlags::empty()),
        };
        let mut polled = [PollFd::from_borrowed_fd(watched, flags)];
        let now = Timespec::default();
        rustix::event::poll(&mut polled, Some(&now)).is_ok_and(|ready| ready > 0)
    }

    /// Ends it; nothing is wrong if it has ended.
    pub(super) fn kill(&self) -> io::Result<()> {
        let process = self.process.as_ref().ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::NotFound,
                "its process cannot be seen from here: another PID namespace hides it",
            )
        })?;
        kill(process)
    }
}

fn kill(process: impl AsFd) -> io::Result<()> {
    match pidfd_send_signal(process, Signal::KILL) {
        Ok(()) | Err(Errno::SRCH) => Ok(()),
        Err(Errno::PERM) => Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "this user may not end it: run as root, or as the user of the VMM",
        )),
        Err(errno) => Err(errno.into()),
    }
}

/// A process that ends the VMM if this one dies.
pub(super) struct Watchdog {
    child: Child,
    input: ChildStdin,
}

impl Watchdog {
    /// Starts this program anew, to watch over `vmm`.
    pub(super) fn start(vmm: &Vmm) -> io::Result<Self> {
        let process = vmm.process.as_ref().ok_or(io::ErrorKind::NotFound)?;
        // By this name it is the same program even if a newer release has replaced the file.
        let mut child = Command::new("/proc/self/exe")
            .arg("uffd-watch")
            .stdin(Stdio::piped())
            // It says nothing there: this is how it gets the descriptor.
            .stdout(Stdio::from(process.try_clone()?))
            // A signal to this process group is not for it.
            .process_group(0)
            .spawn()?;
        let input = child.stdin.take().ok_or(io::ErrorKind::BrokenPipe)?;
        Ok(Self { child, input })
    }

    /// Nothing happens to the VMM any more when this process ends.
    pub(super) fn release(mut self) {
        if self.input.write_all(&[RELEASED]).is_err() {
            // It must not do now what it was started for.
            let _ = self.child.kill();
        }
        drop(self.input);
        let _ = self.child.wait();
    }
}

/// `memferry uffd-watch`: ends the VMM if its handler dies. Nobody calls it but `memferry uffd-handler`, which holds the other end of its
/// standard input, and has made the VMM's process its standard output.
pub(crate) fn watch() -> anyhow::Result<()> {
    // Who stops the handler does not mean this one, which ends with it.
    ctrlc::set_handler(|| {})?;
    let mut told = Vec::new();
    io::stdin().read_to_end(&mut told)?;
    if told.contains(&RELEASED) {
        return Ok(());
    }
    kill(io::stdout()).context(
        "the handler of a VMM has died, and the VMM could not be ended: it waits at its first absent page, for ever",
    )?;
    warn(
        &"memferry: the handler has died before the VMM had all of its memory; the VMM was killed",
    );
    Ok(())
}
