//! Sessions over TCP.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::handshake::{self, CONTROL, HandshakeError, Place, Refusal};
use super::lane::Lane;
use super::pairing::Pairing;

/// How long one connection may take to shake hands. A stranger that connects and says nothing delays the others by
/// this long at most.
const HANDSHAKE: Duration = Duration::from_secs(5);

/// How long it may take to be told no: the end of a session may have to wait for it.
const TURN_AWAY: Duration = Duration::from_secs(1);

/// The most bulk lanes of a session: more than enough to fill any link.
const MAX_LANES: u8 = 64;

/// The connections of one migration.
#[derive(Debug)]
pub struct Session {
    /// Messages about the migration.
    pub control: Lane,
    /// Faults and their answers.
    pub urgent: Lane,
    /// Chunks.
    pub bulk: Vec<Lane>,
}

/// Why no session came about.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The address does not resolve.
    #[error("cannot resolve {address}")]
    Resolve {
        /// The address.
        address: String,
        /// The cause.
        source: io::Error,
    },
    /// Nobody answers.
    #[error(
        "cannot connect to {address}: is the receiver still waiting there, and does the firewall let it through?"
    )]
    Connect {
        /// The address.
        address: String,
        /// The cause.
        source: io::Error,
    },
    /// The two ends do not get on.
    #[error("no session with {address}")]
    Handshake {
        /// The address.
        address: String,
        /// The cause.
        source: HandshakeError,
    },
    /// The session was not complete in time.
    #[error("the other side did not open all of its connections in time")]
    Incomplete,
    /// The listening socket failed.
    #[error("the listening socket failed")]
    Listen(#[from] io::Error),
}

impl Session {
    /// Dials the listener that printed `pairing`, with `lanes` bulk lanes. `silence` is the longest time that the peer
    /// may fail to take what is sent.
    ///
    /// # Errors
    /// If the session does not stand by `deadline`.
    pub fn connect(
        pairing: &Pairing,
        lanes: u8,
        silence: Duration,
        deadline: Instant,
    ) -> Result<Self, ConnectError> {
        let address = &pairing.address;
        let resolved: Vec<SocketAddr> = address
            .to_socket_addrs()
            .map_err(|source| ConnectError::Resolve {
                address: address.clone(),
                source,
            })?
            .collect();
        let lanes = lanes.clamp(1, MAX_LANES);
        let open = |lane| {
            let stream = dial_any(&resolved, deadline).map_err(|source| ConnectError::Connect {
                address: address.clone(),
                source,
            })?;
            let place = Place { lane, lanes };
            handshake::dial(&stream, pairing, place, deadline).map_err(|source| {
                ConnectError::Handshake {
                    address: address.clone(),
                    source,
                }
            })?;
            Ok(Lane::new(stream, silence)?)
        };
        Ok(Self {
            control: open(CONTROL)?,
            urgent: open(0)?,
            bulk: (1..=lanes).map(open).collect::<Result<_, ConnectError>>()?,
        })
    }

    /// Ends all lanes, also for threads that wait on them.
    pub fn shut_down(&self) {
        for lane in [&self.control, &self.urgent].into_iter().chain(&self.bulk) {
            lane.shut_down();
        }
    }
}

