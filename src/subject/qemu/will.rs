//! What has to be done to a QEMU if the process that moves its guest dies.

use std::fmt::Debug;
use std::io;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::error::QemuError;
use super::qmp::Qmp;
use super::settings::Settings;
use super::undo;

/// How long the first attempt may take; half of it is what a migration that QEMU is ending by itself may take.
const FIRST_ATTEMPT: Duration = Duration::from_secs(2);

/// What undoes a migration that nobody goes on with: written down, so that another process can do it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LastWill {
    pub(super) settings: Settings,
    pub(super) stage: Stage,
    /// Whether the guest ran before.
    pub(super) ran: bool,
    /// What the sender set [`STAMPED`] to.
    pub(super) stamp: u64,
}

/// The parameter whose value tells whose migration it is: another sender would have set it to another value.
pub(super) const STAMPED: &str = "max-bandwidth";

/// How far it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Stage {
    /// Settings were changed.
    Prepared,
    /// QEMU was told to migrate: it may have stopped the guest.
    Migrating,
    /// QEMU was told to send the device state.
    Saving,
}

/// Somebody who survives this process and executes its [`LastWill`].
pub trait Executor: Debug + Send {
    /// Takes note of `will`, which replaces the one before; `None` revokes it, and nothing is to be done from then on.
    /// Once this has returned, that is what holds if this process dies, whatever it does afterwards.
    ///
    /// # Errors
    /// If nobody is there any more who could execute it. The one before is not executed either.
    fn note(&mut self, will: Option<&LastWill>) -> io::Result<()>;
}

impl LastWill {
    /// Lets the guest behind `qmp` run as though nothing had been asked of it, and puts QEMU's settings back.
    ///
    /// To be called once the process that wrote it is gone. Blocks until it is done, at most until `deadline`. False if
    /// another sender has migrated the guest since: then it may run elsewhere, and nothing is done.
    ///
    /// # Errors
    /// If QEMU is gone or does not obey; a guest that is stopped stays so then.
    pub fn execute(self, qmp: &mut Qmp, deadline: Instant) -> Result<bool, QemuError> {
        // QEMU serves one client at a time, so nobody comes in between from here on.
        let now = qmp.execute("query-migrate-parameters", &Value::Null, deadline)?;
        if now[STAMPED].as_u64() != Some(self.stamp) {
            return Ok(false);
        }
        if self.stage != Stage::Prepared {
            let saving = self.stage == Stage::Saving;
            // It may have died before QEMU was told to take the last step, which then never ends by itself.
            let first = deadline.min(Instant::now() + FIRST_ATTEMPT);
            undo::end_migration(qmp, saving, first)
                .or_else(|_| undo::end_migration(qmp, false, deadline))?;
            if self.ran {
                undo::run(qmp, deadline)?;
            }
        }
        self.settings.restore(qmp, deadline)?;
        Ok(true)
    }
}
