//! Measures QEMU's own migration on this machine, with the guest and the clock that Memferry is measured with.
//!
//! QEMU before 9.0 loses dirty pages of guests that it emulates, unless their memory has an uneven size: see
//! [`Backing::PrivateUneven`]. Such a guest panics or finds wrong pages, and the run is listed as failed. Debian 12's
//! 7.2 does so in every third run of pre-copy and nearly every run of post-copy.

use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Parser;
use guest_test::accel::accel;
use guest_test::image::Image;
use guest_test::native::{self, Mode, NativeReport, Wish};
use guest_test::packages;
use guest_test::qemu::{Backing, Guest, GuestConfig, Rate, Writer};
use guest_test::serial::Report;

/// Two passes over a few GiB at the rate at which the guest verifies.
const REPORT_LIMIT: Duration = Duration::from_secs(120);

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
    /// QEMU's downtime limit in milliseconds.
    #[arg(long, default_value_t = 300)]
    downtime: u64,
    /// Give up on a migration that takes longer, in seconds.
    #[arg(long, default_value_t = 60)]
    limit: u64,
    /// Use a shared file as memory, as `memferry qemu` needs it, in place of QEMU's own.
    #[arg(long, conflicts_with = "uneven")]
    shared: bool,
    /// Make the memory 8 KiB smaller, so that a QEMU before 9.0 migrates an emulated guest right, and slower.
    #[arg(long)]
    uneven: bool,
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
                check: Rate::Limit(400 << 20),
            },
            backing: match (arguments.shared, arguments.uneven) {
                (true, _) => Backing::SharedFile,
                (_, true) => Backing::PrivateUneven,
                _ => Backing::Private,
            },
            ..GuestConfig::new(image.clone(), accel)
        };
        for mode in Mode::ALL {
            for _ in 0..arguments.runs {
                let wish = Wish {
                    mode,
                    downtime: Duration::from_millis(arguments.downtime),
                    limit: Duration::from_secs(arguments.limit),
                };
                match measure(&config, wish) {
                    Ok(report) => show(&report, rate),
                    Err(reason) => failed(&reason, mode, rate),
                }
            }
        }
    }
    Ok(())
}

fn measure(config: &GuestConfig, wish: Wish) -> Result<NativeReport> {
    let source = Guest::boot(config)?;
    let destination = Guest::incoming(config, false)?;
    // More than a second of ticks, to know what is ordinary; and the writer has got into its stride.
    source
        .reports()
        .wait(Instant::now() + REPORT_LIMIT, |reports| {
            (reports.iter().filter_map(Report::status).count() >= 8).then_some(())
        })?;
    let report = native::migrate(&source, &destination, wish)
        .map_err(|reason| destination.explain(reason, "no migration"))?;
    // A pass over all of memory that began after the guest arrived: only then is it known to be whole.
    destination
        .await_clean_pass(Instant::now() + REPORT_LIMIT)
        .map_err(|reason| destination.explain(reason, "the guest is damaged"))?;
    Ok(report)
}

/// One line a failure; what was said about it goes to standard error.
fn failed(reason: &anyhow::Error, mode: Mode, rate: u64) {
    let whole = format!("{reason:#}");
    let what = if whole.contains("Kernel panic") {
        "the guest's kernel panicked at the destination"
    } else {
        whole.lines().next().unwrap_or_default()
    };
    println!("{:<9} {rate:>5} failed: {what}", format!("{mode:?}"));
    eprintln!("{whole}");
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