fn dial_any(addresses: &[SocketAddr], deadline: Instant) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in addresses {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        match TcpStream::connect_timeout(address, left) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Waits for the connections of a session.
#[derive(Debug)]
pub struct Listener {
    socket: TcpListener,
}

impl Listener {
    /// Listens at `address`; port 0 takes any.
    ///
    /// # Errors
    /// If the address is not one of this host or is in use.
    pub fn bind(address: SocketAddr) -> io::Result<Self> {
        Ok(Self {
            socket: TcpListener::bind(address)?,
        })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// Waits for the session of `pairing`, as long as `wait` says so, which is asked ten times a second; once its
    /// first lane stands, for the others until `patience` has passed. Connections of others are turned away and
    /// reported to `refused`.
    ///
    /// # Errors
    /// [`ConnectError::Incomplete`] if `wait` says no or the other lanes do not come.
    pub fn accept(
        &self,
        pairing: &Pairing,
        silence: Duration,
        patience: Duration,
        mut wait: impl FnMut() -> bool,
        mut refused: impl FnMut(SocketAddr, &HandshakeError),
    ) -> Result<Session, ConnectError> {
        let mut gathering = Gathering::default();
        let mut deadline = None;
        loop {
            let late = deadline.is_some_and(|deadline| Instant::now() >= deadline);
            if late || !wait() {
                return Err(ConnectError::Incomplete);
            }
            if !self.wait_for_connection()? {
                continue;
            }
            let (stream, from) = self.socket.accept()?;
            let end = Instant::now() + HANDSHAKE;
            match handshake::answer(&stream, pairing, end, |place| gathering.check(place)) {
                Ok(place) => {
                    deadline.get_or_insert_with(|| Instant::now() + patience);
                    gathering.add(place, Lane::new(stream, silence)?);
                    if let Some(session) = gathering.complete() {
                        return Ok(session);
                    }
                }
                Err(error) => refused(from, &error),
            }
        }
    }

    /// Tells who comes with `pairing` that it was used already, for as long as `wait` says so, which is asked ten times a
    /// second. For the time in which its session runs.
    ///
    /// # Errors
    /// If the listening socket fails.
    pub fn turn_away(&self, pairing: &Pairing, mut wait: impl FnMut() -> bool) -> io::Result<()> {
        while wait() {
            // A connection that comes when the session is just over is left to the next accept: after a dry run the
            // pairing is still good.
            if self.wait_for_connection()? && wait() {
                let (stream, _) = self.socket.accept()?;
                // Who does not take the answer need not have it.
                let end = Instant::now() + TURN_AWAY;
                let _ = handshake::answer(&stream, pairing, end, |_| Err(Refusal::Used));
            }
        }
        Ok(())
    }

    fn wait_for_connection(&self) -> io::Result<bool> {
        let mut fds = [PollFd::from_borrowed_fd(self.socket.as_fd(), PollFlags::IN)];
        let tenth = Timespec {
            tv_sec: 0,
            tv_nsec: 100_000_000,
        };
        match poll(&mut fds, Some(&tenth)) {
            Ok(ready) => Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// The lanes of a session that have come so far.
#[derive(Default)]
struct Gathering {
    lanes: Vec<(Place, Lane)>,
}

impl Gathering {
    fn check(&self, place: Place) -> Result<(), Refusal> {
        let bulk = (1..=place.lanes).contains(&place.lane);
        if place.lanes == 0
            || place.lanes > MAX_LANES
            || !(bulk || place.lane == CONTROL || place.lane == 0)
        {
            return Err(Refusal::WrongLane);
        }
        match self.lanes.first() {
            Some((first, _)) if first.lanes != place.lanes => Err(Refusal::WrongLane),
            _ if self.lanes.iter().any(|(taken, _)| *taken == place) => Err(Refusal::Used),
            _ => Ok(()),
        }
    }

    fn add(&mut self, place: Place, lane: Lane) {
        self.lanes.push((place, lane));
    }

    fn complete(&mut self) -> Option<Session> {
        let (first, _) = self.lanes.first()?;
        if self.lanes.len() < usize::from(first.lanes) + 2 {
            return None;
        }
        // Control is 255 and so the last, urgent is 0 and so the first; no place is taken twice.
        self.lanes.sort_by_key(|(place, _)| place.lane);
        let mut lanes: Vec<Lane> = self.lanes.drain(..).map(|(_, lane)| lane).collect();
        let control = lanes.pop()?;
        let urgent = lanes.remove(0);
        Some(Session {
            control,
            urgent,
            bulk: lanes,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::LaneError;
    use migrate_proto::Message;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    const SOON: Duration = Duration::from_secs(10);

    fn listen() -> (Listener, Pairing) {
        let listener = Listener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        (listener, Pairing::new(address).unwrap())
    }

    #[test]
    fn all_lanes_of_a_session_find_their_places() {
        let (listener, pairing) = listen();
        thread::scope(|scope| {
            let dialer =
                scope.spawn(|| Session::connect(&pairing, 3, SOON, Instant::now() + SOON).unwrap());
            let session = listener
                .accept(&pairing, SOON, SOON, || true, |_, error| panic!("{error}"))
                .unwrap();
            let dialed = dialer.join().unwrap();
            assert_eq!(session.bulk.len(), 3);
            dialed.bulk[1]
                .split()
                .unwrap()
                .1
                .send(&Message::Probe, &[b"ab", b"c"])
                .unwrap();
            let (mut reader, _) = session.bulk[1].split().unwrap();
            assert_eq!(reader.receive().unwrap(), (Message::Probe, 3));
            let mut payload = [0; 3];
            reader.read_exact(&mut payload).unwrap();
            assert_eq!(&payload, b"abc");
            dialed.shut_down();
            assert!(matches!(reader.receive(), Err(LaneError::Closed)));
        });
    }

    #[test]
    fn a_wrong_secret_is_refused_and_the_right_one_still_works() {
        let (listener, pairing) = listen();
        let mut wrong = pairing.clone();
        wrong.secret[0] ^= 1;
        thread::scope(|scope| {
            let dialer = scope.spawn(|| {
                let refused = Session::connect(&wrong, 1, SOON, Instant::now() + SOON);
                let accepted = Session::connect(&pairing, 1, SOON, Instant::now() + SOON);
                (refused, accepted)
            });
            let mut seen = 0;
            listener
                .accept(&pairing, SOON, SOON, || true, |_, _| seen += 1)
                .unwrap();
            let (refused, accepted) = dialer.join().unwrap();
            let error = refused.unwrap_err();
            assert!(
                matches!(
                    error,
                    ConnectError::Handshake {
                        source: HandshakeError::Refused(Refusal::WrongSecret),
                        ..
                    }
                ),
                "{error:?}"
            );
            assert!(accepted.is_ok());
            assert_eq!(seen, 1);
        });
    }

    #[test]
    fn who_comes_while_a_session_runs_is_told_at_once_that_the_pairing_was_used() {
        let (listener, pairing) = listen();
        let over = &AtomicBool::new(false);
        let refused = thread::scope(|scope| {
            let running = move || !over.load(Ordering::Relaxed);
            let listener = &listener;
            let pairing = &pairing;
            scope.spawn(move || listener.turn_away(pairing, running).unwrap());
            let refused = Session::connect(pairing, 1, SOON, Instant::now() + SOON);
            over.store(true, Ordering::Relaxed);
            refused
        });
        assert!(matches!(
            refused.unwrap_err(),
            ConnectError::Handshake {
                source: HandshakeError::Refused(Refusal::Used),
                ..
            }
        ));
    }

    #[test]
    fn garbage_is_turned_away_without_harm() {
        use std::io::Write;
        let (listener, pairing) = listen();
        let address = pairing.address.clone();
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut stream = TcpStream::connect(&address).unwrap();
                stream
                    .write_all(b"GET / HTTP/1.1\r\n\r\n                  ")
                    .unwrap();
                drop(stream);
                Session::connect(&pairing, 1, SOON, Instant::now() + SOON).unwrap();
            });
            let mut seen = Vec::new();
            listener
                .accept(
                    &pairing,
                    SOON,
                    SOON,
                    || true,
                    |_, error| seen.push(error.to_string()),
                )
                .unwrap();
            assert_eq!(seen.len(), 1, "{seen:?}");
        });
    }
}
