//! Frames: a header of 16 bytes, the fields of a message, and for some messages a payload.
//!
//! ```text
//!  0        1        2        4           8            12         16
//!  | tag    | 0      | 0      | body len  | payload len | check   | body … | payload …
//! ```
//!
//! The check is the low half of the XXH3-64 digest over the first 12 bytes and the body. The payload is not in it:
//! it may be received straight into memory, and each of its chunks has a digest among the fields.

use alloc::vec::Vec;

use xxhash_rust::xxh3::Xxh3Default;

use crate::coding::Reader;
use crate::error::DecodeError;
use crate::limits::{MAX_BODY, MAX_PAYLOAD};
use crate::message::Message;

/// The length of a header in bytes.
pub const HEADER_LEN: usize = 16;

/// A header that was read: its lengths are within the limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    tag: u8,
    body_len: u32,
    payload_len: u32,
    check: u32,
}

impl FrameHeader {
    /// Reads a header.
    ///
    /// # Errors
    /// If a length is above its limit, or a payload follows a message that has none: nothing may be allocated for
    /// this frame then, and the lane is lost.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(bytes);
        let tag = reader.u8()?;
        if reader.array::<3>()? != [0; 3] {
            return Err(DecodeError::BadCheck);
        }
        let (body_len, payload_len) = (reader.u32()?, reader.u32()?);
        let check = reader.u32()?;
        let payload_limit = if Message::carries_payload(tag) {
            MAX_PAYLOAD
        } else {
            0
        };
        for (part, len, limit) in [
            ("body", body_len, MAX_BODY),
            ("payload", payload_len, payload_limit),
        ] {
            if len > limit {
                return Err(DecodeError::TooLong { part, len, limit });
            }
        }
        Ok(Self {
            tag,
            body_len,
            payload_len,
            check,
        })
    }

    /// How many bytes of fields follow the header.
    #[must_use]
    pub fn body_len(&self) -> usize {
        self.body_len as usize
    }

    /// How many bytes of payload follow the fields.
    #[must_use]
    pub fn payload_len(&self) -> usize {
        self.payload_len as usize
    }

    /// Reads the message whose fields are `body`.
    ///
    /// # Errors
    /// If the check does not match or the fields are not those of the message.
    pub fn message(&self, body: &[u8]) -> Result<Message, DecodeError> {
        if self.check != check(self.tag, self.body_len, self.payload_len, body) {
            return Err(DecodeError::BadCheck);
        }
        Message::decode(self.tag, body)
    }
}

/// Appends header and fields of `message` to `out`; the caller sends `payload_len` bytes after them.
///
/// # Panics
/// If the lengths are above the limits or the message carries no payload: what a side makes itself is within them.
pub fn encode_frame(message: &Message, payload_len: usize, out: &mut Vec<u8>) {
    let start = out.len();
    out.extend_from_slice(&[0; HEADER_LEN]);
    message.encode(out);
    let tag = message.tag();
    let body_len = u32::try_from(out.len() - start - HEADER_LEN)
        .ok()
        .filter(|&len| len <= MAX_BODY)
        .expect("a message that this side made fits its frame");
    let payload_len = u32::try_from(payload_len)
        .ok()
        .filter(|&len| len <= MAX_PAYLOAD && (len == 0 || Message::carries_payload(tag)))
        .expect("a payload that this side made fits its frame");
    let check = check(tag, body_len, payload_len, &out[start + HEADER_LEN..]);
    let header = &mut out[start..start + HEADER_LEN];
    header[..12].copy_from_slice(&prefix(tag, body_len, payload_len));
    header[12..].copy_from_slice(&check.to_le_bytes());
}

fn prefix(tag: u8, body_len: u32, payload_len: u32) -> [u8; 12] {
    let mut prefix = [0; 12];
    prefix[0] = tag;
    prefix[4..8].copy_from_slice(&body_len.to_le_bytes());
    prefix[8..].copy_from_slice(&payload_len.to_le_bytes());
    prefix
}

#[expect(clippy::cast_possible_truncation, reason = "the low half is meant")]
fn check(tag: u8, body_len: u32, payload_len: u32, body: &[u8]) -> u32 {
    let mut digest = Xxh3Default::new();
    digest.update(&prefix(tag, body_len, payload_len));
    digest.update(body);
    digest.digest() as u32
}
