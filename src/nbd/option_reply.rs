//! What a server answers in the handshake.

use super::fields::{Reader, Writer, cut, message, text};
use super::{DecodeError, Info, OptionCode};

const REPLY: u64 = 0x0003_e889_0455_65a9;
/// Replies that are errors have this bit.
const ERROR: u32 = 1 << 31;

/// How long an [`OptionReplyHeader`] is.
pub const OPTION_REPLY_HEADER_LEN: usize = 20;

/// To which option the reply belongs, of which kind it is, and how much data belongs to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionReplyHeader {
    /// The option that is answered.
    pub code: OptionCode,
    /// The kind, for [`OptionReply::decode`].
    pub kind: u32,
    /// How many bytes follow. To be checked against [`limits::OPTION_DATA`](super::limits::OPTION_DATA).
    pub len: u32,
}

impl OptionReplyHeader {
    /// The bytes.
    #[must_use]
    pub fn encode(self) -> [u8; OPTION_REPLY_HEADER_LEN] {
        let mut bytes = [0; OPTION_REPLY_HEADER_LEN];
        bytes[..8].copy_from_slice(&REPLY.to_be_bytes());
        bytes[8..12].copy_from_slice(&self.code.to_wire().to_be_bytes());
        bytes[12..16].copy_from_slice(&self.kind.to_be_bytes());
        bytes[16..].copy_from_slice(&self.len.to_be_bytes());
        bytes
    }

    /// What the bytes say.
    ///
    /// # Errors
    /// If they are no reply to an option.
    pub fn decode(bytes: &[u8; OPTION_REPLY_HEADER_LEN]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(bytes, "the answer to an option");
        reader.magic_u64(REPLY)?;
        Ok(Self {
            code: OptionCode::from_wire(reader.u32()?),
            kind: reader.u32()?,
            len: reader.u32()?,
        })
    }
}

/// Why a server does not do what an option asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OptionError {
    /// It does not know the option.
    Unsupported,
    /// It is not allowed.
    Policy,
    /// The option's data is wrong, or it comes at the wrong time.
    Invalid,
    /// It was built without it.
    Platform,
    /// Only over TLS.
    TlsRequired,
    /// There is no such export.
    Unknown,
    /// The server is about to go away.
    Shutdown,
    /// Only for clients that keep to block sizes.
    BlockSizeRequired,
    /// The option has too much data.
    TooBig,
    /// Only with extended headers.
    ExtendedHeadersRequired,
    /// An error that has no name here.
    Other(u32),
}

impl OptionError {
    const fn to_wire(self) -> u32 {
        ERROR
            | match self {
                Self::Unsupported => 1,
                Self::Policy => 2,
                Self::Invalid => 3,
                Self::Platform => 4,
                Self::TlsRequired => 5,
                Self::Unknown => 6,
                Self::Shutdown => 7,
                Self::BlockSizeRequired => 8,
                Self::TooBig => 9,
                Self::ExtendedHeadersRequired => 10,
                Self::Other(kind) => kind,
            }
    }

    const fn from_wire(kind: u32) -> Self {
        match kind & !ERROR {
            1 => Self::Unsupported,
            2 => Self::Policy,
            3 => Self::Invalid,
            4 => Self::Platform,
            5 => Self::TlsRequired,
            6 => Self::Unknown,
            7 => Self::Shutdown,
            8 => Self::BlockSizeRequired,
            9 => Self::TooBig,
            10 => Self::ExtendedHeadersRequired,
            other => Self::Other(other),
        }
    }
}

impl std::fmt::Display for OptionError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Unsupported => "the server does not know the option",
            Self::Policy => "the server does not allow it",
            Self::Invalid => "the server takes the option for invalid",
            Self::Platform => "the server was built without it",
            Self::TlsRequired => "the server wants TLS",
            Self::Unknown => "the server has no such export",
            Self::Shutdown => "the server is shutting down",
            Self::BlockSizeRequired => "the server wants its block sizes kept to",
            Self::TooBig => "the option was too long for the server",
            Self::ExtendedHeadersRequired => "the server wants extended headers",
            Self::Other(kind) => return write!(f, "unknown error {kind}"),
        })
    }
}

/// What a server answers in the handshake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OptionReply {
    /// Done; nothing follows for this option.
    Ack,
    /// One of the exports that there are.
    Server {
        /// Its name.
        name: String,
        /// Something for people.
        details: String,
    },
    /// Something about an export.
    Info(Info),
    /// A meta context.
    MetaContext {
        /// The number by which the transmission phase knows it; without meaning in a list.
        id: u32,
        /// Its name.
        name: String,
    },
    /// No; nothing follows for this option.
    Error {
        /// Why.
        error: OptionError,
        /// The same for people; may be empty.
        message: String,
    },
    /// Something that has no name here.
    Other {
        /// The kind.
        kind: u32,
    },
}

