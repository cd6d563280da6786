//! The first message of both sides, and what they agree on: decided before anything is allocated or touched.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use crate::chunk::{ChunkSize, Layout, RegionDescriptor};
use crate::coding::{Reader, Writer};
use crate::error::{DecodeError, ProtocolError};
use crate::limits::{MAX_ATTRIBUTES, MAX_BODY, MAX_CHUNKS, MAX_NAME, MAX_REGIONS, MAX_VALUE};

/// A version of the protocol. This enum is its changelog.
///
/// * 1: the first.
pub type Version = u16;

/// The versions that this code speaks, oldest and newest.
pub const VERSIONS: (Version, Version) = (1, 1);

/// What a side can do beyond version 1, a bit each: offered in [`Hello::optional`], or in [`Hello::required`] by a side that
/// cannot do without.
pub mod capability {
    /// The leecher keeps what it has of an earlier time where it is still right: [`Keep`](crate::Message::Keep).
    pub const KEEP: u64 = 1;
    /// The cut-over can be asked for: [`CutOver`](crate::Message::CutOver). A leecher that requires this is not suspended for before it
    /// has asked.
    pub const CUT_OVER: u64 = 2;

    /// Every bit that means something here.
    pub(crate) const KNOWN: u64 = KEEP | CUT_OVER;
}

/// When the two copies are compared, chunk by chunk, besides the checksum that every chunk carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Verify {
    /// Not at all.
    #[default]
    Off,
    /// Before ownership passes: adds to the blackout, and a difference rolls back.
    Before,
    /// Once the guest runs at the destination: adds nothing to the blackout; a difference is reported.
    After,
}

/// What a side is in a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Owns the memory now.
    Seeder,
    /// Owns it next.
    Leecher,
}

/// The first message of a side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// Oldest version spoken.
    pub oldest: Version,
    /// Newest version spoken.
    pub newest: Version,
    /// [Capabilities](capability) without which this side cannot work; a bit that the other side does not offer is refused.
    pub required: u64,
    /// [Capabilities](capability) that this side could use. Unknown bits are ignored.
    pub optional: u64,
    /// What this side is.
    pub role: Role,
    /// The unit of transfer. The seeder proposes, the leecher repeats it.
    pub chunk_size: ChunkSize,
    /// The regions with names and lengths in bytes, in the order of the chunk space.
    pub regions: Vec<RegionDescriptor>,
    /// Whether this side can work with post-copy.
    pub post_copy: bool,
    /// The seeder's choice; the leecher's is ignored.
    pub verify: Verify,
    /// Only compare and measure: nothing is changed on either side.
    pub dry_run: bool,
    /// What the subject is.
    pub kind: String,
    /// Facts about the subject that the leecher compares.
    pub attributes: Vec<(String, String)>,
}

/// What both sides agree on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agreement {
    /// The version that is spoken from now on.
    pub version: Version,
    /// The chunk space.
    pub layout: Layout,
    /// When the copies are compared.
    pub verify: Verify,
    /// Whether both sides can work with post-copy.
    pub post_copy: bool,
    /// Only compare and measure.
    pub dry_run: bool,
    /// The leecher offers what it has of an earlier time.
    pub keep: bool,
    /// The cut-over can be asked for.
    pub cut_over: bool,
    /// It has to be: the leecher decides when.
    pub hold: bool,
}

impl Hello {
    /// The capabilities that this side has.
    fn capabilities(&self) -> u64 {
        (self.required | self.optional) & capability::KNOWN
    }

    /// Checks this side's own hello against the limits: the peer could not read one beyond them.
    pub(crate) fn check(&self) -> Result<(), ProtocolError> {
        let incompatible = |reason| Err(ProtocolError::Incompatible { reason });
        if self.regions.len() > MAX_REGIONS {
            return incompatible(format!(
                "there are {} memory regions; at most {MAX_REGIONS} can be moved",
                self.regions.len()
            ));
        }
        if self.attributes.len() > MAX_ATTRIBUTES {
            return incompatible(format!(
                "the subject has {} attributes; at most {MAX_ATTRIBUTES} can be compared",
                self.attributes.len()
            ));
        }
        let regions = self.regions.iter().map(|region| &region.name);
        let names = self.attributes.iter().map(|(name, _)| name);
        let names = regions.chain(names).chain([&self.kind]);
        let values = self.attributes.iter().map(|(_, value)| value);
        let texts = names.map(|name| (name, MAX_NAME));
        for (text, most) in texts.chain(values.map(|value| (value, MAX_VALUE))) {
            if text.len() > most {
                return incompatible(format!(
                    "the text {text:.32}… has {} bytes; at most {most} can be sent",
                    text.len()
                ));
            }
        }
        let mut body = Vec::new();
        self.encode(&mut body);
        if body.len() > MAX_BODY as usize {
            return incompatible(format!(
                "the names of the regions and attributes take {} bytes in all; at most {MAX_BODY} can be sent",
                body.len()
            ));
        }
        Ok(())
    }

    /// The chunk space this side describes.
    ///
    /// # Errors
    /// If it has no region, no bytes, too many, or two of one name.
    pub fn layout(&self) -> Result<Layout, ProtocolError> {
        let incompatible = |reason| ProtocolError::Incompatible { reason };
        for (index, region) in self.regions.iter().enumerate() {
            if self.regions[..index]
                .iter()
                .any(|other| other.name == region.name)
            {
                return Err(incompatible(format!(
                    "two regions are named {}",
                    region.name
                )));
            }
        }
        Layout::new(self.chunk_size, self.regions.clone())
            .filter(|layout| (1..=MAX_CHUNKS).contains(&layout.chunks()))
            .ok_or_else(|| incompatible("the regions are empty or too large".into()))
    }

