//! Keeping a process from running for a moment.

use std::fs;
use std::io;
use std::thread;
use std::time::Instant;

use super::tracee::Tracee;
use super::{AttachError, LIMIT, Target};
use crate::sys::ptrace::Tid;

impl Target {
    /// Runs `work` while no thread of the process runs in user space; they go on afterwards whatever it answers, and
    /// also if we die meanwhile. Blocks for 2 s and the length of `work` at most.
    ///
    /// # Errors
    /// If a thread cannot be stopped in time, or `/proc` cannot be read: `work` did not run then. Else what `work`
    /// answers.
    pub fn halted(&self, work: &mut (dyn FnMut() -> io::Result<()> + Send)) -> io::Result<()> {
        // A tracer is a thread, and its end lets go of whatever it still traces.
        thread::scope(|scope| {
            let tracer = scope.spawn(|| {
                let tracees = self.stop_all().map_err(io::Error::other)?;
                let result = work();
                for tracee in &tracees {
                    // One that is gone needs no letting go.
                    let _ = tracee.detach();
                }
                result
            });
            tracer
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Stops every thread. A stopped thread starts none, so a listing without a new one is complete.
    fn stop_all(&self) -> Result<Vec<Tracee<'_>>, AttachError> {
        let started = Instant::now();
        let mut tracees: Vec<Tracee<'_>> = Vec::new();
        loop {
            let before = tracees.len();
            for tid in self.threads()? {
                if tracees.iter().any(|tracee| tracee.tid == tid) {
                    continue;
                }
                let tracee = Tracee {
                    pid: self.pid,
                    tid,
                    pidfd: self.pidfd(),
                    started,
                    limit: LIMIT,
                };
                let stopped = tracee
                    .seize()
                    .and_then(|()| tracee.interrupt())
                    .and_then(|()| tracee.wait_for_trap());
                match stopped {
                    Ok(()) => tracees.push(tracee),
                    // A thread that ended since it was listed writes nothing any more.
                    Err(AttachError::Exited { .. }) if !self.has_exited() => {}
                    Err(error) => return Err(error),
                }
            }
            if tracees.len() == before {
                return Ok(tracees);
            }
        }
    }

    fn threads(&self) -> Result<Vec<Tid>, AttachError> {
        let path = format!("/proc/{}/task", self.pid);
        let entries = fs::read_dir(&path).map_err(|source| AttachError::Refused {
            pid: self.pid,
            what: "list the threads",
            source,
        })?;
        Ok(entries
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .collect())
    }
}
