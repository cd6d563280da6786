//! What a client asks for in the transmission phase.

use super::fields::{Reader, Writer};
use super::{CommandFlags, DecodeError};

const REQUEST: u32 = 0x2560_9513;
const EXTENDED_REQUEST: u32 = 0x21e4_1c71;

/// How long a [`Request`] is.
pub const REQUEST_LEN: usize = 28;

/// How long a [`Request`] is where extended headers were agreed on.
pub const EXTENDED_REQUEST_LEN: usize = 32;

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Read bytes.
    Read,
    /// Write the bytes that follow the request.
    Write,
    /// The end; not answered.
    Disconnect,
    /// Make durable what was answered.
    Flush,
    /// The bytes are not needed any more.
    Trim,
    /// The bytes will be read soon.
    Cache,
    /// Write zeros.
    WriteZeroes,
    /// What the meta contexts say of the bytes.
    BlockStatus,
    /// A command that has no name here.
    Unknown(u16),
}

impl Command {
    /// The number on the wire.
    #[must_use]
    pub const fn to_wire(self) -> u16 {
        match self {
            Self::Read => 0,
            Self::Write => 1,
            Self::Disconnect => 2,
            Self::Flush => 3,
            Self::Trim => 4,
            Self::Cache => 5,
            Self::WriteZeroes => 6,
            Self::BlockStatus => 7,
            Self::Unknown(command) => command,
        }
    }

    /// What a number stands for.
    #[must_use]
    pub const fn from_wire(command: u16) -> Self {
        match command {
            0 => Self::Read,
            1 => Self::Write,
            2 => Self::Disconnect,
            3 => Self::Flush,
            4 => Self::Trim,
            5 => Self::Cache,
            6 => Self::WriteZeroes,
            7 => Self::BlockStatus,
            other => Self::Unknown(other),
        }
    }
}

/// A request of the transmission phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// How it is to be done.
    pub flags: CommandFlags,
    /// What is to be done.
    pub command: Command,
    /// Comes back with the reply.
    pub cookie: u64,
    /// Where.
    pub offset: u64,
    /// How many bytes; at most [`u32::MAX`] without extended headers.
    pub len: u64,
}

impl Request {
    /// The bytes, without extended headers.
    ///
    /// # Panics
    /// If the length does not fit 32 bits.
    #[must_use]
    pub fn encode(&self) -> [u8; REQUEST_LEN] {
        let len = u32::try_from(self.len).expect("a length of 32 bits without extended headers");
        let mut bytes = [0; REQUEST_LEN];
        bytes[..24].copy_from_slice(&self.head(REQUEST));
        bytes[24..].copy_from_slice(&len.to_be_bytes());
        bytes
    }

    /// The bytes, where extended headers were agreed on.
    #[must_use]
    pub fn encode_extended(&self) -> [u8; EXTENDED_REQUEST_LEN] {
        let mut bytes = [0; EXTENDED_REQUEST_LEN];
        bytes[..24].copy_from_slice(&self.head(EXTENDED_REQUEST));
        bytes[24..].copy_from_slice(&self.len.to_be_bytes());
        bytes
    }

    fn head(&self, magic: u32) -> [u8; 24] {
        let mut bytes = [0; 24];
        bytes[..4].copy_from_slice(&magic.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.flags.0.to_be_bytes());
        bytes[6..8].copy_from_slice(&self.command.to_wire().to_be_bytes());
        bytes[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        bytes[16..].copy_from_slice(&self.offset.to_be_bytes());
        bytes
    }

    /// What the bytes say.
    ///
    /// # Errors
    /// If they are no request: the two sides are out of step.
    pub fn decode(bytes: &[u8; REQUEST_LEN]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(bytes, "a request");
        reader.magic_u32(REQUEST)?;
        Self::fields(reader, |reader| reader.u32().map(u64::from))
    }

    /// What the bytes say, where extended headers were agreed on.
    ///
    /// # Errors
    /// As [`decode`](Self::decode).
    pub fn decode_extended(bytes: &[u8; EXTENDED_REQUEST_LEN]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(bytes, "a request");
        reader.magic_u32(EXTENDED_REQUEST)?;
        Self::fields(reader, Reader::u64)
    }

    fn fields<'a>(
        mut reader: Reader<'a>,
        len: impl FnOnce(&mut Reader<'a>) -> Result<u64, DecodeError>,
    ) -> Result<Self, DecodeError> {
        Ok(Self {
            flags: CommandFlags(reader.u16()?),
            command: Command::from_wire(reader.u16()?),
            cookie: reader.u64()?,
            offset: reader.u64()?,
            len: len(&mut reader)?,
        })
    }
}

/// The payload of a [`Command::BlockStatus`] with [`CommandFlags::PAYLOAD_LEN`]: how many bytes are asked about, and in which contexts.
#[must_use]
pub fn encode_status_payload(effect_len: u64, contexts: &[u32]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(8 + contexts.len() * 4);
    bytes.put_u64(effect_len);
    for context in contexts {
        bytes.put_u32(*context);
    }
    bytes
}

/// What the payload of a [`Command::BlockStatus`] with [`CommandFlags::PAYLOAD_LEN`] says: how many bytes are asked about, and in which contexts.
///
/// # Errors
/// If it is no such payload.
pub fn decode_status_payload(bytes: &[u8]) -> Result<(u64, Vec<u32>), DecodeError> {
    let mut reader = Reader::new(bytes, "the payload of a question for the block status");
    let effect_len = reader.u64()?;
    let count = reader.left() / 4;
    let contexts = (0..count).map(|_| reader.u32()).collect::<Result<_, _>>()?;
    reader.finish()?;
    Ok((effect_len, contexts))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_what_the_specification_shows() {
        let request = Request {
            flags: CommandFlags::FUA,
            command: Command::Write,
            cookie: 0x0102_0304_0506_0708,
            offset: 0x1000,
            len: 512,
        };
        let bytes = request.encode();
        assert_eq!(
            bytes,
            [
                0x25, 0x60, 0x95, 0x13, 0, 1, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0x10,
                0, 0, 0, 2, 0
            ]
        );
        assert_eq!(Request::decode(&bytes), Ok(request));
        assert!(Request::decode(&[0; REQUEST_LEN]).is_err());
    }

    #[test]
    fn an_extended_request_has_a_length_of_64_bits() {
        let request = Request {
            flags: CommandFlags::NONE,
            command: Command::WriteZeroes,
            cookie: 1,
            offset: 0,
            len: 1 << 40,
        };
        assert_eq!(
            Request::decode_extended(&request.encode_extended()),
            Ok(request)
        );
    }

    #[test]
    fn every_command_survives_the_wire() {
        for number in 0..12 {
            assert_eq!(Command::from_wire(number).to_wire(), number);
        }
    }

    #[test]
    fn a_status_payload_survives_the_wire() {
        let bytes = encode_status_payload(1 << 33, &[1, 2]);
        assert_eq!(decode_status_payload(&bytes), Ok((1 << 33, vec![1, 2])));
        assert!(decode_status_payload(&bytes[..10]).is_err());
        assert!(decode_status_payload(&bytes[..7]).is_err());
    }
}
