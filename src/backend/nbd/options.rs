//! How a server is spoken to.

use std::path::PathBuf;
use std::time::Duration;

/// How a server is spoken to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteOptions {
    /// How long an operation may take, reconnecting included; what takes longer fails with
    /// [`TimedOut`](std::io::ErrorKind::TimedOut).
    pub deadline: Duration,
    /// How many connections carry large reads and writes, if the server can be spoken to over several; they are opened when they are needed.
    pub connections: usize,
    /// How many bytes one large read has under way at most, over all connections. It should be the link's bandwidth times the round
    /// trip, and not much more: what is under way beyond that waits in the network, and lets what is urgent wait behind it.
    pub window: usize,
    /// Refuse to write, whatever the server would let us do.
    pub read_only: bool,
    /// Take a server that knows no flush for one that needs none. Otherwise a flush after a write is an error there: nothing tells
    /// when what was written is durable.
    pub assume_durable: bool,
    /// Certificates, for URLs with TLS.
    pub tls: TlsOptions,
}

impl Default for RemoteOptions {
    fn default() -> Self {
        Self {
            // Shorter than the 30 s and more after which programs and kernels say that something hangs.
            deadline: Duration::from_secs(20),
            connections: 4,
            // 1 Gbit/s at 60 ms.
            window: 8 << 20,
            read_only: false,
            assume_durable: false,
            tls: TlsOptions::default(),
        }
    }
}

/// Certificates, each in a PEM file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TlsOptions {
    /// Who may vouch for the server; without it those whom this machine trusts.
    pub authorities: Option<PathBuf>,
    /// Our own certificate with those that vouch for it, and its key, for servers that ask for it.
    pub certificate: Option<(PathBuf, PathBuf)>,
    /// The name that the server's certificate must have, if it is not the host of the URL.
    pub name: Option<String>,
}

/// Why TLS cannot be spoken.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read, or is not what it should be.
    #[cfg(feature = "tls")]
    #[error("{} cannot be read as PEM", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: rustls::pki_types::pem::Error,
    },
    /// A file holds no certificate.
    #[error("{} holds no certificate in PEM", .0.display())]
    Empty(PathBuf),
    /// There is no file of authorities.
    #[error(
        "this machine has no file of trusted authorities: name the one that vouches for the server"
    )]
    NoAuthorities,
    /// The server's name can be in no certificate.
    #[error("{0:?} is no name that a certificate could have: say which name the server's has")]
    Name(String),
    /// Certificates and key do not go together.
    #[cfg(feature = "tls")]
    #[error("the certificates cannot be used")]
    Config(#[source] rustls::Error),
    /// This program was built without TLS.
    #[error("this program was built without TLS: build it with the feature `tls`")]
    NotBuilt,
}
