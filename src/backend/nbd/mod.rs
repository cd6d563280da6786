//! The exports of any NBD server as [`Storage`](crate::chunk::Storage).
//!
//! ```text
//! Remote        any range, in requests that the server takes; again over a new connection, if one is lost
//!  ├ Lane       a connection that is opened when it is needed
//!  │  └ Connection   requests of many threads at a time; who waits for an answer reads those of others, too (Desk)
//!  │     ├ Inbox     what was received and not yet read
//!  │     └ Wire      bytes there and back, plain or over TLS
//!  ├ Order      writes that overlap, one after the other
//!  └ Doubt      what a server that has died may have taken with it
//! ```

mod call;
mod connect_error;
mod connection;
mod desk;
mod doubt;
mod fault;
mod hello;
mod inbox;
mod lane;
mod list;
mod options;
mod order;
mod remote;
#[cfg(test)]
mod tests;
#[cfg_attr(not(feature = "tls"), path = "tls_off.rs")]
mod tls;
mod transfer;
mod url;
mod wire;

pub use connect_error::ConnectError;
pub use doubt::DoubtfulWrites;
pub use fault::{Fault, Misbehaviour};
pub use list::{ListedExport, list};
pub use options::{RemoteOptions, TlsError, TlsOptions};
pub use remote::Remote;
pub use url::{NbdPlace, NbdUrl, NbdUrlError};
