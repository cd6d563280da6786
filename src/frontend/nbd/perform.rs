//! What requests are allowed to ask for, and what is done for them.

use std::ops::Range;

use super::answer::Agreed;
use super::export::{Context, Export, Refused};
use crate::chunk::{is_zeros, write_zeros};
use crate::nbd::{
    BlockStatus, Command, CommandFlags, Errno, Extent, Hole, Request, StatusFlags, limits,
};

/// The unit in which zeros are looked for among bytes that were read: what file systems and page caches keep apart.
const BLOCK: usize = 4 << 10;
/// What is read at once for somebody who only wants it nearer.
const CACHE_STEP: usize = 256 << 10;
/// How much is looked through at once for a block status: so many bytes have at most 32 Ki ranges, which take up 512 KiB.
const STATUS_STEP: u64 = 128 << 20;

impl Request {
    /// How many bytes follow the request.
    pub(super) const fn payload_len(&self, agreed: &Agreed) -> u64 {
        match self.command {
            // Without extended headers the flag has no meaning, and only a write has a payload.
            Command::Write => self.len,
            _ if agreed.extended && self.flags.contains(CommandFlags::PAYLOAD_LEN) => self.len,
            _ => 0,
        }
    }

    /// The bytes that it is about. To be called once it was [checked](check).
    pub(super) const fn range(&self) -> Range<u64> {
        self.offset..self.offset + self.len
    }
}

/// Whether `export` lets itself be asked so.
pub(super) fn check(export: &Export, agreed: &Agreed, request: &Request) -> Result<(), Refused> {
    let refuse = |errno, message: &str| Err(Refused::new(errno, message));
    let writes = match request.command {
        Command::Read | Command::Cache | Command::BlockStatus => false,
        Command::Write | Command::Trim | Command::WriteZeroes => true,
        Command::Flush if request.offset == 0 && request.len == 0 => {
            return flags(agreed, request);
        }
        Command::Flush => return refuse(Errno::Inval, "a flush has neither offset nor length"),
        Command::Disconnect => return Ok(()),
        Command::Unknown(command) => {
            return refuse(Errno::Inval, &format!("there is no command {command}"));
        }
    };
    flags(agreed, request)?;
    if writes && export.is_read_only() {
        return refuse(Errno::Perm, "the export is read-only");
    }
    let status_payload = request.command == Command::BlockStatus
        && request.flags.contains(CommandFlags::PAYLOAD_LEN);
    if status_payload {
        // Its length is that of the payload; what is asked about is checked when that has come.
        let most = 8 + 4 * u64::from(limits::QUERIES);
        return match request.len {
            8.. if request.len <= most => Ok(()),
            _ => refuse(Errno::Inval, "the payload has an impossible length"),
        };
    }
    if request.command == Command::BlockStatus {
        if agreed.contexts.is_empty() {
            return refuse(Errno::Inval, "no meta context was chosen in the handshake");
        }
        if request.len == 0 {
            return refuse(Errno::Inval, "nothing has no status");
        }
    }
    extent(export, request, writes)
}

fn extent(export: &Export, request: &Request, writes: bool) -> Result<(), Refused> {
    let refuse = |errno, message: String| Err(Refused::new(errno, message));
    let size = export.storage().len();
    if request
        .offset
        .checked_add(request.len)
        .is_none_or(|end| end > size)
    {
        let adds = matches!(request.command, Command::Write | Command::WriteZeroes) && writes;
        let errno = if adds { Errno::NoSpc } else { Errno::Inval };
        return refuse(errno, format!("the export ends at {size}"));
    }
    let sizes = export.block_sizes();
    let minimum = u64::from(sizes.minimum);
    if !request.offset.is_multiple_of(minimum) || !request.len.is_multiple_of(minimum) {
        return refuse(
            Errno::Inval,
            format!("offsets and lengths are multiples of {minimum}"),
        );
    }
    let carries = matches!(request.command, Command::Read | Command::Write);
    if carries && request.len > u64::from(sizes.maximum) {
        return refuse(
            Errno::Inval,
            format!("at most {} bytes at once", sizes.maximum),
        );
    }
    Ok(())
}

fn flags(agreed: &Agreed, request: &Request) -> Result<(), Refused> {
    use CommandFlags as Flags;
    // The specification lets it be set on anything, to be ignored where it means nothing.
    let allowed = Flags::FUA.with(match request.command {
        Command::Read if agreed.structured => Flags::DF,
        Command::Write if agreed.extended => Flags::PAYLOAD_LEN,
        Command::WriteZeroes => Flags::NO_HOLE.with(Flags::FAST_ZERO),
        Command::BlockStatus if agreed.extended => Flags::REQ_ONE.with(Flags::PAYLOAD_LEN),
        Command::BlockStatus => Flags::REQ_ONE,
        _ => Flags::NONE,
    });
    let lacks_payload = agreed.extended
        && request.command == Command::Write
        && !request.flags.contains(Flags::PAYLOAD_LEN);
    if request.flags.without(allowed) != Flags::NONE || lacks_payload {
        return Err(Refused::new(
            Errno::Inval,
            format!("the command does not have the flags {:#x}", request.flags.0),
        ));
    }
    Ok(())
}

