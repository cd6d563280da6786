//! `memferry qemu watch`: gives the guest back if the sender dies. Nobody calls it but `memferry qemu send`.
//!
//! The sender starts it and holds the other end of its standard input. On it comes the sender's last will, a line of
//! JSON each time that it changes, `null` when there is nothing (left) to be undone. The end of the input means that
//! the sender has ended: then the last line is executed.

use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use memferry::subject::qemu::{Executor, LastWill, Qmp, QmpError};

use crate::args::Watch;
use crate::output::warn;

/// How long QEMU may take to obey.
const PATIENCE: Duration = Duration::from_secs(30);

/// Waits for the end of the sender, and executes its last will.
pub(crate) fn run(args: &Watch) -> anyhow::Result<()> {
    // Who stops the sender does not mean this one, which ends with it.
    ctrlc::set_handler(|| {})?;
    let mut will: Option<LastWill> = None;
    for line in io::stdin().lines().map_while(Result::ok) {
        // A line that was cut off never came: what it was to say had not begun.
        if let Ok(next) = serde_json::from_str(&line) {
            will = next;
        }
    }
    let Some(will) = will else {
        return Ok(());
    };
    let deadline = Instant::now() + PATIENCE;
    // The sender's connection is closed as it ends, and QEMU greets the next one then.
    let given_back = match Qmp::connect(&args.qmp, deadline) {
        // Nobody listens any more: the guest has ended with its QEMU.
        Err(QmpError::Connect { .. }) => return Ok(()),
        Err(error) => Err(error.into()),
        Ok(mut qmp) => will.execute(&mut qmp, deadline),
    };
    let given_back = given_back.context(
        "the sender has ended, and the guest could not be given back: it may stand still here. If the destination does not run it, \
         `migrate_cancel` and then `cont` on its QMP socket let it run",
    )?;
    if given_back {
        warn(&"memferry: the sender has ended before hand-over; the guest runs on at the source");
    }
    Ok(())
}

/// The sender's end.
#[derive(Debug)]
pub(super) struct Watchdog {
    child: Child,
    /// `None` once it is closed.
    input: Option<ChildStdin>,
    /// It has something to do when the input is closed.
    charged: bool,
}

impl Watchdog {
    /// Starts this program anew, to watch over the guest behind `qmp`.
    pub(super) fn start(qmp: &Path) -> io::Result<Self> {
        // By this name it is the same program even if a newer release has replaced the file.
        let mut child = Command::new("/proc/self/exe")
            .args(["qemu", "watch", "--qmp"])
            .arg(qmp)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            // A signal to the sender's process group is not for it.
            .process_group(0)
            .spawn()?;
        let input = child.stdin.take();
        Ok(Self {
            child,
            input,
            charged: false,
        })
    }
}

impl Executor for Watchdog {
    fn note(&mut self, will: Option<&LastWill>) -> io::Result<()> {
        let noted = serde_json::to_string(&will)
            .map_err(io::Error::other)
            .and_then(|mut line| {
                line.push('\n');
                let input = self.input.as_mut().ok_or(io::ErrorKind::BrokenPipe)?;
                input.write_all(line.as_bytes())
            });
        if noted.is_err() {
            // What it was told before must not be done: after a release the guest would run twice.
            let _ = self.child.kill();
        }
        self.charged = noted.is_ok() && will.is_some();
        noted
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.input = None;
        // A guest that could not be given back is left to it: it tries for longer than a user wants to wait for us.
        if !self.charged {
            let _ = self.child.wait();
        }
    }
}
