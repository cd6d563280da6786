//! The handshake phase of one client, up to its choice of an export.

use std::io;
use std::time::Instant;

use super::answer::Agreed;
use super::channel::{Channel, too_slow};
use super::export::Export;
use super::negotiation::{Negotiation, Next, Security};
use super::transmission::Received;
use crate::nbd::{
    ClientFlags, ClientOption, DecodeError, Greeting, HandshakeFlags, OPTION_HEADER_LEN,
    OptionCode, OptionError, OptionHeader, OptionReply, limits,
};

/// What a server may speak, and with which certificate.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub enum Tls {
    /// Never TLS.
    #[default]
    Off,
    /// TLS for who asks for it. A network in between can keep both sides from it.
    #[cfg(feature = "tls")]
    Allowed(super::TlsIdentity),
    /// TLS, or nothing.
    #[cfg(feature = "tls")]
    Required(super::TlsIdentity),
}

/// Why a client did not come to use an export.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(super) enum HandshakeError {
    /// It said something else.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// It has flags that are not known, so what it says cannot be understood.
    #[error("the client has unknown flags {0:#x}")]
    Flags(u32),
    /// The network, or the client was too slow.
    #[error("the connection broke in the handshake")]
    Io(#[from] io::Error),
    /// It asked for too much.
    #[error("the client asked for more than {} things", limits::OPTIONS)]
    TooMany,
    /// It asked the old way for what there is not.
    #[error("the client asked for an export that there is not, or is not told of without TLS")]
    NoExport,
}

/// A client that uses an export from here on.
#[derive(Debug)]
pub(super) struct Chosen {
    pub(super) channel: Channel,
    pub(super) export: Export,
    pub(super) agreed: Agreed,
    /// What it has sent already.
    pub(super) received: Received,
    pub(super) encrypted: bool,
}

/// Goes through the handshake. `None` if the client only asked, and went.
pub(super) fn shake_hands(
    channel: Channel,
    tls: &Tls,
    exports: impl Fn() -> Vec<Export>,
    deadline: Instant,
) -> Result<Option<Chosen>, HandshakeError> {
    let greeting = Greeting {
        flags: HandshakeFlags::ALL,
    };
    channel.send_all(&greeting.encode(), deadline)?;
    let mut handshake = Handshake {
        channel,
        received: Received::default(),
        deadline,
    };
    let Some(flags) = handshake.next::<4>()? else {
        return Ok(None);
    };
    let flags = ClientFlags::decode(flags);
    if flags.without(ClientFlags::ALL) != ClientFlags::NONE {
        return Err(HandshakeError::Flags(flags.0));
    }
    let no_zeroes = flags.contains(ClientFlags::NO_ZEROES);
    let mut negotiation = Negotiation::new(security(tls), no_zeroes);
    let mut encrypted = false;
    for _ in 0..limits::OPTIONS {
        let Some(header) = handshake.next::<OPTION_HEADER_LEN>()? else {
            return Ok(None);
        };
        let header = OptionHeader::decode(&header)?;
        let mut out = Vec::new();
        let next = if header.len > limits::OPTION_DATA {
            handshake.skip(header.len)?;
            too_big(header.code, &mut out)
        } else {
            let data = handshake.bytes(header.len as usize)?;
            let option = ClientOption::decode(header.code, &data);
            negotiation.answer(header.code, option, &exports(), &mut out)
        };
        let said = handshake.say(&out);
        if header.code == OptionCode::Abort {
            // Few wait for the answer.
            return Ok(None);
        }
        said?;
        match next {
            Next::Option => {}
            Next::Close => {
                handshake.channel.end_sending();
                return Err(HandshakeError::NoExport);
            }
            Next::StartTls => {
                handshake.start_tls(tls)?;
                encrypted = true;
                // What was agreed on in the clear may have been said by somebody else.
                negotiation = Negotiation::new(Security::Established, no_zeroes);
            }
            Next::Serve(export) => {
                let Handshake {
                    channel, received, ..
                } = handshake;
                return Ok(Some(Chosen {
                    channel,
                    agreed: negotiation.agreed(&export),
                    export: *export,
                    received,
                    encrypted,
                }));
            }
        }
    }
    Err(HandshakeError::TooMany)
}

const fn security(tls: &Tls) -> Security {
    match tls {
        Tls::Off => Security::Off,
        #[cfg(feature = "tls")]
        Tls::Allowed(_) => Security::Offered,
        #[cfg(feature = "tls")]
        Tls::Required(_) => Security::Required,
    }
}

fn too_big(code: OptionCode, out: &mut Vec<u8>) -> Next {
    if code == OptionCode::ExportName {
        return Next::Close;
    }
    OptionReply::error(OptionError::TooBig, "the option has too much data").encode(code, out);
    Next::Option
}

struct Handshake {
    channel: Channel,
    received: Received,
    deadline: Instant,
}

impl Handshake {
    /// More bytes, of which there is at least one.
    fn receive(&mut self) -> io::Result<bool> {
        if Instant::now() > self.deadline {
            return Err(too_slow());
        }
        self.received
            .receive(&self.channel, 4096, Some(self.deadline))
    }

    /// The next `N` bytes; `None` if the client has gone before the first.
    fn next<const N: usize>(&mut self) -> io::Result<Option<[u8; N]>> {
        loop {
            if let Some(bytes) = self.received.take() {
                return Ok(Some(bytes));
            }
            if !self.receive()? {
                return match self.received.bytes() {
                    [] => Ok(None),
                    _ => Err(io::ErrorKind::UnexpectedEof.into()),
                };
            }
        }
    }

    /// The next `len` bytes, which is not much.
    fn bytes(&mut self, len: usize) -> io::Result<Vec<u8>> {
        while self.received.bytes().len() < len {
            if !self.receive()? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        let bytes = self.received.bytes()[..len].to_vec();
        self.received.skip(len);
        Ok(bytes)
    }

    fn skip(&mut self, len: u32) -> io::Result<()> {
        let mut left = len as usize;
        loop {
            let part = left.min(self.received.bytes().len());
            self.received.skip(part);
            left -= part;
            if left == 0 {
                return Ok(());
            }
            if !self.receive()? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    fn say(&self, bytes: &[u8]) -> io::Result<()> {
        self.channel.send_all(bytes, self.deadline)
    }

    #[cfg(feature = "tls")]
    fn start_tls(&mut self, tls: &Tls) -> Result<(), HandshakeError> {
        // What came before hands were shaken could have been said by anybody in between, and would pass for the client's.
        if !self.received.bytes().is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the client went on in the clear after it had asked for TLS",
            )
            .into());
        }
        if let Tls::Allowed(identity) | Tls::Required(identity) = tls {
            let config = std::sync::Arc::clone(&identity.0);
            self.channel.start_tls(config, self.deadline)?;
        }
        Ok(())
    }

    #[cfg(not(feature = "tls"))]
    fn start_tls(&mut self, _: &Tls) -> Result<(), HandshakeError> {
        // Never offered.
        Err(io::Error::from(io::ErrorKind::Unsupported).into())
    }
}
