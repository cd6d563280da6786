//! The machine as what is migrated: the five calls that a VMM makes its guest movable with.

use std::io::{Read, Write};
use std::sync::Arc;
use std::time::Instant;

use vmm_integration::{Vmm, VmmError};

use super::Machine;
use crate::state::{MachineState, VERSION};

/// The most that a machine's state takes: 16 processors with all that they can have, many times over.
const MOST_STATE: u64 = 16 << 20;

/// A machine whose guest leaves or arrives.
#[derive(Debug)]
pub(crate) struct Guest {
    machine: Arc<Machine>,
    /// Whether it is to run when it is resumed.
    to_run: bool,
    runs: bool,
}

impl Guest {
    /// A guest that leaves, and runs now or does not.
    pub(crate) fn leaving(machine: &Arc<Machine>, runs: bool) -> Self {
        Self {
            machine: Arc::clone(machine),
            to_run: runs,
            runs,
        }
    }

    /// A guest that arrives: whether it is to run it says itself.
    pub(crate) fn arriving(machine: &Arc<Machine>) -> Self {
        Self::leaving(machine, false)
    }

    /// Whether it runs in this machine.
    pub(crate) fn runs(&self) -> bool {
        self.runs
    }
}

impl Vmm for Guest {
    fn kind(&self) -> &'static str {
        "minivmm"
    }

    fn facts(&self) -> Vec<(String, String)> {
        let version = ("version of the state".to_owned(), VERSION.to_string());
        std::iter::once(version)
            .chain(self.machine.traits())
            .collect()
    }

    fn suspend(&mut self, deadline: Instant) -> Result<(), VmmError> {
        self.machine.stand(deadline)?;
        self.runs = false;
        Ok(())
    }

    fn save(&mut self, state: &mut dyn Write, _: Instant) -> Result<(), VmmError> {
        let mut saved = self.machine.save()?;
        saved.runs = self.to_run;
        Ok(state.write_all(&saved.to_bytes())?)
    }

    fn load(&mut self, state: &mut dyn Read, _: Instant) -> Result<(), VmmError> {
        let mut bytes = Vec::new();
        state.take(MOST_STATE).read_to_end(&mut bytes)?;
        let state = MachineState::from_bytes(&bytes)?;
        self.machine.load(&state)?;
        self.to_run = state.runs;
        Ok(())
    }

    fn resume(&mut self, _: Instant) -> Result<(), VmmError> {
        if self.to_run {
            self.machine.run();
            self.runs = true;
        }
        Ok(())
    }
}
