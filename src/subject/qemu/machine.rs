//! A QEMU as it was found: what it emulates, where its RAM is, and whether it can be moved at all.

use std::collections::BTreeMap;
use std::time::Instant;

use serde_json::{Value, json};

use super::backend::Backend;
use super::error::{QemuError, Refusal, Refusals};
use super::qmp::Qmp;
use super::qmp_codec::Version;
use super::status;
use crate::subject::Description;

/// Attributes with this prefix name the file of a backend, to tell whether both ends have the same one.
pub(super) const FILE: &str = "file:";

/// The kind that both ends' descriptions name.
pub(super) const KIND: &str = "qemu";

/// The run state attribute: `running` or `paused`.
pub(super) const RUN_STATE: &str = "run-state";

/// The version attribute. Informative: the versioned machine type is what makes two QEMUs understand each other.
pub(super) const QEMU_VERSION: &str = "qemu-version";

/// What the guest does now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RunState {
    /// Its processors run.
    Running,
    /// Stopped by its owner.
    Paused,
    /// A destination that waits for a guest.
    InMigrate,
    /// Stopped while a migration ends.
    FinishMigrate,
    /// Stopped because it was migrated.
    PostMigrate,
    /// Another of QEMU's states, by QEMU's name.
    Other(String),
}

impl RunState {
    /// Asks QEMU.
    pub(super) fn query(qmp: &mut Qmp, deadline: Instant) -> Result<Self, QemuError> {
        let answer = qmp.execute("query-status", &Value::Null, deadline)?;
        let state = text(&answer["status"], "query-status", "status")?;
        Ok(match state.as_str() {
            "running" => Self::Running,
            "paused" => Self::Paused,
            "inmigrate" => Self::InMigrate,
            "finish-migrate" => Self::FinishMigrate,
            "postmigrate" => Self::PostMigrate,
            _ => Self::Other(state),
        })
    }
}

impl std::fmt::Display for RunState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::InMigrate => "inmigrate",
            Self::FinishMigrate => "finish-migrate",
            Self::PostMigrate => "postmigrate",
            Self::Other(name) => name,
        })
    }
}

/// A QEMU whose whole RAM is in files that can be copied from outside.
#[derive(Debug, Clone, PartialEq)]
pub struct Machine {
    /// QEMU's process; see [`Qmp::peer_pid`] for when to correct it.
    pub pid: u32,
    /// QEMU's version.
    pub version: Version,
    /// The versioned machine type, for example `pc-i440fx-7.2`.
    pub machine_type: String,
    /// What executes the guest: `kvm` or `tcg`.
    pub accel: String,
    /// The QOM type of the processors, for example `qemu64-x86_64-cpu`.
    pub cpu: String,
    /// The number of processors plugged in.
    pub vcpus: usize,
    /// The guest's UUID; zeros where none was given.
    pub uuid: String,
    /// What the guest did when it was looked at.
    pub run_state: RunState,
    /// All RAM, ordered by id.
    pub backends: Vec<Backend>,
    /// The types of the devices that were plugged with `-device`, ordered.
    pub devices: Vec<String>,
}

impl Machine {
    /// Looks at the QEMU behind `qmp`; changes nothing.
    ///
    /// # Errors
    /// [`QemuError::Refused`] with all reasons why such a guest cannot be moved, whichever end it is.
    pub fn inspect(qmp: &mut Qmp, deadline: Instant) -> Result<Self, QemuError> {
        let pid = qmp.peer_pid().ok_or(QemuError::UnknownProcess)?;
        let mut reasons = Vec::new();
        let backends = backends(qmp, &mut reasons, deadline)?;
        let devices = devices(qmp, &mut reasons, deadline)?;
        network(qmp, &mut reasons, deadline)?;
        migration(qmp, &mut reasons, deadline)?;
        Refusals::check(reasons)?;

        let kvm = qmp.execute("query-kvm", &Value::Null, deadline)?;
        let uuid = qmp.execute("query-uuid", &Value::Null, deadline)?;
        let machine = qom_get(qmp, "/machine", "type", deadline)?;
        let machine = text(&machine, "qom-get", "the machine type")?;
        let (cpu, vcpus) = processors(qmp, deadline)?;
        Ok(Self {
            pid,
            version: qmp.version().clone(),
            machine_type: machine.trim_end_matches("-machine").to_owned(),
            accel: match kvm["enabled"].as_bool() {
                Some(true) => "kvm".to_owned(),
                _ => "tcg".to_owned(),
            },
            cpu,
            vcpus,
            uuid: text(&uuid["UUID"], "query-uuid", "UUID")?,
            run_state: RunState::query(qmp, deadline)?,
            backends,
            devices,
        })
    }

