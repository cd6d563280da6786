//! One migration between two fresh QEMUs: what it cost, and the proof that the guest arrived whole.

use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::figure::{Sample, Spread};
use super::{Mode, QemuMemory, Verification};
use crate::ferry;
use crate::native::{self, NotInTime, Wish};
use crate::qemu::{Guest, GuestConfig};
use crate::serial::Report;
use crate::ticks::{self, Passage};

/// What is the same for all migrations at a rate.
#[derive(Debug, Clone)]
pub(super) struct Setup {
    pub(super) memferry: PathBuf,
    pub(super) config: GuestConfig,
    /// What the guests that QEMU migrates have as memory.
    pub(super) memory: QemuMemory,
    pub(super) verify: Verification,
    pub(super) send_options: Vec<String>,
    /// QEMU's downtime limit.
    pub(super) downtime: Duration,
    pub(super) limit: Duration,
}

/// Why a migration has no figures.
#[derive(Debug)]
pub(super) struct Failure(anyhow::Error);

impl Failure {
    /// Whether trying again would only take time.
    pub(super) fn is_final(&self) -> bool {
        self.0.downcast_ref::<NotInTime>().is_some()
    }
}

impl fmt::Display for Failure {
    /// One line; with `#` all that QEMU and the guest said.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = format!("{:#}", self.0);
        if f.alternate() {
            return f.write_str(&whole);
        }
        if whole.contains("Kernel panic") {
            return f.write_str("the guest's kernel panicked at the destination");
        }
        f.write_str(whole.lines().next().unwrap_or_default())
    }
}

/// Two passes over a guest's memory at the rate at which it verifies, emulated, on a machine that does other things.
const REPORT_LIMIT: Duration = Duration::from_secs(120);
/// Reports of a guest are 200 ms apart: more than a second of ordinary life, to compare with.
const ORDINARY_REPORTS: usize = 8;

/// Boots a guest, migrates it, and proves that it arrived whole. Blocks for some seconds.
pub(super) fn measure(setup: &Setup, mode: Mode) -> Result<Sample, Failure> {
    let result = match mode {
        Mode::Memferry => by_memferry(setup),
        Mode::Precopy => by_qemu(setup, native::Mode::Precopy),
        Mode::Multifd => by_qemu(setup, native::Mode::Multifd),
        Mode::Postcopy => by_qemu(setup, native::Mode::Postcopy),
    };
    result.map_err(Failure)
}

/// Touches and frees as much memory as a destination needs. A virtual machine gives free memory back to its host, which
/// then takes longer to hand out a page than any migration takes to fill it; what was freed a moment ago is still there.
/// Every mode gets this, so that a migration is measured and not the hypervisor below.
fn warm_up(bytes: u64) {
    let bytes = usize::try_from(bytes + bytes / 4).unwrap_or(0);
    drop(std::hint::black_box(vec![1_u8; bytes]));
}

fn by_memferry(setup: &Setup) -> Result<Sample> {
    let (source, destination) = pair(&setup.config, true)?;
    let written = write_rate(&source);
    let verify = match setup.verify {
        Verification::Off => "--verify=off",
        Verification::Before => "--verify=before",
        Verification::After => "--verify=after",
    };
    let options = [&[verify.to_owned()], &setup.send_options[..]].concat();
    warm_up(setup.config.memory);
    let report = ferry::migrate_with(
        &setup.memferry,
        &source,
        &destination,
        &options,
        setup.limit,
    )?;
    let passage = ticks::passage(source.ticks(), destination.ticks(), report.began)
        .map_err(|reason| destination.explain(reason, "the guest did not arrive"))?;
    prove(&source, &destination)?;
    ensure!(
        setup.verify == Verification::Off || report.is_verified(),
        "memferry did not verify the copy: {:?}",
        report.field("verified")
    );
    let sent = report.sent.iter().rfind(|event| event["event"] == "report");
    let sent = sent.context("memferry qemu send printed no report")?;
    let bytes = |value: &serde_json::Value| value.as_u64().map(mib);
    let (send, receive) = (report.sender, report.receiver);
    let ferries = send.cpu + receive.cpu;
    let cpu = report.cpu + ferries;
    Ok(Sample {
        total: milliseconds(report.complete),
        session: sent["total"].as_f64().map(|seconds| seconds * 1e3),
        wall: milliseconds(report.total),
        written,
        wire: bytes(&sent["traffic"]["wire_bytes"]).context("a report without traffic")?,
        cpu: cpu.as_secs_f64(),
        cpu_outside: cpu.saturating_sub(report.vcpu).as_secs_f64(),
        cpu_send: Some(send.cpu.as_secs_f64()),
        cpu_receive: Some(receive.cpu.as_secs_f64()),
        resident_send: Some(mib(send.resident)),
        resident_receive: Some(mib(receive.resident)),
        ..of(&passage)
    })
}