/// Writes `bytes`, durably if the request wants that.
pub(super) fn write(export: &Export, request: &Request, bytes: &[u8]) -> Result<(), Refused> {
    export.storage().write_all_at(bytes, request.offset)?;
    settle(export, request)
}

fn settle(export: &Export, request: &Request) -> Result<(), Refused> {
    if request.flags.contains(CommandFlags::FUA) {
        export.storage().flush()?;
    }
    Ok(())
}

/// Does what needs neither bytes nor an answer of more than yes or no.
pub(super) fn act(export: &Export, request: &Request) -> Result<(), Refused> {
    let storage = export.storage();
    match request.command {
        Command::Flush => storage.flush()?,
        Command::Trim => {
            storage.zero(request.range())?;
            settle(export, request)?;
        }
        Command::WriteZeroes => {
            let stays = request.flags.contains(CommandFlags::NO_HOLE);
            let fast = !stays && export.zeroes_fast();
            if request.flags.contains(CommandFlags::FAST_ZERO) && !fast {
                return Err(Refused::new(
                    Errno::NotSup,
                    "zeros are not faster than other bytes",
                ));
            }
            if stays {
                write_zeros(storage, request.range())?;
            } else {
                storage.zero(request.range())?;
            }
            settle(export, request)?;
        }
        Command::Cache => bring_nearer(export, request)?,
        _ => {}
    }
    Ok(())
}

fn bring_nearer(export: &Export, request: &Request) -> Result<(), Refused> {
    let storage = export.storage();
    // It is advice; a client that gives it for more than it could read at once is not made to wait for all.
    let end = request.range().end;
    let end = end.min(request.offset.saturating_add(u64::from(limits::PAYLOAD)));
    let mut offset = request.offset;
    let mut scratch = Vec::new();
    while offset < end {
        let len = usize::try_from(end - offset).map_or(CACHE_STEP, |left| left.min(CACHE_STEP));
        if !storage.is_at_hand(offset..offset + len as u64) {
            scratch.resize(len, 0);
            storage.read_ahead_at(&mut scratch, offset)?;
        }
        offset += len as u64;
    }
    Ok(())
}

/// What the contexts say, in the order in which they were chosen; those of `only`, if there is one.
pub(super) fn statuses(
    export: &Export,
    agreed: &Agreed,
    request: &Request,
    only: Option<&[u32]>,
) -> Result<Vec<BlockStatus>, Refused> {
    if let Some(only) = only {
        extent(export, request, false)?;
        let known = |id: &u32| agreed.contexts.iter().any(|context| context.id() == *id);
        let twice = (1..only.len()).any(|at| only[..at].contains(&only[at]));
        if request.len == 0 || twice || !only.iter().all(known) {
            return Err(Refused::new(
                Errno::Inval,
                "the contexts of a question are among those chosen in the handshake, each once",
            ));
        }
    }
    let most = if request.flags.contains(CommandFlags::REQ_ONE) {
        1
    } else {
        limits::EXTENTS
    };
    let wanted = |context: &&Context| only.is_none_or(|only| only.contains(&context.id()));
    agreed
        .contexts
        .iter()
        .filter(wanted)
        .map(|context| {
            let extents = match context {
                Context::Allocation => {
                    let hole = StatusFlags::HOLE | StatusFlags::ZERO;
                    extents(request.range(), most, [0, hole], |within| {
                        Ok(export.storage().data_ranges(within)?)
                    })?
                }
                Context::Dirty => {
                    extents(request.range(), most, [StatusFlags::DIRTY, 0], |within| {
                        Ok(export
                            .marks()
                            .map_or_else(Vec::new, |marks| marks.marked(within)))
                    })?
                }
            };
            Ok(BlockStatus {
                context: context.id(),
                extents,
            })
        })
        .collect()
}

