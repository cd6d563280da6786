//! What a client asks for in the handshake.

use super::fields::{Reader, Writer, text};
use super::handshake::OPTION;
use super::{DecodeError, InfoKind, limits};

/// How long an [`OptionHeader`] is.
pub const OPTION_HEADER_LEN: usize = 16;

/// Which option it is, and how much data belongs to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionHeader {
    /// Which option.
    pub code: OptionCode,
    /// How many bytes follow. To be checked against [`limits::OPTION_DATA`].
    pub len: u32,
}

impl OptionHeader {
    /// The bytes.
    #[must_use]
    pub fn encode(self) -> [u8; OPTION_HEADER_LEN] {
        let mut bytes = [0; OPTION_HEADER_LEN];
        bytes[..8].copy_from_slice(&OPTION.to_be_bytes());
        bytes[8..12].copy_from_slice(&self.code.to_wire().to_be_bytes());
        bytes[12..].copy_from_slice(&self.len.to_be_bytes());
        bytes
    }

    /// What the bytes say.
    ///
    /// # Errors
    /// If they are no option.
    pub fn decode(bytes: &[u8; OPTION_HEADER_LEN]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(bytes, "an option");
        reader.magic_u64(OPTION)?;
        Ok(Self {
            code: OptionCode::from_wire(reader.u32()?),
            len: reader.u32()?,
        })
    }
}

/// Which option it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OptionCode {
    /// Use an export, without an answer that could be no.
    ExportName,
    /// The end.
    Abort,
    /// Which exports there are.
    List,
    /// Speak TLS from here on.
    StartTls,
    /// What an export is like.
    Info,
    /// Use an export.
    Go,
    /// Structured replies, please.
    StructuredReply,
    /// Which meta contexts an export has.
    ListMetaContext,
    /// Which meta contexts will be asked for.
    SetMetaContext,
    /// Longer headers, please, with lengths of 64 bits.
    ExtendedHeaders,
    /// An option that has no name here.
    Unknown(u32),
}

impl OptionCode {
    /// The number on the wire.
    #[must_use]
    pub const fn to_wire(self) -> u32 {
        match self {
            Self::ExportName => 1,
            Self::Abort => 2,
            Self::List => 3,
            Self::StartTls => 5,
            Self::Info => 6,
            Self::Go => 7,
            Self::StructuredReply => 8,
            Self::ListMetaContext => 9,
            Self::SetMetaContext => 10,
            Self::ExtendedHeaders => 11,
            Self::Unknown(code) => code,
        }
    }

    /// What a number stands for. 4 was withdrawn, and is as unknown as those that never were.
    #[must_use]
    pub const fn from_wire(code: u32) -> Self {
        match code {
            1 => Self::ExportName,
            2 => Self::Abort,
            3 => Self::List,
            5 => Self::StartTls,
            6 => Self::Info,
            7 => Self::Go,
            8 => Self::StructuredReply,
            9 => Self::ListMetaContext,
            10 => Self::SetMetaContext,
            11 => Self::ExtendedHeaders,
            other => Self::Unknown(other),
        }
    }
}

/// An export, and what is to be told of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InfoQuery {
    /// The export's name; empty for the default one.
    pub name: String,
    /// What the client wants to know.
    pub kinds: Vec<InfoKind>,
}

/// An export, and questions for its meta contexts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetaQuery {
    /// The export's name; empty for the default one.
    pub name: String,
    /// Names of contexts, or beginnings of names that end in a colon.
    pub queries: Vec<String>,
}

/// What a client asks for in the handshake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClientOption {
    /// Use the export of this name. The answer is an [`OldExport`](super::OldExport), or the end of the connection.
    ExportName(String),
    /// The end.
    Abort,
    /// Which exports there are.
    List,
    /// Speak TLS from here on.
    StartTls,
    /// What an export is like.
    Info(InfoQuery),
    /// Use an export.
    Go(InfoQuery),
    /// Structured replies, please.
    StructuredReply,
    /// Which meta contexts an export has.
    ListMetaContext(MetaQuery),
    /// Which meta contexts will be asked for.
    SetMetaContext(MetaQuery),
    /// Longer headers, please.
    ExtendedHeaders,
    /// An option that has no name here.
    Unknown(u32),
}

impl ClientOption {
    /// Which option it is.
    #[must_use]
    pub const fn code(&self) -> OptionCode {
        match self {
            Self::ExportName(_) => OptionCode::ExportName,
            Self::Abort => OptionCode::Abort,
            Self::List => OptionCode::List,
            Self::StartTls => OptionCode::StartTls,
            Self::Info(_) => OptionCode::Info,
            Self::Go(_) => OptionCode::Go,
            Self::StructuredReply => OptionCode::StructuredReply,
            Self::ListMetaContext(_) => OptionCode::ListMetaContext,
            Self::SetMetaContext(_) => OptionCode::SetMetaContext,
            Self::ExtendedHeaders => OptionCode::ExtendedHeaders,
            Self::Unknown(code) => OptionCode::Unknown(*code),
        }
    }

