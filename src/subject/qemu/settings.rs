//! QEMU's migration capabilities and parameters: set for us, and put back for their owner.
//!
//! They stay set in QEMU after we are gone, and `x-ignore-shared` left behind would make somebody's later
//! `migrate` to a file leave out the RAM. So what was changed is remembered and restored.

use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::error::{QemuError, Refusal, Refusals};
use super::qmp::Qmp;

/// Capabilities that do not concern the stream's form: whoever set them wants them.
const LEFT_ALONE: [&str; 3] = ["late-block-activate", "dirty-bitmaps", "validate-uuid"];

/// The values that were there before.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Settings {
    capabilities: Vec<Value>,
    parameters: Map<String, Value>,
}

impl Settings {
    /// Turns the capabilities `on`, all that change the stream's form off, and sets `parameters` where QEMU has them.
    pub(super) fn apply(
        qmp: &mut Qmp,
        on: &[&str],
        parameters: &[(&str, Value)],
        deadline: Instant,
    ) -> Result<Self, QemuError> {
        let mut before = Self::default();
        let known = qmp.execute("query-migrate-capabilities", &Value::Null, deadline)?;
        let known: Vec<(&str, bool)> = known
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|entry| Some((entry["capability"].as_str()?, entry["state"].as_bool()?)))
            .collect();
        let missing = on
            .iter()
            .filter(|wanted| known.iter().all(|(name, _)| name != *wanted));
        Refusals::check(
            missing
                .map(|name| Refusal::Capability {
                    name: (*name).to_owned(),
                })
                .collect(),
        )?;
        let mut wanted = Vec::new();
        for (name, state) in known {
            let want = on.contains(&name) || (state && LEFT_ALONE.contains(&name));
            if want != state {
                wanted.push(json!({"capability": name, "state": want}));
                let old = json!({"capability": name, "state": state});
                before.capabilities.push(old);
            }
        }
        let now = qmp.execute("query-migrate-parameters", &Value::Null, deadline)?;
        let mut changed = Map::new();
        for (name, value) in parameters {
            let old = &now[*name];
            // One that has this value already may get another one while the migration runs.
            if !old.is_null() {
                changed.insert((*name).to_owned(), value.clone());
                before.parameters.insert((*name).to_owned(), old.clone());
            }
        }
        let set = send(qmp, &wanted, &changed, deadline);
        if let Err(error) = set {
            // The first error is the one to tell.
            let _ = before.restore(qmp, deadline);
            return Err(error);
        }
        Ok(before)
    }

    /// Puts everything back.
    pub(super) fn restore(&self, qmp: &mut Qmp, deadline: Instant) -> Result<(), QemuError> {
        send(qmp, &self.capabilities, &self.parameters, deadline)
    }
}

fn send(
    qmp: &mut Qmp,
    capabilities: &[Value],
    parameters: &Map<String, Value>,
    deadline: Instant,
) -> Result<(), QemuError> {
    if !capabilities.is_empty() {
        let arguments = json!({"capabilities": capabilities});
        qmp.execute("migrate-set-capabilities", &arguments, deadline)?;
    }
    if !parameters.is_empty() {
        qmp.execute("migrate-set-parameters", &json!(parameters), deadline)?;
    }
    Ok(())
}
