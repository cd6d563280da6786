//! What is served under a name.

use std::sync::Arc;

use crate::chunk::{Marks, Storage};
use crate::nbd::{self, BlockSizes, Errno, TransmissionFlags, limits};

/// A storage under a name, and what clients may do with it.
#[derive(Debug, Clone)]
pub struct Export {
    name: String,
    description: String,
    storage: Arc<dyn Storage>,
    marks: Option<Arc<dyn Marks>>,
    read_only: bool,
    fast_zeroes: bool,
    sizes: BlockSizes,
}

/// Why something cannot be an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// No client could ask for it.
    #[error(
        "the name or the description of an export is longer than {} bytes or has a zero byte",
        limits::NAME
    )]
    Name,
    /// The sizes break the rules of the specification.
    #[error(
        "the block sizes {0:?} are none: minimum and preferred are powers of two, the minimum at most 64 KiB, the preferred at least \
         512 and the minimum and at most the maximum, which is a multiple of the minimum and at most {max}", max = limits::PAYLOAD
    )]
    Sizes(BlockSizes),
    /// The end of the export could not be read.
    #[error("the length {len} is no multiple of the minimum block size {minimum}")]
    Length {
        /// The length of the storage in bytes.
        len: u64,
        /// The size that was wanted.
        minimum: u32,
    },
}

impl Export {
    /// Serves `storage` as `name`, to be read and written by any byte, with requests of at most 32 MiB.
    ///
    /// # Errors
    /// [`ExportError::Name`].
    pub fn new(name: impl Into<String>, storage: Arc<dyn Storage>) -> Result<Self, ExportError> {
        Ok(Self {
            name: checked(name.into())?,
            description: String::new(),
            storage,
            marks: None,
            read_only: false,
            fast_zeroes: false,
            sizes: BlockSizes {
                minimum: 1,
                preferred: 4096,
                maximum: limits::PAYLOAD,
            },
        })
    }

    /// Says something about it to people.
    ///
    /// # Errors
    /// [`ExportError::Name`].
    pub fn with_description(mut self, description: impl Into<String>) -> Result<Self, ExportError> {
        self.description = checked(description.into())?;
        Ok(self)
    }

    /// Refuses to be written.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }

    /// Says that [`Storage::zero`] is faster than to write zeros. Clients that ask for zeros only if they are fast are refused otherwise.
    #[must_use]
    pub fn with_fast_zeroes(mut self) -> Self {
        self.fast_zeroes = true;
        self
    }

    /// Offers what `marks` says as the meta context [`nbd::DIRTY`].
    #[must_use]
    pub fn with_marks(mut self, marks: Arc<dyn Marks>) -> Self {
        self.marks = Some(marks);
        self
    }

    /// Announces other sizes of requests, and refuses those that do not keep to them.
    ///
    /// # Errors
    /// [`ExportError::Sizes`], [`ExportError::Length`].
    pub fn with_block_sizes(mut self, sizes: BlockSizes) -> Result<Self, ExportError> {
        if !sizes.are_valid() || sizes.maximum > limits::PAYLOAD {
            return Err(ExportError::Sizes(sizes));
        }
        let (len, minimum) = (self.storage.len(), sizes.minimum);
        if !len.is_multiple_of(u64::from(minimum)) {
            return Err(ExportError::Length { len, minimum });
        }
        self.sizes = sizes;
        Ok(self)
    }

    /// The name by which clients ask for it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What people are told.
    #[must_use]
    pub fn description(&self) -> &str {
        &self.description
    }

    /// What is served.
    #[must_use]
    pub fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    /// Whether writing is refused.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// The sizes of requests.
    #[must_use]
    pub fn block_sizes(&self) -> BlockSizes {
        self.sizes
    }

    /// What a client is told that it can do, with structured replies or without.
    ///
    /// Several connections may be used at once: a flush, on whichever, is one of the storage, and covers all that it was given.
    #[must_use]
    pub fn flags(&self, structured: bool) -> TransmissionFlags {
        use nbd::TransmissionFlags as Flags;
        Flags::HAS_FLAGS
            .with(Flags::SEND_FLUSH)
            .with(Flags::SEND_FUA)
            .with(Flags::CAN_MULTI_CONN)
            .with(Flags::SEND_CACHE)
            .with_if(structured, Flags::SEND_DF)
            .with_if(self.read_only, Flags::READ_ONLY)
            .with_if(
                !self.read_only,
                Flags::SEND_TRIM
                    .with(Flags::SEND_WRITE_ZEROES)
                    .with(Flags::SEND_FAST_ZERO),
            )
    }

    /// Whether it is what `other` is a clone of, and not another one that has got its name.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        self.name == other.name
            && Arc::ptr_eq(&self.storage, &other.storage)
            && self.read_only == other.read_only
    }

    pub(super) fn zeroes_fast(&self) -> bool {
        self.fast_zeroes
    }

    pub(super) fn contexts(&self) -> Vec<Context> {
        let mut contexts = vec![Context::Allocation];
        contexts.extend(self.marks.as_ref().map(|_| Context::Dirty));
        contexts
    }

    pub(super) fn marks(&self) -> Option<&Arc<dyn Marks>> {
        self.marks.as_ref()
    }
}

fn checked(name: String) -> Result<String, ExportError> {
    if name.len() > limits::NAME || name.contains('\0') {
        return Err(ExportError::Name);
    }
    Ok(name)
}

/// A meta context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Context {
    /// Where there are holes.
    Allocation,
    /// What was written.
    Dirty,
}

impl Context {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Allocation => nbd::ALLOCATION,
            Self::Dirty => nbd::DIRTY,
        }
    }

    /// By which the transmission phase knows it.
    pub(super) const fn id(self) -> u32 {
        match self {
            Self::Allocation => 1,
            Self::Dirty => 2,
        }
    }
}

/// What is wrong with a request, for the client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refused {
    pub(super) errno: Errno,
    pub(super) message: String,
}

impl Refused {
    pub(super) fn new(errno: Errno, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { errno, message }
    }
}

impl From<std::io::Error> for Refused {
    fn from(error: std::io::Error) -> Self {
        Self::new(Errno::of(&error), error.to_string())
    }
}
