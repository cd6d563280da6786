//! TLS with another implementation at the other end.

use std::path::{Path, PathBuf};

use memferry::frontend::nbd::{Tls, TlsIdentity};
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose,
};
use serde_json::Value;
use tempfile::TempDir;

use crate::rig::{Rig, good, noise, run};

const LEN: usize = 2 << 20;

/// A folder with files of the names that libnbd and QEMU look for.
struct Certificates {
    folder: TempDir,
}

impl Certificates {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let authority = params.self_signed(&key).unwrap();
        write(folder.path(), "ca-cert.pem", &authority.pem());
        let issuer = Issuer::new(params, key);
        for (name, purpose) in [
            ("server", ExtendedKeyUsagePurpose::ServerAuth),
            ("client", ExtendedKeyUsagePurpose::ClientAuth),
        ] {
            let (certificate, key) = signed(&issuer, purpose);
            write(
                folder.path(),
                &format!("{name}-cert.pem"),
                &certificate.pem(),
            );
            write(
                folder.path(),
                &format!("{name}-key.pem"),
                &key.serialize_pem(),
            );
        }
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn identity(&self, clients: bool) -> TlsIdentity {
        let authority = self.path("ca-cert.pem");
        TlsIdentity::load(
            &self.path("server-cert.pem"),
            &self.path("server-key.pem"),
            clients.then_some(authority.as_path()),
        )
        .unwrap()
    }
}

fn write(folder: &Path, name: &str, text: &str) {
    std::fs::write(folder.join(name), text).unwrap();
}

fn signed(
    issuer: &Issuer<'_, KeyPair>,
    purpose: ExtendedKeyUsagePurpose,
) -> (Certificate, KeyPair) {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    params.extended_key_usages = vec![purpose];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    (params.signed_by(&key, issuer).unwrap(), key)
}

/// Over a socket there is no host whose name could be checked.
fn url(rig: &Rig, certificates: &Path) -> String {
    format!(
        "nbds+unix:///disk?socket={}&tls-certificates={}&tls-verify-peer=false",
        rig.socket().display(),
        certificates.display()
    )
}

#[test]
#[ignore = "foreign: needs nbdinfo"]
fn libnbd_speaks_tls_with_a_certificate_of_its_own() {
    let certificates = Certificates::new();
    let rig = Rig::new(LEN as u64, Tls::Required(certificates.identity(true)));
    let url = url(&rig, certificates.folder.path());
    let told: Value = serde_json::from_str(&good("nbdinfo", &["--json", &url])).unwrap();
    assert_eq!(told["TLS"], true);
    assert_eq!(told["exports"][0]["export-size"], LEN);
    // Nothing is told in the clear.
    let clear = run("nbdinfo", &[&rig.url()]);
    assert!(!clear.success, "{clear:?}");
    let clear = run("nbdinfo", &["--list", &rig.url_of("")]);
    assert!(!clear.success, "{clear:?}");
    // Nor to who has no certificate, or one of somebody else.
    let others = Certificates::new();
    let stranger = run("nbdinfo", &[&self::url(&rig, others.folder.path())]);
    assert!(!stranger.success, "{stranger:?}");
    rig.is_left();
}

#[test]
#[ignore = "foreign: needs nbdcopy"]
fn bytes_come_through_tls_unchanged() {
    let certificates = Certificates::new();
    let rig = Rig::new(LEN as u64, Tls::Allowed(certificates.identity(false)));
    let url = url(&rig, certificates.folder.path());
    let bytes = noise(LEN);
    let file = rig.file("from", &bytes);
    let back = rig.file("to", &[]);
    good("nbdcopy", &[&file, &url]);
    assert!(rig.bytes() == bytes);
    for size in ["--request-size=4096", "--request-size=1048576"] {
        good("nbdcopy", &[size, &url, &back]);
        assert!(std::fs::read(&back).unwrap() == bytes);
    }
    // Where it is only offered, it can be left.
    good("nbdinfo", &[&rig.url()]);
    rig.is_left();
}

#[test]
#[ignore = "foreign: needs qemu-img"]
fn qemu_speaks_tls() {
    let certificates = Certificates::new();
    let rig = Rig::new(LEN as u64, Tls::Required(certificates.identity(true)));
    let object = format!(
        "tls-creds-x509,id=tls0,endpoint=client,dir={},verify-peer=yes",
        certificates.folder.path().display()
    );
    let image = format!(
        "driver=raw,file.driver=nbd,file.server.type=unix,file.server.path={},file.export=disk,file.tls-creds=tls0,\
         file.tls-hostname=localhost",
        rig.socket().display()
    );
    let bytes = noise(LEN);
    let file = rig.file("image", &bytes);
    let common = ["--object", &object, "--image-opts"];
    let info = [&["info", "--output=json"], &common[..], &[&image]].concat();
    let info: Value = serde_json::from_str(&good("qemu-img", &info)).unwrap();
    assert_eq!(info["virtual-size"], LEN);
    let convert = ["convert", "-n", "--object", &object, "--target-image-opts"];
    good(
        "qemu-img",
        &[&convert[..], &["-f", "raw", &file, &image]].concat(),
    );
    assert!(rig.bytes() == bytes);
    rig.is_left();
}
