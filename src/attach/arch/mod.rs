//! What injection must know of a CPU: its registers, call numbers, gadgets and signal frame.
//!
//! A port writes one more file with the items that [`x86_64`] has. The rest of [`attach`](super) does not know
//! which CPU it runs on.

#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub(super) use x86_64::{Call, Frame, Gadgets, Registers, SECCOMP_ARCHITECTURE, Search};

#[cfg(not(target_arch = "x86_64"))]
mod unsupported;
#[cfg(not(target_arch = "x86_64"))]
pub(super) use unsupported::{Call, Frame, Gadgets, Registers, SECCOMP_ARCHITECTURE, Search};

/// Whether this build can inject at all.
pub(super) const SUPPORTED: bool = cfg!(target_arch = "x86_64");
