//! Agreeing on an export.
//!
//! Everything is sent before the first word of the server is read, so it costs one round trip from the first byte to the last:
//!
//! ```text
//!   ── connect ──►  flags, structured replies, contexts, GO  ──►
//!   ◄── greeting, yes, contexts, size and flags, yes ──
//! ```
//!
//! A server that takes this amiss, because it is of an older time, is asked again over another connection, one step after the
//! other, and without what it does not know; in the end by the option that every server has.

use std::io::{self, IoSlice};
use std::time::Instant;

use super::fault::{Fault, Misbehaviour};
use super::inbox::Inbox;
use super::tls::TlsConfig;
use super::wire::{Also, Wire};
use super::{ConnectError, NbdUrl};
use crate::nbd::{
    ALLOCATION, BlockSizes, ClientFlags, ClientOption, Export, Greeting, HandshakeFlags, Info,
    InfoKind, InfoQuery, MetaQuery, OldExport, OptionCode, OptionError, OptionReply,
    OptionReplyHeader, TransmissionFlags, limits,
};

/// The most replies to one option that has not to do with a list.
const REPLIES: usize = 256;

/// What was agreed on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Agreed {
    pub(super) size: u64,
    pub(super) flags: TransmissionFlags,
    /// What the server says of sizes, if it does.
    pub(super) blocks: Option<BlockSizes>,
    pub(super) structured: bool,
    /// The number of `base:allocation`, if the server has it.
    pub(super) allocation: Option<u32>,
}

/// How fast one goes ahead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pace {
    /// All at once, on the assumption that the server is of this age.
    Bold,
    /// One step after the other.
    Careful,
}

/// A connection on which options are still asked for.
pub(super) struct Hello {
    pub(super) wire: Wire,
    pub(super) inbox: Inbox,
    pace: Pace,
    greeted: Option<HandshakeFlags>,
    deadline: Instant,
}

/// The client flags that every server of this age takes.
fn usual() -> ClientFlags {
    ClientFlags::FIXED_NEWSTYLE.with(ClientFlags::NO_ZEROES)
}

/// Agrees on the export of `url`, as one goes ahead boldly if that works.
pub(super) fn agree(
    url: &NbdUrl,
    tls: Option<&TlsConfig>,
    deadline: Instant,
) -> Result<(Wire, Inbox, Agreed), ConnectError> {
    let bold = Hello::dial(url, tls, Pace::Bold, deadline).and_then(|hello| hello.go(url));
    match bold {
        Err(ConnectError::Lost(fault)) if !fault.is_late() => {
            let careful = Hello::dial(url, tls, Pace::Careful, deadline)?;
            careful.go(url)
        }
        bold => bold,
    }
}

impl Hello {
    /// Connects, and gets as far as options may be asked for, by TLS where it is wanted.
    pub(super) fn dial(
        url: &NbdUrl,
        tls: Option<&TlsConfig>,
        pace: Pace,
        deadline: Instant,
    ) -> Result<Self, ConnectError> {
        let wire = Wire::dial(url.place(), deadline).map_err(|source| ConnectError::Connect {
            place: url.place().to_string(),
            source,
        })?;
        let mut hello = Self {
            wire,
            inbox: Inbox::new(),
            pace,
            greeted: None,
            deadline,
        };
        let flags = match pace {
            Pace::Bold => usual(),
            Pace::Careful => {
                let greeted = hello.greeting()?;
                let flags = ClientFlags::NONE
                    .with_if(
                        greeted.contains(HandshakeFlags::FIXED_NEWSTYLE),
                        ClientFlags::FIXED_NEWSTYLE,
                    )
                    .with_if(
                        greeted.contains(HandshakeFlags::NO_ZEROES),
                        ClientFlags::NO_ZEROES,
                    );
                hello.greeted = Some(greeted);
                flags
            }
        };
        match tls {
            None => hello.send(&flags.encode())?,
            Some(config) => {
                let mut bytes = flags.encode().to_vec();
                ClientOption::StartTls.encode(&mut bytes);
                hello.send(&bytes)?;
                hello.check_greeting()?;
                hello
                    .answer(OptionCode::StartTls, |_| Ok(()))?
                    .map_err(|(error, message)| ConnectError::NoTls { error, message })?;
                if !hello.inbox.is_empty() {
                    return Err(Fault::from(Misbehaviour::BeforeTls).into());
                }
                hello.wire = hello
                    .wire
                    .start_tls(config, deadline)
                    .map_err(ConnectError::TlsHandshake)?;
                // What speaks TLS is of this age.
                hello.pace = Pace::Bold;
            }
        }
        Ok(hello)
    }

