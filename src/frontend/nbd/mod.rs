//! A region as a network block device, served to whoever speaks the protocol.
//!
//! ```text
//!  clients             one thread each               shared
//! ┌────────┐ requests ┌───────────────────┐  what   ┌─────────┐
//! │ qemu,  │─────────►│ handshake, then   │────────►│ workers │────► Storage
//! │ kernel,│          │ read, check;      │ may wait└────┬────┘         ▲
//! │ libnbd │          │ what is at hand ──┼──────────────┼──────────────┘
//! │ …      │◄─────────┤ is done at once   │   replies    │
//! └────────┘ replies  └───────────────────┘              │
//!      ▲                                                 │
//!      └─────────────────────────────────────────────────┘
//! ```
//!
//! Replies go out in the order in which they are ready, together where several are. What is held for a client, requests under way and
//! replies that it has not taken, is limited, for it and for all; who has reached the limit is not read until it has taken some.

mod answer;
mod budget;
mod channel;
mod connection;
#[cfg(feature = "nbd-device")]
mod device;
mod export;
mod handshake;
mod negotiation;
mod overdue;
mod perform;
mod server;
#[cfg(feature = "tls")]
mod tls;
mod transmission;
mod workers;

pub use connection::Traffic;
#[cfg(feature = "nbd-device")]
pub use device::{
    AttachError, Control, DetachError, Device, DeviceOptions, DeviceState, Force, FreeError,
    Holder, ListedDevice, Readiness, devices, free,
};
pub use export::{Export, ExportError};
pub use handshake::Tls;
pub use server::{AddError, CutOff, Event, Listener, OnEvent, Server, ServerOptions};
#[cfg(feature = "tls")]
pub use tls::{TlsError, TlsIdentity};
pub use transmission::serve_transmission;
pub use workers::{WorkerOptions, Workers};