    /// Appends the option, header and data, to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut data = Vec::new();
        match self {
            Self::ExportName(name) => data.extend_from_slice(super::fields::cut(name).as_bytes()),
            Self::Info(query) | Self::Go(query) => query.encode(&mut data),
            Self::ListMetaContext(query) | Self::SetMetaContext(query) => query.encode(&mut data),
            Self::Abort
            | Self::List
            | Self::StartTls
            | Self::StructuredReply
            | Self::ExtendedHeaders
            | Self::Unknown(_) => {}
        }
        let len = u32::try_from(data.len()).unwrap_or(u32::MAX);
        let code = self.code();
        out.extend_from_slice(&OptionHeader { code, len }.encode());
        out.extend_from_slice(&data);
    }

    /// What the data of an option says.
    ///
    /// # Errors
    /// If it is not what belongs to the option. What follows the data can be read nevertheless.
    pub fn decode(code: OptionCode, data: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(data, "the data of an option");
        let option = match code {
            OptionCode::ExportName => {
                Self::ExportName(text(reader.rest(), "the name of an export")?.to_owned())
            }
            OptionCode::Abort => {
                // The specification asks to ignore what comes with it.
                reader.rest();
                Self::Abort
            }
            OptionCode::List => Self::List,
            OptionCode::StartTls => Self::StartTls,
            OptionCode::Info => Self::Info(InfoQuery::decode(&mut reader)?),
            OptionCode::Go => Self::Go(InfoQuery::decode(&mut reader)?),
            OptionCode::StructuredReply => Self::StructuredReply,
            OptionCode::ListMetaContext => Self::ListMetaContext(MetaQuery::decode(&mut reader)?),
            OptionCode::SetMetaContext => Self::SetMetaContext(MetaQuery::decode(&mut reader)?),
            OptionCode::ExtendedHeaders => Self::ExtendedHeaders,
            OptionCode::Unknown(code) => {
                reader.rest();
                Self::Unknown(code)
            }
        };
        reader.finish()?;
        Ok(option)
    }
}

impl InfoQuery {
    fn encode(&self, out: &mut Vec<u8>) {
        out.put_text(&self.name);
        let kinds = &self.kinds[..self.kinds.len().min(usize::from(u16::MAX))];
        out.put_u16(u16::try_from(kinds.len()).expect("cut to what fits"));
        for kind in kinds {
            out.put_u16(kind.to_wire());
        }
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let name = reader.text()?.to_owned();
        let count = usize::from(reader.u16()?);
        if count * 2 > reader.left() {
            return Err(DecodeError::UnexpectedEnd {
                what: "a list of what a client wants to know",
            });
        }
        let kinds = (0..count)
            .map(|_| reader.u16().map(InfoKind::from_wire))
            .collect::<Result<_, _>>()?;
        Ok(Self { name, kinds })
    }
}

impl MetaQuery {
    fn encode(&self, out: &mut Vec<u8>) {
        out.put_text(&self.name);
        let queries = &self.queries[..self.queries.len().min(limits::QUERIES as usize)];
        out.put_u32(u32::try_from(queries.len()).expect("cut to what is allowed"));
        for query in queries {
            out.put_text(query);
        }
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let name = reader.text()?.to_owned();
        let count = reader.u32()?;
        if count > limits::QUERIES {
            return Err(DecodeError::TooLong {
                what: "a list of questions for meta contexts",
                len: u64::from(count),
                limit: u64::from(limits::QUERIES),
            });
        }
        let queries = (0..count)
            .map(|_| reader.text().map(str::to_owned))
            .collect::<Result<_, _>>()?;
        Ok(Self { name, queries })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(option: &ClientOption) {
        let mut bytes = Vec::new();
        option.encode(&mut bytes);
        let (header, data) = bytes.split_first_chunk().unwrap();
        let header = OptionHeader::decode(header).unwrap();
        assert_eq!(header.len as usize, data.len());
        assert_eq!(&ClientOption::decode(header.code, data).unwrap(), option);
        // What ends early is not taken for something else.
        for len in 0..data.len() {
            let short = ClientOption::decode(header.code, &data[..len]);
            assert_ne!(short.as_ref(), Ok(option));
        }
    }

    #[test]
    fn every_option_survives_the_wire() {
        let info = InfoQuery {
            name: "disk".into(),
            kinds: vec![InfoKind::BlockSize, InfoKind::Unknown(99)],
        };
        let meta = MetaQuery {
            name: String::new(),
            queries: vec!["base:allocation".into(), "qemu:".into()],
        };
        for option in [
            ClientOption::ExportName("ä".into()),
            ClientOption::Abort,
            ClientOption::List,
            ClientOption::StartTls,
            ClientOption::Info(info.clone()),
            ClientOption::Go(info),
            ClientOption::StructuredReply,
            ClientOption::ListMetaContext(meta.clone()),
            ClientOption::SetMetaContext(meta),
            ClientOption::ExtendedHeaders,
            ClientOption::Unknown(4),
        ] {
            check(&option);
        }
    }

    #[test]
    fn data_that_does_not_belong_to_an_option_is_refused() {
        let check = |code, data: &[u8]| {
            assert!(
                ClientOption::decode(code, data).is_err(),
                "{code:?} {data:?}"
            );
        };
        check(OptionCode::List, b"x");
        check(OptionCode::StartTls, b"x");
        check(OptionCode::StructuredReply, b"x");
        check(OptionCode::ExportName, b"\xff");
        check(OptionCode::ExportName, b"a\0b");
        check(OptionCode::ExportName, &[b'a'; limits::NAME + 1]);
        check(OptionCode::Go, &[0, 0, 0, 9, b'a', 0, 0]);
        check(OptionCode::Go, &[0, 0, 0, 1, b'a', 0, 2, 0, 0]);
        check(OptionCode::Go, &[0, 0, 0, 1, b'a', 0, 0, 0]);
        check(
            OptionCode::SetMetaContext,
            &[0, 0, 0, 0, 255, 255, 255, 255],
        );
    }
}
