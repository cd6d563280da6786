//! Our client with our server, over sockets.

use std::io;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use memferry::backend::MemoryStorage;
use memferry::backend::nbd::{DoubtfulWrites, NbdUrl, Remote, RemoteOptions};
use memferry::chunk::conformance::storage;
use memferry::chunk::{Fault, Faulty, Operation, Storage};
use memferry::frontend::nbd::{Export, Listener, Server, ServerOptions};

const SOON: Duration = Duration::from_secs(20);

/// A server of exports that have numbers for names, and its port.
struct Rig {
    server: Server,
    port: u16,
    exports: AtomicU64,
}

impl Rig {
    fn new() -> Self {
        Self::at(TcpListener::bind("127.0.0.1:0").unwrap())
    }

    fn at(listener: TcpListener) -> Self {
        let server = Server::new(ServerOptions::default());
        let port = listener.local_addr().unwrap().port();
        server.listen(Listener::Tcp(listener)).unwrap();
        Self {
            server,
            port,
            exports: AtomicU64::new(0),
        }
    }

    fn serve(&self, storage: Arc<dyn Storage>) -> NbdUrl {
        let name = self.exports.fetch_add(1, Ordering::Relaxed).to_string();
        self.server
            .add(Export::new(&name, storage).unwrap())
            .unwrap();
        NbdUrl::tcp("127.0.0.1", self.port, &name).unwrap()
    }

    fn connect(&self, storage: Arc<dyn Storage>) -> Remote {
        let options = RemoteOptions {
            deadline: SOON,
            ..RemoteOptions::default()
        };
        Remote::connect(&self.serve(storage), &options).unwrap()
    }
}

#[test]
fn a_storage_keeps_its_promises_through_both() {
    let rig = Rig::new();
    storage::run_all(&|len| Arc::new(rig.connect(Arc::new(MemoryStorage::new(len)))));
}

#[test]
fn large_reads_and_writes_are_spread_over_connections_and_every_byte_is_where_it_belongs() {
    let rig = Rig::new();
    let remote = rig.connect(Arc::new(MemoryStorage::new(64 << 20)));
    let bytes: Vec<u8> = (0..40_000_001_u32)
        .map(|at| (at ^ (at >> 9) ^ (at >> 17)) as u8)
        .collect();
    remote.write_all_at(&bytes, 12_345).unwrap();
    let mut read = vec![0; bytes.len()];
    remote.read_ahead_at(&mut read, 12_345).unwrap();
    assert!(read == bytes);
    read.fill(0);
    remote.read_exact_at(&mut read, 12_345).unwrap();
    assert!(read == bytes);
    // The urgent one, and all of the others.
    assert_eq!(rig.server.clients(), 5);
}

#[test]
fn an_error_of_the_medium_comes_through_as_what_it_is() {
    let rig = Rig::new();
    let faulty = Faulty::new(Arc::new(MemoryStorage::new(1 << 20)));
    let faults = faulty.faults();
    let remote = rig.connect(Arc::new(faulty));
    for (operation, kind) in [
        (Operation::Write, io::ErrorKind::StorageFull),
        (Operation::Write, io::ErrorKind::PermissionDenied),
        (Operation::Read, io::ErrorKind::OutOfMemory),
        (Operation::Zero, io::ErrorKind::StorageFull),
    ] {
        faults.add(Fault::error(kind).on(operation).times(1));
        let result = match operation {
            Operation::Write => remote.write_all_at(&[1; 4096], 0),
            Operation::Zero => remote.zero(0..4096),
            _ => remote.read_exact_at(&mut [0; 4096], 0),
        };
        assert_eq!(result.unwrap_err().kind(), kind, "{operation:?}");
    }
    remote.write_all_at(&[1; 4096], 0).unwrap();
    faults.add(
        Fault::error(io::ErrorKind::StorageFull)
            .on(Operation::Flush)
            .times(1),
    );
    let error = remote.flush().unwrap_err();
    let doubtful: &DoubtfulWrites = error.get_ref().unwrap().downcast_ref().unwrap();
    assert_eq!(
        (doubtful.ranges.len(), doubtful.ranges[0].clone()),
        (1, 0..4096)
    );
    remote.flush().unwrap();
}

#[test]
fn who_waits_for_a_server_that_is_away_can_be_told_why() {
    let memory: Arc<dyn Storage> = Arc::new(MemoryStorage::new(4096));
    let rig = Rig::new();
    let remote = rig.connect(Arc::clone(&memory));
    let port = rig.port;
    assert_eq!(remote.outage(), None);
    drop(rig);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| remote.read_exact_at(&mut [1], 0));
        let begun = Instant::now();
        let why = loop {
            assert!(begun.elapsed() < SOON && !reader.is_finished());
            if let Some(why) = remote.outage() {
                break why;
            }
            std::thread::yield_now();
        };
        assert!(why.contains("cannot connect"), "{why}");
        let rig = Rig::at(TcpListener::bind(("127.0.0.1", port)).unwrap());
        rig.serve(memory);
        reader.join().unwrap().unwrap();
        assert_eq!(remote.outage(), None);
    });
}

#[test]
fn readers_and_writers_go_on_while_servers_come_and_go() {
    // The bytes outlive the servers, as those of a disk do.
    const LEN: u64 = 4 << 20;
    let memory: Arc<dyn Storage> = Arc::new(MemoryStorage::new(LEN));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let rig = Rig::at(listener.try_clone().unwrap());
    let remote = rig.connect(Arc::clone(&memory));
    let begun = Instant::now();
    // It was counted how many servers there had been when the workers were done; a busy machine let them finish before.
    const LIVES: u64 = 5;
    let (steps, lives) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..3_u64)
            .map(|own| {
                let (remote, steps, lives) = (&remote, &steps, &lives);
                scope.spawn(move || {
                    let goes_on =
                        |_: &u64| lives.load(Ordering::Relaxed) < LIVES && begun.elapsed() < SOON;
                    for step in (0_u64..).take_while(goes_on) {
                        let at = own * (1 << 20) + (step * 7919) % (1 << 19);
                        let len = 1 + (step * 104_729) % 200_000;
                        let bytes = vec![(own + step) as u8; len as usize];
                        remote.write_all_at(&bytes, at).unwrap();
                        let mut read = vec![0; bytes.len()];
                        remote.read_exact_at(&mut read, at).unwrap();
                        assert!(read == bytes);
                        steps.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        let mut rig = rig;
        while lives.load(Ordering::Relaxed) < LIVES {
            let seen = steps.load(Ordering::Relaxed);
            // A life is as long as some steps take.
            while steps.load(Ordering::Relaxed) < seen + 20 {
                assert!(begun.elapsed() < SOON, "nobody gets on");
                assert!(workers.iter().all(|worker| !worker.is_finished()));
                std::thread::yield_now();
            }
            drop(rig);
            rig = Rig::at(listener.try_clone().unwrap());
            rig.serve(Arc::clone(&memory));
            lives.fetch_add(1, Ordering::Relaxed);
        }
        // The last of them lives until all are done.
        for worker in workers {
            worker.join().unwrap();
        }
    });
}