    /// What a destination has to equal.
    #[must_use]
    pub fn describe(&self) -> Description {
        let mut attributes = vec![
            ("machine".to_owned(), self.machine_type.clone()),
            ("accel".to_owned(), self.accel.clone()),
            ("cpu".to_owned(), self.cpu.clone()),
            ("vcpus".to_owned(), self.vcpus.to_string()),
            ("uuid".to_owned(), self.uuid.clone()),
            ("devices".to_owned(), self.devices.join(",")),
        ];
        for backend in &self.backends {
            attributes.push((format!("backend:{}", backend.id), backend.len.to_string()));
            // What cannot be opened is refused where it is needed.
            if let Ok(file) = backend
                .open(self.pid)
                .and_then(|file| backend.identify(&file))
            {
                attributes.push((format!("{FILE}{}", backend.id), file));
            }
        }
        attributes.push((RUN_STATE.to_owned(), self.run_state.to_string()));
        attributes.push((QEMU_VERSION.to_owned(), self.version.to_string()));
        Description {
            kind: KIND.to_owned(),
            attributes,
        }
    }
}

fn backends(
    qmp: &mut Qmp,
    reasons: &mut Vec<Refusal>,
    deadline: Instant,
) -> Result<Vec<Backend>, QemuError> {
    let mut found = BTreeMap::new();
    let mut covered = 0_u64;
    let before = reasons.len();
    for (id, kind) in children(qmp, "/objects", deadline)? {
        if !kind.starts_with("memory-backend-") {
            continue;
        }
        if kind != "memory-backend-file" {
            reasons.push(Refusal::BackendKind { id, kind });
            continue;
        }
        let path = format!("/objects/{id}");
        let flag = |qmp: &mut Qmp, name| -> Result<bool, QemuError> {
            Ok(qom_get(qmp, &path, name, deadline)?.as_bool() == Some(true))
        };
        if !flag(qmp, "share")? {
            reasons.push(Refusal::NotShared { id });
            continue;
        }
        if flag(qmp, "readonly")? {
            reasons.push(Refusal::ReadOnly { id });
            continue;
        }
        if flag(qmp, "discard-data")? {
            reasons.push(Refusal::DiscardData { id: id.clone() });
        }
        // Since QEMU 8.1.
        let offset = qom_get(qmp, &path, "offset", deadline).ok();
        if let Some(offset) = offset.and_then(|value| value.as_u64()).filter(|&o| o != 0) {
            reasons.push(Refusal::Offset {
                id: id.clone(),
                offset,
            });
        }
        let len = qom_get(qmp, &path, "size", deadline)?.as_u64();
        let len = len.ok_or_else(|| lacks("qom-get", "the size of a memory backend"))?;
        let mem_path = qom_get(qmp, &path, "mem-path", deadline)?;
        covered = covered.saturating_add(len);
        found.insert(
            id.clone(),
            Backend {
                id,
                path: text(&mem_path, "qom-get", "mem-path")?.into(),
                len,
                shared: true,
            },
        );
    }
    let summary = qmp.execute("query-memory-size-summary", &Value::Null, deadline)?;
    let total = ["base-memory", "plugged-memory"]
        .iter()
        .filter_map(|name| summary[name].as_u64())
        .fold(0_u64, u64::saturating_add);
    // Where a backend was refused already, that is the reason why RAM is not covered.
    if total > covered && reasons.len() == before {
        reasons.push(Refusal::Uncovered { total, covered });
    }
    Ok(found.into_values().collect())
}

fn devices(
    qmp: &mut Qmp,
    reasons: &mut Vec<Refusal>,
    deadline: Instant,
) -> Result<Vec<String>, QemuError> {
    let mut types = Vec::new();
    for parent in ["/machine/peripheral", "/machine/peripheral-anon"] {
        for (device, kind) in children(qmp, parent, deadline)? {
            if writes_from_outside(&kind) {
                reasons.push(Refusal::ForeignWriter {
                    device,
                    kind: kind.clone(),
                });
            } else if kind.starts_with("virtio-mem") {
                reasons.push(Refusal::Device {
                    device,
                    kind: kind.clone(),
                });
            }
            types.push(kind);
        }
    }
    types.sort_unstable();
    Ok(types)
}

/// Whether something outside QEMU's address space writes guest RAM on behalf of such a device.
fn writes_from_outside(kind: &str) -> bool {
    [
        "vhost-user-",
        "vhost-vdpa-",
        "vfio-",
        "ivshmem-",
        "x-pci-proxy-dev",
    ]
    .iter()
    .any(|prefix| kind.starts_with(prefix))
}

/// Network back ends are no QOM objects; only the human monitor lists them.
fn network(qmp: &mut Qmp, reasons: &mut Vec<Refusal>, deadline: Instant) -> Result<(), QemuError> {
    let arguments = json!({"command-line": "info network"});
    let answer = qmp.execute("human-monitor-command", &arguments, deadline)?;
    for line in answer.as_str().unwrap_or_default().lines() {
        if let Some((device, kind)) = foreign_network(line) {
            reasons.push(Refusal::ForeignWriter { device, kind });
        }
    }
    Ok(())
}

