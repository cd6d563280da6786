//! TLS beneath a connection.

use std::io::{self, IoSlice, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore};

use super::wire::{Also, Wire, left};
use super::{NbdPlace, TlsError, TlsOptions};

/// Where distributions keep the authorities that a machine trusts.
const SYSTEM_AUTHORITIES: [&str; 3] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/cert.pem",
];

/// How many bytes are encrypted at once: four records.
const PORTION: usize = 64 << 10;

/// What is needed to speak TLS to one server.
#[derive(Debug, Clone)]
pub(super) struct TlsConfig {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
}

impl TlsConfig {
    pub(super) fn new(options: &TlsOptions, place: &NbdPlace) -> Result<Self, TlsError> {
        let name = match (&options.name, place) {
            (Some(name), _) => name.as_str(),
            (None, NbdPlace::Tcp { host, .. }) => host.as_str(),
            // Whom one finds there is who owns the file.
            (None, NbdPlace::Unix(_)) => "localhost",
        };
        let name =
            ServerName::try_from(name.to_owned()).map_err(|_| TlsError::Name(name.to_owned()))?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(TlsError::Config)?
            .with_root_certificates(authorities(options.authorities.as_deref())?);
        let config = match &options.certificate {
            None => config.with_no_client_auth(),
            Some((chain, key)) => {
                let chain = certificates(chain)?;
                let key = PrivateKeyDer::from_pem_file(key).map_err(|source| TlsError::File {
                    path: key.clone(),
                    source,
                })?;
                config
                    .with_client_auth_cert(chain, key)
                    .map_err(TlsError::Config)?
            }
        };
        let config = Arc::new(config);
        Ok(Self { config, name })
    }
}

fn authorities(path: Option<&Path>) -> Result<RootCertStore, TlsError> {
    let path = match path {
        Some(path) => path.to_owned(),
        None => SYSTEM_AUTHORITIES
            .iter()
            .map(PathBuf::from)
            .find(|path| path.exists())
            .ok_or(TlsError::NoAuthorities)?,
    };
    let mut store = RootCertStore::empty();
    let (added, _) = store.add_parsable_certificates(certificates(&path)?);
    if added == 0 {
        return Err(TlsError::Empty(path));
    }
    Ok(store)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let file = |source| TlsError::File {
        path: path.to_owned(),
        source,
    };
    let certificates: Vec<_> = CertificateDer::pem_file_iter(path)
        .map_err(file)?
        .collect::<Result<_, _>>()
        .map_err(file)?;
    if certificates.is_empty() {
        return Err(TlsError::Empty(path.to_owned()));
    }
    Ok(certificates)
}

/// The state of a TLS connection. Its lock is held while bytes are encrypted or decrypted, and never while one waits.
#[derive(Debug)]
pub(super) struct Tls {
    state: Mutex<State>,
    /// What was received and not yet decrypted; of the thread that receives.
    received: Mutex<Received>,
}

#[derive(Debug)]
struct State {
    connection: ClientConnection,
    /// Encrypted, and not yet sent.
    outgoing: Vec<u8>,
    sent: usize,
}

#[derive(Debug)]
struct Received {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Tls {
    /// Shakes hands.
    pub(super) fn handshake(
        wire: &Wire,
        config: &TlsConfig,
        deadline: Instant,
    ) -> io::Result<Self> {
        let mut connection = ClientConnection::new(Arc::clone(&config.config), config.name.clone())
            .map_err(io::Error::other)?;
        // What is given to it at once is limited here, by `PORTION`.
        connection.set_buffer_limit(None);
        let tls = Self {
            state: Mutex::new(State {
                connection,
                outgoing: Vec::new(),
                sent: 0,
            }),
            received: Mutex::new(Received {
                bytes: vec![0; PORTION].into_boxed_slice(),
                start: 0,
                end: 0,
            }),
        };
        loop {
            match tls.try_flush(wire) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    wire.wait_to_send(Also::Nothing, deadline)?;
                    continue;
                }
                Err(error) => return Err(error),
            }
            if !tls.lock().connection.is_handshaking() {
                return Ok(tls);
            }
            match tls.receive_records(wire, deadline) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => {
                    left(deadline)?;
                }
                Err(error) => {
                    // An alert that tells the server why is worth a try.
                    let _ = tls.try_flush(wire);
                    return Err(error);
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic of rustls leaves a connection whose next call fails; nothing of ours is half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Receives what there is, at least a byte; 0 is the end.
    pub(super) fn receive(
        &self,
        wire: &Wire,
        buf: &mut [u8],
        deadline: Instant,
    ) -> io::Result<usize> {
        let mut begun = false;
        loop {
            match self.lock().connection.reader().read(buf) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // Without its alert the end may have been made by a stranger; to the protocol above every end is an error.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
                read => return read,
            }
            if begun {
                // Parts of a record have come, and do not count.
                left(deadline)?;
            }
            begun = true;
            if self.receive_records(wire, deadline)? == 0 {
                return Ok(0);
            }
        }
    }

    /// Decrypts what has come, or waits for more to come. 0 is the end.
    fn receive_records(&self, wire: &Wire, deadline: Instant) -> io::Result<usize> {
        let mut received = self.received.lock().unwrap_or_else(PoisonError::into_inner);
        if received.start == received.end {
            let len = wire.receive_raw(&mut received.bytes, false, deadline)?;
            (received.start, received.end) = (0, len);
            if len == 0 {
                return Ok(0);
            }
        }
        let mut state = self.lock();
        let mut rest = &received.bytes[received.start..received.end];
        let taken = state.connection.read_tls(&mut rest)?;
        state
            .connection
            .process_new_packets()
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        received.start += taken;
        Ok(taken)
    }

    /// Encrypts some of `parts`, and sends what the peer takes at once. Returns how many bytes need not be given again.
    pub(super) fn try_send(&self, wire: &Wire, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut state = self.lock();
        state.try_flush(wire)?;
        let mut taken = 0;
        for part in parts {
            let some = &part[..part.len().min(PORTION - taken)];
            state.connection.writer().write_all(some)?;
            taken += some.len();
            if taken == PORTION {
                break;
            }
        }
        // What is left over is sent first the next time.
        match state.try_flush(wire) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(taken),
        }
    }

    /// Sends what was encrypted and not yet sent.
    pub(super) fn try_flush(&self, wire: &Wire) -> io::Result<()> {
        self.lock().try_flush(wire)
    }

    /// Whether there are bytes that no system call is needed for.
    pub(super) fn has_something(&self) -> bool {
        let mut state = self.lock();
        let decrypted = state
            .connection
            .process_new_packets()
            .is_ok_and(|io| io.plaintext_bytes_to_read() > 0);
        drop(state);
        let received = self.received.lock().unwrap_or_else(PoisonError::into_inner);
        decrypted || received.start < received.end
    }
}

impl State {
    fn try_flush(&mut self, wire: &Wire) -> io::Result<()> {
        loop {
            while self.sent < self.outgoing.len() {
                self.sent += wire.send_raw(&[IoSlice::new(&self.outgoing[self.sent..])])?;
            }
            self.outgoing.clear();
            self.sent = 0;
            if !self.connection.wants_write() {
                return Ok(());
            }
            self.connection.write_tls(&mut self.outgoing)?;
        }
    }
}
