//! Measures QEMU's own migration on this machine, with the guest and the clock that Memferry is measured with.

use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use guest_test::accel::accel;
use guest_test::image::Image;
use guest_test::native::{self, Mode, NativeReport};
use guest_test::packages;
use guest_test::qemu::{Backing, Guest, GuestConfig, Rate, Writer};

/// Measures QEMU's own migration of a busy guest: pre-copy, multifd and post-copy.
#[derive(Debug, Parser)]
struct Arguments {
    /// The guest's memory in MiB.
    #[arg(long, default_value_t = 1024)]
    memory: u64,
    /// MiB that the guest fills.
    #[arg(long, default_value_t = 800)]
    fill: u64,
    /// MiB of these that it goes on writing.
    #[arg(long, default_value_t = 64)]
    set: u64,
    /// How fast it does, in MB a second; may be given several times.
    #[arg(long, default_values_t = [10, 100, 1000])]
    rate: Vec<u64>,
    /// How often each is measured.
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Give up on a migration that takes longer, in seconds.
    #[arg(long, default_value_t = 60)]
    limit: u64,
    /// Use a shared file as memory, as `memferry qemu` needs it, in place of QEMU's own.
    #[arg(long)]
    shared: bool,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    packages::ensure(&[packages::QEMU])?;
    let image = Image::prepare()?;
    let accel = accel()?;
    println!(
        "{accel} guest of {} MiB, {} MiB filled, writes {} MiB of it at random",
        arguments.memory, arguments.fill, arguments.set
    );
    println!(
        "{:<9} {:>5} {:>8} {:>9} {:>9} {:>9} {:>9} {:>6} {:>6} {:>6}",
        "mode",
        "MB/s",
        "total ms",
        "black ms",
        "QEMU's ms",
        "after ms",
        "before ms",
        "wire",
        "passes",
        "cpu s"
    );
    for &rate in &arguments.rate {
        let config = GuestConfig {
            memory: arguments.memory << 20,
            writer: Writer {
                fill: arguments.fill << 20,
                set: arguments.set << 20,
                rate: Rate::Limit(rate * 1_000_000),
                check: Rate::Limit(100 << 20),
            },
            backing: if arguments.shared {
                Backing::SharedFile
            } else {
                Backing::Private
            },
            ..GuestConfig::new(image.clone(), accel)
        };
        for mode in Mode::ALL {
            for _ in 0..arguments.runs {
                match measure(&config, mode, Duration::from_secs(arguments.limit)) {
                    Ok(report) => show(&report, rate),
                    Err(reason) => println!("{:<9} {rate:>5} {reason:#}", format!("{mode:?}")),
                }
            }
        }
    }
    Ok(())
}

fn measure(config: &GuestConfig, mode: Mode, limit: Duration) -> Result<NativeReport> {
    let source = Guest::boot(config)?;
    let destination = Guest::incoming(config, false)?;
    // A second of ticks and more, to know what is ordinary; and the writer has got into its stride.
    source
        .reports()
        .wait(
            std::time::Instant::now() + Duration::from_secs(60),
            |reports| {
                (reports
                    .iter()
                    .filter(|report| report.status().is_some())
                    .count()
                    >= 8)
                    .then_some(())
            },
        )
        .context("the guest does not report")?;
    let report = native::migrate(&source, &destination, mode, limit)
        .map_err(|reason| destination.explain(reason, "no migration"))?;
    let last = destination.reports().all();
    let status = last
        .iter()
        .rev()
        .find_map(|report| report.status())
        .context("the guest says nothing after it")?;
    anyhow::ensure!(
        status.errors == 0,
        "the guest found {} wrong pages",
        status.errors
    );
    Ok(report)
}

fn show(report: &NativeReport, rate: u64) {
    let milliseconds = |duration: Duration| format!("{:.1}", duration.as_secs_f64() * 1e3);
    println!(
        "{:<9} {:>5} {:>8} {:>9} {:>9} {:>9} {:>9} {:>6} {:>6} {:>6.2}",
        format!("{:?}", report.mode),
        rate,
        milliseconds(report.total),
        milliseconds(report.blackout),
        milliseconds(report.downtime_claimed),
        milliseconds(report.brownout.longest_gap),
        milliseconds(report.before.longest_gap),
        report.wire >> 20,
        report.passes,
        report.cpu.as_secs_f64(),
    );
}
