//! Big-endian fields in a row.

use super::DecodeError;
use super::limits;

/// Reads fields off the front of what `what` names.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    what: &'static str,
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8], what: &'static str) -> Self {
        Self { bytes, what }
    }

    pub(super) fn left(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn bytes(&mut self, len: usize) -> Result<&'a [u8], DecodeError> {
        let (head, tail) = self
            .bytes
            .split_at_checked(len)
            .ok_or(DecodeError::UnexpectedEnd { what: self.what })?;
        self.bytes = tail;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let (head, tail) = self
            .bytes
            .split_first_chunk()
            .ok_or(DecodeError::UnexpectedEnd { what: self.what })?;
        self.bytes = tail;
        Ok(*head)
    }

    pub(super) fn u16(&mut self) -> Result<u16, DecodeError> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, DecodeError> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, DecodeError> {
        self.array().map(u64::from_be_bytes)
    }

    pub(super) fn magic_u32(&mut self, magic: u32) -> Result<(), DecodeError> {
        let found = self.u32()?;
        self.same(u64::from(magic), u64::from(found))
    }

    pub(super) fn magic_u64(&mut self, magic: u64) -> Result<(), DecodeError> {
        let found = self.u64()?;
        self.same(magic, found)
    }

    fn same(&self, magic: u64, found: u64) -> Result<(), DecodeError> {
        if magic == found {
            return Ok(());
        }
        let what = self.what;
        Err(DecodeError::Magic { what, found })
    }

    /// A text, its length as `u32` before it.
    pub(super) fn text(&mut self) -> Result<&'a str, DecodeError> {
        let len = self.u32()?;
        if usize::try_from(len).map_or(true, |len| len > limits::NAME) {
            return Err(DecodeError::TooLong {
                what: "a name",
                len: u64::from(len),
                limit: limits::NAME as u64,
            });
        }
        let bytes = self.bytes(len as usize)?;
        text(bytes, self.what)
    }

    /// All that is left.
    pub(super) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.bytes)
    }

    /// Refuses what nobody asked for.
    pub(super) fn finish(self) -> Result<(), DecodeError> {
        if self.bytes.is_empty() {
            Ok(())
        } else {
            Err(DecodeError::TrailingBytes { what: self.what })
        }
    }
}

/// Text without zero bytes, of at most the length of a name.
pub(super) fn text<'a>(bytes: &'a [u8], what: &'static str) -> Result<&'a str, DecodeError> {
    if bytes.len() > limits::NAME {
        return Err(DecodeError::TooLong {
            what,
            len: bytes.len() as u64,
            limit: limits::NAME as u64,
        });
    }
    match str::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => Ok(text),
        _ => Err(DecodeError::NotText { what }),
    }
}

/// A message for people, as far as it is text.
pub(super) fn message(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[..bytes.len().min(limits::NAME)]).into_owned()
}

/// What of a name is sent: names are checked when they are made, and messages need not be whole.
pub(super) fn cut(text: &str) -> &str {
    &text[..text.floor_char_boundary(limits::NAME)]
}

/// Appends fields.
pub(super) trait Writer {
    fn put_u16(&mut self, value: u16);
    fn put_u32(&mut self, value: u32);
    fn put_u64(&mut self, value: u64);
    fn put_text(&mut self, text: &str);
}

impl Writer for Vec<u8> {
    fn put_u16(&mut self, value: u16) {
        self.extend_from_slice(&value.to_be_bytes());
    }

    fn put_u32(&mut self, value: u32) {
        self.extend_from_slice(&value.to_be_bytes());
    }

    fn put_u64(&mut self, value: u64) {
        self.extend_from_slice(&value.to_be_bytes());
    }

    fn put_text(&mut self, text: &str) {
        let text = cut(text);
        self.put_u32(u32::try_from(text.len()).expect("cut to the length of a name"));
        self.extend_from_slice(text.as_bytes());
    }
}