/// The name and type in a line such as ` \ n0: index=0,type=vhost-user,…`, if another process serves it.
fn foreign_network(line: &str) -> Option<(String, String)> {
    let (name, facts) = line.split_once(": ")?;
    let kind = facts
        .split(',')
        .find_map(|fact| fact.strip_prefix("type="))?;
    matches!(kind, "vhost-user" | "vhost-vdpa").then(|| {
        let name = name.trim_start_matches([' ', '\\']);
        (name.to_owned(), kind.to_owned())
    })
}

fn migration(
    qmp: &mut Qmp,
    reasons: &mut Vec<Refusal>,
    deadline: Instant,
) -> Result<(), QemuError> {
    let answer = status::query(qmp, deadline)?;
    if let Some(status) = answer["status"].as_str()
        && status::is_under_way(status)
    {
        reasons.push(Refusal::MigrationActive {
            status: status.to_owned(),
        });
    }
    for reason in answer["blocked-reasons"].as_array().into_iter().flatten() {
        reasons.push(Refusal::Blocked {
            reason: reason.as_str().unwrap_or_default().to_owned(),
        });
    }
    Ok(())
}

fn processors(qmp: &mut Qmp, deadline: Instant) -> Result<(String, usize), QemuError> {
    let answer = qmp.execute("query-cpus-fast", &Value::Null, deadline)?;
    let list = answer
        .as_array()
        .filter(|list| !list.is_empty())
        .ok_or_else(|| lacks("query-cpus-fast", "a processor"))?;
    let path = text(&list[0]["qom-path"], "query-cpus-fast", "qom-path")?;
    let kind = qom_get(qmp, &path, "type", deadline)?;
    Ok((
        text(&kind, "qom-get", "the type of a processor")?,
        list.len(),
    ))
}

/// The children of a QOM node: names and types.
fn children(
    qmp: &mut Qmp,
    path: &str,
    deadline: Instant,
) -> Result<Vec<(String, String)>, QemuError> {
    let answer = qmp.execute("qom-list", &json!({"path": path}), deadline)?;
    let entries = answer
        .as_array()
        .ok_or_else(|| lacks("qom-list", "a list"))?;
    Ok(entries
        .iter()
        .filter_map(|entry| {
            let kind = entry["type"].as_str()?;
            let kind = kind.strip_prefix("child<")?.strip_suffix('>')?;
            Some((entry["name"].as_str()?.to_owned(), kind.to_owned()))
        })
        .collect())
}

fn qom_get(
    qmp: &mut Qmp,
    path: &str,
    property: &str,
    deadline: Instant,
) -> Result<Value, QemuError> {
    let arguments = json!({"path": path, "property": property});
    Ok(qmp.execute("qom-get", &arguments, deadline)?)
}

/// The backends that have every page from the start.
pub(super) fn preallocated(
    qmp: &mut Qmp,
    machine: &Machine,
    deadline: Instant,
) -> Result<Vec<Refusal>, QemuError> {
    let mut reasons = Vec::new();
    for backend in &machine.backends {
        let path = format!("/objects/{}", backend.id);
        if qom_get(qmp, &path, "prealloc", deadline)?.as_bool() == Some(true) {
            reasons.push(Refusal::Prealloc {
                id: backend.id.clone(),
            });
        }
    }
    Ok(reasons)
}

fn text(value: &Value, command: &str, lack: &'static str) -> Result<String, QemuError> {
    value
        .as_str()
        .map(str::to_owned)
        .ok_or_else(|| lacks(command, lack))
}

fn lacks(command: &str, lacks: &'static str) -> QemuError {
    QemuError::Answer {
        command: command.to_owned(),
        lacks,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_served_by_another_process_is_seen() {
        assert_eq!(
            foreign_network(" \\ n0: index=0,type=vhost-user,chardev=c0"),
            Some(("n0".into(), "vhost-user".into()))
        );
    }

    #[test]
    fn a_device_that_another_process_or_the_hardware_serves_is_seen() {
        for kind in ["vfio-pci", "vhost-user-blk-pci", "vhost-vdpa-device-pci"] {
            assert!(writes_from_outside(kind), "{kind}");
        }
        for kind in ["virtio-blk-pci", "vhost-vsock-pci", "VGA"] {
            assert!(!writes_from_outside(kind), "{kind}");
        }
    }

    #[test]
    fn a_network_of_qemu_itself_is_fine() {
        assert_eq!(
            foreign_network(" \\ n0: index=0,type=tap,ifname=tap0"),
            None
        );
    }
}
