//! How a server is reached: arguments that several commands have.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use memferry::backend::nbd::{RemoteOptions, TlsOptions};

#[derive(Debug, Args)]
pub(crate) struct RemoteArgs {
    /// How many connections carry large reads and writes, if the server can be spoken to over several
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=64))]
    connections: u8,
    /// PEM file with certificates one of which has to vouch for the server, for nbds:// URLs
    #[arg(long, value_name = "FILE")]
    tls_ca: Option<PathBuf>,
    /// PEM file with this client's certificate
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// PEM file with the certificate's key
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// The name in the server's certificate, if it is not the host of the URL
    #[arg(long, value_name = "NAME")]
    tls_name: Option<String>,
}

impl RemoteArgs {
    pub(crate) fn options(&self, deadline: Duration) -> RemoteOptions {
        RemoteOptions {
            deadline,
            connections: usize::from(self.connections),
            tls: TlsOptions {
                authorities: self.tls_ca.clone(),
                certificate: self.tls_cert.clone().zip(self.tls_key.clone()),
                name: self.tls_name.clone(),
            },
            ..RemoteOptions::default()
        }
    }
}
