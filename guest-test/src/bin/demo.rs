//! `cargo demo`: live-migrates a running virtual machine from one QEMU to another on this machine, and proves it.

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use clap::Parser;
use guest_test::accel::accel;
use guest_test::embedded;
use guest_test::ferry::{self, Report};
use guest_test::image::Image;
use guest_test::packages;
use guest_test::qemu::{Guest, GuestConfig, Rate, Writer};
use guest_test::serial;
use guest_test::ticks;

/// Live-migrates a virtual machine that writes memory all the time, and prints what its user would have noticed.
#[derive(Debug, Parser)]
struct Arguments {
    /// The guest's memory in MiB.
    #[arg(long, default_value_t = 1024)]
    memory: u64,
    /// MiB that the guest fills with data that does not compress.
    #[arg(long, default_value_t = 800)]
    fill: u64,
    /// MiB of these that it goes on writing at random.
    #[arg(long, default_value_t = 64)]
    set: u64,
    /// How fast it does, in MB a second.
    #[arg(long, default_value_t = 100)]
    rate: u64,
    /// The `memferry` to use, in place of one built from this source.
    #[arg(long)]
    memferry: Option<PathBuf>,
    /// Migrate a workload of its own between two processes, as where there is no QEMU.
    #[arg(long)]
    embedded: bool,
}

/// A GiB takes seconds; a machine that is busy or has little memory takes longer, and a stuck one for ever.
const MIGRATION_LIMIT: Duration = Duration::from_secs(300);
/// Two passes over the guest's memory, emulated.
const CHECK_LIMIT: Duration = Duration::from_secs(120);
/// How long the guest is watched at the destination.
const AFTER: Duration = Duration::from_secs(2);

/// Memory of the workload that is migrated where there is no QEMU.
const EMBEDDED: u64 = 256 << 20;

fn main() -> Result<ExitCode> {
    if let Ok(memory) = std::env::var(embedded::MEMORY) {
        embedded::serve(&memory)?;
        return Ok(ExitCode::SUCCESS);
    }
    let arguments = Arguments::parse();
    if arguments.embedded {
        return migrate_embedded();
    }
    let image = packages::ensure(&[packages::QEMU]).and_then(|()| Image::prepare());
    match image {
        Ok(image) => migrate_guest(&arguments, image),
        Err(reason) => {
            println!("no QEMU guest can be booted here: {reason:#}");
            migrate_embedded()
        }
    }
}

