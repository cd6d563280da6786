//! The same benchmark in a Linux guest, which has nbd and netem.

use std::io::{self, Write};
use std::time::Duration;

use anyhow::Result;

use crate::accel::accel;
use crate::bench::Outcome;
use crate::lab::{Ended, Job, Lab};

/// A region, a copy of it, what was read, and what is mounted of them.
const MEMORY: u64 = 3 << 30;
/// Emulated, everything takes ten times as long.
const LIMIT: Duration = Duration::from_secs(3600);

/// Runs this program there, with the arguments that it was given but for the one that leads here, and `--netem`.
pub(super) fn run(series: &str) -> Result<Outcome> {
    let mut lab = Lab::new(series, accel()?)?;
    lab.memory = MEMORY;
    lab.limit = LIMIT;
    let given = std::env::args()
        .skip_while(|argument| argument != "mount")
        .skip(1);
    let kept = given.filter(|argument| !argument.starts_with("--lab") && argument != series);
    let mut arguments = vec!["mount".to_owned(), "--netem".to_owned()];
    arguments.extend(kept);
    let job = Job {
        program: std::env::current_exe()?,
        arguments,
        environment: Vec::new(),
        directory: "/tmp".into(),
        programs: Vec::new(),
    };
    let output = Output {
        json: job.arguments.iter().any(|argument| argument == "--json"),
        line: Vec::new(),
    };
    match lab.run(&job, output)? {
        Ended::Exited(0) => Ok(Outcome::Measured),
        Ended::Exited(_) | Ended::Killed(_) => Ok(Outcome::Failed),
    }
}

/// Everything that is printed there comes through one port; what programs are to read is told from the rest by its beginning.
struct Output {
    json: bool,
    /// One that is not complete.
    line: Vec<u8>,
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            self.line.push(byte);
            if byte != b'\n' {
                continue;
            }
            if self.json && !self.line.starts_with(b"{") {
                io::stderr().write_all(&self.line)?;
            } else {
                io::stdout().write_all(&self.line)?;
            }
            self.line.clear();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stdout().flush()
    }
}