    fn greeting(&mut self) -> Result<HandshakeFlags, ConnectError> {
        let bytes = self.take()?;
        Ok(Greeting::decode(&bytes).map_err(Fault::from)?.flags)
    }

    /// Reads the greeting, if it was not read yet. A server that is not what was assumed is as good as lost: it is asked
    /// again carefully.
    fn check_greeting(&mut self) -> Result<HandshakeFlags, ConnectError> {
        if let Some(greeted) = self.greeted {
            return Ok(greeted);
        }
        let greeted = self.greeting()?;
        let assumed = HandshakeFlags::FIXED_NEWSTYLE.with(HandshakeFlags::NO_ZEROES);
        if !greeted.contains(assumed) {
            let error =
                io::Error::new(io::ErrorKind::Unsupported, "the server is of an older time");
            return Err(Fault::from(error).into());
        }
        self.greeted = Some(greeted);
        Ok(greeted)
    }

    /// Asks for the export and all that belongs to it.
    fn go(mut self, url: &NbdUrl) -> Result<(Wire, Inbox, Agreed), ConnectError> {
        let no_options =
            |greeted: HandshakeFlags| !greeted.contains(HandshakeFlags::FIXED_NEWSTYLE);
        if self.greeted.is_some_and(no_options) {
            return self.old_way(url, false, None);
        }
        let name = url.export().to_owned();
        let options = [
            ClientOption::StructuredReply,
            ClientOption::SetMetaContext(MetaQuery {
                name: name.clone(),
                queries: vec![ALLOCATION.to_owned()],
            }),
            ClientOption::Go(InfoQuery {
                name,
                kinds: vec![InfoKind::BlockSize],
            }),
        ];
        let bold = self.pace == Pace::Bold;
        let mut bytes = Vec::new();
        for option in &options {
            option.encode(&mut bytes);
        }
        if bold {
            self.send(&bytes)?;
        }
        self.check_greeting()?;
        let ask = |hello: &mut Self, option: &ClientOption| {
            if bold {
                return Ok(());
            }
            let mut bytes = Vec::new();
            option.encode(&mut bytes);
            hello.send(&bytes)
        };

        ask(&mut self, &options[0])?;
        let structured = self
            .answer(OptionCode::StructuredReply, |_| Ok(()))?
            .is_ok();

        let mut allocation = None;
        if structured || bold {
            ask(&mut self, &options[1])?;
            let set = self.answer(OptionCode::SetMetaContext, |reply| {
                if let OptionReply::MetaContext { id, name } = reply
                    && name == ALLOCATION
                {
                    allocation = Some(id);
                }
                Ok(())
            })?;
            if set.is_err() || !structured {
                allocation = None;
            }
        }

        ask(&mut self, &options[2])?;
        let mut export: Option<Export> = None;
        let mut blocks = None;
        let gone = self.answer(OptionCode::Go, |reply| {
            match reply {
                OptionReply::Info(Info::Export(told)) => export = Some(told),
                OptionReply::Info(Info::BlockSize(told)) => blocks = Some(told),
                _ => {}
            }
            Ok(())
        })?;
        match gone {
            Ok(()) => {
                let export = export.ok_or_else(|| Fault::from(Misbehaviour::NoSize))?;
                check_size(export.size)?;
                if blocks.is_some_and(|blocks| !blocks.are_valid()) {
                    return Err(Fault::from(Misbehaviour::BlockSizes).into());
                }
                let agreed = Agreed {
                    size: export.size,
                    flags: export.flags,
                    blocks,
                    structured,
                    allocation,
                };
                Ok((self.wire, self.inbox, agreed))
            }
            Err((OptionError::Unsupported, _)) => self.old_way(url, structured, allocation),
            Err((OptionError::Unknown, _)) => Err(ConnectError::NoExport(url.export().to_owned())),
            Err((OptionError::TlsRequired, _)) if !url.tls() => Err(ConnectError::NeedsTls),
            Err((error, message)) => Err(ConnectError::Refused { error, message }),
        }
    }

