//! The status of QEMU's own migration: asked, and waited for.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::error::QemuError;
use super::qmp::Qmp;
use super::qmp_codec::Event;

/// Events tell the status at once; it is asked for as well now and then, in case an event was missed.
const PATIENCE: Duration = Duration::from_millis(100);

/// What `query-migrate` says.
pub(super) fn query(qmp: &mut Qmp, deadline: Instant) -> Result<Value, QemuError> {
    Ok(qmp.execute("query-migrate", &Value::Null, deadline)?)
}

/// Whether a migration with this status still holds the guest.
pub(super) fn is_under_way(status: &str) -> bool {
    !matches!(status, "none" | "completed" | "failed" | "cancelled")
}

/// Waits until the status is `wanted` and calls `impatient` whenever it has not changed for a while.
///
/// Fails at once if the migration ended in another way than wanted.
pub(super) fn wait(
    qmp: &mut Qmp,
    during: &'static str,
    wanted: impl Fn(&str) -> bool,
    mut impatient: impl FnMut(&mut Qmp) -> Result<(), QemuError>,
    deadline: Instant,
) -> Result<String, QemuError> {
    let began = Instant::now();
    let mut last = String::from("unknown");
    let mut look = began + PATIENCE;
    loop {
        let event = qmp.next_event(deadline.min(look))?;
        let now = Instant::now();
        let status = match event.as_ref().map(Event::migration_status) {
            Some(Some(status)) => status.to_owned(),
            _ if now >= deadline => {
                return Err(QemuError::Late {
                    during,
                    waited: began.elapsed(),
                    status: last,
                });
            }
            // A migration that does not converge sends events of other kinds all the time.
            _ if now < look => continue,
            _ => {
                look = now + PATIENCE;
                let answer = query(qmp, deadline)?;
                let status = answer["status"].as_str().unwrap_or("none").to_owned();
                if !wanted(&status) && is_under_way(&status) {
                    impatient(qmp)?;
                }
                status
            }
        };
        if wanted(&status) {
            return Ok(status);
        }
        // Before the first event, a destination has no status.
        if !is_under_way(&status) && status != "none" {
            let answer = query(qmp, deadline)?;
            let reason = answer["error-desc"].as_str().map(str::to_owned);
            return Err(QemuError::Migration {
                during,
                status,
                reason,
            });
        }
        last = status;
    }
}
