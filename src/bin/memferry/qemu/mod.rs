//! `memferry qemu`: the two ends of a QEMU guest's migration.

mod ram;
pub(crate) mod receive;
pub(crate) mod send;
pub(crate) mod watch;

use std::net::SocketAddr;

use anyhow::bail;

/// Refuses to carry a guest's memory in clear over a network that others may listen to.
fn check_encryption(address: SocketAddr, insecure: bool) -> anyhow::Result<()> {
    if address.ip().is_loopback() || insecure {
        return Ok(());
    }
    bail!(
        "{address} is not loopback, and the guest's memory would cross the network unencrypted: run it through a tunnel to \
         loopback (for example `ssh -L`), or add --insecure on both sides if the network is trusted"
    )
}
