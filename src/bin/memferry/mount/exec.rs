//! A program that is run with the mount.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus};

use anyhow::Context;

use crate::exit::Exited;

/// A program that is run with the mount.
pub(super) struct Program {
    child: Child,
    /// Set once it has ended: its number may be another's then.
    status: Option<ExitStatus>,
}

impl Program {
    /// Starts it, with the path in the place of `{}` and as `MEMFERRY_PATH`.
    pub(super) fn start(words: &[String], path: &Path) -> anyhow::Result<Self> {
        let path = path.to_str().context("the path is no UTF-8")?;
        let (name, arguments) = words.split_first().context("no program was named")?;
        let child = Command::new(name)
            .args(arguments.iter().map(|word| word.replace("{}", path)))
            .env("MEMFERRY_PATH", path)
            .spawn()
            .with_context(|| format!("cannot run {name}"))?;
        Ok(Self {
            child,
            status: None,
        })
    }

    /// How it ended, if it has.
    pub(super) fn ended(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        if self.status.is_none() {
            self.status = self.child.try_wait()?;
        }
        Ok(self.status)
    }

    /// Asks it to end.
    pub(super) fn ask_to_end(&mut self) {
        if !matches!(self.ended(), Ok(None)) {
            return;
        }
        let pid = rustix::process::Pid::from_child(&self.child);
        // A child that was not waited for keeps its number.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }

    /// Ends it.
    pub(super) fn kill(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        self.status = self.child.wait().ok().or(self.status);
    }
}

/// Exits as the program did; as a shell does if it was ended by a signal.
pub(super) fn pass_on(status: Option<ExitStatus>) -> anyhow::Result<()> {
    let code = match status {
        Some(status) => match (status.code(), status.signal()) {
            (Some(code), _) => u8::try_from(code).unwrap_or(1),
            (None, Some(signal)) => u8::try_from(128 + signal).unwrap_or(255),
            (None, None) => 1,
        },
        None => 1,
    };
    match code {
        0 => Ok(()),
        code => Err(Exited(code).into()),
    }
}
