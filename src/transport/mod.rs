//! Connections between two hosts: pairing, lanes, frames.
//!
//! A [`Session`] is several connections that belong together: one for control, one for faults and their answers, and
//! some for bulk. Sockets are blocking; every wait has a deadline, or ends when the session is shut down.

mod handshake;
mod lane;
mod pairing;
mod tcp;

pub use handshake::{HandshakeError, Refusal};
pub use lane::{Lane, LaneError, LaneReader, LaneWriter};
pub use pairing::{Pairing, PairingError};
pub use tcp::{ConnectError, Listener, Session};
