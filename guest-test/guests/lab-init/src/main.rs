//! The first process of the lab: a Linux in QEMU that runs one program of ours and tells how it ended.
//!
//! ```text
//! /lab/job ─▶ mounts, modules ─▶ program ─▶ everybody else killed
//!                  │                │                │
//! ttyS2:         ready            ttyS1:          exit 0 bytes=812
//!                             what it prints
//! ```
//!
//! The kernel has the first serial port, the program the second, and this process the third: what a test prints is never
//! mistaken for a report, and a panic never ends in the middle of a test's line. The last report says how many bytes the
//! program printed, so that the host knows when it has them all; then the host ends QEMU. If this process returns, the
//! kernel panics, which ends QEMU as well.

#[allow(
    unsafe_code,
    reason = "the system calls that the standard library does not have"
)]
mod sys;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// What the host has put beside this program.
const JOB: &str = "/lab/job";
/// A killed process closes its end of the pipe at once, unless a device holds it in the kernel.
const OUTPUT_LIMIT: Duration = Duration::from_secs(5);

/// Kernel file systems, in the order of their depth. None is where a program may be: all else is memory as well.
const MOUNTS: [(&str, &str); 6] = [
    ("proc", "/proc"),
    ("sysfs", "/sys"),
    ("devpts", "/dev/pts"),
    ("tmpfs", "/dev/shm"),
    ("cgroup2", "/sys/fs/cgroup"),
    ("debugfs", "/sys/kernel/debug"),
];

fn main() {
    let mounted = mount("devtmpfs", "/dev");
    let Ok(mut reports) = mounted.and_then(|()| serial("/dev/ttyS2")) else {
        return; // there is nobody to tell; the panic that follows is on the console
    };
    if let Err(reason) = run(&mut reports) {
        let _unheard = writeln!(reports, "failed {reason}").and_then(|()| sys::drain(&reports));
    }
    // The host has what it waits for and ends the machine.
    sys::wait_for_ever();
}

fn run(reports: &mut File) -> io::Result<()> {
    for (kind, at) in MOUNTS {
        mount(kind, at).map_err(|reason| about(at, &reason))?;
    }
    let job = Job::parse(&fs::read(JOB).map_err(|reason| about(JOB, &reason))?)?;
    for module in &job.modules {
        File::open(module)
            .and_then(|file| sys::load_module(&file))
            .map_err(|reason| about(module, &reason))?;
    }
    let loopback = ["ifconfig", "lo", "up"];
    Command::new("/bin/busybox").args(loopback).status()?;

    let output = if job.terminal {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/ttyS1")?
    } else {
        serial("/dev/ttyS1")?
    };
    writeln!(reports, "ready {}", kernel()?)?;
    let (ended, printed) = job.run(output)?;
    match ended {
        sys::Ended::Exited(code) => writeln!(reports, "exit {code} bytes={printed}")?,
        sys::Ended::Killed(signal) => writeln!(reports, "signal {signal} bytes={printed}")?,
    }
    sys::drain(reports)
}

/// What to run and how; the host writes it as strings that end with a zero and begin with a letter that says what they
/// are.
#[derive(Default)]
struct Job {
    modules: Vec<String>,
    words: Vec<String>,
    environment: Vec<(String, String)>,
    directory: Option<String>,
    /// The program has the second serial port as its terminal, in place of a pipe.
    terminal: bool,
}

impl Job {
    fn parse(bytes: &[u8]) -> io::Result<Self> {
        let mut job = Self::default();
        for entry in bytes
            .split(|&byte| byte == 0)
            .filter(|entry| !entry.is_empty())
        {
            let entry = str::from_utf8(entry).map_err(io::Error::other)?;
            let text = entry[1..].to_owned();
            match entry.as_bytes()[0] {
                b'm' => job.modules.push(text),
                b'w' => job.words.push(text),
                b'd' => job.directory = Some(text),
                b't' => job.terminal = true,
                b'e' => {
                    let (name, value) = text.split_once('=').unwrap_or((&text, ""));
                    job.environment.push((name.to_owned(), value.to_owned()));
                }
                _ => return Err(io::Error::other(format!("an entry of the job: {entry}"))),
            }
        }
        Ok(job)
    }

    /// Runs the program until it ends; returns how, and how many bytes it and its children have printed.
    fn run(&self, output: File) -> io::Result<(sys::Ended, u64)> {
        let (program, arguments) = self
            .words
            .split_first()
            .ok_or_else(|| io::Error::other("a job without a program"))?;
        let mut command = Command::new(program);
        command.args(arguments).env_clear();
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        if let Some(directory) = &self.directory {
            command.current_dir(directory);
        }
        if self.terminal {
            command
                .stdin(output.try_clone()?)
                .stdout(output.try_clone()?)
                .stderr(output.try_clone()?);
            let child = command.spawn().map_err(|reason| about(program, &reason))?;
            let ended = wait(&child)?;
            sys::drain(&output)?;
            return Ok((ended, 0));
        }
        let (pipe, end) = io::pipe()?;
        command
            .stdin(Stdio::null())
            .stdout(end.try_clone()?)
            .stderr(end);
        let child = command.spawn().map_err(|reason| about(program, &reason))?;
        drop(command); // and with it this process's copies of the pipe's end
        let printed = copy(pipe, output);
        let ended = wait(&child)?;
        // Whoever is left would keep the pipe open.
        sys::kill_all_others();
        let mut bytes = 0;
        while let Ok(more) = printed.recv_timeout(OUTPUT_LIMIT) {
            bytes += more;
        }
        Ok((ended, bytes))
    }
}

/// Copies in a thread; tells how many bytes were written to the port, piece by piece, and hangs up when they have left.
fn copy(mut from: impl Read + Send + 'static, mut to: File) -> mpsc::Receiver<u64> {
    let (told, copied) = mpsc::channel();
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            if to.write_all(&buffer[..count]).is_err() || told.send(count as u64).is_err() {
                break;
            }
        }
        let _tried = sys::drain(&to);
    });
    copied
}

/// Waits for a child, and reaps whoever has lost its parent in the meantime.
fn wait(child: &Child) -> io::Result<sys::Ended> {
    loop {
        let (process, ended) = sys::wait_for_any()?;
        if process == child.id() {
            return Ok(ended);
        }
    }
}

fn mount(kind: &str, at: &str) -> io::Result<()> {
    fs::create_dir_all(at)?;
    sys::mount(kind, at)
}

fn kernel() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/osrelease")?
        .trim()
        .to_owned())
}

fn serial(path: &str) -> io::Result<File> {
    let port = OpenOptions::new().read(true).write(true).open(path)?;
    sys::make_raw(&port)?;
    Ok(port)
}

fn about(what: &str, reason: &io::Error) -> io::Error {
    io::Error::new(reason.kind(), format!("{what}: {reason}"))
}
