//! Reads and writes of any range as requests that the server takes.

use std::io;
use std::ops::Range;
use std::thread;
use std::time::Instant;

use super::call::{Body, Call};
use super::remote::{CarriedOut, Path, Remote};
use crate::chunk::Storage;
use crate::nbd::{Command, CommandFlags, Errno, Extent, StatusFlags, TransmissionFlags};

/// Reads and writes up to this size go over the urgent connection: so few bytes hold up nobody who comes after them, and they are not held up
/// themselves by those that are read ahead.
const URGENT: usize = 64 << 10;

/// How large one request of a large read or write is. Large enough for its header and its system calls not to count, small enough for several
/// threads of a server to have their share of one read.
const PIECE: u32 = 256 << 10;

/// From twice this size on, a read or write is spread over several connections, each with its own thread for the time; smaller ones would
/// spend more on the threads than they gain.
const SPREAD: usize = 4 << 20;

/// How much is zeroed by one request, and by one batch of them: a server that has to write the zeros takes its time, and the deadline is that of a
/// request.
const ZERO_PIECE: u32 = 128 << 20;
const ZERO_BATCH: u64 = 4 << 30;

/// How much is zeroed by one batch of writes, where the server has no better way.
const WRITTEN_ZEROS: u64 = 64 << 20;

/// The most bytes of which the status is asked for at once: the longest length of 32 bits that keeps to all block sizes.
const STATUS: u64 = 2 << 30;

/// Zeros to be written.
static ZEROS: [u8; PIECE as usize] = [0; PIECE as usize];

impl Remote {
    /// The size of one request of many.
    fn piece(&self) -> usize {
        let minimum = self.blocks.minimum;
        let piece = PIECE.min(self.blocks.maximum);
        (piece - piece % minimum) as usize
    }

    fn down(&self, offset: u64) -> u64 {
        offset - offset % u64::from(self.blocks.minimum)
    }

    /// The end of the block that `offset` is in, or of the export, if that is no multiple of the block.
    fn up(&self, offset: u64) -> u64 {
        offset
            .next_multiple_of(u64::from(self.blocks.minimum))
            .min(self.agreed.size)
    }

    /// `range` and what belongs to its first and its last block.
    fn blocks_of(&self, range: &Range<u64>) -> Range<u64> {
        self.down(range.start)..self.up(range.end)
    }

    fn read(&self, buf: &mut [u8], offset: u64, path: Path) -> io::Result<()> {
        self.check(offset, buf.len() as u64)?;
        if buf.is_empty() {
            return Ok(());
        }
        if self.blocks.minimum > 1 {
            return self.read_blocks(buf, offset, path);
        }
        if buf.len() <= self.piece().min(URGENT) {
            return self.one(path, read_call(buf, offset)).map(drop);
        }
        let ways = self.ways(buf.len(), path);
        if ways <= 1 {
            return self.read_pieces(buf, offset, path, self.options.window);
        }
        let share = buf.len().div_ceil(ways).next_multiple_of(self.piece());
        let window = self.options.window / ways;
        let parts = buf.chunks_mut(share).zip((offset..).step_by(share));
        thread::scope(|scope| {
            let parts: Vec<_> = parts
                .map(|(part, offset)| {
                    scope.spawn(move || self.read_pieces(part, offset, path, window))
                })
                .collect();
            join_all(parts).map(drop)
        })
    }

    /// On how many connections something of this size is worth to be spread.
    fn ways(&self, len: usize, path: Path) -> usize {
        match path {
            Path::Bulk => (len / SPREAD).min(self.lanes.len() - 1),
            _ => 1,
        }
    }

    fn one(&self, path: Path, call: Call<'_>) -> io::Result<CarriedOut> {
        let calls = &mut [call];
        let done = self.carry_out(path, usize::MAX, calls)?;
        result_of(calls)?;
        Ok(done)
    }

    fn read_pieces(
        &self,
        buf: &mut [u8],
        offset: u64,
        path: Path,
        window: usize,
    ) -> io::Result<()> {
        let piece = self.piece();
        let mut calls: Vec<Call<'_>> = buf
            .chunks_mut(piece)
            .zip((offset..).step_by(piece))
            .map(|(piece, offset)| read_call(piece, offset))
            .collect();
        self.carry_out(path, window, &mut calls)?;
        result_of(&calls)
    }