impl OptionReply {
    /// An error, with a message for people.
    #[must_use]
    pub fn error(error: OptionError, message: impl Into<String>) -> Self {
        let message = message.into();
        Self::Error { error, message }
    }

    /// Whether no further reply to the same option follows.
    #[must_use]
    pub const fn is_last(&self) -> bool {
        matches!(self, Self::Ack | Self::Error { .. })
    }

    const fn kind(&self) -> u32 {
        match self {
            Self::Ack => 1,
            Self::Server { .. } => 2,
            Self::Info(_) => 3,
            Self::MetaContext { .. } => 4,
            Self::Error { error, .. } => error.to_wire(),
            Self::Other { kind } => *kind,
        }
    }

    /// Appends the reply to the option `code`, header and data, to `out`.
    pub fn encode(&self, code: OptionCode, out: &mut Vec<u8>) {
        let mut data = Vec::new();
        match self {
            Self::Ack | Self::Other { .. } => {}
            Self::Server { name, details } => {
                data.put_text(name);
                data.extend_from_slice(cut(details).as_bytes());
            }
            Self::Info(info) => info.encode(&mut data),
            Self::MetaContext { id, name } => {
                data.put_u32(*id);
                data.extend_from_slice(cut(name).as_bytes());
            }
            Self::Error { message, .. } => data.extend_from_slice(cut(message).as_bytes()),
        }
        let header = OptionReplyHeader {
            code,
            kind: self.kind(),
            len: u32::try_from(data.len()).unwrap_or(u32::MAX),
        };
        out.extend_from_slice(&header.encode());
        out.extend_from_slice(&data);
    }

    /// What a reply of this kind says.
    ///
    /// # Errors
    /// If the data is not what belongs to the kind.
    pub fn decode(kind: u32, data: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(data, "the answer to an option");
        let reply = match kind {
            1 => Self::Ack,
            2 => Self::Server {
                name: reader.text()?.to_owned(),
                details: message(reader.rest()),
            },
            3 => return Info::decode(reader).map(Self::Info),
            4 => Self::MetaContext {
                id: reader.u32()?,
                name: text(reader.rest(), "the name of a meta context")?.to_owned(),
            },
            kind if kind & ERROR != 0 => Self::Error {
                error: OptionError::from_wire(kind),
                message: message(reader.rest()),
            },
            kind => {
                reader.rest();
                Self::Other { kind }
            }
        };
        reader.finish()?;
        Ok(reply)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{BlockSizes, Export, TransmissionFlags};
    use super::*;

    fn check(reply: &OptionReply) {
        let mut bytes = Vec::new();
        reply.encode(OptionCode::Go, &mut bytes);
        let (header, data) = bytes.split_first_chunk().unwrap();
        let header = OptionReplyHeader::decode(header).unwrap();
        assert_eq!(header.code, OptionCode::Go);
        assert_eq!(header.len as usize, data.len());
        assert_eq!(&OptionReply::decode(header.kind, data).unwrap(), reply);
    }

    #[test]
    fn every_reply_survives_the_wire() {
        for reply in [
            OptionReply::Ack,
            OptionReply::Server {
                name: "a".into(),
                details: "the first".into(),
            },
            OptionReply::Info(Info::Export(Export {
                size: 7,
                flags: TransmissionFlags::HAS_FLAGS,
            })),
            OptionReply::Info(Info::Name("n".into())),
            OptionReply::Info(Info::Description(String::new())),
            OptionReply::Info(Info::BlockSize(BlockSizes {
                minimum: 1,
                preferred: 4096,
                maximum: 32 << 20,
            })),
            OptionReply::MetaContext {
                id: 3,
                name: "base:allocation".into(),
            },
            OptionReply::Other { kind: 77 },
        ] {
            check(&reply);
        }
        for kind in 1..=11 {
            let error = OptionError::from_wire(ERROR | kind);
            check(&OptionReply::error(error, "why"));
        }
    }

    #[test]
    fn data_that_does_not_belong_to_a_reply_is_refused() {
        let check = |kind, data: &[u8]| assert!(OptionReply::decode(kind, data).is_err());
        check(1, b"x");
        check(2, &[0, 0, 0, 9]);
        check(3, &[0]);
        check(3, &[0, 0, 1]);
        check(3, &[0, 3, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0]);
        check(4, &[0, 0, 0]);
    }
}
