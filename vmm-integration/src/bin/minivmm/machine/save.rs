//! From a machine to its state and back: in the orders that KVM needs.

use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, Msrs, kvm_irqchip,
    kvm_msr_entry,
};
use kvm_ioctls::{VcpuFd, VmFd};

use super::{MachineError, kvm};
use crate::state::{self, Chips, Controller, CpuState, XsaveArea};
use crate::sys;

const CONTROLLERS: [u32; 3] = [
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_IRQCHIP_IOAPIC,
];

/// The time stamp counter.
const TSC: u32 = 0x10;
/// When the local APIC's timer is due, as a value of the time stamp counter.
const TSC_DEADLINE: u32 = 0x6e0;

/// The state of a processor that stands.
pub(super) fn save_cpu(cpu: &VcpuFd, told: &CpuId, msrs: &[u32]) -> Result<CpuState, MachineError> {
    // First, because it lets events that wait change the rest.
    let mp_state = kvm("the state of a processor", cpu.get_mp_state())?;
    Ok(CpuState {
        // Not what KVM answers, in which some bits follow what the guest has switched on.
        cpuid: told.as_slice().to_vec(),
        tsc_khz: kvm("the speed of the clock", cpu.get_tsc_khz())?,
        mp_state,
        regs: kvm("the registers", cpu.get_regs())?,
        sregs: kvm("the special registers", cpu.get_sregs())?,
        xcrs: kvm("the extended control registers", cpu.get_xcrs())?,
        xsave: XsaveArea(kvm("the vector registers", cpu.get_xsave())?.region),
        debug_registers: kvm("the debug registers", cpu.get_debug_regs())?,
        lapic: kvm("the local APIC", cpu.get_lapic())?,
        msrs: read_msrs(cpu, msrs)?,
        events: kvm("the events on their way", cpu.get_vcpu_events())?,
    })
}

/// Reads those of `wanted` that can be read.
fn read_msrs(cpu: &VcpuFd, wanted: &[u32]) -> Result<Vec<kvm_msr_entry>, MachineError> {
    let mut read = Vec::with_capacity(wanted.len());
    let mut rest = wanted;
    while !rest.is_empty() {
        let entries: Vec<_> = rest
            .iter()
            .map(|&index| kvm_msr_entry {
                index,
                ..kvm_msr_entry::default()
            })
            .collect();
        let mut msrs = Msrs::from_entries(&entries).expect("there are fewer than KVM takes");
        let count = kvm("model-specific registers", cpu.get_msrs(&mut msrs))?;
        read.extend_from_slice(&msrs.as_slice()[..count]);
        // KVM stops at one that it lists and this processor does not have.
        rest = rest.get(count + 1..).unwrap_or_default();
    }
    Ok(read)
}

/// Gives a processor a state. The guest was told the same of it as this one is told.
pub(super) fn load_cpu(cpu: &VcpuFd, state: &CpuState) -> Result<(), MachineError> {
    kvm("the state of a processor", cpu.set_mp_state(state.mp_state))?;
    kvm("the registers", cpu.set_regs(&state.regs))?;
    // Before the local APIC, whose base it has.
    kvm("the special registers", cpu.set_sregs(&state.sregs))?;
    kvm("the extended control registers", cpu.set_xcrs(&state.xcrs))?;
    kvm(
        "the vector registers",
        sys::set_xsave(cpu, &state.xsave.for_kvm()),
    )?;
    kvm(
        "the debug registers",
        cpu.set_debug_regs(&state.debug_registers),
    )?;
    kvm("the local APIC", cpu.set_lapic(&state.lapic))?;
    write_msrs(cpu, &state.msrs)?;
    // Last, because setting registers drops what is pending.
    kvm(
        "the events on their way",
        cpu.set_vcpu_events(&state.events),
    )
}

/// Writes registers: the time stamp counter first, and what is measured by it last.
fn write_msrs(cpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), MachineError> {
    let mut ordered = entries.to_vec();
    ordered.sort_by_key(|entry| match entry.index {
        TSC => 0,
        TSC_DEADLINE => 2,
        _ => 1,
    });
    let msrs = Msrs::from_entries(&ordered).map_err(|_| MachineError::Refused {
        what: "so many model-specific registers".into(),
    })?;
    let written = kvm("model-specific registers", cpu.set_msrs(&msrs))?;
    match ordered.get(written) {
        None => Ok(()),
        Some(refused) => Err(MachineError::Refused {
            what: format!(
                "model-specific register {:#x} with the value {:#x}",
                refused.index, refused.data
            ),
        }),
    }
}

/// The state of what the kernel emulates besides processors.
pub(super) fn save_chips(vm: &VmFd) -> Result<Chips, MachineError> {
    let mut chips = Chips {
        pit: kvm("the timer", vm.get_pit2())?,
        ..Chips::default()
    };
    for (saved, chip_id) in chips.interrupt_controllers.iter_mut().zip(CONTROLLERS) {
        let mut chip = kvm_irqchip {
            chip_id,
            ..kvm_irqchip::default()
        };
        kvm("an interrupt controller", vm.get_irqchip(&mut chip))?;
        *saved = sys::controller_bytes(&chip);
    }
    Ok(chips)
}

/// Gives them another state.
pub(super) fn load_chips(vm: &VmFd, state: &Chips) -> Result<(), MachineError> {
    for (Controller(bytes), chip_id) in state.interrupt_controllers.iter().zip(CONTROLLERS) {
        let mut chip = kvm_irqchip {
            chip_id,
            ..kvm_irqchip::default()
        };
        chip.chip.dummy = bytes.map(u8::cast_signed);
        kvm("an interrupt controller", vm.set_irqchip(&chip))?;
    }
    kvm("the timer", vm.set_pit2(&state.pit))
}

/// KVM's clock, which a guest may read.
pub(super) fn save_clock(vm: &VmFd) -> Result<u64, MachineError> {
    Ok(kvm("the clock", vm.get_clock())?.clock)
}

/// Lets KVM's clock go on from where it stood: for the guest no time passes while it is suspended.
pub(super) fn load_clock(vm: &VmFd, nanos: u64) -> Result<(), MachineError> {
    kvm("the clock", vm.set_clock(&state::clock(nanos)))
}
