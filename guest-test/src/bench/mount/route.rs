//! How a server is reached: through a link of this process, or as the kernel delays its packets.

use std::io;
use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use super::link::{Link, Shape};
use crate::command;

/// Who makes the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum By {
    /// Threads of this process.
    Proxy,
    /// The kernel, on the loopback interface: for a machine of one's own.
    Netem,
}

/// A way to a server, as long as this is kept.
#[derive(Debug)]
pub(super) enum Route {
    Direct(SocketAddr),
    Proxy(Link),
    Netem(SocketAddr),
}

const LIMIT: Duration = Duration::from_secs(20);
/// Packets that may be under way: with the smallest that a stream has, more than any round trip's worth.
const PACKETS: &str = "100000";

impl Route {
    /// A way of this shape; without one, as it is.
    pub(super) fn new(server: SocketAddr, shape: Option<Shape>, by: By) -> Result<Self> {
        match (shape, by) {
            (None, _) => Ok(Self::Direct(server)),
            (Some(shape), By::Proxy) => Ok(Self::Proxy(Link::new(server, shape)?)),
            (Some(shape), By::Netem) => {
                // Both directions of a connection pass the interface once.
                let delay = format!("{}us", (shape.round_trip / 2).as_micros());
                let rate = format!("{:.0}bit", shape.rate * 8.0);
                let netem = ["netem", "limit", PACKETS, "delay", &delay, "rate", &rate];
                traffic_control("replace", &netem).context("netem")?;
                Ok(Self::Netem(server))
            }
        }
    }

    /// Where to connect to.
    pub(super) fn address(&self) -> SocketAddr {
        match self {
            Self::Direct(address) | Self::Netem(address) => *address,
            Self::Proxy(link) => link.address(),
        }
    }
}

impl Drop for Route {
    fn drop(&mut self) {
        if matches!(self, Self::Netem(_)) {
            // Without it the next one replaces it.
            let _gone = traffic_control("del", &[]);
        }
    }
}

fn traffic_control(what: &str, arguments: &[&str]) -> Result<()> {
    let tc = command::find("tc")
        .ok_or(io::ErrorKind::NotFound)
        .map_err(io::Error::from);
    let mut command = Command::new(tc.context("tc is missing (Debian: iproute2)")?);
    command
        .args(["qdisc", what, "dev", "lo", "root"])
        .args(arguments);
    command::output(&mut command, LIMIT)?;
    Ok(())
}
