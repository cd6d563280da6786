//! What a server answers in the transmission phase.

use super::fields::{Reader, Writer, cut, message};
use super::{ChunkFlags, DecodeError, Errno};

const SIMPLE: u32 = 0x6744_6698;
const CHUNK: u32 = 0x668e_33ef;
const EXTENDED_CHUNK: u32 = 0x6e8a_278c;

/// How long a [`SimpleReply`] is.
pub const SIMPLE_REPLY_LEN: usize = 16;

/// How long a [`ChunkHeader`] is.
pub const CHUNK_HEADER_LEN: usize = 20;

/// How long an [`ExtendedChunkHeader`] is.
pub const EXTENDED_CHUNK_HEADER_LEN: usize = 32;

/// How long the payload of a [`ChunkKind::OffsetHole`] is.
pub const HOLE_LEN: usize = 12;

/// A whole answer, but for the bytes of a read, which follow if there is no error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SimpleReply {
    /// Why not, if not.
    pub error: Option<Errno>,
    /// Of the request.
    pub cookie: u64,
}

impl SimpleReply {
    /// The bytes.
    #[must_use]
    pub fn encode(self) -> [u8; SIMPLE_REPLY_LEN] {
        let mut bytes = [0; SIMPLE_REPLY_LEN];
        bytes[..4].copy_from_slice(&SIMPLE.to_be_bytes());
        bytes[4..8].copy_from_slice(&self.error.map_or(0, Errno::to_wire).to_be_bytes());
        bytes[8..].copy_from_slice(&self.cookie.to_be_bytes());
        bytes
    }
}

/// What a chunk of a structured reply holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChunkKind {
    /// Nothing.
    None,
    /// An offset (`u64`), and the bytes from there on.
    OffsetData,
    /// A [`Hole`].
    OffsetHole,
    /// A [`BlockStatus`](super::BlockStatus).
    BlockStatus,
    /// A [`BlockStatus`](super::BlockStatus) with lengths of 64 bits.
    BlockStatusExtended,
    /// An [`ErrorChunk`].
    Error,
    /// An [`ErrorChunk`] with an offset.
    ErrorOffset,
    /// Something that has no name here.
    Unknown(u16),
}

impl ChunkKind {
    /// The number on the wire.
    #[must_use]
    pub const fn to_wire(self) -> u16 {
        match self {
            Self::None => 0,
            Self::OffsetData => 1,
            Self::OffsetHole => 2,
            Self::BlockStatus => 5,
            Self::BlockStatusExtended => 6,
            Self::Error => 0x8001,
            Self::ErrorOffset => 0x8002,
            Self::Unknown(kind) => kind,
        }
    }

    /// What a number stands for.
    #[must_use]
    pub const fn from_wire(kind: u16) -> Self {
        match kind {
            0 => Self::None,
            1 => Self::OffsetData,
            2 => Self::OffsetHole,
            5 => Self::BlockStatus,
            6 => Self::BlockStatusExtended,
            0x8001 => Self::Error,
            0x8002 => Self::ErrorOffset,
            other => Self::Unknown(other),
        }
    }

    /// Whether a chunk of this kind says that the request failed; also one that has no name here can.
    #[must_use]
    pub const fn is_error(self) -> bool {
        self.to_wire() & 0x8000 != 0
    }
}

/// The beginning of a chunk of a structured reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkHeader {
    /// Whether it is the last of its reply.
    pub flags: ChunkFlags,
    /// What it holds.
    pub kind: ChunkKind,
    /// Of the request.
    pub cookie: u64,
    /// How long the payload is.
    pub len: u32,
}

impl ChunkHeader {
    /// The bytes.
    #[must_use]
    pub fn encode(self) -> [u8; CHUNK_HEADER_LEN] {
        let mut bytes = [0; CHUNK_HEADER_LEN];
        bytes[..4].copy_from_slice(&CHUNK.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.flags.0.to_be_bytes());
        bytes[6..8].copy_from_slice(&self.kind.to_wire().to_be_bytes());
        bytes[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        bytes[16..].copy_from_slice(&self.len.to_be_bytes());
        bytes
    }
}

/// The beginning of a chunk, where extended headers were agreed on: there all replies are chunks with this beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExtendedChunkHeader {
    /// Whether it is the last of its reply.
    pub flags: ChunkFlags,
    /// What it holds.
    pub kind: ChunkKind,
    /// Of the request.
    pub cookie: u64,
    /// Of the request.
    pub offset: u64,
    /// How long the payload is.
    pub len: u64,
}