/// Without QEMU: a workload in a process of its own moves to another process.
fn migrate_embedded() -> Result<ExitCode> {
    println!(
        "migrating an embedded workload of {} MiB between two processes, in place of a QEMU guest",
        EMBEDDED >> 20
    );
    let program = std::env::current_exe()?;
    let moved = embedded::run(|| Command::new(&program), EMBEDDED)?;
    let milliseconds = |seconds: f64| format!("{:.1} ms", seconds * 1e3);
    println!();
    println!("  writes tracked by     {}", moved.tracking);
    println!(
        "  missing pages fault   {}",
        if moved.faults {
            "yes"
        } else {
            "no, this user may not attach"
        }
    );
    println!("  total time            {}", milliseconds(moved.sent.total));
    println!(
        "  blackout, by itself   {}",
        milliseconds(moved.blackout.as_secs_f64())
    );
    println!(
        "  rounds                {}{}",
        moved.sent.rounds,
        if moved.sent.post_copy {
            ", then post-copy"
        } else {
            ""
        }
    );
    println!("  faults over the wire  {}", moved.received.faults);
    println!();
    let verified = moved
        .sent
        .verified
        .is_some_and(|verdict| verdict.compared > 0 && verdict.different == 0);
    let status = moved.status;
    let proofs = [
        (format!("it goes on: tick {}", status.ticks), status.running),
        (
            format!(
                "it finds its memory right: {} pages checked, {} wrong",
                status.checked, status.errors
            ),
            status.errors == 0,
        ),
        ("memory is equal, by memferry's digests".into(), verified),
        (
            "one owner: the source stands still".into(),
            moved.source_stopped,
        ),
    ];
    for (what, holds) in &proofs {
        println!("  {} {what}", if *holds { "ok     " } else { "FAILED " });
    }
    Ok(if proofs.iter().all(|(_, holds)| *holds) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn migrate_guest(arguments: &Arguments, image: Image) -> Result<ExitCode> {
    println!("migrating a QEMU guest; building memferry");
    let memferry = match &arguments.memferry {
        Some(path) => path.clone(),
        None => ferry::build()?,
    };
    let accel = accel()?;
    let config = GuestConfig {
        memory: arguments.memory << 20,
        writer: Writer {
            fill: arguments.fill << 20,
            set: arguments.set << 20,
            rate: Rate::Limit(arguments.rate * 1_000_000),
            check: Rate::Limit(400 << 20),
        },
        ..GuestConfig::new(image, accel)
    };

    println!("booting a guest of {} MiB ({accel})", arguments.memory);
    let source = Guest::boot(&config)?;
    let destination = Guest::incoming(&config, true)?;
    let boot_id = source
        .ready()
        .context("a booted guest is ready")?
        .boot_id
        .clone();
    println!(
        "  runs, boot id {boot_id}; fills {} MiB, writes {} MB/s",
        arguments.fill, arguments.rate
    );
    source
        .reports()
        .wait(Instant::now() + CHECK_LIMIT, |reports| {
            // A second and more of ordinary life, to compare with.
            (reports.iter().filter_map(serial::Report::status).count() >= 8).then_some(())
        })
        .map_err(|reason| source.explain(reason, "the guest does not report"))?;

    println!("migrating it while it runs");
    let report = ferry::migrate(&memferry, &source, &destination, MIGRATION_LIMIT)
        .map_err(|reason| destination.explain(reason, "the migration failed"))?;
    let proofs = prove(&source, &destination, &boot_id, &report);
    let proved = proofs.iter().all(|(_, proof)| proof.is_ok());
    show(&source, &destination, &report)?;
    for (what, proof) in proofs {
        match proof {
            Ok(how) => println!("  ok      {what}: {how}"),
            Err(reason) => println!("  FAILED  {what}: {reason:#}"),
        }
    }
    Ok(if proved {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

type Proof = (&'static str, Result<String>);

fn prove(source: &Guest, destination: &Guest, boot_id: &str, report: &Report) -> Vec<Proof> {
    let arrived = destination
        .ticks()
        .wait(Instant::now() + CHECK_LIMIT, |ticks| ticks.first().copied())
        .and_then(|first| {
            destination
                .ticks()
                .wait(first.at + AFTER + CHECK_LIMIT, |ticks| {
                    ticks
                        .last()
                        .filter(|last| last.at >= first.at + AFTER)
                        .copied()
                })
        });
    let ticks_go_on = arrived.and_then(|last| {
        ticks::check_continuity(&source.ticks().all(), &destination.ticks().all())?;
        Ok(format!(
            "none lost, none twice, up to number {}",
            last.number
        ))
    });
    let whole = destination.await_clean_pass(Instant::now() + CHECK_LIMIT);
    let same_guest = || {
        let status = whole.as_ref().map_err(|reason| anyhow!("{reason:#}"))?;
        ensure!(
            status.boot_id == boot_id,
            "the guest's boot id is {}",
            status.boot_id
        );
        Ok(format!("boot id {}", status.boot_id))
    };
    let memory_equal = || {
        ensure!(
            report.is_verified(),
            "memferry did not verify it: {:?}",
            report.field("verified")
        );
        Ok("digests of source and destination, by memferry".to_owned())
    };
    let source_stopped = || {
        ensure!(!source.is_running()?, "it runs at the source as well");
        Ok("stopped".to_owned())
    };
    let same = same_guest();
    vec![
        ("the same guest", same),
        ("its ticks go on", ticks_go_on),
        (
            "it finds its memory right",
            whole.map(|status| {
                format!(
                    "{} pages verified, {} errors, checksum {}",
                    status.checked, status.errors, status.checksum
                )
            }),
        ),
        ("memory is equal", memory_equal()),
        ("one owner: the source is", source_stopped()),
    ]
}

fn show(source: &Guest, destination: &Guest, report: &Report) -> Result<()> {
    let (before, after) = (source.ticks().all(), destination.ticks().all());
    let milliseconds = |duration: Duration| format!("{:.1} ms", duration.as_secs_f64() * 1e3);
    let second = Duration::from_secs(1);
    let ordinary = ticks::steadiness(&before, report.began - second, second);
    println!();
    println!(
        "  total time                          {}",
        milliseconds(report.total)
    );
    if let (Ok(blackout), Some(first)) = (ticks::blackout(&before, &after), after.first()) {
        let brownout = ticks::steadiness(&after, first.at, AFTER);
        println!(
            "  blackout, by the guest's ticks      {}",
            milliseconds(blackout)
        );
        println!(
            "  longest stall in the 2 s after it   {}",
            milliseconds(brownout.longest_gap)
        );
    }
    println!(
        "  longest stall in the second before  {}",
        milliseconds(ordinary.longest_gap)
    );
    println!(
        "  processor time of both QEMUs        {:.2} s",
        report.cpu.as_secs_f64()
    );
    for (side, events) in [("sender", &report.sent), ("receiver", &report.received)] {
        if let Some(last) = events.last() {
            println!("  the {side}'s last event: {last}");
        }
    }
    println!();
    Ok(())
}