/// `range` as extents: what `find` names has the first flags, what is between has the second. Ends before the range does
/// if there would be more than `most`.
fn extents(
    range: Range<u64>,
    most: usize,
    [found, between]: [u64; 2],
    find: impl Fn(Range<u64>) -> Result<Vec<Range<u64>>, Refused>,
) -> Result<Vec<Extent>, Refused> {
    let mut extents = Extents {
        list: Vec::new(),
        most,
    };
    let mut at = range.start;
    let mut step = STATUS_STEP;
    'steps: while at < range.end {
        let end = range.end.min(at.saturating_add(step));
        let ranges = find(at..end)?;
        // Where there is little, more is looked through at once.
        if ranges.len() < 64 {
            step = step.saturating_mul(4);
        } else {
            step = STATUS_STEP;
        }
        for data in ranges {
            let data = data.start.max(at)..data.end.min(end);
            if data.is_empty() {
                continue;
            }
            if !extents.push(data.start - at, between)
                || !extents.push(data.end - data.start, found)
            {
                break 'steps;
            }
            at = data.end;
        }
        if !extents.push(end - at, between) {
            break;
        }
        at = end;
    }
    Ok(extents.list)
}

struct Extents {
    list: Vec<Extent>,
    most: usize,
}

impl Extents {
    /// Whether there was room.
    fn push(&mut self, len: u64, flags: u64) -> bool {
        if len == 0 {
            return true;
        }
        if let Some(last) = self.list.last_mut().filter(|last| last.flags == flags) {
            last.len += len;
            return true;
        }
        let room = self.list.len() < self.most;
        if room {
            self.list.push(Extent { len, flags });
        }
        room
    }
}

/// What a client gets of bytes that were read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Run {
    /// These, as they are.
    Data(Range<usize>),
    /// Zeros.
    Zero(Hole),
}

/// Tells zeros from other bytes, in blocks of the export; as runs, in order.
pub(super) fn runs(bytes: &[u8], offset: u64) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let into = usize::try_from((offset + at as u64) % BLOCK as u64).expect("less than a block");
        let end = bytes.len().min(at + BLOCK - into);
        let block = &bytes[at..end];
        let zero = is_zeros(block);
        let len = u32::try_from(block.len()).expect("at most a block");
        match runs.last_mut() {
            Some(Run::Data(last)) if !zero => last.end = end,
            Some(Run::Zero(hole)) if zero => hole.len += len,
            _ if zero => runs.push(Run::Zero(Hole {
                offset: offset + at as u64,
                len,
            })),
            _ => runs.push(Run::Data(at..end)),
        }
        at = end;
    }
    runs
}

/// Whether the bytes begin with a block of zeros or have one: cheap where they have none.
pub(super) fn has_zeros(bytes: &[u8], offset: u64) -> bool {
    let mut at = 0;
    while at < bytes.len() {
        let into = usize::try_from((offset + at as u64) % BLOCK as u64).expect("less than a block");
        let end = bytes.len().min(at + BLOCK - into);
        if is_zeros(&bytes[at..end]) {
            return true;
        }
        at = end;
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_told_from_other_bytes_in_blocks_of_the_export() {
        let hole = |offset, len| Run::Zero(Hole { offset, len });
        let mut bytes = vec![0; 3 * BLOCK];
        assert_eq!(runs(&bytes, 512), [hole(512, 12288)]);
        bytes[BLOCK] = 1;
        assert_eq!(
            runs(&bytes, 0),
            [hole(0, 4096), Run::Data(BLOCK..2 * BLOCK), hole(8192, 4096)]
        );
        // The byte is in the second block of the export, which the read has from its 512th byte on.
        assert_eq!(
            runs(&bytes, BLOCK as u64 - 512),
            [
                hole(3584, 512),
                Run::Data(512..BLOCK + 512),
                hole(8192, 7680)
            ]
        );
        assert!(has_zeros(&bytes, 0));
        assert!(!has_zeros(&[0, 1], 4095 - 1));
        assert!(has_zeros(&[0, 1], 4095));
        assert_eq!(runs(&[], 7), []);
    }

    #[test]
    fn extents_cover_a_range_and_no_more_than_were_asked_for() {
        let extent = |len, flags| Extent { len, flags };
        let find = |within: Range<u64>| {
            let all = [10..20, 20..30, 50..60];
            let cut = all
                .into_iter()
                .map(|range: Range<u64>| range.start.max(within.start)..range.end.min(within.end));
            Ok(cut.filter(|range| !range.is_empty()).collect())
        };
        let all = extents(0..100, 9, [1, 2], find).unwrap();
        assert_eq!(
            all,
            [
                extent(10, 2),
                extent(20, 1),
                extent(20, 2),
                extent(10, 1),
                extent(40, 2)
            ]
        );
        assert_eq!(extents(12..15, 9, [1, 2], find).unwrap(), [extent(3, 1)]);
        assert_eq!(extents(0..100, 1, [1, 2], find).unwrap(), [extent(10, 2)]);
        assert_eq!(extents(10..100, 1, [1, 2], find).unwrap(), [extent(20, 1)]);
        // Where nothing is, one extent tells all of a terabyte.
        let none = |_| Ok(Vec::new());
        assert_eq!(
            extents(0..1 << 40, 9, [1, 2], none).unwrap(),
            [extent(1 << 40, 2)]
        );
    }
}
