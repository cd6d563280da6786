//! Our client with our server, over TLS: who is trusted, and who is not.

use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use memferry::backend::MemoryStorage;
use memferry::backend::nbd::{ConnectError, NbdUrl, Remote, RemoteOptions, TlsOptions, list};
use memferry::chunk::Storage;
use memferry::frontend::nbd::{Export, Listener, Server, ServerOptions, Tls, TlsIdentity};
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use tempfile::TempDir;

const LEN: u64 = 24 << 20;

/// An authority, and what it has signed, as files.
struct Authority {
    folder: TempDir,
}

impl Authority {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let write =
            |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        write("ca", &params.self_signed(&key).unwrap().pem());
        let issuer = Issuer::new(params, key);
        for (name, purpose) in [
            ("server", ExtendedKeyUsagePurpose::ServerAuth),
            ("client", ExtendedKeyUsagePurpose::ClientAuth),
        ] {
            let key = KeyPair::generate().unwrap();
            let mut params = CertificateParams::new(vec!["host.example".to_owned()]).unwrap();
            params.extended_key_usages = vec![purpose];
            let certificate = params.signed_by(&key, &issuer).unwrap();
            write(name, &certificate.pem());
            write(&format!("{name}-key"), &key.serialize_pem());
        }
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A server that asks clients for certificates, if it is to.
    fn serve(&self, clients: bool) -> (Server, NbdUrl) {
        let ca = self.path("ca");
        let clients = clients.then_some(ca.as_path());
        let identity =
            TlsIdentity::load(&self.path("server"), &self.path("server-key"), clients).unwrap();
        let server = Server::new(ServerOptions {
            tls: Tls::Required(identity),
            ..ServerOptions::default()
        });
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        server.listen(Listener::Tcp(listener)).unwrap();
        let storage = Arc::new(MemoryStorage::new(LEN));
        server.add(Export::new("", storage).unwrap()).unwrap();
        let url = NbdUrl::tcp("127.0.0.1", port, "").unwrap().with_tls(true);
        (server, url)
    }

    fn options(&self, certificate: bool) -> RemoteOptions {
        RemoteOptions {
            deadline: Duration::from_secs(20),
            tls: TlsOptions {
                authorities: Some(self.path("ca")),
                certificate: certificate.then(|| (self.path("client"), self.path("client-key"))),
                name: Some("host.example".to_owned()),
            },
            ..RemoteOptions::default()
        }
    }
}

#[test]
fn bytes_are_the_same_over_tls() {
    let authority = Authority::new();
    for certificate in [false, true] {
        let (server, url) = authority.serve(certificate);
        let options = authority.options(certificate);
        assert_eq!(list(&url, &options).unwrap().len(), 1);
        let remote = Remote::connect(&url, &options).unwrap();
        let bytes: Vec<u8> = (0..20_000_001_u32)
            .map(|at| (at ^ (at >> 9) ^ (at >> 17)) as u8)
            .collect();
        remote.write_all_at(&bytes, 77).unwrap();
        remote.flush().unwrap();
        let mut read = vec![0; bytes.len()];
        remote.read_ahead_at(&mut read, 77).unwrap();
        assert!(read == bytes);
        let mut page = [0; 4096];
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for at in (77..1_000_000).step_by(40_000) {
                        let mut page = [0; 4096];
                        remote.read_exact_at(&mut page, at).unwrap();
                        let from = at as usize - 77;
                        assert!(page[..] == bytes[from..from + 4096]);
                    }
                });
            }
        });
        remote.zero(0..4096).unwrap();
        remote.read_exact_at(&mut page, 0).unwrap();
        assert_eq!(page, [0; 4096]);
        drop(server);
    }
}

#[test]
fn a_server_that_nobody_vouches_for_is_not_spoken_to() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    let (_server, url) = authority.serve(false);
    let error = Remote::connect(&url, &stranger.options(false)).unwrap_err();
    assert!(matches!(error, ConnectError::TlsHandshake(_)), "{error:?}");
    let mut other_name = authority.options(false);
    other_name.tls.name = Some("other.example".to_owned());
    let error = Remote::connect(&url, &other_name).unwrap_err();
    assert!(matches!(error, ConnectError::TlsHandshake(_)), "{error:?}");
    // Without its name it is known by its address, which the certificate does not have.
    other_name.tls.name = None;
    Remote::connect(&url, &other_name).unwrap_err();
}

#[test]
fn a_client_that_nobody_vouches_for_gets_nothing() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    let (_server, url) = authority.serve(true);
    Remote::connect(&url, &authority.options(false)).unwrap_err();
    let mut options = authority.options(false);
    options.tls.certificate = Some((stranger.path("client"), stranger.path("client-key")));
    Remote::connect(&url, &options).unwrap_err();
}

#[test]
fn with_tls_and_without_do_not_mix() {
    let authority = Authority::new();
    let (_server, url) = authority.serve(false);
    let error = Remote::connect(&url.with_tls(false), &authority.options(false)).unwrap_err();
    assert!(matches!(error, ConnectError::NeedsTls), "{error:?}");
    let server = Server::new(ServerOptions::default());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    server.listen(Listener::Tcp(listener)).unwrap();
    let url = NbdUrl::tcp("127.0.0.1", port, "").unwrap().with_tls(true);
    let error = Remote::connect(&url, &authority.options(false)).unwrap_err();
    assert!(matches!(error, ConnectError::NoTls { .. }), "{error:?}");
}

#[test]
fn files_that_are_no_certificates_are_named() {
    let authority = Authority::new();
    let (_server, url) = authority.serve(false);
    let mut options = authority.options(false);
    options.tls.authorities = Some(authority.path("nothing"));
    let error = Remote::connect(&url, &options).unwrap_err();
    assert!(format!("{:#}", anyhow::Error::from(error)).contains("nothing"));
    options.tls.authorities = Some(authority.path("server-key"));
    let error = Remote::connect(&url, &options).unwrap_err();
    assert!(format!("{:#}", anyhow::Error::from(error)).contains("no certificate"));
}
