//! Ctrl-C: what was started is ended, so that whoever waits for it stops waiting, and everything is cleared away on
//! the way out as after any other failure.

use std::os::fd::OwnedFd;
use std::process::Child;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Result;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// What there is to end. A descriptor of a process, unlike its number, never means another one.
static HELD: Mutex<Held> = Mutex::new(Held {
    interrupted: false,
    processes: Vec::new(),
});

#[derive(Debug)]
struct Held {
    interrupted: bool,
    processes: Vec<Arc<OwnedFd>>,
}

/// From now on SIGINT and SIGTERM kill the processes that are on a [`Leash`], in place of this program.
///
/// # Errors
/// If this process cannot handle signals, or does already.
pub fn handle() -> Result<()> {
    ctrlc::set_handler(|| {
        let mut held = held();
        held.interrupted = true;
        for process in &held.processes {
            kill(process);
        }
    })?;
    Ok(())
}

/// Whether somebody has asked this program to end.
#[must_use]
pub fn requested() -> bool {
    held().interrupted
}

/// A process that does not outlive an interrupt, for as long as this is kept.
#[derive(Debug)]
pub struct Leash(Option<Arc<OwnedFd>>);

impl Leash {
    /// Puts a process on the leash, which its parent has not reaped yet.
    #[must_use]
    pub fn hold(child: &Child) -> Self {
        // Kernels before 5.3 have no such descriptors: there an interrupt waits for a deadline.
        let process = i32::try_from(child.id())
            .ok()
            .and_then(Pid::from_raw)
            .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok())
            .map(Arc::new);
        if let Some(process) = &process {
            let mut held = held();
            held.processes.push(Arc::clone(process));
            if held.interrupted {
                kill(process); // the handler ran before it could know of this one
            }
        }
        Self(process)
    }
}

impl Drop for Leash {
    fn drop(&mut self) {
        if let Some(process) = &self.0 {
            held()
                .processes
                .retain(|other| !Arc::ptr_eq(other, process));
        }
    }
}

fn held() -> MutexGuard<'static, Held> {
    HELD.lock().unwrap_or_else(PoisonError::into_inner)
}

fn kill(process: &OwnedFd) {
    // Fails only where it has ended already.
    let _ended = pidfd_send_signal(process, Signal::KILL);
}
