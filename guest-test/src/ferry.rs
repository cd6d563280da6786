//! A migration by the `memferry` command, as a user runs it: one program at each end.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;

use crate::command;
use crate::interrupt::Leash;
use crate::process::{self, MemoryMeter};
use crate::qemu::Guest;

/// What a migration took, as the two commands tell it.
#[derive(Debug, Clone)]
pub struct Report {
    /// When the sending command was started.
    pub began: Instant,
    /// From there until the sender said that all memory was at the destination; what follows is verification.
    pub complete: Duration,
    /// From there until both commands had ended.
    pub total: Duration,
    /// The events of `memferry qemu send`, in their order.
    pub sent: Vec<Value>,
    /// The events of `memferry qemu receive`, in their order.
    pub received: Vec<Value>,
    /// Processor time of both QEMUs meanwhile, the guest's own included.
    pub cpu: Duration,
    /// The part of that which the guest's processors used.
    pub vcpu: Duration,
    /// What `memferry qemu send` cost.
    pub sender: Usage,
    /// What `memferry qemu receive` cost, its wait for the sender included.
    pub receiver: Usage,
}

/// What one of the two commands cost.
#[derive(Debug, Clone, Copy)]
pub struct Usage {
    /// Its processor time.
    pub cpu: Duration,
    /// The most memory that it had resident, in bytes, without the guest's RAM that it maps.
    pub resident: u64,
}

impl Report {
    /// What the last event that has the field says, at either end.
    #[must_use]
    pub fn field(&self, name: &str) -> Option<&Value> {
        let events = self.received.iter().rev().chain(self.sent.iter().rev());
        events.filter_map(|event| event.get(name)).next()
    }

    /// Whether the destination's memory was proved to be the source's.
    #[must_use]
    pub fn is_verified(&self) -> bool {
        // Every end that says something about it has to say that something was compared and nothing differs.
        let mut verdicts = self
            .sent
            .iter()
            .chain(&self.received)
            .filter(|event| event["event"] == "verified")
            .peekable();
        verdicts.peek().is_some()
            && verdicts.all(|verdict| {
                verdict["different"].as_u64() == Some(0)
                    && verdict["compared"]
                        .as_u64()
                        .is_some_and(|compared| compared > 0)
            })
    }
}

/// The destination listens and prints where well within this.
const PAIRING_LIMIT: Duration = Duration::from_secs(30);

/// Compiles the command as users get it, and yields where it is: beside the program that runs now, in the same
/// target directory.
///
/// # Errors
/// If it does not compile.
pub fn build() -> Result<PathBuf> {
    command::build(&["-p", "memferry", "--bin", "memferry"])
}

/// Migrates a running guest to a QEMU started with [`Guest::incoming`], paused: runs
/// `memferry qemu receive --qmp SOCKET --json` and `memferry qemu send --qmp SOCKET PAIRING --json` and collects
/// what they print.
///
/// # Errors
/// If either fails or both have not ended within `limit`; holds what they printed. Both have ended then.
pub fn migrate(
    memferry: &Path,
    source: &Guest,
    destination: &Guest,
    limit: Duration,
) -> Result<Report> {
    migrate_with(memferry, source, destination, &[], limit)
}

/// As [`migrate`], with more options for `memferry qemu send`.
///
/// # Errors
/// As [`migrate`].
pub fn migrate_with(
    memferry: &Path,
    source: &Guest,
    destination: &Guest,
    options: &[String],
    limit: Duration,
) -> Result<Report> {
    let mut receive = Ferry::start(memferry, "receive", destination, &[])?;
    let pairing = receive.pairing()?;

    let cpu = || anyhow::Ok(source.cpu_time()? + destination.cpu_time()?);
    let vcpu = || anyhow::Ok(source.vcpu_time()? + destination.vcpu_time()?);
    let (cpu_before, vcpu_before) = (cpu()?, vcpu()?);
    let began = Instant::now();
    let deadline = began + limit;
    let arguments = [&[pairing], options].concat();
    let mut send = Ferry::start(memferry, "send", source, &arguments)?;
    // The sender first: where it fails, its reason is the better one.
    let sender = send.finish(deadline)?;
    let receiver = receive.finish(deadline)?;
    let total = began.elapsed();
    let complete = send.complete.map_or(total, |at| at - began);
    Ok(Report {
        began,
        complete,
        total,
        sent: std::mem::take(&mut send.events),
        received: std::mem::take(&mut receive.events),
        cpu: cpu()?.saturating_sub(cpu_before),
        vcpu: vcpu()?.saturating_sub(vcpu_before),
        sender,
        receiver,
    })
}

