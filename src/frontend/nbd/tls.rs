//! TLS over a connection, and who a server is.

use std::io::{self, IoSlice, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection};

/// What a server shows to its clients, and which of them it lets in.
#[derive(Debug, Clone)]
pub struct TlsIdentity(pub(super) Arc<ServerConfig>);

/// Why files make no identity.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file is not what it should be.
    #[error("cannot take {what} from {path}: it has to be a PEM file")]
    Pem {
        /// What was wanted.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        source: rustls::pki_types::pem::Error,
    },
    /// The file has no certificate.
    #[error("{path} has no certificate")]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// The certificate and the key do not belong together, or are of a kind that is not supported.
    #[error("the certificate and its key cannot be used")]
    Identity(#[source] rustls::Error),
    /// Clients cannot be checked with this.
    #[error("clients cannot be checked with the certificates of {path}")]
    Clients {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl TlsIdentity {
    /// Reads a chain of certificates and its key, and with `clients` the authorities one of which has to vouch for every client. All
    /// are PEM files.
    ///
    /// # Errors
    /// If a file cannot be read or used.
    pub fn load(certificates: &Path, key: &Path, clients: Option<&Path>) -> Result<Self, TlsError> {
        let chain = read_certificates(certificates)?;
        let key = PrivateKeyDer::from_pem_file(key).map_err(|source| TlsError::Pem {
            what: "a private key",
            path: key.into(),
            source,
        })?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(TlsError::Identity)?;
        let builder = match clients {
            None => builder.with_no_client_auth(),
            Some(path) => {
                let refuse = |source| TlsError::Clients {
                    path: path.into(),
                    source,
                };
                let mut roots = RootCertStore::empty();
                for certificate in read_certificates(path)? {
                    roots
                        .add(certificate)
                        .map_err(|error| refuse(error.into()))?;
                }
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                        .build()
                        .map_err(|error| refuse(error.into()))?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        builder
            .with_single_cert(chain, key)
            .map(|config| Self(Arc::new(config)))
            .map_err(TlsError::Identity)
    }
}

fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = || CertificateDer::pem_file_iter(path)?.collect::<Result<Vec<_>, _>>();
    let certificates = read().map_err(|source| TlsError::Pem {
        what: "certificates",
        path: path.into(),
        source,
    })?;
    if certificates.is_empty() {
        return Err(TlsError::Empty { path: path.into() });
    }
    Ok(certificates)
}

/// What is encrypted at once: some records, so that a large reply does not take up as much room again.
const STEP: usize = 64 << 10;

/// A connection that has shaken hands. One thread reads, another may write at the same time; they meet in the lock for as long
/// as a few records take.
#[derive(Debug)]
pub(super) struct TlsStream {
    session: Mutex<Session>,
    /// Of the thread that reads.
    incoming: Mutex<Incoming>,
}

/// Encrypted bytes that came. They are not all decrypted at once: the session holds only so many that are not read.
#[derive(Debug)]
struct Incoming {
    bytes: Vec<u8>,
    at: usize,
    end: usize,
}

#[derive(Debug)]
struct Session {
    tls: ServerConnection,
    /// Encrypted, and not sent from `sent` on.
    out: Vec<u8>,
    sent: usize,
}

impl TlsStream {
    pub(super) fn shake_hands(
        config: Arc<ServerConfig>,
        mut recv: impl FnMut(&mut [u8]) -> io::Result<usize>,
        mut send: impl FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<Self> {
        let mut tls = ServerConnection::new(config).map_err(io::Error::other)?;
        tls.set_buffer_limit(Some(STEP * 2));
        let mut incoming = Incoming {
            bytes: vec![0; 16 << 10],
            at: 0,
            end: 0,
        };
        let mut out = Vec::new();
        loop {
            while tls.wants_write() {
                tls.write_tls(&mut out)?;
            }
            send(&out)?;
            out.clear();
            if !tls.is_handshaking() {
                break;
            }
            if incoming.at == incoming.end && !incoming.fill(&mut recv)? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let taken = incoming.give(&mut tls);
            if taken.is_err() {
                // The alert tells the client what is wrong; whether it hears it does not matter.
                while tls.wants_write() {
                    tls.write_tls(&mut out)?;
                }
                let _ = send(&out);
            }
            taken?;
        }
        Ok(Self {
            session: Mutex::new(Session { tls, out, sent: 0 }),
            incoming: Mutex::new(incoming),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Session> {
        // After a panic the peer finds out by itself that records are missing.
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn recv(
        &self,
        buf: &mut [u8],
        mut recv: impl FnMut(&mut [u8]) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let mut incoming = self.incoming.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let mut session = self.lock();
            match session.tls.reader().read(buf) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // Without a farewell: somebody may have cut it short, but every request says how long it is.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
                read => return read,
            }
            if incoming.at < incoming.end {
                incoming.give(&mut session.tls)?;
                continue;
            }
            drop(session);
            if !incoming.fill(&mut recv)? {
                return Ok(0);
            }
        }
    }

    pub(super) fn send(
        &self,
        slices: &[IoSlice<'_>],
        mut send: impl FnMut(&[u8]) -> io::Result<usize>,
    ) -> io::Result<usize> {
        self.push(&mut send)?;
        let mut session = self.lock();
        let mut taken = 0;
        for slice in slices {
            let part = &slice[..slice.len().min(STEP - taken)];
            let written = session.tls.writer().write(part)?;
            taken += written;
            if taken == STEP || written < slice.len() {
                break;
            }
        }
        let Session { tls, out, .. } = &mut *session;
        while tls.wants_write() {
            tls.write_tls(out)?;
        }
        drop(session);
        match self.push(send) {
            // The bytes are taken; what of them could not be sent yet goes first the next time.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(taken),
            pushed => pushed.map(|()| taken),
        }
    }

    pub(super) fn push(&self, mut send: impl FnMut(&[u8]) -> io::Result<usize>) -> io::Result<()> {
        let mut session = self.lock();
        let Session { out, sent, .. } = &mut *session;
        while *sent < out.len() {
            // Never waits, so the reader is kept for as long as a copy takes.
            *sent += send(&out[*sent..])?;
        }
        out.clear();
        *sent = 0;
        Ok(())
    }

    pub(super) fn end(&self, send: impl FnMut(&[u8]) -> io::Result<usize>) -> io::Result<()> {
        let mut session = self.lock();
        session.tls.send_close_notify();
        let Session { tls, out, .. } = &mut *session;
        while tls.wants_write() {
            tls.write_tls(out)?;
        }
        drop(session);
        self.push(send)
    }
}

impl Incoming {
    /// Whether anything came.
    fn fill(&mut self, recv: &mut impl FnMut(&mut [u8]) -> io::Result<usize>) -> io::Result<bool> {
        (self.at, self.end) = (0, recv(&mut self.bytes)?);
        Ok(self.end > 0)
    }

    /// Has the session take some.
    fn give(&mut self, tls: &mut ServerConnection) -> io::Result<()> {
        let mut rest = &self.bytes[self.at..self.end];
        if tls.read_tls(&mut rest)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.at = self.end - rest.len();
        tls.process_new_packets()
            .map(|_| ())
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    }
}
