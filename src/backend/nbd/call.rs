//! One request and its answer.

use std::ops::Range;

use super::fault::{Fault, Misbehaviour};
use crate::nbd::{BlockStatus, ChunkKind, Command, CommandFlags, Errno, Extent};

/// What a request carries, or what its answer is put into.
#[derive(Debug)]
pub(super) enum Body<'a> {
    /// For the bytes of a read.
    Read(&'a mut [u8]),
    /// The bytes of a write.
    Write(&'a [u8]),
    /// For the extents of one context.
    Status(u32, &'a mut Vec<Extent>),
    /// Neither.
    Nothing,
}

/// A request, and what has come of it.
#[derive(Debug)]
pub(super) struct Call<'a> {
    pub(super) command: Command,
    pub(super) flags: CommandFlags,
    pub(super) offset: u64,
    pub(super) len: u32,
    pub(super) body: Body<'a>,
    /// `None` until it is answered.
    pub(super) outcome: Option<Result<(), Errno>>,
    error: Option<Errno>,
    covered: Covered,
}

/// What may come as the answer to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wants {
    /// So many bytes, from an offset of the export on.
    Bytes(u64, u32),
    /// Extents.
    Extents,
    /// Success or failure.
    Nothing,
}

/// How many parts an answer may have beyond the bytes that were asked for: errors, of which there may be one for each block.
const PARTS: u64 = 1024;

impl Wants {
    /// How much the parts of the answer weigh at most.
    pub(super) fn room(self) -> u64 {
        match self {
            Self::Bytes(_, len) => u64::from(len) + PARTS,
            Self::Extents | Self::Nothing => PARTS,
        }
    }
}

/// A part of an answer.
#[derive(Debug)]
pub(super) enum News {
    /// Bytes at an offset of the export.
    Bytes(u64, Vec<u8>),
    /// Zeros at an offset of the export.
    Zeros(u64, u32),
    /// What a context says.
    Status(BlockStatus),
    /// It failed.
    Error(Errno),
    /// Nothing but, perhaps, that it is done.
    Nothing,
}

impl News {
    /// How much it takes of [`Wants::room`]: what it is about, at most. There is one status in an answer.
    pub(super) fn weight(&self) -> u64 {
        match self {
            Self::Bytes(_, bytes) => bytes.len() as u64,
            Self::Status(_) => PARTS - 1,
            Self::Zeros(..) | Self::Error(_) | Self::Nothing => 1,
        }
    }
}

impl<'a> Call<'a> {
    pub(super) fn new(command: Command, offset: u64, len: u32, body: Body<'a>) -> Self {
        Self {
            command,
            flags: CommandFlags::NONE,
            offset,
            len,
            body,
            outcome: None,
            error: None,
            covered: Covered::default(),
        }
    }

    pub(super) fn wants(&self) -> Wants {
        match self.body {
            Body::Read(_) => Wants::Bytes(self.offset, self.len),
            Body::Status(..) => Wants::Extents,
            Body::Write(_) | Body::Nothing => Wants::Nothing,
        }
    }

    /// The bytes that go with the request.
    pub(super) fn payload(&self) -> &'a [u8] {
        match self.body {
            Body::Write(bytes) => bytes,
            _ => &[],
        }
    }

    /// How much room of the window it takes.
    pub(super) fn weight(&self) -> usize {
        match self.body {
            Body::Read(_) | Body::Write(_) => self.len as usize,
            _ => 0,
        }
    }

    /// As if it had never been sent.
    pub(super) fn reset(&mut self) {
        self.outcome = None;
        self.error = None;
        self.covered = Covered::default();
        if let Body::Status(_, extents) = &mut self.body {
            extents.clear();
        }
    }

    /// Where bytes at `offset` belong, which the server is about to send.
    ///
    /// # Errors
    /// If they were not asked for, have come before, or come in too many pieces.
    pub(super) fn place(&mut self, offset: u64, len: u32) -> Result<&mut [u8], Fault> {
        let misplaced = Misbehaviour::Range {
            offset,
            len: u64::from(len),
            wanted_offset: self.offset,
            wanted_len: u64::from(self.len),
        };
        let Body::Read(buf) = &mut self.body else {
            return Err(Misbehaviour::Kind(ChunkKind::OffsetData).into());
        };
        let range = offset
            .checked_sub(self.offset)
            .and_then(|start| usize::try_from(start).ok())
            .and_then(|start| Some(start..start.checked_add(len as usize)?))
            .filter(|range| range.end <= buf.len() && !range.is_empty())
            .ok_or_else(|| misplaced.clone())?;
        if !self.covered.add(range.clone()) {
            return Err(misplaced.into());
        }
        Ok(&mut buf[range])
    }

    /// Whether an error has come.
    pub(super) fn has_failed(&self) -> bool {
        self.error.is_some()
    }

    /// Takes note of a part of the answer.
    ///
    /// # Errors
    /// If it is no answer to this.
    pub(super) fn note(&mut self, news: News) -> Result<(), Fault> {
        match news {
            News::Nothing => {}
            News::Error(errno) => {
                self.error.get_or_insert(errno);
            }
            News::Bytes(offset, bytes) => {
                let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
                self.place(offset, len)?.copy_from_slice(&bytes);
            }
            News::Zeros(offset, len) => self.place(offset, len)?.fill(0),
            News::Status(status) => match &mut self.body {
                Body::Status(context, extents)
                    if *context == status.context && extents.is_empty() =>
                {
                    **extents = status.extents;
                }
                _ => return Err(Misbehaviour::Kind(ChunkKind::BlockStatus).into()),
            },
        }
        Ok(())
    }

    /// Nothing more will come.
    ///
    /// # Errors
    /// If it is said to be done and is not.
    pub(super) fn finish(&mut self) -> Result<(), Fault> {
        self.outcome = Some(match self.error {
            Some(errno) => Err(errno),
            None => {
                match &self.body {
                    Body::Read(buf) if self.covered.total != buf.len() => {
                        return Err(Misbehaviour::Short {
                            covered: self.covered.total as u64,
                            wanted: buf.len() as u64,
                        }
                        .into());
                    }
                    Body::Status(_, extents) if extents.is_empty() => {
                        return Err(Misbehaviour::Kind(ChunkKind::None).into());
                    }
                    _ => {}
                }
                Ok(())
            }
        });
        Ok(())
    }
}

