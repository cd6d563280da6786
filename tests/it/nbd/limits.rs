//! Clients that are slow, greedy, many, or gone.

use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use memferry::chunk::Storage;
use memferry::frontend::nbd::{
    CutOff, Export, Server, ServerOptions, WorkerOptions, Workers, serve_transmission,
};
use memferry::nbd::{ClientOption, Command, Errno, OptionError, OptionReply};

use super::client::{Client, SIZE, SOON, eventually, memory, request, server, server_of};

/// Reads of the first byte wait until they are let go.
#[derive(Debug)]
struct Stuck {
    inner: Arc<dyn Storage>,
    open: Mutex<bool>,
    opened: Condvar,
    waiting: AtomicUsize,
}

impl Stuck {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            inner: memory(),
            open: Mutex::new(false),
            opened: Condvar::new(),
            waiting: AtomicUsize::new(0),
        })
    }

    fn let_go(&self) {
        *self.open.lock().unwrap() = true;
        self.opened.notify_all();
    }
}

impl Storage for Stuck {
    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        if offset == 0 {
            self.waiting.fetch_add(1, Ordering::Relaxed);
            let open = self.open.lock().unwrap();
            let (open, _) = self
                .opened
                .wait_timeout_while(open, SOON, |open| !*open)
                .unwrap();
            self.waiting.fetch_sub(1, Ordering::Relaxed);
            if !*open {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
        self.inner.read_exact_at(buf, offset)
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.inner.write_all_at(buf, offset)
    }

    fn flush(&self) -> io::Result<()> {
        self.inner.flush()
    }

    fn data_ranges(&self, within: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        self.inner.data_ranges(within)
    }
}

#[test]
fn answers_overtake_those_that_wait_for_the_storage() {
    let stuck = Stuck::new();
    let server = server_of(Export::new("it", Arc::clone(&stuck) as _).unwrap());
    let mut client = Client::simple(&server);
    client.request(&request(Command::Read, 0, 1), &[]);
    for offset in 1..100 {
        let answer = client.run(&request(Command::Read, offset, 1), &[]);
        assert_eq!(answer.error, None);
    }
    stuck.let_go();
    assert_eq!(
        client.answer(|_| 1).cookie,
        request(Command::Read, 0, 1).cookie
    );
}

#[test]
fn who_takes_no_answers_is_not_read_any_more_and_keeps_nobody_else_waiting() {
    let server = Server::new(ServerOptions {
        workers: WorkerOptions {
            threads: 2,
            in_flight: 0,
            in_flight_each: 0,
            ..WorkerOptions::default()
        },
        ..ServerOptions::default()
    });
    let long: Arc<dyn Storage> = Arc::new(memferry::backend::MemoryStorage::new(64 << 20));
    server.add(Export::new("it", long).unwrap()).unwrap();
    let mut greedy: Vec<Client> = (0..3).map(|_| Client::simple(&server)).collect();
    for client in &mut greedy {
        client
            .socket
            .set_write_timeout(Some(Duration::from_millis(200)))
            .unwrap();
        // Until the server does not read any more; each asks for 16 MiB.
        let bytes = request(Command::Read, 0, 16 << 20).encode();
        let asked = (0..100_000).find(|_| client.socket.write_all(&bytes).is_err());
        assert!(asked.is_some(), "the server takes any number of requests");
    }
    let mut client = Client::simple(&server);
    for _ in 0..100 {
        let answer = client.run(&request(Command::Read, 5, 64 << 10), &[]);
        assert_eq!(answer.error, None);
    }
    drop(greedy);
    eventually("clients that went are still there", || {
        server.clients() == 1
    });
    // And everything that was held for them was given back.
    let answer = client.run(&request(Command::Read, 0, 32 << 20), &[]);
    assert_eq!(answer.error, None);
}

#[test]
fn a_client_that_vanishes_leaves_nothing_behind() {
    let stuck = Stuck::new();
    let server = server_of(Export::new("it", Arc::clone(&stuck) as _).unwrap());
    for _ in 0..4 {
        let mut client = Client::simple(&server);
        client.request(&request(Command::Read, 0, 4096), &[]);
        // Half a write.
        client.request(&request(Command::Write, 0, 4096), &[0; 100]);
    }
    eventually("requests are under way", || {
        stuck.waiting.load(Ordering::Relaxed) == 4
    });
    stuck.let_go();
    eventually("clients that went are still there", || {
        server.clients() == 0
    });
    // The export's, and this one.
    eventually("somebody holds the storage", || {
        Arc::strong_count(&stuck) == 2
    });
}

#[test]
fn who_does_not_shake_hands_in_time_is_sent_away() {
    let server = Server::new(ServerOptions {
        handshake: Duration::from_millis(50),
        ..ServerOptions::default()
    });
    let (mut silent, other) = UnixStream::pair().unwrap();
    silent.set_read_timeout(Some(SOON)).unwrap();
    server.serve(other).unwrap();
    // The greeting, and then the end.
    let mut all = Vec::new();
    silent.read_to_end(&mut all).unwrap();
    assert_eq!(all.len(), 18);
    eventually("it is still there", || server.clients() == 0);
}

#[test]
fn there_are_only_so_many_clients() {
    let server = Server::new(ServerOptions {
        connections: 1,
        ..ServerOptions::default()
    });
    server.add(Export::new("it", memory()).unwrap()).unwrap();
    let client = Client::simple(&server);
    let (_socket, other) = UnixStream::pair().unwrap();
    assert!(server.serve(other).is_err());
    drop(client);
    eventually("it is still there", || server.clients() == 0);
    Client::simple(&server);
}

#[test]
fn exports_come_and_go_by_name() {
    let server = server();
    let again = Export::new("memory", memory()).unwrap();
    assert!(server.add(again.clone()).is_err());
    let mut client = Client::simple(&server);
    assert_eq!(server.remove("memory", Instant::now() + SOON), Ok(true));
    assert!(client.is_closed());
    assert_eq!(server.remove("memory", Instant::now() + SOON), Ok(false));
    let mut client = Client::greet(&server);
    assert_eq!(client.ask(&ClientOption::List), [OptionReply::Ack]);
    let go = ClientOption::Go(memferry::nbd::InfoQuery {
        name: "memory".into(),
        kinds: Vec::new(),
    });
    let refused = client.ask(&go);
    assert!(matches!(
        refused[..],
        [OptionReply::Error {
            error: OptionError::Unknown,
            ..
        }]
    ));
    server.add(again).unwrap();
    client.go();
}

#[test]
fn what_was_asked_for_before_a_shutdown_is_answered() {
    let stuck = Stuck::new();
    let server = server_of(Export::new("it", Arc::clone(&stuck) as _).unwrap());
    let mut client = Client::simple(&server);
    client.request(&request(Command::Read, 0, 4096), &[]);
    eventually("the read is under way", || {
        stuck.waiting.load(Ordering::Relaxed) == 1
    });
    thread::scope(|scope| {
        let down = scope.spawn(|| server.shutdown(Instant::now() + SOON));
        stuck.let_go();
        let answer = client.answer(|_| 4096);
        assert_eq!(answer.error, None);
        assert!(client.is_closed());
        assert_eq!(down.join().unwrap(), Ok(()));
    });
    let (_socket, other) = UnixStream::pair().unwrap();
    assert!(server.serve(other).is_err());
}

#[test]
fn a_shutdown_does_not_wait_for_a_storage_longer_than_it_may() {
    let stuck = Stuck::new();
    let server = server_of(Export::new("it", Arc::clone(&stuck) as _).unwrap());
    let mut client = Client::simple(&server);
    client.request(&request(Command::Read, 0, 4096), &[]);
    eventually("the read is under way", || {
        stuck.waiting.load(Ordering::Relaxed) == 1
    });
    let began = Instant::now();
    let down = server.shutdown(began + Duration::from_millis(50));
    assert_eq!(down, Err(CutOff { left: 1 }));
    assert!(began.elapsed() < SOON);
    stuck.let_go();
}

#[test]
fn several_sockets_without_a_handshake_share_an_export_and_workers() {
    let export = Export::new("it", memory()).unwrap();
    let workers = Workers::new(&WorkerOptions::default());
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let sockets: Vec<UnixStream> = (0..3)
            .map(|_| {
                let (socket, other) = UnixStream::pair().unwrap();
                socket.set_read_timeout(Some(SOON)).unwrap();
                let (export, workers, done) = (&export, &workers, &done);
                scope.spawn(move || {
                    let traffic = serve_transmission(other, export, workers).unwrap();
                    assert!(traffic.requests > 0);
                    done.store(true, Ordering::Relaxed);
                });
                socket
            })
            .collect();
        for (at, socket) in (0_u64..).zip(sockets) {
            let mut client = Client {
                socket,
                extended: false,
            };
            let byte = u8::try_from(at + 1).unwrap();
            let write = request(Command::Write, at, 1);
            assert_eq!(client.error(&write, &[byte]), None);
            let answer = client.run(&request(Command::Read, 0, at + 1), &[]);
            let bytes: Vec<u8> = (1..=byte).collect();
            assert_eq!(answer.chunks[0].1, bytes);
            if at == 0 {
                client.request(&request(Command::Disconnect, 0, 0), &[]);
                assert!(client.is_closed());
            }
        }
    });
    assert!(done.load(Ordering::Relaxed));
}

