//! `memferry bench`: measures Memferry side by side with what it has to beat.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use guest_test::bench::{self, Outcome};
use guest_test::interrupt;

/// Measures Memferry side by side with what it has to beat, on this machine.
#[derive(Debug, Parser)]
#[command(name = "memferry bench", bin_name = "memferry bench", version)]
struct Arguments {
    /// The `memferry` to measure, in place of one built from this source
    #[arg(long, value_name = "PATH")]
    memferry: Option<PathBuf>,
    #[command(subcommand)]
    suite: Suite,
}

#[derive(Debug, Subcommand)]
enum Suite {
    /// Live migration of a QEMU guest that writes: memferry and QEMU's pre-copy, multifd and post-copy
    ///
    /// Prints a table with the median and the spread of every figure, then one JSON line a goal. All times are those of
    /// one machine that runs both QEMUs, both memferrys and this program.
    ///
    /// Exit codes: 0 it was measured, 1 it could not be measured, or a migration by memferry failed or damaged the guest,
    /// or a goal is not met and --require-goals was given, 2 wrong arguments, 130 interrupted.
    Qemu(bench::Options),
    /// Remote memory that is mounted: throughput, the first access to a page, opening
    ///
    /// Over a link of a set rate and round trip, in this process. Prints a table with the median and the spread of every
    /// figure, then one JSON line a goal. Every byte that is read or arrives is compared with what it has to be.
    ///
    /// Exit codes: 0 it was measured, 1 it could not be measured or bytes were wrong, or a goal is not met and
    /// --require-goals was given, 2 wrong arguments.
    Mount(bench::mount::MountOptions),
}

fn main() -> ExitCode {
    let Arguments { memferry, suite } = Arguments::parse();
    let result = interrupt::handle().and_then(|()| match suite {
        Suite::Qemu(options) => bench::run(&options, memferry),
        Suite::Mount(options) => bench::mount::run(&options),
    });
    match result {
        Ok(Outcome::Measured) => ExitCode::SUCCESS,
        Ok(Outcome::GoalsMissed | Outcome::Failed) => ExitCode::FAILURE,
        Err(reason) => {
            eprintln!("memferry bench: {reason:#}");
            ExitCode::from(if interrupt::requested() { 130 } else { 1 })
        }
    }
}