impl ExtendedChunkHeader {
    /// The bytes.
    #[must_use]
    pub fn encode(self) -> [u8; EXTENDED_CHUNK_HEADER_LEN] {
        let mut bytes = [0; EXTENDED_CHUNK_HEADER_LEN];
        bytes[..4].copy_from_slice(&EXTENDED_CHUNK.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.flags.0.to_be_bytes());
        bytes[6..8].copy_from_slice(&self.kind.to_wire().to_be_bytes());
        bytes[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_be_bytes());
        bytes[24..].copy_from_slice(&self.len.to_be_bytes());
        bytes
    }
}

/// The beginning of any reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyHeader {
    /// A whole answer.
    Simple(SimpleReply),
    /// A chunk of a structured one.
    Chunk(ChunkHeader),
    /// A chunk, where extended headers were agreed on.
    Extended(ExtendedChunkHeader),
}

impl ReplyHeader {
    /// How long the header is that begins with these four bytes, themselves included.
    ///
    /// # Errors
    /// If no reply begins so: the two sides are out of step.
    pub fn len_of(magic: [u8; 4]) -> Result<usize, DecodeError> {
        match u32::from_be_bytes(magic) {
            SIMPLE => Ok(SIMPLE_REPLY_LEN),
            CHUNK => Ok(CHUNK_HEADER_LEN),
            EXTENDED_CHUNK => Ok(EXTENDED_CHUNK_HEADER_LEN),
            found => Err(DecodeError::Magic {
                what: "a reply",
                found: u64::from(found),
            }),
        }
    }

    /// What the bytes say; as many as [`len_of`](Self::len_of) told.
    ///
    /// # Errors
    /// If they are no reply, or more or fewer than one header.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(bytes, "a reply");
        let header = match reader.u32()? {
            SIMPLE => Self::Simple(SimpleReply {
                error: Errno::from_wire(reader.u32()?),
                cookie: reader.u64()?,
            }),
            CHUNK => Self::Chunk(ChunkHeader {
                flags: ChunkFlags(reader.u16()?),
                kind: ChunkKind::from_wire(reader.u16()?),
                cookie: reader.u64()?,
                len: reader.u32()?,
            }),
            EXTENDED_CHUNK => Self::Extended(ExtendedChunkHeader {
                flags: ChunkFlags(reader.u16()?),
                kind: ChunkKind::from_wire(reader.u16()?),
                cookie: reader.u64()?,
                offset: reader.u64()?,
                len: reader.u64()?,
            }),
            found => {
                return Err(DecodeError::Magic {
                    what: "a reply",
                    found: u64::from(found),
                });
            }
        };
        reader.finish()?;
        Ok(header)
    }
}

/// Zeros, without their bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hole {
    /// Where.
    pub offset: u64,
    /// How many; never none.
    pub len: u32,
}

impl Hole {
    /// The payload.
    #[must_use]
    pub fn encode(self) -> [u8; HOLE_LEN] {
        let mut bytes = [0; HOLE_LEN];
        bytes[..8].copy_from_slice(&self.offset.to_be_bytes());
        bytes[8..].copy_from_slice(&self.len.to_be_bytes());
        bytes
    }

    /// What the payload says.
    ///
    /// # Errors
    /// If the hole is empty.
    pub fn decode(payload: &[u8; HOLE_LEN]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(payload, "a hole");
        let (offset, len) = (reader.u64()?, reader.u32()?);
        if len == 0 {
            return Err(DecodeError::Impossible {
                what: "the length of a hole",
                value: 0,
            });
        }
        Ok(Self { offset, len })
    }
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ErrorChunk {
    /// Why.
    pub error: Errno,
    /// The same for people; may be empty.
    pub message: String,
    /// Where it failed, in a chunk of [`ChunkKind::ErrorOffset`].
    pub offset: Option<u64>,
}

impl ErrorChunk {
    /// Which kind of chunk this is the payload of.
    #[must_use]
    pub const fn kind(&self) -> ChunkKind {
        match self.offset {
            Some(_) => ChunkKind::ErrorOffset,
            None => ChunkKind::Error,
        }
    }