fn by_qemu(setup: &Setup, mode: native::Mode) -> Result<Sample> {
    let backing = setup.memory.backing(mode, setup.config.accel);
    let config = GuestConfig {
        backing,
        ..setup.config.clone()
    };
    let (source, destination) = pair(&config, false)?;
    let written = write_rate(&source);
    let wish = Wish {
        mode,
        downtime: setup.downtime,
        limit: setup.limit,
    };
    warm_up(config.memory);
    let report = native::migrate(&source, &destination, wish)
        .map_err(|reason| destination.explain(reason, "QEMU did not migrate the guest"))?;
    prove(&source, &destination)?;
    Ok(Sample {
        total: milliseconds(report.total),
        wall: milliseconds(report.total),
        written,
        wire: mib(report.wire),
        cpu: report.cpu.as_secs_f64(),
        cpu_outside: report.cpu.saturating_sub(report.vcpu).as_secs_f64(),
        ..of(&Passage {
            blackout: report.blackout,
            brownout: report.brownout,
            before: report.before,
        })
    })
}

/// A guest in its stride, and a QEMU that waits for it.
fn pair(config: &GuestConfig, paused: bool) -> Result<(Guest, Guest)> {
    let source = Guest::boot(config)?;
    let destination = Guest::incoming(config, paused)?;
    source
        .reports()
        .wait(Instant::now() + REPORT_LIMIT, |reports| {
            let statuses = reports.iter().filter_map(Report::status);
            (statuses.count() >= ORDINARY_REPORTS).then_some(())
        })
        .map_err(|reason| source.explain(reason, "the guest does not report"))?;
    Ok((source, destination))
}

/// What the guest writes by its own account, in MB a second: an emulated one does not come up to every rate.
fn write_rate(guest: &Guest) -> f64 {
    let reports = guest.reports().all();
    let statuses = reports.iter().filter_map(Report::status).skip(1); // it begins with the first
    let rates = statuses.map(|status| megabytes(status.rate));
    Spread::of(rates).map_or(0.0, |spread| spread.median)
}

/// The same guest, only there, and all of its memory as it has to be: a pass that began after it arrived.
fn prove(source: &Guest, destination: &Guest) -> Result<()> {
    let whole = destination
        .await_clean_pass(Instant::now() + REPORT_LIMIT)
        .map_err(|reason| destination.explain(reason, "the guest is damaged"))?;
    let booted = source.ready().context("a booted guest is ready")?;
    ensure!(
        whole.boot_id == booted.boot_id,
        "another guest runs at the destination"
    );
    ensure!(
        !source.is_running()?,
        "the guest runs at the source as well"
    );
    Ok(())
}

fn of(passage: &Passage) -> Sample {
    Sample {
        blackout: milliseconds(passage.blackout),
        stall: milliseconds(passage.brownout.longest_gap),
        before: milliseconds(passage.before.longest_gap),
        ..Sample::default()
    }
}

fn milliseconds(span: Duration) -> f64 {
    span.as_secs_f64() * 1e3
}

#[expect(clippy::cast_precision_loss, reason = "a figure to read")]
fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

#[expect(
    clippy::cast_precision_loss,
    reason = "a figure to read; exact up to 8 PiB"
)]
fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
