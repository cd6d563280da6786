//! The way back from any point of a migration of QEMU's: nothing under way, and the guest running.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::error::QemuError;
use super::machine::RunState;
use super::qmp::Qmp;
use super::qmp_error::QmpError;
use super::status;

/// Cancels what is under way, and waits until nothing is. `saving`: QEMU may be in its last step.
pub(super) fn end_migration(
    qmp: &mut Qmp,
    saving: bool,
    deadline: Instant,
) -> Result<(), QemuError> {
    let answer = status::query(qmp, deadline)?;
    let status = answer["status"].as_str().unwrap_or("none");
    if !status::is_under_way(status) {
        return Ok(());
    }
    if saving {
        // QEMU gives its disks away in this step, and 7.2 does not take them back when it is cancelled meanwhile: the
        // guest runs then, and QEMU aborts at its next write. The step takes milliseconds, since what it sends is
        // always received. So it is left to end, and cancelled only if it does not.
        let half = deadline.saturating_duration_since(Instant::now()) / 2;
        match await_end(qmp, "ending its last step", Instant::now() + half) {
            Err(QemuError::Late { .. }) => {}
            ended => return ended,
        }
    }
    qmp.execute("migrate_cancel", &Value::Null, deadline)?;
    await_end(qmp, "cancelling its migration", deadline)
}

/// Waits until no migration is under way. An end that was told by an event before is seen by asking.
fn await_end(qmp: &mut Qmp, during: &'static str, deadline: Instant) -> Result<(), QemuError> {
    let ended = |status: &str| !status::is_under_way(status);
    status::wait(qmp, during, ended, |_| Ok(()), deadline)?;
    Ok(())
}

/// Lets the guest run. QEMU sees to that itself after some ends of a migration and not after others; it is told to in any
/// case, because `cont` also takes back the disks that a migration gave away.
pub(super) fn run(qmp: &mut Qmp, deadline: Instant) -> Result<(), QemuError> {
    let mut told = false;
    loop {
        let state = RunState::query(qmp, deadline)?;
        match state {
            RunState::Running if told => return Ok(()),
            RunState::Running | RunState::Paused | RunState::PostMigrate => {
                match qmp.execute("cont", &Value::Null, deadline) {
                    Ok(_) => told = true,
                    // The end of the migration is told before it is quite over.
                    Err(QmpError::Refused { desc, .. }) if desc.contains("not finalized") => {}
                    Err(error) => return Err(error.into()),
                }
            }
            RunState::FinishMigrate => {
                let soon = deadline.min(Instant::now() + Duration::from_millis(1));
                qmp.next_event(soon)?;
            }
            RunState::InMigrate | RunState::Other(_) => {
                return Err(QemuError::RunState {
                    state: state.to_string(),
                    during: "it should run again",
                    remedy: "look at QEMU's log, and let it run with `cont` on its QMP socket",
                });
            }
        }
        if Instant::now() >= deadline {
            return Err(QemuError::RunState {
                state: state.to_string(),
                during: "it should run again",
                remedy: "it did not by the deadline; let it run with `cont` on its QMP socket",
            });
        }
    }
}
