//! What needs `unsafe` in this program: a call that trusts a size, bytes of a union, and the way to interrupt a processor.

#![expect(
    unsafe_code,
    reason = "a signal handler reaches what it interrupts, and KVM's structures have unions"
)]

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::ptr;

use kvm_bindings::{kvm_irqchip, kvm_xsave};
use kvm_ioctls::{Error, VcpuFd};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::state::Controller;

thread_local! {
    /// Where KVM looks whether this thread's processor is to leave the guest at once; null if the thread runs none.
    static LEAVE: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// The signal that makes a processor's thread leave the guest.
pub(crate) fn kick_signal() -> c_int {
    SIGRTMIN()
}

/// Makes the kick do what it is for. Before it is sent for the first time.
pub(crate) fn handle_kicks() -> Result<(), Error> {
    register_signal_handler(kick_signal(), on_kick)
}

/// If the thread is about to enter the guest, it leaves again without having run: so a kick is not lost between looking whether
/// one should stop and entering.
extern "C" fn on_kick(_: c_int, _: *mut libc::siginfo_t, _: *mut c_void) {
    let leave = LEAVE.get();
    if !leave.is_null() {
        // SAFETY: it is not null, so the `Kickable` of this thread lives, and with it the mapping that holds this byte. The kernel reads it
        // when the thread enters the guest, and this thread alone writes it. The cell has no destructor and is initialised without
        // code, so that reading it in a handler is sound.
        unsafe { leave.write_volatile(1) };
    }
}

/// This thread may be kicked out of `cpu` while this lives.
#[derive(Debug)]
pub(crate) struct Kickable<'a> {
    cpu: &'a mut VcpuFd,
}

impl<'a> Kickable<'a> {
    pub(crate) fn new(cpu: &'a mut VcpuFd) -> Self {
        LEAVE.set(&raw mut cpu.get_kvm_run().immediate_exit);
        Self { cpu }
    }

    pub(crate) fn cpu(&mut self) -> &mut VcpuFd {
        self.cpu
    }
}

impl Drop for Kickable<'_> {
    fn drop(&mut self) {
        LEAVE.set(ptr::null_mut());
        self.cpu.set_kvm_immediate_exit(0);
    }
}

/// Loads what `XSAVE` saved.
pub(crate) fn set_xsave(cpu: &VcpuFd, xsave: &kvm_xsave) -> Result<(), Error> {
    // SAFETY: KVM reads more than the 4096 bytes of `kvm_xsave` only in a process that has asked for state that is larger
    // (`ARCH_REQ_XCOMP_GUEST_PERM`), which this program never does.
    unsafe { cpu.set_xsave(xsave) }
}

/// The registers of an interrupt controller as bytes.
pub(crate) fn controller_bytes(chip: &kvm_irqchip) -> Controller {
    // SAFETY: every member of the union is plain integers within these 512 bytes, and the structure was zeroed before KVM wrote a part
    // of it, so each of them is initialised.
    let bytes = unsafe { chip.chip.dummy };
    Controller(bytes.map(i8::cast_unsigned))
}
