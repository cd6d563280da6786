//! What two machines must have in common for a guest to move from one to the other.

use std::collections::BTreeMap;

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::{Machine, MachineError, Memory};
use crate::state::{MachineState, Region};

/// The leaf with the number of the processor that asks, and how many there are.
const IDENTITY: u32 = 1;
/// The leaves that say how processors are arranged, each with the number of the one that asks.
const TOPOLOGY: [u32; 2] = [0xb, 0x1f];
/// Which the processor's package, core and node are, on AMD's.
const TOPOLOGY_AMD: u32 = 0x8000_001e;
/// That there are several processors to a package.
const SEVERAL: u32 = 1 << 28;

/// What processor `index` of `count` is told of itself: everything that the host can be, and each processor a package of its own.
pub(super) fn cpuid_of(supported: &CpuId, index: u32, count: u32) -> CpuId {
    let mut told = supported.clone();
    for entry in told.as_mut_slice() {
        match entry.function {
            IDENTITY => {
                entry.ebx = (entry.ebx & 0xffff) | count << 16 | index << 24;
                if count > 1 {
                    entry.edx |= SEVERAL;
                } else {
                    entry.edx &= !SEVERAL;
                }
            }
            leaf if TOPOLOGY.contains(&leaf) => {
                // No level below the package.
                (entry.eax, entry.ebx, entry.edx) = (0, 0, index);
                entry.ecx &= 0xff;
            }
            TOPOLOGY_AMD => (entry.eax, entry.ebx, entry.ecx) = (index, index, 0),
            _ => {}
        }
    }
    told
}

/// What a guest is told, by leaf.
fn leaves(entries: &[kvm_cpuid_entry2]) -> BTreeMap<String, String> {
    let mut leaves: BTreeMap<String, String> = BTreeMap::new();
    for entry in entries {
        let registers = [entry.eax, entry.ebx, entry.ecx, entry.edx];
        let registers = registers.map(|register| format!("{register:x}")).join(" ");
        let leaf = leaves
            .entry(format!("cpuid {:x}", entry.function))
            .or_default();
        if entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX == 0 {
            leaf.push_str(&registers);
        } else {
            if !leaf.is_empty() {
                leaf.push_str(", ");
            }
            leaf.push_str(&format!("{:x}: {registers}", entry.index));
        }
    }
    leaves
}

/// Traits by name.
fn by_name(traits: &[(String, String)]) -> BTreeMap<&str, &str> {
    let pairs = traits.iter();
    pairs
        .map(|(name, value)| (name.as_str(), value.as_str()))
        .collect()
}

/// Compares what a machine elsewhere says of itself with what this one does.
///
/// # Errors
/// The first that differs.
pub(crate) fn compare(
    theirs: &[(String, String)],
    ours: &[(String, String)],
) -> Result<(), MachineError> {
    let (theirs, ours) = (by_name(theirs), by_name(ours));
    for name in theirs.keys().chain(ours.keys()) {
        let value = |traits: &BTreeMap<&str, &str>| traits.get(name).map(|&value| value.to_owned());
        let (theirs, ours) = (value(&theirs), value(&ours));
        if theirs != ours {
            let absent = || "nothing".to_owned();
            return Err(MachineError::Differs {
                field: (*name).to_owned(),
                theirs: theirs.unwrap_or_else(absent),
                ours: ours.unwrap_or_else(absent),
            });
        }
    }
    Ok(())
}

/// The regions of a machine's memory.
pub(super) fn regions(memory: &Memory) -> Vec<Region> {
    let region = |region: &<Memory as GuestMemoryBackend>::R| Region {
        start: region.start_addr().0,
        len: region.len(),
    };
    memory.iter().map(region).collect()
}

/// What must be the same for a state to fit, by name; that of the processors as the first one is told.
fn traits(
    regions: &[Region],
    chips: bool,
    cpus: &[(&[kvm_cpuid_entry2], u32)],
) -> Vec<(String, String)> {
    let regions: Vec<String> = regions
        .iter()
        .map(|region| format!("{:#x}+{:#x}", region.start, region.len))
        .collect();
    let chips = if chips { "in the kernel" } else { "absent" };
    let mut traits = vec![
        ("regions".to_owned(), regions.join(", ")),
        ("processors".to_owned(), cpus.len().to_string()),
        ("interrupt controllers".to_owned(), chips.to_owned()),
    ];
    if let Some((told, khz)) = cpus.first() {
        traits.push(("time stamp counter".to_owned(), format!("{khz} kHz")));
        traits.extend(leaves(told));
    }
    traits
}

impl MachineState {
    /// What a machine must have for this to fit it, by name.
    pub(super) fn traits(&self) -> Vec<(String, String)> {
        let cpus: Vec<_> = self
            .cpus
            .iter()
            .map(|cpu| (&cpu.cpuid[..], cpu.tsc_khz))
            .collect();
        traits(&self.memory, self.chips.is_some(), &cpus)
    }
}

impl Machine {
    /// What must be the same at both ends, by name.
    pub(crate) fn traits(&self) -> Vec<(String, String)> {
        let told = self.told.iter();
        let cpus: Vec<_> = told.map(|told| (told.as_slice(), self.tsc_khz)).collect();
        traits(&regions(&self.memory), self.chips, &cpus)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(features: u32) -> Vec<kvm_cpuid_entry2> {
        let leaf = |function, index, flags| kvm_cpuid_entry2 {
            function,
            index,
            flags,
            ecx: features,
            ..kvm_cpuid_entry2::default()
        };
        let significant = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
        vec![
            leaf(1, 0, 0),
            leaf(7, 0, significant),
            leaf(7, 1, significant),
        ]
    }

    fn machine(features: u32, khz: u32, len: u64) -> Vec<(String, String)> {
        let told = told(features);
        traits(
            &[Region { start: 0, len }],
            true,
            &[(&told, khz), (&told, khz)],
        )
    }

    #[test]
    fn what_differs_is_named_with_both_values() {
        let ours = machine(1, 2_000_000, 0x1000);
        compare(&machine(1, 2_000_000, 0x1000), &ours).unwrap();
        for (theirs, field, value) in [
            (machine(3, 2_000_000, 0x1000), "cpuid 1", "0 0 3 0"),
            (
                machine(1, 2_000_001, 0x1000),
                "time stamp counter",
                "2000001 kHz",
            ),
            (machine(1, 2_000_000, 0x2000), "regions", "0x0+0x2000"),
            (Vec::new(), "cpuid 1", "nothing"),
        ] {
            let error = compare(&theirs, &ours).unwrap_err().to_string();
            assert!(error.contains(field) && error.contains(value), "{error}");
        }
    }

    #[test]
    fn leaves_below_one_another_are_one_trait() {
        let traits = leaves(&told(5));
        assert_eq!(traits["cpuid 7"], "0: 0 0 5 0, 1: 0 0 5 0");
    }

    #[test]
    fn every_processor_is_told_its_own_number() {
        let entries = [IDENTITY, 0xb, TOPOLOGY_AMD].map(|function| kvm_cpuid_entry2 {
            function,
            ..kvm_cpuid_entry2::default()
        });
        let supported = CpuId::from_entries(&entries).unwrap();
        let told = cpuid_of(&supported, 2, 4);
        let [identity, topology, amd] = told.as_slice() else {
            panic!("three went in");
        };
        assert_eq!(identity.ebx, 0x0204_0000);
        assert_eq!(topology.edx, 2);
        assert_eq!((amd.eax, amd.ebx), (2, 2));
    }
}
