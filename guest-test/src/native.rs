//! QEMU's own migration, at its best: what Memferry is compared with.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde_json::{Value, json};

use crate::qemu::Guest;
use crate::ticks::{self, Passage, Steadiness};

/// A way in which QEMU migrates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Rounds of dirty pages over one connection until what is left fits into the downtime limit of 300 ms.
    Precopy,
    /// The same over four connections.
    Multifd,
    /// One pass, then the guest runs at the destination and its missing pages are fetched as it needs them.
    Postcopy,
}

/// What to ask of QEMU.
#[derive(Debug, Clone, Copy)]
pub struct Wish {
    /// How it is to be done.
    pub mode: Mode,
    /// How long the guest may stand still by QEMU's own estimate, at which pre-copy ends; QEMU's default is 300 ms.
    /// It means nothing to post-copy, which ends its pre-copy after one pass.
    pub downtime: Duration,
    /// Give up after this.
    pub limit: Duration,
}

/// What a migration by QEMU took.
#[derive(Debug, Clone, serde::Serialize)]
pub struct NativeReport {
    /// How it was done.
    pub mode: Mode,
    /// From the command to the last page.
    pub total: Duration,
    /// The guest's stand-still by its own ticks.
    pub blackout: Duration,
    /// The ticks in the two seconds after it.
    pub brownout: Steadiness,
    /// The ticks in the second before the migration.
    pub before: Steadiness,
    /// What QEMU says that the stand-still was.
    pub downtime_claimed: Duration,
    /// Bytes of memory sent, headers included.
    pub wire: u64,
    /// Passes over memory.
    pub passes: u64,
    /// Processor time of both QEMUs, the guest's own included.
    pub cpu: Duration,
    /// The part of that which the guest's processors used.
    pub vcpu: Duration,
}

/// QEMU was not done in time: it may never be with a guest that writes as fast as it sends. Found in the error of
/// [`migrate`] by `downcast_ref`.
#[derive(Debug, Clone, Copy)]
pub struct NotInTime {
    mode: Mode,
    limit: Duration,
}

impl fmt::Display for NotInTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { mode, limit } = self;
        write!(f, "QEMU's {mode:?} migration did not end within {limit:?}")
    }
}

impl Mode {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Precopy, Self::Multifd, Self::Postcopy];

    fn capabilities(self) -> Vec<Value> {
        let on = |name: &str| json!({ "capability": name, "state": true });
        match self {
            Self::Precopy => vec![on("events")],
            Self::Multifd => vec![on("events"), on("multifd")],
            Self::Postcopy => vec![on("events"), on("postcopy-ram")],
        }
    }
}

/// No limit: the default of 128 MiB/s is older than today's networks.
const BANDWIDTH: u64 = 100 << 30;
const CHANNELS: u32 = 4;

