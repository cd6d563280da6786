//! A link to a server: so many bytes a second each way, and half a round trip each way.
//!
//! ```text
//!            reader                      writer
//! client ──▶ takes what the rate lets ──▶ waits until it would have arrived ──▶ server
//!        ◀──                          ◀──                                     ◀──
//! ```
//!
//! In threads and TCP of this process, because what the kernel has for it (netem) is missing from many. All connections share
//! the rate, in the order in which they send. A connection costs the round trip that it costs on a real link, too: what
//! the client sends right away is as late as if it had waited for its connection.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::net::sockopt;

/// What a link is like.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Shape {
    /// From here to there and back.
    pub(super) round_trip: Duration,
    /// In bytes a second, each way.
    pub(super) rate: f64,
}

/// A link that is there until it is dropped.
#[derive(Debug)]
pub(super) struct Link {
    address: SocketAddr,
    ends: Arc<Ends>,
    acceptor: Option<JoinHandle<()>>,
}

/// What is to be closed.
#[derive(Debug, Default)]
struct Ends {
    closing: AtomicBool,
    sockets: Mutex<Vec<TcpStream>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// One direction: when it has sent what it was given.
#[derive(Debug, Clone)]
struct Direction {
    shape: Shape,
    free: Arc<Mutex<Instant>>,
}

/// What is under way, and when it arrives; nothing is the end.
struct Piece {
    arrives: Instant,
    bytes: Vec<u8>,
}

/// What is sent at once; at 1 Gbit/s a quarter of a millisecond, for which others wait.
const PIECE: usize = 32 << 10;
/// How far a sender may be ahead of the link. Beyond that its bytes stay in its own buffers, as with a real one.
const AHEAD: Duration = Duration::from_millis(1);
/// How late a reader may be without wasting what the link could have carried: the burst of a token bucket.
const LATE: Duration = Duration::from_millis(4);
/// What a socket here takes in before the link does; more would let what is urgent wait behind it.
const BUFFER: usize = 512 << 10;
/// Pieces under way in a direction of a connection: with the smallest ones, too, more than a round trip's worth.
const UNDER_WAY: usize = 1 << 14;
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

impl Link {
    /// A link to a server on this machine.
    pub(super) fn new(server: SocketAddr, shape: Shape) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        sockopt::set_socket_recv_buffer_size(&listener, BUFFER)?;
        let address = listener.local_addr()?;
        let ends = Arc::new(Ends::default());
        let kept = Arc::clone(&ends);
        let (there, back) = (Direction::new(shape), Direction::new(shape));
        let acceptor = thread::Builder::new()
            .name("link".to_owned())
            .spawn(move || {
                for client in listener.incoming() {
                    if kept.closing.load(Ordering::Relaxed) {
                        break;
                    }
                    // A connection that cannot be made ends, as it would on a real link.
                    let _refused =
                        client.and_then(|client| join(&client, server, &there, &back, &kept));
                }
            })?;
        Ok(Self {
            address,
            ends,
            acceptor: Some(acceptor),
        })
    }

    /// Where to connect to.
    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.ends.closing.store(true, Ordering::Relaxed);
        // Who waits for a client gets this one.
        let _woken = TcpStream::connect(self.address);
        if let Some(acceptor) = self.acceptor.take() {
            let _printed = acceptor.join();
        }
        for socket in locked(&self.ends.sockets).drain(..) {
            let _closed = socket.shutdown(Shutdown::Both);
        }
        let threads = std::mem::take(&mut *locked(&self.ends.threads));
        for thread in threads {
            let _printed = thread.join();
        }
    }
}

/// Carries what both ends of a new connection say.
fn join(
    client: &TcpStream,
    server: SocketAddr,
    there: &Direction,
    back: &Direction,
    ends: &Ends,
) -> io::Result<()> {
    let began = Instant::now();
    let server = TcpStream::connect_timeout(&server, CONNECT_LIMIT)?;
    let half = there.shape.round_trip / 2;
    for socket in [client, &server] {
        socket.set_nodelay(true)?;
        locked(&ends.sockets).push(socket.try_clone()?);
    }
    // The client's first byte leaves when it knows that it is connected; the server hears so half a round trip later.
    for (from, to, direction, leaves) in [
        (client, &server, there, began + 2 * half),
        (&server, client, back, began + 3 * half),
    ] {
        let (queue, queued) = mpsc::sync_channel(UNDER_WAY);
        let (from, to, direction) = (from.try_clone()?, to.try_clone()?, direction.clone());
        let reader = thread::spawn(move || direction.take_in(from, &queue, leaves));
        let writer = thread::spawn(move || deliver(&queued, to));
        locked(&ends.threads).extend([reader, writer]);
    }
    Ok(())
}

