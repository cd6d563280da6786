//! What a process costs: processor time and memory.

use std::fs;
use std::process::Child;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};

use crate::command;

/// The processor time that a process has used, to 10 ms; also of one that has ended and was not reaped yet.
///
/// # Errors
/// If there is no such process.
pub fn cpu_time(pid: u32) -> Result<Duration> {
    parse_cpu_time(&fs::read_to_string(format!("/proc/{pid}/stat"))?)
}

/// The processor time that one thread of a process has used, to 10 ms.
///
/// # Errors
/// If there is no such thread.
pub fn thread_cpu_time(pid: u32, thread: u64) -> Result<Duration> {
    parse_cpu_time(&fs::read_to_string(format!(
        "/proc/{pid}/task/{thread}/stat"
    ))?)
}

/// Waits until a child has ended, and leaves it to be reaped, so that what it cost can still be asked.
///
/// # Errors
/// If it does not end within `limit`.
pub fn wait_unreaped(child: &Child, limit: Duration) -> Result<()> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pid = pid.context("a child has a number")?;
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    command::poll_until(Instant::now() + limit, || {
        waitid(WaitId::Pid(pid), options).transpose()
    })
    .with_context(|| format!("did not end within {limit:?}"))??;
    Ok(())
}

fn parse_cpu_time(stat: &str) -> Result<Duration> {
    // The name is in brackets and may hold anything; fields are counted after it.
    let (_, fields) = stat
        .rsplit_once(") ")
        .context("unknown format of /proc/PID/stat")?;
    let ticks: u64 = fields
        .split(' ')
        .skip(11) // utime and stime are fields 14 and 15 of all, the name is field 2
        .take(2)
        .map(|field| field.parse::<u64>().unwrap_or(0))
        .sum();
    let per_second = rustix::param::clock_ticks_per_second();
    Ok(Duration::from_millis(ticks * 1000 / per_second.max(1)))
}

/// Often enough that no buffer of a migration of a second is missed, seldom enough to cost nothing.
const SAMPLE_EVERY: Duration = Duration::from_millis(10);

/// Watches how much memory of its own a process has resident, until it is asked or dropped.
#[derive(Debug)]
pub struct MemoryMeter {
    stop: Sender<()>,
    sampler: Option<JoinHandle<u64>>,
}

impl MemoryMeter {
    /// Begins to watch. Shared memory does not count, such as the RAM of a guest that is a file in tmpfs; files do,
    /// the program's own among them, unless `files` says that the guest's RAM is one.
    #[must_use]
    pub fn start(pid: u32, files: bool) -> Self {
        let (stop, stopped) = mpsc::channel::<()>();
        let sampler = thread::spawn(move || {
            let mut peak = 0;
            loop {
                if let Ok(status) = fs::read_to_string(format!("/proc/{pid}/status")) {
                    peak = peak.max(parse_resident(&status, files));
                }
                if stopped.recv_timeout(SAMPLE_EVERY) != Err(RecvTimeoutError::Timeout) {
                    return peak;
                }
            }
        });
        Self {
            stop,
            sampler: Some(sampler),
        }
    }

    /// The most that was seen, in bytes.
    #[must_use]
    pub fn finish(mut self) -> u64 {
        self.join()
    }

    fn join(&mut self) -> u64 {
        // Fails only where the sampler has ended already.
        let _ended = self.stop.send(());
        let sampler = self.sampler.take().map(JoinHandle::join);
        sampler.and_then(Result::ok).unwrap_or(0)
    }
}

impl Drop for MemoryMeter {
    fn drop(&mut self) {
        self.join();
    }
}

/// Bytes; nothing of a process that has ended.
fn parse_resident(status: &str, files: bool) -> u64 {
    status
        .lines()
        .filter_map(|line| line.split_once(':'))
        .filter(|(name, _)| *name == "RssAnon" || (files && *name == "RssFile"))
        .filter_map(|(_, value)| {
            value
                .trim()
                .strip_suffix(" kB")
                .and_then(|number| number.parse::<u64>().ok())
        })
        .sum::<u64>()
        * 1024
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_name_with_brackets_and_blanks_does_not_shift_the_fields() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 1 0 0 0 150 50 0 0 20 0 1 0 5 6 7";
        let per_second = rustix::param::clock_ticks_per_second();
        let expected = Duration::from_millis(200_000 / per_second);
        assert_eq!(parse_cpu_time(stat).unwrap(), expected);
    }

    #[test]
    fn shared_memory_does_not_count_as_a_process_own() {
        let status = "Name:\tx\nVmRSS:\t 900 kB\nRssAnon:\t     100 kB\nRssFile:\t 20 kB\nRssShmem:\t 780 kB\n";
        assert_eq!(parse_resident(status, true), 120 << 10);
        assert_eq!(parse_resident(status, false), 100 << 10);
    }

    #[test]
    fn what_a_child_cost_can_be_asked_after_it_has_ended() {
        let mut child = Command::new("true").spawn().unwrap();
        wait_unreaped(&child, Duration::from_secs(30)).unwrap();
        assert!(cpu_time(child.id()).is_ok());
        assert!(child.wait().unwrap().success());
    }
}
