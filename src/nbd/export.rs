//! What is told of an export before it is used.

use super::fields::{Reader, Writer, cut, text};
use super::{DecodeError, TransmissionFlags};

/// The sizes that requests may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSizes {
    /// Offsets and lengths are multiples of this power of two, at most 64 KiB.
    pub minimum: u32,
    /// Requests of this size, a power of two, cost the least for what they do.
    pub preferred: u32,
    /// The most bytes that a read or a write may carry; a multiple of the minimum, or [`u32::MAX`] for no limit.
    pub maximum: u32,
}

impl BlockSizes {
    /// Whether the sizes keep to the rules of the specification.
    #[must_use]
    pub const fn are_valid(&self) -> bool {
        self.minimum.is_power_of_two()
            && self.minimum <= 64 << 10
            && self.preferred.is_power_of_two()
            && self.preferred >= self.minimum
            && self.preferred >= 512
            && self.preferred <= self.maximum
            && (self.maximum == u32::MAX || self.maximum.is_multiple_of(self.minimum))
    }
}

/// The export itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Export {
    /// The size in bytes.
    pub size: u64,
    /// What it can do.
    pub flags: TransmissionFlags,
}

/// Kinds of [`Info`], as a client asks for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InfoKind {
    /// Size and flags; always told.
    Export,
    /// The export's proper name.
    Name,
    /// A text for people.
    Description,
    /// Sizes of requests; who asks promises to keep to them.
    BlockSize,
    /// Something else, to be ignored.
    Unknown(u16),
}

impl InfoKind {
    /// The number on the wire.
    #[must_use]
    pub const fn to_wire(self) -> u16 {
        match self {
            Self::Export => 0,
            Self::Name => 1,
            Self::Description => 2,
            Self::BlockSize => 3,
            Self::Unknown(kind) => kind,
        }
    }

    /// What a number stands for.
    #[must_use]
    pub const fn from_wire(kind: u16) -> Self {
        match kind {
            0 => Self::Export,
            1 => Self::Name,
            2 => Self::Description,
            3 => Self::BlockSize,
            other => Self::Unknown(other),
        }
    }
}

/// One thing told of an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Info {
    /// Size and flags.
    Export(Export),
    /// The export's proper name.
    Name(String),
    /// A text for people.
    Description(String),
    /// Sizes of requests.
    BlockSize(BlockSizes),
    /// Something that this side does not know.
    Unknown(u16),
}

impl Info {
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.put_u16(match self {
            Self::Export(_) => InfoKind::Export.to_wire(),
            Self::Name(_) => InfoKind::Name.to_wire(),
            Self::Description(_) => InfoKind::Description.to_wire(),
            Self::BlockSize(_) => InfoKind::BlockSize.to_wire(),
            Self::Unknown(kind) => *kind,
        });
        match self {
            Self::Export(export) => {
                out.put_u64(export.size);
                out.put_u16(export.flags.0);
            }
            Self::Name(text) | Self::Description(text) => {
                out.extend_from_slice(cut(text).as_bytes());
            }
            Self::BlockSize(sizes) => {
                out.put_u32(sizes.minimum);
                out.put_u32(sizes.preferred);
                out.put_u32(sizes.maximum);
            }
            Self::Unknown(_) => {}
        }
    }

    pub(super) fn decode(mut reader: Reader<'_>) -> Result<Self, DecodeError> {
        let info = match InfoKind::from_wire(reader.u16()?) {
            InfoKind::Export => Self::Export(Export {
                size: reader.u64()?,
                flags: TransmissionFlags(reader.u16()?),
            }),
            InfoKind::Name => Self::Name(text(reader.rest(), "the name of an export")?.to_owned()),
            InfoKind::Description => {
                Self::Description(text(reader.rest(), "a description")?.to_owned())
            }
            InfoKind::BlockSize => Self::BlockSize(BlockSizes {
                minimum: reader.u32()?,
                preferred: reader.u32()?,
                maximum: reader.u32()?,
            }),
            InfoKind::Unknown(kind) => {
                reader.rest();
                Self::Unknown(kind)
            }
        };
        reader.finish()?;
        Ok(info)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_sizes_keep_to_the_rules() {
        let check = |minimum, preferred, maximum, expected| {
            let sizes = BlockSizes {
                minimum,
                preferred,
                maximum,
            };
            assert_eq!(sizes.are_valid(), expected, "{sizes:?}");
        };
        check(1, 4096, 32 << 20, true);
        check(512, 512, u32::MAX, true);
        check(0, 4096, 32 << 20, false);
        check(3, 4096, 32 << 20, false);
        check(128 << 10, 128 << 10, 32 << 20, false);
        check(4096, 512, 32 << 20, false);
        check(1, 1, 32 << 20, false);
        check(512, 4096, 4097, false);
        check(512, 4096, 2048, false);
    }
}