impl Direction {
    fn new(shape: Shape) -> Self {
        Self {
            shape,
            free: Arc::new(Mutex::new(Instant::now())),
        }
    }

    /// Reads as fast as the link carries; nothing leaves before `leaves`.
    fn take_in(&self, mut from: TcpStream, queue: &SyncSender<Piece>, leaves: Instant) {
        let mut buffer = vec![0; PIECE];
        loop {
            let count = match from.read(&mut buffer) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => 0,
            };
            let sent = self.send(count, leaves);
            let piece = Piece {
                arrives: sent + self.shape.round_trip / 2,
                bytes: buffer[..count].to_vec(),
            };
            if queue.send(piece).is_err() || count == 0 {
                break;
            }
            wait_until(sent.checked_sub(AHEAD).unwrap_or(sent));
        }
    }

    /// When the last of these bytes has left.
    fn send(&self, count: usize, leaves: Instant) -> Instant {
        let now = Instant::now();
        let mut free = locked(&self.free);
        // A reader that comes late, because the machine does other things, has lost no time on the link.
        let begins = (*free).max(now.checked_sub(LATE).unwrap_or(now));
        #[expect(clippy::cast_precision_loss, reason = "a piece is small")]
        let takes = Duration::from_secs_f64(count as f64 / self.shape.rate);
        *free = begins + takes;
        // A connection that is not there yet holds up nobody else.
        (*free).max(leaves + takes).max(now)
    }
}

/// Writes what has arrived, until the end.
fn deliver(queued: &Receiver<Piece>, mut to: TcpStream) {
    while let Ok(piece) = queued.recv() {
        wait_until(piece.arrives);
        if piece.bytes.is_empty() || to.write_all(&piece.bytes).is_err() {
            break;
        }
    }
    let _closed = to.shutdown(Shutdown::Write);
}

fn wait_until(deadline: Instant) {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        thread::park_timeout(left);
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each is changed in one step.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server that sends back what it gets, for one connection.
    fn echo() -> (SocketAddr, JoinHandle<()>) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let server = thread::spawn(move || {
            let (socket, _) = listener.accept().unwrap();
            let _copied = io::copy(&mut &socket, &mut &socket);
        });
        (address, server)
    }

    #[test]
    fn a_link_takes_its_time_and_changes_nothing() {
        let shape = Shape {
            round_trip: Duration::from_millis(20),
            rate: 10e6,
        };
        let (address, server) = echo();
        let link = Link::new(address, shape).unwrap();
        let began = Instant::now();
        let mut socket = TcpStream::connect(link.address()).unwrap();
        let mut answer = [0; 3];
        socket.write_all(b"one").unwrap();
        socket.read_exact(&mut answer).unwrap();
        // A round trip for the connection and one for the question.
        assert!(began.elapsed() >= Duration::from_millis(40));
        assert_eq!(&answer, b"one");

        let sent: Vec<u8> = (0..1_000_000_u32)
            .map(|index| (index % 251) as u8)
            .collect();
        let copy = sent.clone();
        let mut writing = socket.try_clone().unwrap();
        let began = Instant::now();
        let writer = thread::spawn(move || writing.write_all(&copy).unwrap());
        let mut received = vec![0; sent.len()];
        socket.read_exact(&mut received).unwrap();
        // 1 MB at 10 MB/s, there and back at the same time.
        assert!(began.elapsed() >= Duration::from_millis(100));
        assert!(received == sent);
        writer.join().unwrap();

        socket.shutdown(Shutdown::Write).unwrap();
        assert_eq!(socket.read(&mut answer).unwrap(), 0);
        server.join().unwrap();
    }

    #[test]
    fn a_link_that_is_dropped_ends_its_connections() {
        let shape = Shape {
            round_trip: Duration::ZERO,
            rate: 1e9,
        };
        let (address, server) = echo();
        let link = Link::new(address, shape).unwrap();
        let mut socket = TcpStream::connect(link.address()).unwrap();
        socket.write_all(b"x").unwrap();
        socket.read_exact(&mut [0]).unwrap();
        drop(link);
        assert!(matches!(socket.read(&mut [0]), Ok(0) | Err(_)));
        server.join().unwrap();
    }
}
