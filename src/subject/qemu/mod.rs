//! A QEMU guest as a subject: found, checked, suspended and restored through its QMP socket.
//!
//! QEMU is unmodified. Its RAM is a shared file that the engine copies on its own; QEMU is asked for the rest, the
//! device state, with its capability `x-ignore-shared`, and for a stop at the right moment, with
//! `pause-before-switchover`. The state passes through a socket pair whose one end is handed to QEMU over QMP, so
//! it needs no path, no port and no common mount namespace.
//!
//! ```text
//! Outgoing                                   Incoming (started with -incoming defer)
//! prepare   capabilities, limits             prepare   capabilities, `stop` (the same as -S)
//! suspend   migrate fd:…  → pre-switchover   load      migrate-incoming fd:… → completed, paused
//! save      migrate-continue → completed
//! release                                    resume    cont
//! ```

mod backend;
mod error;
mod incoming;
mod machine;
mod outgoing;
mod qmp;
mod qmp_codec;
mod qmp_error;
mod settings;
mod status;
mod stream;
mod undo;
mod will;

pub use backend::{Backend, BackendError};
pub use error::{QemuError, Refusal, Refusals};
pub use incoming::{IncomingQemu, IncomingTimings};
pub use machine::{Machine, RunState};
pub use outgoing::{OutgoingQemu, OutgoingTimings};
pub use qmp::Qmp;
pub use qmp_codec::{CodecError, Event, Version};
pub use qmp_error::QmpError;
pub use stream::StreamError;
pub use will::{Executor, LastWill};