    /// Reads where only whole blocks can be read: the first and the last one beside the buffer, if they are wanted in part.
    fn read_blocks(&self, buf: &mut [u8], offset: u64, path: Path) -> io::Result<()> {
        let range = offset..offset + buf.len() as u64;
        let all = self.blocks_of(&range);
        let (head, middle, tail) = split(&range, &all, u64::from(self.blocks.minimum));
        let mut first = vec![0; len(&head)];
        let mut last = vec![0; len(&tail)];
        let (inside_head, rest) = buf.split_at_mut(overlap(&head, &range));
        let (inside, inside_tail) = rest.split_at_mut(len(&middle));
        let piece = self.piece();
        let mut calls = Vec::with_capacity(len(&middle) / piece + 3);
        if !first.is_empty() {
            calls.push(read_call(&mut first, head.start));
        }
        calls.extend(
            inside
                .chunks_mut(piece)
                .zip((middle.start..).step_by(piece))
                .map(|(piece, offset)| read_call(piece, offset)),
        );
        if !last.is_empty() {
            calls.push(read_call(&mut last, tail.start));
        }
        self.carry_out(path, self.options.window, &mut calls)?;
        result_of(&calls)?;
        drop(calls);
        if !first.is_empty() {
            let from = at(range.start - head.start);
            inside_head.copy_from_slice(&first[from..from + inside_head.len()]);
        }
        inside_tail.copy_from_slice(&last[..inside_tail.len()]);
        Ok(())
    }

    fn write(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.check_writable()?;
        self.check(offset, buf.len() as u64)?;
        if buf.is_empty() {
            return Ok(());
        }
        let path = if buf.len() <= URGENT {
            Path::Urgent
        } else {
            Path::Bulk
        };
        let range = offset..offset + buf.len() as u64;
        let all = self.blocks_of(&range);
        let deadline = Instant::now() + self.options.deadline;
        let _turn = self.order.wait(all.clone(), deadline)?;
        let (head, middle, tail) = split(&range, &all, u64::from(self.blocks.minimum));
        // Blocks that are written in part are read first, both at once.
        let mut first = vec![0; len(&head)];
        let mut last = vec![0; len(&tail)];
        let mut calls = Vec::new();
        if !first.is_empty() {
            calls.push(read_call(&mut first, head.start));
        }
        if !last.is_empty() {
            calls.push(read_call(&mut last, tail.start));
        }
        if !calls.is_empty() {
            self.carry_out(path, usize::MAX, &mut calls)?;
            result_of(&calls)?;
        }
        drop(calls);
        let (for_head, rest) = buf.split_at(overlap(&head, &range));
        let (inside, for_tail) = rest.split_at(len(&middle));
        if !first.is_empty() {
            let from = at(range.start - head.start);
            first[from..from + for_head.len()].copy_from_slice(for_head);
        }
        last[..for_tail.len()].copy_from_slice(for_tail);

        let connections = self.write_parts(
            &[
                (&first, head.start),
                (inside, middle.start),
                (&last, tail.start),
            ],
            path,
        )?;
        self.wrote(range, connections);
        Ok(())
    }

    /// Returns how many connections there had been before the first answer, as all that write do.
    fn write_parts(&self, parts: &[(&[u8], u64)], path: Path) -> io::Result<u64> {
        let piece = self.piece();
        let ways = parts
            .iter()
            .map(|(bytes, _)| self.ways(bytes.len(), path))
            .max()
            .unwrap_or(1);
        let flags = self.write_flags();
        let mut calls = parts.iter().flat_map(|&(bytes, offset)| {
            bytes
                .chunks(piece)
                .zip((offset..).step_by(piece))
                .map(move |(bytes, offset)| write_call(bytes, offset, flags))
        });
        if ways <= 1 {
            // The common case, which allocates nothing.
            if let (Some(call), None) = (calls.next(), calls.next()) {
                return Ok(self.one(path, call)?.connections);
            }
        }
        let mut calls: Vec<Call<'_>> = parts
            .iter()
            .flat_map(|&(bytes, offset)| {
                bytes
                    .chunks(piece)
                    .zip((offset..).step_by(piece))
                    .map(move |(bytes, offset)| write_call(bytes, offset, flags))
            })
            .collect();
        self.spread(&mut calls, ways.max(1), path)
    }

