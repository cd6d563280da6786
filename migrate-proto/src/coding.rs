//! Little-endian fields in a row: how every body is written and read.

use alloc::string::String;
use alloc::vec::Vec;

use crate::error::DecodeError;

/// Reads fields off the front of a body.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn new(body: &'a [u8]) -> Self {
        Self(body)
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Result<&'a [u8], DecodeError> {
        let (head, tail) = self
            .0
            .split_at_checked(len)
            .ok_or(DecodeError::UnexpectedEnd)?;
        self.0 = tail;
        Ok(head)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let (head, tail) = self
            .0
            .split_first_chunk()
            .ok_or(DecodeError::UnexpectedEnd)?;
        self.0 = tail;
        Ok(*head)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, DecodeError> {
        self.array().map(u8::from_le_bytes)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, DecodeError> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, DecodeError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, DecodeError> {
        self.array().map(u64::from_le_bytes)
    }

    pub(crate) fn bool(&mut self) -> Result<bool, DecodeError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(DecodeError::InvalidValue { field: "flag" }),
        }
    }

    /// A text of at most `longest` bytes: its length as `u16`, then UTF-8.
    pub(crate) fn text(&mut self, longest: usize) -> Result<String, DecodeError> {
        let len = usize::from(self.u16()?);
        if len > longest {
            return Err(DecodeError::InvalidValue {
                field: "text length",
            });
        }
        core::str::from_utf8(self.bytes(len)?)
            .map(String::from)
            .map_err(|_| DecodeError::InvalidValue { field: "text" })
    }

    /// How many elements of at least `size` bytes follow, as `u16`; refused if they cannot all be there, so
    /// that a count never sizes an allocation which the body does not back.
    pub(crate) fn count(&mut self, size: usize) -> Result<usize, DecodeError> {
        let count = usize::from(self.u16()?);
        if count * size > self.0.len() {
            return Err(DecodeError::UnexpectedEnd);
        }
        Ok(count)
    }

    /// Refuses what nobody asked for.
    pub(crate) fn finish(self) -> Result<(), DecodeError> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(DecodeError::TrailingBytes)
        }
    }
}

/// Appends fields to a body.
pub(crate) trait Writer {
    fn put_u8(&mut self, value: u8);
    fn put_u16(&mut self, value: u16);
    fn put_u32(&mut self, value: u32);
    fn put_u64(&mut self, value: u64);
    fn put_text(&mut self, text: &str, longest: usize);
}

impl Writer for Vec<u8> {
    fn put_u8(&mut self, value: u8) {
        self.push(value);
    }

    fn put_u16(&mut self, value: u16) {
        self.extend_from_slice(&value.to_le_bytes());
    }

    fn put_u32(&mut self, value: u32) {
        self.extend_from_slice(&value.to_le_bytes());
    }

    fn put_u64(&mut self, value: u64) {
        self.extend_from_slice(&value.to_le_bytes());
    }

    /// Cuts `text` at a character border if it is longer than the decoder takes: only reasons meant for
    /// humans can be that long, names are checked when they are made.
    fn put_text(&mut self, text: &str, longest: usize) {
        let end = text.floor_char_boundary(longest.min(usize::from(u16::MAX)));
        let text = &text[..end];
        self.put_u16(u16::try_from(text.len()).expect("cut above"));
        self.extend_from_slice(text.as_bytes());
    }
}
