//! Why there is no connection.

use std::io;

use super::TlsError;
use super::fault::Fault;
use crate::nbd::OptionError;

/// Why an export cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// Nobody answers.
    #[error(
        "cannot connect to {place}: is a server listening there, and does the firewall let it through?"
    )]
    Connect {
        /// Where.
        place: String,
        /// The cause.
        source: io::Error,
    },
    /// TLS cannot be spoken.
    #[error("cannot speak TLS")]
    Tls(#[from] TlsError),
    /// The server does not speak TLS, and we do nothing without.
    #[error(
        "the server does not speak TLS ({error}{}): use a URL without it only if whoever listens in between may read and change everything",
        said(message)
    )]
    NoTls {
        /// What it says.
        error: OptionError,
        /// The same for people.
        message: String,
    },
    /// The two ends do not agree on TLS.
    #[error("no agreement on TLS: do the certificates fit, on both sides?")]
    TlsHandshake(#[source] io::Error),
    /// The server lets nobody in without TLS.
    #[error("the server wants TLS: write nbds:// in place of nbd://")]
    NeedsTls,
    /// There is no export of this name.
    #[error("the server has no export named {0:?}: `memferry list` shows those that it has")]
    NoExport(String),
    /// The server says no.
    #[error("the server refuses the export: {error}{}", said(message))]
    Refused {
        /// What it says.
        error: OptionError,
        /// The same for people.
        message: String,
    },
    /// The connection has ended before anything was agreed on, or the server does not keep to the protocol.
    #[error(transparent)]
    Lost(#[from] Fault),
    /// The export is not the one it was.
    #[error(
        "the export is not the one it was ({0}), so nothing is read from or written to it: has the server been started with another file?"
    )]
    Changed(String),
}

/// What a server says besides its error.
fn said(message: &str) -> String {
    if message.is_empty() {
        String::new()
    } else {
        format!(" ({message})")
    }
}
