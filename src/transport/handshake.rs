//! What both ends of a new connection prove to each other before the first frame.
//!
//! ```text
//! dialer                                            listener
//!   magic, version, lane, lanes, session, nonce ───────►
//!        ◄─────────────────────────── magic, version, nonce
//!   proof of the secret ───────────────────────────────►
//!        ◄──────────────────────── verdict, proof of the secret
//! ```
//!
//! A proof is a keyed BLAKE3 hash over the role, the lane, the session and both nonces: it cannot be replayed,
//! reflected, or moved to another lane. It keeps strangers and mistakes out; it does not encrypt.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use super::pairing::{Pairing, fill_random};

const MAGIC: [u8; 4] = *b"MFRY";
const VERSION: u8 = 1;
const NONCE: usize = 16;

/// Which lane of how many a connection wants to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    /// 0 is urgent, 255 control, others are bulk.
    pub(super) lane: u8,
    /// How many bulk lanes the session has.
    pub(super) lanes: u8,
}

/// The lane number of control.
pub(super) const CONTROL: u8 = 255;

/// Why the listener turned a connection away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The secret is another one.
    #[error("the pairing string is wrong: use the one that the receiving side printed last")]
    WrongSecret,
    /// The session is another one.
    #[error(
        "the pairing string is not of the session that waits there: it was used already, or is of another receiver"
    )]
    WrongSession,
    /// The session has begun with somebody else.
    #[error("the pairing string was used already: a migration with it has begun")]
    Used,
    /// The lane does not exist or is taken.
    #[error("the receiver refused a connection of the session")]
    WrongLane,
}

/// Why a connection did not become a lane.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The other end is no memferry, or a cut connection.
    #[error("the other end does not speak memferry's protocol")]
    NotMemferry,
    /// Another version of the handshake.
    #[error(
        "the other end speaks version {theirs} of the handshake, this one {VERSION}: use the same release on both hosts"
    )]
    OtherVersion {
        /// The peer's version.
        theirs: u8,
    },
    /// The listener said no.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The listener does not know the secret: it is an impostor, or the address is of another receiver.
    #[error(
        "the other end does not know the secret of this pairing: the connection may have been intercepted"
    )]
    Impostor,
    /// The network.
    #[error("the connection failed during the handshake")]
    Io(#[from] io::Error),
}

/// Makes `stream` a lane from the dialer's side.
pub(super) fn dial(
    stream: &TcpStream,
    pairing: &Pairing,
    place: Place,
    deadline: Instant,
) -> Result<(), HandshakeError> {
    let mut wire = Wire { stream, deadline };
    let mut ours = [0; NONCE];
    fill_random(&mut ours)?;
    let mut opening = Vec::with_capacity(31);
    opening.extend_from_slice(&MAGIC);
    opening.extend_from_slice(&[VERSION, place.lane, place.lanes]);
    opening.extend_from_slice(&pairing.session);
    opening.extend_from_slice(&ours);
    wire.send(&opening)?;
    check_greeting(wire.receive()?)?;
    let theirs = wire.receive()?;
    wire.send(prove(pairing, "dialer", place, &ours, &theirs).as_bytes())?;
    let [verdict] = wire.receive()?;
    match verdict {
        0 => {}
        1 => return Err(Refusal::WrongSecret.into()),
        2 => return Err(Refusal::WrongSession.into()),
        3 => return Err(Refusal::Used.into()),
        _ => return Err(Refusal::WrongLane.into()),
    }
    let proof: [u8; 32] = wire.receive()?;
    if blake3::Hash::from(proof) == prove(pairing, "listener", place, &ours, &theirs) {
        Ok(())
    } else {
        Err(HandshakeError::Impostor)
    }
}

/// Makes `stream` a lane from the listener's side; `check` says whether the place is free.
pub(super) fn answer(
    stream: &TcpStream,
    pairing: &Pairing,
    deadline: Instant,
    check: impl FnOnce(Place) -> Result<(), Refusal>,
) -> Result<Place, HandshakeError> {
    let mut wire = Wire { stream, deadline };
    check_greeting(wire.receive()?)?;
    let [lane, lanes] = wire.receive()?;
    let place = Place { lane, lanes };
    let session: [u8; 8] = wire.receive()?;
    let theirs = wire.receive()?;
    let mut ours = [0; NONCE];
    fill_random(&mut ours)?;
    let mut greeting = [0; 5 + NONCE];
    greeting[..4].copy_from_slice(&MAGIC);
    greeting[4] = VERSION;
    greeting[5..].copy_from_slice(&ours);
    wire.send(&greeting)?;
    let proof: [u8; 32] = wire.receive()?;
    // Hash compares in constant time.
    let known = blake3::Hash::from(proof) == prove(pairing, "dialer", place, &theirs, &ours);
    let verdict = if session != pairing.session {
        Err(Refusal::WrongSession)
    } else if known {
        check(place)
    } else {
        Err(Refusal::WrongSecret)
    };
    if let Err(refusal) = verdict {
        let code = match refusal {
            Refusal::WrongSecret => 1,
            Refusal::WrongSession => 2,
            Refusal::Used => 3,
            Refusal::WrongLane => 4,
        };
        wire.send(&[code])?;
        return Err(refusal.into());
    }
    let mut accepted = [0; 33];
    accepted[1..].copy_from_slice(prove(pairing, "listener", place, &theirs, &ours).as_bytes());
    wire.send(&accepted)?;
    Ok(place)
}

fn check_greeting(greeting: [u8; 5]) -> Result<(), HandshakeError> {
    let [magic @ .., version] = greeting;
    if magic != MAGIC {
        return Err(HandshakeError::NotMemferry);
    }
    if version != VERSION {
        return Err(HandshakeError::OtherVersion { theirs: version });
    }
    Ok(())
}

fn prove(
    pairing: &Pairing,
    role: &str,
    place: Place,
    dialer: &[u8; NONCE],
    listener: &[u8; NONCE],
) -> blake3::Hash {
    let key = blake3::derive_key("memferry 1 lane handshake", &pairing.secret);
    let mut hasher = blake3::Hasher::new_keyed(&key);
    hasher.update(role.as_bytes());
    hasher.update(&[place.lane, place.lanes]);
    hasher.update(&pairing.session);
    hasher.update(dialer);
    hasher.update(listener);
    hasher.finalize()
}

/// Fixed-size messages with one deadline for all of them.
struct Wire<'a> {
    stream: &'a TcpStream,
    deadline: Instant,
}

impl Wire<'_> {
    fn remaining(&self) -> io::Result<Option<Duration>> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "the other end did not finish the handshake in time",
            ));
        }
        Ok(Some(left))
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.set_write_timeout(self.remaining()?)?;
        self.stream.write_all(bytes)
    }

    fn receive<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        let mut filled = 0;
        // One read at a time, so that a peer that sends a byte now and then does not move the deadline.
        while filled < N {
            self.stream.set_read_timeout(self.remaining()?)?;
            match self.stream.read(&mut bytes[filled..]) {
                Ok(0) => {
                    return Err(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        "the other end closed the connection",
                    ));
                }
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.remaining()?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(bytes)
    }
}
