//! All that a virtual processor has besides memory.

use kvm_bindings::{
    kvm_cpuid_entry2, kvm_debugregs, kvm_dtable, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events, kvm_vcpu_events__bindgen_ty_1,
    kvm_vcpu_events__bindgen_ty_2, kvm_vcpu_events__bindgen_ty_3, kvm_vcpu_events__bindgen_ty_4,
    kvm_vcpu_events__bindgen_ty_5, kvm_xcr, kvm_xcrs, kvm_xsave,
};

use super::coding::{Coded, Input, Malformed, coded};

/// The state of one virtual processor.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct CpuState {
    /// What the guest was told of its processor.
    pub(crate) cpuid: Vec<kvm_cpuid_entry2>,
    /// How fast its time stamp counter counts.
    pub(crate) tsc_khz: u32,
    pub(crate) mp_state: kvm_mp_state,
    pub(crate) regs: kvm_regs,
    pub(crate) sregs: kvm_sregs,
    pub(crate) xcrs: kvm_xcrs,
    /// x87, SSE, AVX and what else the processor saves that way.
    pub(crate) xsave: XsaveArea,
    pub(crate) debug_registers: kvm_debugregs,
    pub(crate) lapic: kvm_lapic_state,
    /// Every register of the host's list that it can read.
    pub(crate) msrs: Vec<kvm_msr_entry>,
    /// Exceptions and interrupts on their way.
    pub(crate) events: kvm_vcpu_events,
}

coded! {
    CpuState {
        cpuid, tsc_khz, mp_state, regs, sregs, xcrs, xsave, debug_registers, lapic, msrs, events,
    }
    kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx }
    kvm_mp_state { mp_state }
    kvm_regs {
        rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags,
    }
    kvm_segment {
        base, limit, selector, type_, present, dpl, db, s, l, g, avl, unusable,
    }
    kvm_dtable { base, limit }
    kvm_sregs {
        cs, ds, es, fs, gs, ss, tr, ldt, gdt, idt, cr0, cr2, cr3, cr4, cr8, efer, apic_base, interrupt_bitmap,
    }
    kvm_xcr { xcr, value }
    kvm_xcrs { nr_xcrs, flags, xcrs }
    kvm_debugregs { db, dr6, dr7, flags }
    kvm_lapic_state { regs }
    kvm_msr_entry { index, data }
    kvm_vcpu_events {
        exception, interrupt, nmi, sipi_vector, flags, smi, triple_fault, exception_has_payload, exception_payload,
    }
    kvm_vcpu_events__bindgen_ty_1 { injected, nr, has_error_code, pending, error_code }
    kvm_vcpu_events__bindgen_ty_2 { injected, nr, soft, shadow }
    kvm_vcpu_events__bindgen_ty_3 { injected, pending, masked }
    kvm_vcpu_events__bindgen_ty_4 { smm, pending, smm_inside_nmi, latched_init }
    kvm_vcpu_events__bindgen_ty_5 { pending }
}

/// What `XSAVE` saves, in the processor's own layout. It has no room for state that the kernel only gives to who asks for it (AMX), and
/// the guest is not told of that.
#[derive(Clone, PartialEq)]
pub(crate) struct XsaveArea(pub(crate) [u32; 1024]);

impl Default for XsaveArea {
    fn default() -> Self {
        Self([0; 1024])
    }
}

impl std::fmt::Debug for XsaveArea {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let used = self.0.iter().filter(|&&word| word != 0).count();
        write!(f, "XsaveArea({used} words that are not 0)")
    }
}

impl XsaveArea {
    /// As KVM takes it.
    pub(crate) fn for_kvm(&self) -> kvm_xsave {
        kvm_xsave {
            region: self.0,
            ..kvm_xsave::default()
        }
    }
}

impl Coded for XsaveArea {
    fn put(&self, output: &mut Vec<u8>) {
        self.0.put(output);
    }

    fn take(input: &mut Input<'_>) -> Result<Self, Malformed> {
        let mut area = Self::default();
        for (index, word) in area.0.iter_mut().enumerate() {
            *word = input.field(index)?;
        }
        Ok(area)
    }
}