#[test]
fn a_storage_that_panics_or_fails_is_an_error_to_its_client_and_nothing_to_anybody_else() {
    #[derive(Debug)]
    struct Broken(Arc<dyn Storage>);
    impl Storage for Broken {
        fn len(&self) -> u64 {
            self.0.len()
        }
        fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
            assert_ne!(offset, 666, "on purpose");
            self.0.read_exact_at(buf, offset)
        }
        fn write_all_at(&self, _: &[u8], _: u64) -> io::Result<()> {
            Err(io::ErrorKind::TimedOut.into())
        }
        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
        fn data_ranges(&self, _: Range<u64>) -> io::Result<Vec<Range<u64>>> {
            Err(io::ErrorKind::StorageFull.into())
        }
    }
    let server = server_of(Export::new("it", Arc::new(Broken(memory()))).unwrap());
    let (mut one, mut other) = (Client::structured(&server), Client::simple(&server));
    let read = request(Command::Read, 666, 1);
    assert_eq!(one.error(&read, &[]), Some(Errno::Io));
    assert_eq!(one.run(&request(Command::Read, 0, 1), &[]).error, None);
    assert_eq!(other.run(&request(Command::Read, 0, 1), &[]).error, None);
    let write = request(Command::Write, 0, 1);
    assert_eq!(other.error(&write, &[1]), Some(Errno::Io));
    let mut third = Client::structured(&server);
    let status = request(Command::BlockStatus, 0, SIZE);
    assert_eq!(third.error(&status, &[]), Some(Errno::NoSpc));
}
