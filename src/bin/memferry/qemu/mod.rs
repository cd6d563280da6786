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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_is_used_unencrypted_unless_the_user_insists() {
        for (address, insecure, allowed) in [
            ("127.0.0.1:1", false, true),
            ("[::1]:1", false, true),
            ("192.0.2.1:1", false, false),
            ("0.0.0.0:1", false, false),
            ("[::]:1", false, false),
            ("192.0.2.1:1", true, true),
        ] {
            let answer = check_encryption(address.parse().unwrap(), insecure);
            assert_eq!(answer.is_ok(), allowed, "{address}");
        }
    }
}