/// One of the two commands; killed when dropped.
#[derive(Debug)]
struct Ferry {
    name: &'static str,
    process: Child,
    _leash: Leash,
    memory: Option<MemoryMeter>,
    lines: Receiver<(Instant, String)>,
    complaints: Receiver<(Instant, String)>,
    events: Vec<Value>,
    /// When it said that all memory had been moved.
    complete: Option<Instant>,
}

impl Ferry {
    fn start(
        memferry: &Path,
        name: &'static str,
        guest: &Guest,
        arguments: &[String],
    ) -> Result<Self> {
        let mut process = Command::new(memferry)
            .args(["qemu", name, "--qmp"])
            .arg(guest.qmp_socket())
            .args(arguments)
            .arg("--json")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", memferry.display()))?;
        let lines = read_lines(process.stdout.take());
        let complaints = read_lines(process.stderr.take());
        let ram_is_shared_memory = guest.memory_file().starts_with("/dev/shm");
        Ok(Self {
            name,
            _leash: Leash::hold(&process),
            memory: Some(MemoryMeter::start(process.id(), ram_is_shared_memory)),
            process,
            lines,
            complaints,
            events: Vec::new(),
            complete: None,
        })
    }

    /// What the sender has to be given: the receiver's first event.
    fn pairing(&mut self) -> Result<String> {
        let event = match self.next(Instant::now() + PAIRING_LIMIT) {
            Ok(Some(event)) => event,
            Ok(None) => return Err(self.explain(anyhow!("it ended before it was ready"))),
            Err(reason) => return Err(self.explain(reason)),
        };
        let string = event["string"].as_str().map(str::to_owned);
        string.with_context(|| format!("the receiver's first event is no pairing: {event}"))
    }

    /// Reads events until the command ends, and yields what it cost.
    fn finish(&mut self, deadline: Instant) -> Result<Usage> {
        loop {
            match self.next(deadline) {
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(reason) => return Err(self.explain(reason)),
            }
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let left = left.max(Duration::from_secs(1));
        process::wait_unreaped(&self.process, left)?;
        let usage = Usage {
            cpu: process::cpu_time(self.process.id())?,
            resident: self.memory.take().map_or(0, MemoryMeter::finish),
        };
        let status = command::wait(&mut self.process, left)?;
        if status.success() {
            Ok(usage)
        } else {
            Err(self.explain(anyhow!("it failed ({status})")))
        }
    }

    /// The next event, or nothing when there are no more.
    fn next(&mut self, deadline: Instant) -> Result<Option<Value>> {
        let left = deadline.saturating_duration_since(Instant::now());
        let (at, line) = match self.lines.recv_timeout(left) {
            Ok(line) => line,
            Err(RecvTimeoutError::Disconnected) => return Ok(None),
            Err(RecvTimeoutError::Timeout) => bail!("it did not get on in time"),
        };
        let event: Value =
            serde_json::from_str(&line).with_context(|| format!("not an event: {line}"))?;
        if event["event"] == "phase" && event["phase"] == "verifying" {
            self.complete = Some(at);
        }
        self.events.push(event.clone());
        Ok(Some(event))
    }

    fn explain(&mut self, reason: anyhow::Error) -> anyhow::Error {
        // So that what it says on standard error is all there.
        let _ended = self.process.kill();
        let complaints: Vec<String> = self.complaints.iter().map(|(_, line)| line).collect();
        let events: Vec<String> = self.events.iter().map(Value::to_string).collect();
        reason.context(format!(
            "memferry qemu {}\nits events:\n{}\nits errors:\n{}",
            self.name,
            events.join("\n"),
            complaints.join("\n")
        ))
    }
}

impl Drop for Ferry {
    fn drop(&mut self) {
        // Fails only where it has ended already.
        let _ended = self.process.kill();
        let _reaped = self.process.wait();
    }
}

/// Lines, each with the time at which it came.
fn read_lines(pipe: Option<impl std::io::Read + Send + 'static>) -> Receiver<(Instant, String)> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        for line in pipe
            .into_iter()
            .flat_map(|pipe| BufReader::new(pipe).lines())
            .map_while(Result::ok)
        {
            // Nobody listens any more: the rest is still read, so that the command does not block.
            let _unheard = sender.send((Instant::now(), line));
        }
    });
    receiver
}