    /// By the option that every server has, and that has no answer for no.
    fn old_way(
        mut self,
        url: &NbdUrl,
        structured: bool,
        allocation: Option<u32>,
    ) -> Result<(Wire, Inbox, Agreed), ConnectError> {
        let mut bytes = Vec::new();
        ClientOption::ExportName(url.export().to_owned()).encode(&mut bytes);
        self.send(&bytes)?;
        let old = match self.take() {
            Ok(bytes) => OldExport::decode(&bytes).map_err(Fault::from)?,
            // The only way in which such a server can say it.
            Err(ConnectError::Lost(fault)) if !fault.is_late() => {
                return Err(ConnectError::NoExport(url.export().to_owned()));
            }
            Err(error) => return Err(error),
        };
        check_size(old.size)?;
        let greeted = self.greeted.unwrap_or_default();
        if !greeted.contains(HandshakeFlags::NO_ZEROES) {
            self.take::<{ OldExport::ZEROES }>()?;
        }
        let agreed = Agreed {
            size: old.size,
            flags: old.flags,
            blocks: None,
            structured,
            allocation,
        };
        Ok((self.wire, self.inbox, agreed))
    }

    /// Reads the replies to one option, until the last; what the server says if it says no.
    pub(super) fn answer(
        &mut self,
        code: OptionCode,
        note: impl FnMut(OptionReply) -> Result<(), ConnectError>,
    ) -> Result<Result<(), (OptionError, String)>, ConnectError> {
        self.answer_long(code, REPLIES, note)
    }

    /// As [`answer`](Self::answer), of at most `most` replies.
    pub(super) fn answer_long(
        &mut self,
        code: OptionCode,
        most: usize,
        mut note: impl FnMut(OptionReply) -> Result<(), ConnectError>,
    ) -> Result<Result<(), (OptionError, String)>, ConnectError> {
        self.check_greeting()?;
        for _ in 0..most {
            let header = OptionReplyHeader::decode(&self.take()?).map_err(Fault::from)?;
            if header.code != code {
                return Err(Fault::from(Misbehaviour::Option).into());
            }
            if header.len > limits::OPTION_DATA {
                let what = "the answer to an option";
                let (len, limit) = (u64::from(header.len), u64::from(limits::OPTION_DATA));
                let error = crate::nbd::DecodeError::TooLong { what, len, limit };
                return Err(Fault::from(error).into());
            }
            let mut data = vec![0; header.len as usize];
            self.inbox
                .read_exact(&self.wire, &mut data, self.deadline)
                .map_err(Fault::from)?;
            match OptionReply::decode(header.kind, &data).map_err(Fault::from)? {
                OptionReply::Ack => return Ok(Ok(())),
                OptionReply::Error { error, message } => return Ok(Err((error, message))),
                reply => note(reply)?,
            }
        }
        let what = "the answers to an option";
        let (len, limit) = (most as u64 + 1, most as u64);
        Err(Fault::from(crate::nbd::DecodeError::TooLong { what, len, limit }).into())
    }

    pub(super) fn send(&mut self, bytes: &[u8]) -> Result<(), ConnectError> {
        let deadline = self.deadline;
        self.wire
            .send(&mut [IoSlice::new(bytes)], |wire, _| {
                wire.wait_to_send(Also::Nothing, deadline)
            })
            .map_err(|error| Fault::from(error).into())
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], ConnectError> {
        self.inbox
            .take(&self.wire, self.deadline)
            .map_err(|error| Fault::from(error).into())
    }
}

/// Offsets are those of files, which are signed: so no sum of an offset and a length of a request is too large, either.
fn check_size(size: u64) -> Result<(), Fault> {
    if i64::try_from(size).is_err() {
        return Err(Misbehaviour::Size(size).into());
    }
    Ok(())
}