/// The most pieces that bytes of a read may come in, out of order: a server that cuts smaller wastes our time.
const MOST_PIECES: usize = 1024;

/// Which bytes of a read have come. Nearly always they are one range, for which nothing is allocated.
#[derive(Debug, Default)]
struct Covered {
    /// The first that came, and what followed it in order.
    run: Range<usize>,
    /// Others, in order.
    others: Vec<Range<usize>>,
    total: usize,
}

impl Covered {
    /// Adds a range, which is not empty; `false` if some of it was covered already, or there are too many.
    fn add(&mut self, range: Range<usize>) -> bool {
        if range.start < self.run.end && self.run.start < range.end {
            return false;
        }
        let at = self
            .others
            .partition_point(|other| other.end <= range.start);
        let next = self.others.get(at);
        if next.is_some_and(|next| next.start < range.end) || self.others.len() >= MOST_PIECES {
            return false;
        }
        self.total += range.len();
        if self.run.is_empty() {
            self.run = range;
        } else if self.run.end == range.start {
            self.run.end = range.end;
        } else {
            self.others.insert(at, range);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_read_is_done_only_when_every_byte_has_come_once() {
        let mut buf = [9; 8];
        let mut call = Call::new(Command::Read, 100, 8, Body::Read(&mut buf));
        call.note(News::Bytes(104, vec![1; 2])).unwrap();
        call.note(News::Zeros(100, 4)).unwrap();
        for (offset, len) in [
            (99, 1),
            (100, 1),
            (103, 2),
            (105, 2),
            (107, 2),
            (108, 1),
            (u64::MAX, 1),
            (106, 0),
        ] {
            assert!(call.place(offset, len).is_err(), "{offset}+{len}");
        }
        assert!(call.finish().is_err());
        call.note(News::Bytes(106, vec![2; 2])).unwrap();
        call.finish().unwrap();
        assert_eq!(call.outcome, Some(Ok(())));
        drop(call);
        assert_eq!(buf, [0, 0, 0, 0, 1, 1, 2, 2]);
    }

    #[test]
    fn a_read_that_failed_need_not_be_complete_and_the_first_reason_counts() {
        let mut buf = [9; 8];
        let mut call = Call::new(Command::Read, 0, 8, Body::Read(&mut buf));
        call.note(News::Zeros(0, 4)).unwrap();
        call.note(News::Error(Errno::Io)).unwrap();
        call.note(News::Error(Errno::Perm)).unwrap();
        call.finish().unwrap();
        assert_eq!(call.outcome, Some(Err(Errno::Io)));
    }

    #[test]
    fn extents_of_another_context_or_twice_are_refused() {
        let mut extents = Vec::new();
        let status = |context| {
            News::Status(BlockStatus {
                context,
                extents: vec![Extent { len: 1, flags: 0 }],
            })
        };
        let mut call = Call::new(Command::BlockStatus, 0, 8, Body::Status(3, &mut extents));
        assert!(call.note(status(2)).is_err());
        assert!(call.finish().is_err());
        call.reset();
        call.note(status(3)).unwrap();
        assert!(call.note(status(3)).is_err());
        call.finish().unwrap();
    }

    proptest! {
        /// Against a set of single bytes, too simple to be wrong.
        #[test]
        fn ranges_are_covered_as_single_bytes_are(ranges in proptest::collection::vec((0_usize..64, 1_usize..16), 0..40)) {
            let mut covered = Covered::default();
            let mut bytes = std::collections::BTreeSet::new();
            for (start, len) in ranges {
                let free = (start..start + len).all(|byte| !bytes.contains(&byte));
                prop_assert_eq!(covered.add(start..start + len), free);
                if free {
                    bytes.extend(start..start + len);
                }
                prop_assert_eq!(covered.total, bytes.len());
            }
        }
    }
}