    /// Has requests that write carried out over so many connections.
    fn spread(&self, calls: &mut [Call<'_>], ways: usize, path: Path) -> io::Result<u64> {
        let window = self.options.window / ways;
        let share = calls.len().div_ceil(ways).max(1);
        let carry_out = |calls: &mut [Call<'_>]| {
            let done = self.carry_out(path, window, calls)?;
            result_of(calls)?;
            Ok(done.connections)
        };
        if ways == 1 {
            return carry_out(calls);
        }
        thread::scope(|scope| {
            let parts: Vec<_> = calls
                .chunks_mut(share)
                .map(|part| scope.spawn(move || carry_out(part)))
                .collect();
            let connections = join_all(parts)?;
            Ok(connections.into_iter().min().unwrap_or(0))
        })
    }

    /// Where a server knows no flush, every write is to be durable at once.
    fn write_flags(&self) -> CommandFlags {
        CommandFlags::NONE.with_if(self.writes_through(), CommandFlags::FUA)
    }

    fn writes_through(&self) -> bool {
        !self.has(TransmissionFlags::SEND_FLUSH) && self.has(TransmissionFlags::SEND_FUA)
    }

    fn wrote(&self, range: Range<u64>, connections: u64) {
        if !self.writes_through() {
            self.doubt.wrote(range, connections);
        }
    }

    /// Zeroes whole blocks by the command for it.
    fn zero_blocks(&self, range: Range<u64>) -> io::Result<u64> {
        let flags = self.write_flags();
        let piece = u64::from(ZERO_PIECE);
        let mut calls: Vec<Call<'_>> = steps(range, piece)
            .map(|piece| {
                let len = u32::try_from(piece.end - piece.start).unwrap_or(ZERO_PIECE);
                let mut call = Call::new(Command::WriteZeroes, piece.start, len, Body::Nothing);
                call.flags = flags;
                call
            })
            .collect();
        let done = self.carry_out(Path::Bulk, usize::MAX, &mut calls)?;
        result_of(&calls)?;
        Ok(done.connections)
    }

    /// Zeroes whole blocks by writing zeros.
    fn write_zeros(&self, range: Range<u64>) -> io::Result<u64> {
        let flags = self.write_flags();
        let mut connections = u64::MAX;
        for batch in steps(range, WRITTEN_ZEROS) {
            let mut calls: Vec<Call<'_>> = steps(batch, self.piece() as u64)
                .map(|piece| write_call(&ZEROS[..len(&piece)], piece.start, flags))
                .collect();
            connections = connections.min(self.spread(&mut calls, 1, Path::Bulk)?);
        }
        Ok(connections)
    }

    /// The ranges of `within`, which are whole blocks, that are not known to be zeros.
    fn ask_for_data(&self, context: u32, within: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        let mut next = within.start;
        while next < within.end {
            let len = u32::try_from((within.end - next).min(STATUS)).unwrap_or(PIECE);
            let mut extents: Vec<Extent> = Vec::new();
            let body = Body::Status(context, &mut extents);
            self.one(
                Path::Urgent,
                Call::new(Command::BlockStatus, next, len, body),
            )?;
            for extent in extents {
                let end = next.saturating_add(extent.len).min(within.end);
                if extent.flags & StatusFlags::ZERO == 0 && end > next {
                    match ranges.last_mut() {
                        Some(last) if last.end == next => last.end = end,
                        _ => ranges.push(next..end),
                    }
                }
                next = end;
            }
        }
        Ok(ranges)
    }
}

impl Storage for Remote {
    fn len(&self) -> u64 {
        self.agreed.size
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let path = if buf.len() <= URGENT {
            Path::Urgent
        } else {
            Path::Bulk
        };
        self.read(buf, offset, path)
    }

    fn read_ahead_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.read(buf, offset, Path::Bulk)
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.write(buf, offset)
    }

    fn zero(&self, range: Range<u64>) -> io::Result<()> {
        self.check_writable()?;
        let len = range.end.checked_sub(range.start).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidInput,
                "the range ends before it starts",
            )
        })?;
        self.check(range.start, len)?;
        // Blocks that are zeroed in part are written.
        let whole = self.up(range.start)..match range.end {
            end if end == self.agreed.size => end,
            end => self.down(end),
        };
        if whole.is_empty() {
            return self.write(&ZEROS[..at(len).min(ZEROS.len())], range.start);
        }
        self.write(&ZEROS[..at(whole.start - range.start)], range.start)?;
        self.write(&ZEROS[..at(range.end - whole.end)], whole.end)?;

        let deadline = Instant::now() + self.options.deadline;
        let _turn = self.order.wait(whole.clone(), deadline)?;
        let mut by_command = self.has(TransmissionFlags::SEND_WRITE_ZEROES);
        let mut connections = u64::MAX;
        for batch in steps(whole.clone(), ZERO_BATCH) {
            if by_command {
                match self.zero_blocks(batch.clone()) {
                    // What a server offers, the file system beneath it need not have.
                    Err(error) if is_unsupported(&error) => by_command = false,
                    done => {
                        connections = connections.min(done?);
                        continue;
                    }
                }
            }
            connections = connections.min(self.write_zeros(batch)?);
        }
        self.wrote(whole, connections);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        let Some(begun) = self.doubt.begin_flush() else {
            return Ok(());
        };
        if !self.has(TransmissionFlags::SEND_FLUSH) {
            if self.options.assume_durable {
                return self
                    .doubt
                    .flushed(begun, 0, self.agreed.size)
                    .map_err(io::Error::other);
            }
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the server has no way to tell when what was written is durable",
            ));
        }
        let calls = &mut [Call::new(Command::Flush, 0, 0, Body::Nothing)];
        let done = self.carry_out(Path::Oldest, usize::MAX, calls)?;
        match result_of(calls) {
            Ok(()) => self
                .doubt
                .flushed(begun, done.born, self.agreed.size)
                .map_err(io::Error::other),
            Err(error) => {
                let doubtful = self.doubt.failed(begun, self.agreed.size);
                Err(io::Error::new(error.kind(), doubtful))
            }
        }
    }

    fn data_ranges(&self, within: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let within = within.start..within.end.min(self.agreed.size);
        if within.is_empty() {
            return Ok(Vec::new());
        }
        let Some(context) = self.agreed.allocation else {
            return Ok(vec![within]);
        };
        let found = self.ask_for_data(context, self.blocks_of(&within))?;
        Ok(found
            .into_iter()
            .map(|range| range.start.max(within.start)..range.end.min(within.end))
            .filter(|range| !range.is_empty())
            .collect())
    }
}

