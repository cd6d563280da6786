//! The first words of a server, and the old way of choosing an export.

use super::fields::Reader;
use super::{ClientFlags, DecodeError, HandshakeFlags, TransmissionFlags};

/// `NBDMAGIC`.
const GREETING: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`, in the greeting; also before every option.
pub(super) const OPTION: u64 = 0x4948_4156_454f_5054;
/// In the place of `IHAVEOPT`: a server that knows no handshake.
const OLDSTYLE: u64 = 0x0000_4202_8186_1253;

/// How long a [`Greeting`] is.
pub const GREETING_LEN: usize = 18;

/// The first words of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Greeting {
    /// What it says of its handshake.
    pub flags: HandshakeFlags,
}

impl Greeting {
    /// The bytes.
    #[must_use]
    pub fn encode(self) -> [u8; GREETING_LEN] {
        let mut bytes = [0; GREETING_LEN];
        bytes[..8].copy_from_slice(&GREETING.to_be_bytes());
        bytes[8..16].copy_from_slice(&OPTION.to_be_bytes());
        bytes[16..].copy_from_slice(&self.flags.0.to_be_bytes());
        bytes
    }

    /// What the bytes say.
    ///
    /// # Errors
    /// If they are no greeting, or one of a server of the old style, which lacks nearly everything.
    pub fn decode(bytes: &[u8; GREETING_LEN]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(bytes, "the greeting of an NBD server");
        reader.magic_u64(GREETING)?;
        let mut style = reader;
        if style.u64()? == OLDSTYLE {
            return Err(DecodeError::Impossible {
                what: "the handshake of the server, which is of the old style,",
                value: OLDSTYLE,
            });
        }
        reader.magic_u64(OPTION)?;
        let flags = HandshakeFlags(reader.u16()?);
        Ok(Self { flags })
    }
}

impl ClientFlags {
    /// The bytes.
    #[must_use]
    pub const fn encode(self) -> [u8; 4] {
        self.0.to_be_bytes()
    }

    /// What the bytes say; flags without a name are kept, and a server has to end the connection for them.
    #[must_use]
    pub const fn decode(bytes: [u8; 4]) -> Self {
        Self(u32::from_be_bytes(bytes))
    }
}

/// How long an [`OldExport`] is without zeros.
pub const OLD_EXPORT_LEN: usize = 10;

/// The answer to [`ClientOption::ExportName`](super::ClientOption::ExportName); 124 zero bytes follow unless both sides agreed to leave them out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OldExport {
    /// The size in bytes.
    pub size: u64,
    /// What the export can do.
    pub flags: TransmissionFlags,
}

impl OldExport {
    /// How many zero bytes may follow.
    pub const ZEROES: usize = 124;

    /// The bytes, without zeros.
    #[must_use]
    pub fn encode(self) -> [u8; OLD_EXPORT_LEN] {
        let mut bytes = [0; OLD_EXPORT_LEN];
        bytes[..8].copy_from_slice(&self.size.to_be_bytes());
        bytes[8..].copy_from_slice(&self.flags.0.to_be_bytes());
        bytes
    }

    /// What the bytes say.
    ///
    /// # Errors
    /// Never; an answer of this kind has no magic.
    pub fn decode(bytes: &[u8; OLD_EXPORT_LEN]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(bytes, "an export");
        let (size, flags) = (reader.u64()?, TransmissionFlags(reader.u16()?));
        Ok(Self { size, flags })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_greeting_is_what_the_specification_shows() {
        let greeting = Greeting {
            flags: HandshakeFlags::ALL,
        };
        let bytes = greeting.encode();
        assert_eq!(&bytes[..16], b"NBDMAGICIHAVEOPT");
        assert_eq!(bytes[16..], [0, 3]);
        assert_eq!(Greeting::decode(&bytes), Ok(greeting));
        assert!(Greeting::decode(b"HTTP/1.1 400 Bad R").is_err());
        let mut old = bytes;
        old[8..16].copy_from_slice(&OLDSTYLE.to_be_bytes());
        let error = Greeting::decode(&old).unwrap_err();
        assert!(error.to_string().contains("old style"), "{error}");
    }

    #[test]
    fn an_old_export_survives_the_wire() {
        let export = OldExport {
            size: 1 << 40,
            flags: TransmissionFlags::HAS_FLAGS.with(TransmissionFlags::SEND_CACHE),
        };
        assert_eq!(OldExport::decode(&export.encode()), Ok(export));
    }
}