/// Migrates a guest over loopback TCP to a QEMU started with [`Guest::incoming`], and watches it there for two
/// seconds. QEMU's best is had where that was not started paused.
///
/// # Errors
/// If QEMU refuses, fails or does not converge within `limit` (the migration is then cancelled and the guest runs
/// on at the source), or the guest's ticks do not continue.
pub fn migrate(source: &Guest, destination: &Guest, wish: Wish) -> Result<NativeReport> {
    let Wish {
        mode,
        downtime,
        limit,
    } = wish;
    for guest in [source, destination] {
        let mut monitor = guest.monitor();
        let capabilities = json!({ "capabilities": mode.capabilities() });
        monitor.execute("migrate-set-capabilities", capabilities)?;
        // Post-copy is there for guests that pre-copy does not finish with, and must not be finished by it: QEMU's
        // first estimate of the bandwidth is often three times what it gets.
        let downtime = if mode == Mode::Postcopy {
            Duration::from_millis(1)
        } else {
            downtime
        };
        let downtime = u64::try_from(downtime.as_millis()).unwrap_or(u64::MAX);
        let mut parameters = json!({ "max-bandwidth": BANDWIDTH, "downtime-limit": downtime });
        if mode == Mode::Multifd {
            parameters["multifd-channels"] = json!(CHANNELS);
        }
        monitor.execute("migrate-set-parameters", parameters)?;
    }
    let address = listen(destination)?;
    let cpu_time = || anyhow::Ok(source.cpu_time()? + destination.cpu_time()?);
    let vcpu_time = || anyhow::Ok(source.vcpu_time()? + destination.vcpu_time()?);
    let (cpu_before, vcpu_before) = (cpu_time()?, vcpu_time()?);

    let began = Instant::now();
    let deadline = began + limit;
    source
        .monitor()
        .execute("migrate", json!({ "uri": address }))?;
    if mode == Mode::Postcopy {
        // Pass 1 is the first; its end is announced as the beginning of pass 2. A guest that hardly writes may be
        // done by then.
        let event = source.monitor().wait_event(deadline, |event| {
            (event["event"] == "MIGRATION_PASS" && event["data"]["pass"].as_u64() >= Some(2))
                || is_over(event)
        })?;
        if !is_over(&event) {
            source
                .monitor()
                .execute("migrate-start-postcopy", json!({}))?;
        }
    }
    let over = match finished(source, deadline) {
        Ok(over) => over,
        Err(reason) => {
            let _ended = source.monitor().execute("migrate_cancel", json!({}));
            return Err(if Instant::now() < deadline {
                reason
            } else {
                reason.context(NotInTime { mode, limit })
            });
        }
    };
    finished(destination, deadline)?;
    if !destination.is_running()? {
        // It was stopped at the source, or this end was started paused.
        destination.monitor().execute("cont", json!({}))?;
    }
    let total = began.elapsed();
    if over != "completed" {
        bail!("QEMU's {mode:?} migration ended as {over}");
    }
    let cpu = cpu_time()?.saturating_sub(cpu_before);
    let vcpu = vcpu_time()?.saturating_sub(vcpu_before);
    let Passage {
        blackout,
        brownout,
        before,
    } = ticks::passage(source.ticks(), destination.ticks(), began)?;
    let facts = source.monitor().execute("query-migrate", json!({}))?;
    let number = |value: &Value| value.as_u64().unwrap_or(0);
    Ok(NativeReport {
        mode,
        total,
        blackout,
        brownout,
        before,
        downtime_claimed: Duration::from_millis(number(&facts["downtime"])),
        wire: number(&facts["ram"]["transferred"]),
        passes: number(&facts["ram"]["dirty-sync-count"]),
        cpu,
        vcpu,
    })
}

/// Opens a port at the destination; its number is the system's choice.
fn listen(destination: &Guest) -> Result<String> {
    let mut monitor = destination.monitor();
    monitor.execute("migrate-incoming", json!({ "uri": "tcp:127.0.0.1:0" }))?;
    let deadline = Instant::now() + Duration::from_secs(10);
    let port = monitor.poll("query-migrate", deadline, |answer| {
        answer["socket-address"][0]["port"]
            .as_str()
            .map(str::to_owned)
    })?;
    Ok(format!("tcp:127.0.0.1:{port}"))
}

fn finished(guest: &Guest, deadline: Instant) -> Result<String> {
    // Asked first, because the event may have been taken from the queue by an earlier wait.
    let mut monitor = guest.monitor();
    let facts = monitor.execute("query-migrate", json!({}))?;
    let status = |value: &Value| value["status"].as_str().unwrap_or_default().to_owned();
    if ["completed", "failed", "cancelled"].contains(&status(&facts).as_str()) {
        return Ok(status(&facts));
    }
    let event = monitor.wait_event(deadline, is_over)?;
    Ok(status(&event["data"]))
}

fn is_over(event: &Value) -> bool {
    let status = event["data"]["status"].as_str().unwrap_or_default();
    event["event"] == "MIGRATION" && ["completed", "failed", "cancelled"].contains(&status)
}