    /// Compares the two first messages; symmetric, so that both sides come to the same end.
    ///
    /// # Errors
    /// Names what differs, with both values.
    pub fn agree(&self, theirs: &Self) -> Result<Agreement, ProtocolError> {
        let incompatible = |reason| Err(ProtocolError::Incompatible { reason });
        let unsupported = |reason| Err(ProtocolError::Unsupported { reason });
        let version = self.newest.min(theirs.newest);
        if version < self.oldest.max(theirs.oldest) {
            return unsupported(format!(
                "this side speaks versions {} to {} of the protocol, the other {} to {}",
                self.oldest, self.newest, theirs.oldest, theirs.newest
            ));
        }
        let lacking = theirs.required & !self.capabilities();
        if lacking != 0 {
            return unsupported(format!(
                "the other side requires capabilities {lacking:#x} that this one does not have"
            ));
        }
        let lacking = self.required & !theirs.capabilities();
        if lacking != 0 {
            return unsupported(format!(
                "this side requires capabilities {lacking:#x} that the other one does not have"
            ));
        }
        let common = self.capabilities() & theirs.capabilities();
        let (seeder, leecher) = match (self.role, theirs.role) {
            (Role::Seeder, Role::Leecher) => (self, theirs),
            (Role::Leecher, Role::Seeder) => (theirs, self),
            (Role::Seeder, Role::Seeder) => return incompatible("both sides send".into()),
            (Role::Leecher, Role::Leecher) => return incompatible("both sides receive".into()),
        };
        if seeder.kind != leecher.kind {
            return incompatible(format!(
                "the source is of kind {}, the destination of kind {}",
                seeder.kind, leecher.kind
            ));
        }
        if seeder.regions.len() != leecher.regions.len() {
            return incompatible(format!(
                "the source has {} memory regions, the destination {}",
                seeder.regions.len(),
                leecher.regions.len()
            ));
        }
        for (source, destination) in seeder.regions.iter().zip(&leecher.regions) {
            if source != destination {
                return incompatible(format!(
                    "memory region {} of the source has {} bytes, {} of the destination has {}",
                    source.name, source.len, destination.name, destination.len
                ));
            }
        }
        Ok(Agreement {
            version,
            layout: seeder.layout()?,
            verify: seeder.verify,
            post_copy: seeder.post_copy && leecher.post_copy,
            dry_run: seeder.dry_run,
            keep: common & capability::KEEP != 0 && !seeder.dry_run,
            cut_over: common & capability::CUT_OVER != 0,
            hold: leecher.required & capability::CUT_OVER != 0,
        })
    }

    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        out.put_u16(self.oldest);
        out.put_u16(self.newest);
        out.put_u64(self.required);
        out.put_u64(self.optional);
        out.put_u8(match self.role {
            Role::Seeder => 0,
            Role::Leecher => 1,
        });
        out.put_u32(self.chunk_size.bytes());
        out.put_u8(u8::from(self.post_copy));
        out.put_u8(match self.verify {
            Verify::Off => 0,
            Verify::Before => 1,
            Verify::After => 2,
        });
        out.put_u8(u8::from(self.dry_run));
        out.put_u16(u16::try_from(self.regions.len()).expect("limited when it was made"));
        for region in &self.regions {
            out.put_text(&region.name, MAX_NAME);
            out.put_u64(region.len);
        }
        out.put_text(&self.kind, MAX_NAME);
        out.put_u16(u16::try_from(self.attributes.len()).expect("limited when it was made"));
        for (name, value) in &self.attributes {
            out.put_text(name, MAX_NAME);
            out.put_text(value, MAX_VALUE);
        }
    }

    /// Reads the fields of version 1. A later version appends fields, so what follows them is left unread.
    pub(crate) fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let invalid = |field| DecodeError::InvalidValue { field };
        let (oldest, newest) = (reader.u16()?, reader.u16()?);
        let (required, optional) = (reader.u64()?, reader.u64()?);
        let role = match reader.u8()? {
            0 => Role::Seeder,
            1 => Role::Leecher,
            _ => return Err(invalid("role")),
        };
        let chunk_size = ChunkSize::new(reader.u32()?).ok_or_else(|| invalid("chunk size"))?;
        let post_copy = reader.bool()?;
        let verify = match reader.u8()? {
            0 => Verify::Off,
            1 => Verify::Before,
            2 => Verify::After,
            _ => return Err(invalid("verification")),
        };
        let dry_run = reader.bool()?;
        let count = reader.count(10)?;
        if count > MAX_REGIONS {
            return Err(invalid("number of regions"));
        }
        let regions = (0..count)
            .map(|_| {
                Ok(RegionDescriptor {
                    name: reader.text(MAX_NAME)?,
                    len: reader.u64()?,
                })
            })
            .collect::<Result<_, DecodeError>>()?;
        let kind = reader.text(MAX_NAME)?;
        let count = reader.count(4)?;
        if count > MAX_ATTRIBUTES {
            return Err(invalid("number of attributes"));
        }
        let attributes = (0..count)
            .map(|_| Ok((reader.text(MAX_NAME)?, reader.text(MAX_VALUE)?)))
            .collect::<Result<_, DecodeError>>()?;
        Ok(Self {
            oldest,
            newest,
            required,
            optional,
            role,
            chunk_size,
            regions,
            post_copy,
            verify,
            dry_run,
            kind,
            attributes,
        })
    }
}
