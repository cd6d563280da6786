//! One QEMU: its boot, what its guest reports, how it ends.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use tempfile::TempDir;

use super::initramfs::Initramfs;
use super::{Ended, Lab};
use crate::accel::Accel;
use crate::command;
use crate::interrupt::{self, Leash};
use crate::qemu;
use crate::serial::Log;

/// Boots, until one reports.
const BOOTS: usize = 3;
/// A kernel's panic takes 40 lines, and its reason is among the first.
const LAST_LINES: usize = 60;
/// What was printed before the report of the end, and is still in a socket.
const OUTPUT_LIMIT: Duration = Duration::from_secs(10);
/// An oops is a panic, so that it is told; `mitigations=off`, because nothing in there is secret.
const KERNEL_OPTIONS: &str =
    "console=ttyS0 quiet panic=-1 oops=panic reboot=t mitigations=off random.trust_cpu=on";

/// Old, so that little is emulated, but with a source of randomness, which a kernel waits for.
const EMULATED: &str = "qemu64,+rdrand";

/// Who reads what the program prints. Shared, because a boot that hangs is given up together with its reader.
type Output = Arc<Mutex<Box<dyn Write + Send>>>;

pub(super) fn run(
    lab: &Lab,
    initramfs: &Initramfs,
    output: Box<dyn Write + Send>,
) -> Result<Ended> {
    let output: Output = Arc::new(Mutex::new(output));
    let machine = boot(lab, initramfs, &output)?;
    let (ended, printed) = machine.await_end(Some(Instant::now() + lab.limit))?;
    machine.await_output(printed)?;
    Ok(ended)
}

pub(super) fn interact(lab: &Lab, initramfs: &Initramfs) -> Result<Ended> {
    let output: Output = Arc::new(Mutex::new(Box::new(io::stdout())));
    let machine = boot(lab, initramfs, &output)?;
    let mut typed = machine.port.try_clone()?;
    // It reads for as long as this program runs: nothing interrupts a read of a terminal.
    thread::spawn(move || {
        let _closed = io::copy(&mut io::stdin(), &mut typed);
    });
    let _raw = RawTerminal::set();
    Ok(machine.await_end(None)?.0)
}

/// Starts QEMU until a guest reports.
fn boot(lab: &Lab, initramfs: &Initramfs, output: &Output) -> Result<Machine> {
    let mut attempt = 1;
    loop {
        let machine = Machine::start(lab, initramfs, attempt, output)?;
        match machine.await_ready(Instant::now() + lab.boot_limit) {
            Ok(()) => return Ok(machine),
            Err(reason) if attempt == BOOTS || interrupt::requested() => return Err(reason),
            Err(reason) => {
                let first = reason.to_string();
                eprintln!(
                    "{}; booting again",
                    first.lines().next().unwrap_or_default()
                );
            }
        }
        attempt += 1;
    }
}

/// A QEMU; killed when dropped.
struct Machine {
    process: Child,
    _leash: Leash,
    /// The kernel's console.
    console: Log<String>,
    /// What `lab-init` reports.
    reports: Log<String>,
    /// The program's port, and how many bytes have come through it.
    port: UnixStream,
    printed: Arc<AtomicU64>,
    readers: Vec<JoinHandle<()>>,
    directory: TempDir,
}