fn read_call(buf: &mut [u8], offset: u64) -> Call<'_> {
    let len = u32::try_from(buf.len()).expect("a piece is at most PIECE bytes");
    Call::new(Command::Read, offset, len, Body::Read(buf))
}

fn write_call(buf: &[u8], offset: u64, flags: CommandFlags) -> Call<'_> {
    let len = u32::try_from(buf.len()).expect("a piece is at most PIECE bytes");
    let mut call = Call::new(Command::Write, offset, len, Body::Write(buf));
    call.flags = flags;
    call
}

fn result_of(calls: &[Call<'_>]) -> io::Result<()> {
    for call in calls {
        if let Some(Err(errno)) = call.outcome {
            return Err(errno.into());
        }
    }
    Ok(())
}

fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        error
            .get_ref()
            .and_then(|error| error.downcast_ref::<Errno>()),
        Some(Errno::NotSup | Errno::Inval)
    )
}

/// What all threads returned, or the first error; none is left running.
fn join_all<T>(threads: Vec<thread::ScopedJoinHandle<'_, io::Result<T>>>) -> io::Result<Vec<T>> {
    let joined: Vec<_> = threads
        .into_iter()
        .map(|thread| {
            thread
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("a thread has panicked")))
        })
        .collect();
    joined.into_iter().collect()
}

/// `range` in steps of `step`.
fn steps(range: Range<u64>, step: u64) -> impl Iterator<Item = Range<u64>> {
    let end = range.end;
    (range.start..end)
        .step_by(usize::try_from(step).unwrap_or(usize::MAX))
        .map(move |start| start..end.min(start.saturating_add(step)))
}

/// The first block if `range` begins inside of it, the whole blocks, and the last block if `range` ends inside of it. `all` are
/// the blocks that it touches. A range that begins and ends inside of one block has only a first.
fn split(range: &Range<u64>, all: &Range<u64>, block: u64) -> (Range<u64>, Range<u64>, Range<u64>) {
    let head_end = if range.start == all.start {
        all.start
    } else {
        (all.start + block).min(all.end)
    };
    let tail_start = if range.end == all.end {
        all.end
    } else {
        (range.end - range.end % block).max(head_end)
    };
    (
        all.start..head_end,
        head_end..tail_start,
        tail_start..all.end,
    )
}

/// How many bytes of `range` are in `head`.
fn overlap(head: &Range<u64>, range: &Range<u64>) -> usize {
    at(head.end.min(range.end).saturating_sub(range.start))
}

fn len(range: &Range<u64>) -> usize {
    at(range.end - range.start)
}

/// A distance within a buffer.
fn at(distance: u64) -> usize {
    usize::try_from(distance).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_range_is_split_at_blocks(start in 0_u64..5000, len in 1_u64..5000, size in 0_u64..600, block in prop_oneof![Just(1_u64), Just(512), Just(4096)]) {
            let range = start..start + len;
            let size = range.end + size;
            let all = start - start % block..range.end.next_multiple_of(block).min(size);
            let (head, middle, tail) = split(&range, &all, block);
            // They follow each other, and together are all.
            prop_assert_eq!((head.start, head.end, middle.end, tail.end), (all.start, middle.start, tail.start, all.end));
            // The middle is whole blocks that are wanted whole, up to the end of the export.
            if !middle.is_empty() {
                prop_assert!(range.start <= middle.start && middle.end <= range.end);
                prop_assert!(middle.start % block == 0 && (middle.end % block == 0 || middle.end == size));
            }
            // The others are one block each, and only there if they are wanted in part.
            for part in [head, tail] {
                if !part.is_empty() {
                    prop_assert!(part.end - part.start <= block && part.start % block == 0);
                    prop_assert!(part.start < range.start || part.end > range.end);
                }
            }
        }
    }
}