    /// The payload.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let message = cut(&self.message);
        let mut payload = Vec::with_capacity(4 + 2 + message.len() + 8);
        payload.put_u32(self.error.to_wire());
        payload.put_u16(u16::try_from(message.len()).expect("cut to the length of a name"));
        payload.extend_from_slice(message.as_bytes());
        if let Some(offset) = self.offset {
            payload.put_u64(offset);
        }
        payload
    }

    /// What the payload of a chunk of `kind` says. Of a kind without a name only the error and its message are read.
    ///
    /// # Errors
    /// If it is no error, or its error is success.
    pub fn decode(kind: ChunkKind, payload: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(payload, "an error");
        let error = Errno::from_wire(reader.u32()?).ok_or(DecodeError::Impossible {
            what: "the number of an error",
            value: 0,
        })?;
        let len = usize::from(reader.u16()?);
        let message = message(reader.bytes(len)?);
        let offset = match kind {
            ChunkKind::ErrorOffset => Some(reader.u64()?),
            ChunkKind::Error => None,
            _ => {
                reader.rest();
                None
            }
        };
        reader.finish()?;
        Ok(Self {
            error,
            message,
            offset,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(bytes: &[u8], expected: ReplyHeader) {
        let magic = *bytes.first_chunk().unwrap();
        assert_eq!(ReplyHeader::len_of(magic), Ok(bytes.len()));
        assert_eq!(ReplyHeader::decode(bytes), Ok(expected));
        assert!(ReplyHeader::decode(&bytes[..bytes.len() - 1]).is_err());
    }

    #[test]
    fn every_reply_survives_the_wire() {
        for error in [None, Some(Errno::NoSpc)] {
            let reply = SimpleReply { error, cookie: 9 };
            check(&reply.encode(), ReplyHeader::Simple(reply));
        }
        for kind in [0, 1, 2, 3, 5, 6, 0x8001, 0x8002, 0x8003] {
            let kind = ChunkKind::from_wire(kind);
            let (flags, cookie) = (ChunkFlags::DONE, 1 << 63);
            let chunk = ChunkHeader {
                flags,
                kind,
                cookie,
                len: 4,
            };
            check(&chunk.encode(), ReplyHeader::Chunk(chunk));
            let chunk = ExtendedChunkHeader {
                flags,
                kind,
                cookie,
                offset: 4096,
                len: 1 << 33,
            };
            check(&chunk.encode(), ReplyHeader::Extended(chunk));
        }
        assert!(ReplyHeader::len_of(*b"HTTP").is_err());
        assert!(ReplyHeader::decode(b"HTTP/1.1 200 OK\r\n").is_err());
    }

    #[test]
    fn holes_and_errors_survive_the_wire() {
        let hole = Hole {
            offset: 1 << 40,
            len: 4096,
        };
        assert_eq!(Hole::decode(&hole.encode()), Ok(hole));
        let empty = Hole { offset: 0, len: 0 };
        assert!(Hole::decode(&empty.encode()).is_err());
        for offset in [None, Some(7)] {
            let error = ErrorChunk {
                error: Errno::Io,
                message: "the disk is on fire".into(),
                offset,
            };
            assert_eq!(
                ErrorChunk::decode(error.kind(), &error.encode()),
                Ok(error.clone())
            );
            let payload = error.encode();
            assert!(ErrorChunk::decode(error.kind(), &payload[..payload.len() - 1]).is_err());
        }
        assert!(ErrorChunk::decode(ChunkKind::Error, &[0; 6]).is_err());
        assert!(ErrorChunk::decode(ChunkKind::Error, &[0, 0, 0, 5, 255, 255]).is_err());
    }
}