impl Machine {
    fn start(lab: &Lab, initramfs: &Initramfs, attempt: usize, output: &Output) -> Result<Self> {
        let directory = tempfile::Builder::new()
            .prefix(&format!("boot-{attempt}-"))
            .tempdir_in(initramfs.directory.path())?;
        let path = |name: &str| directory.path().join(name);
        let listeners = [
            qemu::listen(&path("console"))?,
            qemu::listen(&path("output"))?,
            qemu::listen(&path("reports"))?,
        ];
        let mut process = Command::new("qemu-system-x86_64")
            .args(arguments(lab, &initramfs.file, directory.path()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(path("stderr"))?)
            .spawn()
            .context("cannot start qemu-system-x86_64 (Debian: apt-get install qemu-system-x86)")?;
        let leash = Leash::hold(&process);
        let connected = qemu::connect(&mut process, listeners.each_ref())
            .and_then(|[console, port, reports]| Ok((console, port.try_clone()?, port, reports)));
        let (console, copied, port, reports) = match connected {
            Ok(connected) => connected,
            Err(reason) => {
                qemu::end(&mut process);
                let said = fs::read_to_string(path("stderr")).unwrap_or_default();
                return Err(reason.context(format!("QEMU does not start: {said}")));
            }
        };
        let (console, console_reader) = Log::read(console, |line, _| Some(line.to_owned()));
        let (reports, reports_reader) = Log::read(reports, |line, _| Some(line.to_owned()));
        let printed = Arc::new(AtomicU64::new(0));
        let output_reader = copy(copied, Arc::clone(output), Arc::clone(&printed));
        Ok(Self {
            process,
            _leash: leash,
            console,
            reports,
            port,
            printed,
            readers: vec![console_reader, reports_reader, output_reader],
            directory,
        })
    }

    fn await_ready(&self, deadline: Instant) -> Result<()> {
        self.await_report(Some(deadline), "did not boot", |line| {
            line.starts_with("ready ").then_some(())
        })
    }

    /// How the program ended, and how much it has printed.
    fn await_end(&self, deadline: Option<Instant>) -> Result<(Ended, u64)> {
        self.await_report(deadline, "did not finish", parse_end)
    }

    fn await_report<T>(
        &self,
        deadline: Option<Instant>,
        what: &str,
        found: impl Fn(&str) -> Option<T>,
    ) -> Result<T> {
        // Nobody waits for ever for a test; a person at a shell may.
        let deadline = deadline.unwrap_or_else(|| Instant::now() + Duration::from_secs(1 << 30));
        let report = self.reports.wait(deadline, |lines| {
            lines
                .iter()
                .find_map(|line| match line.strip_prefix("failed ") {
                    Some(reason) => Some(Err(anyhow!("lab-init gave up: {reason}"))),
                    None => found(line).map(Ok),
                })
        });
        let reason = match report {
            Ok(Ok(found)) => return Ok(found),
            Ok(Err(reason)) => reason,
            Err(_) if Instant::now() >= deadline => anyhow!("its time is up and it was ended"),
            Err(_) => anyhow!("its machine ended{}", self.panic()),
        };
        Err(reason.context(format!("the guest {what}{}", self.words())))
    }

    /// Waits until everything that the program has printed is here.
    fn await_output(&self, bytes: u64) -> Result<()> {
        let here = || (self.printed.load(Ordering::Acquire) >= bytes).then_some(());
        command::poll_until(Instant::now() + OUTPUT_LIMIT, here)
            .context("some of what the program printed did not arrive")
    }

    /// Why, where its kernel said so.
    fn panic(&self) -> String {
        let lines = self.console.all();
        let panic = lines.iter().find(|line| line.contains("Kernel panic"));
        panic.map_or_else(String::new, |line| format!(": {line}"))
    }

    /// What its kernel and QEMU said at last.
    fn words(&self) -> String {
        let lines = self.console.all();
        let tail = lines[lines.len().saturating_sub(LAST_LINES)..].join("\n");
        let complaints =
            fs::read_to_string(self.directory.path().join("stderr")).unwrap_or_default();
        format!("\nits kernel said: {tail}\nQEMU said: {complaints}")
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        qemu::end(&mut self.process);
        for reader in self.readers.drain(..) {
            // It ends because QEMU's ends of the sockets are closed; a panic of its own is printed already.
            let _printed = reader.join();
        }
    }
}

/// Copies what comes through the program's port, in a thread that ends with QEMU.
fn copy(mut port: UnixStream, output: Output, printed: Arc<AtomicU64>) -> JoinHandle<()> {
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = port.read(&mut buffer) {
            let mut output = output.lock().unwrap_or_else(PoisonError::into_inner);
            // What nobody reads any more is counted all the same, or the guest would wait.
            let _unread = output
                .write_all(&buffer[..count])
                .and_then(|()| output.flush());
            printed.fetch_add(count as u64, Ordering::Release);
        }
    })
}

fn parse_end(line: &str) -> Option<(Ended, u64)> {
    let (ended, bytes) = line.rsplit_once(" bytes=")?;
    let ended = match ended.split_once(' ')? {
        ("exit", code) => Ended::Exited(code.parse().ok()?),
        ("signal", signal) => Ended::Killed(signal.parse().ok()?),
        _ => return None,
    };
    Some((ended, bytes.parse().ok()?))
}

fn arguments(lab: &Lab, initramfs: &Path, directory: &Path) -> Vec<String> {
    let mut words: Vec<String> = Vec::new();
    let mut add = |option: &str, value: String| words.extend([option.to_owned(), value]);
    add("-accel", lab.accel.name().to_owned());
    add("-m", format!("{}K", lab.memory >> 10));
    add("-smp", lab.processors.to_string());
    add(
        "-cpu",
        if lab.accel == Accel::Kvm {
            "host"
        } else {
            EMULATED
        }
        .to_owned(),
    );
    // In the order of the ports: the kernel's, the program's, that of `lab-init`.
    for name in ["console", "output", "reports"] {
        let path = directory.join(name);
        add(
            "-chardev",
            format!("socket,id={name},path={},server=off", path.display()),
        );
        add("-serial", format!("chardev:{name}"));
    }
    add("-display", "none".to_owned());
    add("-kernel", lab.kernel.image.display().to_string());
    add("-initrd", initramfs.display().to_string());
    add("-append", KERNEL_OPTIONS.to_owned());
    words.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(str::to_owned));
    words
}

/// The terminal passes keys on as they are pressed, until this is dropped.
struct RawTerminal(Option<rustix::termios::Termios>);

impl RawTerminal {
    fn set() -> Self {
        let before = rustix::termios::tcgetattr(io::stdin()).ok();
        if let Some(before) = &before {
            let mut raw = before.clone();
            raw.make_raw();
            let _stays = rustix::termios::tcsetattr(
                io::stdin(),
                rustix::termios::OptionalActions::Now,
                &raw,
            );
        }
        Self(before)
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _stays = rustix::termios::tcsetattr(
                io::stdin(),
                rustix::termios::OptionalActions::Now,
                before,
            );
        }
    }
}
