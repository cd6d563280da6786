//! How far a suite is, on standard error.

use std::time::Instant;

use super::figure::Sample;
use super::measure::Failure;
use super::options::Mode;

/// Counts migrations.
#[derive(Debug)]
pub(super) struct Progress {
    began: Instant,
    done: usize,
    all: usize,
}

impl Progress {
    pub(super) fn new(all: usize) -> Self {
        Self {
            began: Instant::now(),
            done: 0,
            all,
        }
    }

    pub(super) fn begin(&mut self, mode: Mode, rate: u64, run: Option<u32>) {
        let left = self
            .began
            .elapsed()
            .checked_div(u32::try_from(self.done).unwrap_or(u32::MAX))
            .map(|each| each * u32::try_from(self.all - self.done).unwrap_or(u32::MAX))
            .map_or(String::new(), |left| format!(", {} s left", left.as_secs()));
        self.done += 1;
        let run = run.map_or_else(|| "to warm up".to_owned(), |run| format!("run {run}"));
        eprintln!(
            "[{}/{}{left}] {rate} MB/s, {}, {run}",
            self.done,
            self.all,
            mode.name()
        );
    }

    pub(super) fn told(mode: Mode, measured: &Result<Sample, Failure>) {
        match measured {
            Ok(sample) => eprintln!(
                "    total {:.0} ms, blackout {:.1} ms, {:.2} s of processor time",
                sample.total, sample.blackout, sample.cpu
            ),
            Err(failure) if mode == Mode::Memferry => eprintln!("    failed: {failure:#}"),
            Err(failure) => eprintln!("    failed: {failure}"),
        }
    }
}
