//! nbd-client, of the kernel's device; without a device it can list.

use std::net::TcpListener;

use memferry::frontend::nbd::{Listener, Tls};

use crate::rig::{Rig, run};

#[test]
#[ignore = "foreign: needs nbd-client"]
fn nbd_client_lists_exports() {
    let rig = Rig::new(1 << 20, Tls::Off);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    rig.server.listen(Listener::Tcp(listener)).unwrap();
    let said = run("nbd-client", &["-l", "127.0.0.1", &port]);
    // Debian's lives where only root looks.
    assert!(said.success, "{said:?}");
    assert!(said.out.contains("disk"), "{said:?}");
    rig.is_left();
}
