//! What meta contexts say of an export's bytes.

use super::fields::{Reader, Writer};
use super::{DecodeError, limits};

/// The context that says where there are holes and zeros; every server has it that has any.
pub const ALLOCATION: &str = "base:allocation";

/// The context that says which bytes were written since their last taking.
pub const DIRTY: &str = "memferry:dirty";

/// What the flags of extents mean, which depends on the context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatusFlags;

impl StatusFlags {
    /// Of [`ALLOCATION`]: no room is taken.
    pub const HOLE: u64 = 1 << 0;
    /// Of [`ALLOCATION`]: reads as zeros.
    pub const ZERO: u64 = 1 << 1;
    /// Of [`DIRTY`]: was written.
    pub const DIRTY: u64 = 1 << 0;
}

/// Bytes in a row of which the same holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// How many bytes; never none, and at most [`u32::MAX`] without extended headers.
    pub len: u64,
    /// What holds of them.
    pub flags: u64,
}

/// What one context says, from the offset of the request on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockStatus {
    /// The number that the context was given in the handshake.
    pub context: u32,
    /// What it says.
    pub extents: Vec<Extent>,
}

impl BlockStatus {
    /// The payload of a [`ChunkKind::BlockStatus`](super::ChunkKind::BlockStatus).
    ///
    /// # Panics
    /// If a length or flags do not fit 32 bits.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut payload = Vec::with_capacity(4 + self.extents.len() * 8);
        payload.put_u32(self.context);
        for extent in &self.extents {
            let narrow = |number: u64| {
                u32::try_from(number).expect("numbers of 32 bits without extended headers")
            };
            payload.put_u32(narrow(extent.len));
            payload.put_u32(narrow(extent.flags));
        }
        payload
    }

    /// The payload of a [`ChunkKind::BlockStatusExtended`](super::ChunkKind::BlockStatusExtended).
    #[must_use]
    pub fn encode_extended(&self) -> Vec<u8> {
        let mut payload = Vec::with_capacity(8 + self.extents.len() * 16);
        payload.put_u32(self.context);
        payload.put_u32(u32::try_from(self.extents.len()).unwrap_or(u32::MAX));
        for extent in &self.extents {
            payload.put_u64(extent.len);
            payload.put_u64(extent.flags);
        }
        payload
    }

    /// What the payload of a [`ChunkKind::BlockStatus`](super::ChunkKind::BlockStatus) says.
    ///
    /// # Errors
    /// If it is none, or has an extent of no length, or more extents than [`limits::EXTENTS`].
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(payload, "a block status");
        let context = reader.u32()?;
        let count = reader.left() / 8;
        Self::extents(reader, context, count, |reader| {
            Ok((u64::from(reader.u32()?), u64::from(reader.u32()?)))
        })
    }

    /// What the payload of a [`ChunkKind::BlockStatusExtended`](super::ChunkKind::BlockStatusExtended) says.
    ///
    /// # Errors
    /// As [`decode`](Self::decode).
    pub fn decode_extended(payload: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(payload, "a block status");
        let (context, count) = (reader.u32()?, reader.u32()? as usize);
        if count != reader.left() / 16 {
            return Err(DecodeError::Impossible {
                what: "the number of extents",
                value: count as u64,
            });
        }
        Self::extents(reader, context, count, |reader| {
            Ok((reader.u64()?, reader.u64()?))
        })
    }

    fn extents(
        mut reader: Reader<'_>,
        context: u32,
        count: usize,
        next: impl Fn(&mut Reader<'_>) -> Result<(u64, u64), DecodeError>,
    ) -> Result<Self, DecodeError> {
        if count == 0 {
            return Err(DecodeError::UnexpectedEnd {
                what: "a block status",
            });
        }
        if count > limits::EXTENTS {
            return Err(DecodeError::TooLong {
                what: "a block status",
                len: count as u64,
                limit: limits::EXTENTS as u64,
            });
        }
        let mut extents = Vec::with_capacity(count);
        for _ in 0..count {
            let (len, flags) = next(&mut reader)?;
            if len == 0 {
                return Err(DecodeError::Impossible {
                    what: "the length of an extent",
                    value: 0,
                });
            }
            extents.push(Extent { len, flags });
        }
        reader.finish()?;
        Ok(Self { context, extents })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_status_survives_the_wire() {
        let extent = |len, flags| Extent { len, flags };
        let status = BlockStatus {
            context: 2,
            extents: vec![extent(4096, 0), extent(8192, 3)],
        };
        assert_eq!(BlockStatus::decode(&status.encode()), Ok(status.clone()));
        let extended = status.encode_extended();
        assert_eq!(BlockStatus::decode_extended(&extended), Ok(status.clone()));
        for len in 0..extended.len() {
            assert!(BlockStatus::decode_extended(&extended[..len]).is_err());
        }
        let payload = status.encode();
        assert!(BlockStatus::decode(&payload[..4]).is_err());
        assert!(BlockStatus::decode(&payload[..15]).is_err());
        let empty = BlockStatus {
            context: 2,
            extents: vec![extent(0, 0)],
        };
        assert!(BlockStatus::decode(&empty.encode()).is_err());
    }
}
