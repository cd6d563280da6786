//! A managed mount of an export of our server, over a socket that is cut.

use std::io;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use memferry::backend::MemoryStorage;
use memferry::backend::nbd::{NbdUrl, Remote, RemoteOptions};
use memferry::chunk::Storage;
use memferry::frontend::nbd::{Export, Listener, Server, ServerOptions};
use memferry::mount::{CloseError, Managed, ManagedOptions, Push};

const LEN: u64 = (8 << 20) + 777;
const SOON: Duration = Duration::from_secs(20);

fn serve(listener: TcpListener, region: &Arc<MemoryStorage>) -> Server {
    let server = Server::new(ServerOptions::default());
    server
        .add(Export::new("region", region.clone()).unwrap())
        .unwrap();
    server.listen(Listener::Tcp(listener)).unwrap();
    server
}

fn region() -> (Arc<MemoryStorage>, Vec<u8>) {
    let region = Arc::new(MemoryStorage::new(LEN));
    let bytes: Vec<u8> = (0..LEN)
        .map(|at| (at % 251 + at / 4096) as u8 | 1)
        .collect();
    region.write_all_at(&bytes, 0).unwrap();
    (region, bytes)
}

fn open(port: u16, options: &ManagedOptions) -> Managed {
    let url = NbdUrl::tcp("127.0.0.1", port, "region").unwrap();
    let remote_options = RemoteOptions {
        deadline: Duration::from_millis(300),
        ..RemoteOptions::default()
    };
    let remote = Arc::new(Remote::connect(&url, &remote_options).unwrap());
    let local = Arc::new(MemoryStorage::new(remote.len()));
    Managed::open(remote, local, options).unwrap()
}

fn all_of(storage: &dyn Storage) -> io::Result<Vec<u8>> {
    let mut buf = vec![0; usize::try_from(storage.len()).unwrap()];
    storage.read_exact_at(&mut buf, 0)?;
    Ok(buf)
}

#[test]
fn a_mount_outlives_its_server_and_saves_what_was_written_meanwhile() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (region, mut bytes) = region();
    let server = serve(listener, &region);
    let managed = open(
        address.port(),
        &ManagedOptions {
            pull: false,
            read_ahead: false,
            push: Push::Every(Duration::from_millis(5)),
            ..ManagedOptions::default()
        },
    );
    managed.read_exact_at(&mut [0; 4096], 0).unwrap();
    drop(server);

    let before = Instant::now();
    let error = managed.read_exact_at(&mut [0; 4096], 1 << 20).unwrap_err();
    assert!(before.elapsed() < SOON, "{error}");
    managed.read_exact_at(&mut [0; 4096], 0).unwrap();
    managed.write_all_at(&[9; 8192], 4 << 20).unwrap();
    bytes[4 << 20..(4 << 20) + 8192].fill(9);
    managed.flush().unwrap_err();
    assert_eq!(managed.progress().dirty, 8192);
    assert!(managed.progress().last_push_error.is_some());

    // Connections of the old server are still around.
    let listener = {
        let deadline = Instant::now() + SOON;
        loop {
            match TcpListener::bind(address) {
                Ok(listener) => break listener,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            std::thread::yield_now();
        }
    };
    let _server = serve(listener, &region);
    let deadline = Instant::now() + SOON;
    while managed.flush().is_err() {
        assert!(Instant::now() < deadline, "{:?}", managed.progress());
    }
    assert!(all_of(&*region).unwrap() == bytes);
    assert!(all_of(&managed).unwrap() == bytes);
    managed.close(SOON).unwrap();
}

#[test]
fn what_no_server_took_is_named_when_the_mount_is_closed() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let (region, _) = region();
    let server = serve(listener, &region);
    let managed = open(port, &ManagedOptions::default());
    managed.wait_for_all(SOON).unwrap();
    drop(server);
    managed.write_all_at(&[9; 10], 5000).unwrap();
    let before = Instant::now();
    let error = managed.close(Duration::from_millis(500)).unwrap_err();
    assert!(before.elapsed() < SOON);
    let CloseError::Lost { ranges, .. } = error else {
        panic!("{error}");
    };
    assert_eq!(ranges.len(), 1);
    assert_eq!(ranges[0], 4096..8192);
}
