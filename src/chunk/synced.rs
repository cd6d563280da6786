//! Reading through: what is not here yet comes from the remote end, once.

mod plan;

use std::fmt::Debug;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::residency::{ChunkState, Claim, Residency, Writing};
use super::{ChunkRun, ChunkSize, Storage, check_range};
use plan::{Cut, clip_into, piece, piece_mut};

/// What a [`Synced`] tells whoever keeps it.
///
/// Called by the thread that reads, writes or fetches, which waits for it: it must not block.
pub trait Listener: Debug + Send + Sync {
    /// These chunks are here now, with bytes from the remote end or with new ones.
    fn arrived(&self, run: ChunkRun);

    /// A part of these chunks was read from the remote end and not kept: it would be well to fetch them.
    fn wanted(&self, run: ChunkRun);
}

/// Nobody listens.
impl Listener for () {
    fn arrived(&self, _: ChunkRun) {}
    fn wanted(&self, _: ChunkRun) {}
}

/// A local storage that fills from a remote one as it is read.
///
/// - A read of chunks that are here reads them here. Of others it reads just its own range from the remote end, in the caller's
///   thread, as few and large reads as possible; the chunks that it covers whole are here afterwards.
/// - A short read does not wait for a chunk that is being fetched with many others, but overtakes it.
/// - A write of whole chunks fetches nothing. A write of a part of a chunk fetches that chunk first. Writes go to the local storage alone.
///
/// A chunk is here once its bytes are written into the local storage, and no lock is held while bytes come: who reads or writes
/// other chunks never waits. An error goes to those who asked for these bytes. If the local storage has no room, bytes that were read are
/// returned all the same.
#[derive(Debug)]
pub struct Synced {
    remote: Arc<dyn Storage>,
    local: Arc<dyn Storage>,
    residency: Arc<Residency>,
    cut: Cut,
    patience: Duration,
    listener: Arc<dyn Listener>,
}

/// A read up to this long asks the remote end at once, even if its chunks are on their way already: it costs the link less than
/// half a millisecond at 1 Gbit/s. A longer one would fetch twice what a stream of reads is about to get anyway.
const OVERTAKES: u64 = 32 << 10;

/// Chunks here that lie between others that are not are read from the remote end with those, up to so many bytes: another read would cost a
/// round trip, which at 1 Gbit/s is as long as 125 KB take if it is a millisecond.
const BRIDGE: u64 = 128 << 10;

impl Synced {
    /// Reads through `local` from `remote`, nothing of which is here yet. `patience` is how long to wait for a chunk that somebody else
    /// fetches or writes.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] if `local` is shorter than `remote`.
    pub fn new(
        remote: Arc<dyn Storage>,
        local: Arc<dyn Storage>,
        chunk_size: ChunkSize,
        patience: Duration,
        listener: Arc<dyn Listener>,
    ) -> io::Result<Self> {
        let cut = Cut::new(chunk_size, remote.len());
        if local.len() < cut.len {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "the local storage has {} bytes and is to keep {}",
                    local.len(),
                    cut.len
                ),
            ));
        }
        Ok(Self {
            residency: Arc::new(Residency::new(cut.chunks())),
            remote,
            local,
            cut,
            patience,
            listener,
        })
    }

    /// Which chunks are here.
    #[must_use]
    pub fn residency(&self) -> &Arc<Residency> {
        &self.residency
    }

    /// What is written goes here.
    #[must_use]
    pub fn local(&self) -> &Arc<dyn Storage> {
        &self.local
    }

    /// What is not here comes from there.
    #[must_use]
    pub fn remote(&self) -> &Arc<dyn Storage> {
        &self.remote
    }

    /// The size of a chunk.
    #[must_use]
    pub fn chunk_size(&self) -> ChunkSize {
        self.cut.size
    }

    /// The bytes of a run of chunks; the last chunk of the region may be short.
    #[must_use]
    pub fn bytes_of(&self, run: ChunkRun) -> Range<u64> {
        self.cut.bytes_of(run)
    }

    /// The chunks that `range` touches.
    #[must_use]
    pub fn chunks_touched(&self, range: &Range<u64>) -> ChunkRun {
        self.cut.touched(range)
    }

    /// Fetches what was claimed, for nobody who waits, by one read through `buf`. Blocks as the remote end does.
    ///
    /// # Errors
    /// What the remote end says, or the local storage; the chunks are remote again then.
    pub fn fetch(&self, claim: Claim<'_>, buf: &mut Vec<u8>) -> io::Result<()> {
        let range = self.cut.bytes_of(claim.run());
        buf.resize(length(&range), 0);
        match self.remote.read_ahead_at(buf, range.start) {
            Ok(()) => self.install(claim.land(), buf, range.start),
            Err(error) => {
                claim.fail(&error);
                Err(error)
            }
        }
    }

    /// Makes chunks that were claimed here without reading them, because they hold nothing but zeros.
    ///
    /// # Errors
    /// What the local storage says; the chunks are remote again then.
    pub fn fetch_zeros(&self, claim: Claim<'_>) -> io::Result<()> {
        let writing = claim.land();
        for &run in writing.runs() {
            if let Err(error) = self.local.zero(self.cut.bytes_of(run)) {
                writing.fail(&error);
                return Err(error);
            }
        }
        self.arrived(writing);
        Ok(())
    }

    fn check(&self, offset: u64, count: u64) -> io::Result<Range<u64>> {
        check_range(self.cut.len, offset, count)?;
        Ok(offset..offset + count)
    }

    fn arrived(&self, writing: Writing<'_>) {
        for run in writing.done() {
            self.listener.arrived(run);
        }
    }

    /// Writes the chunks that are the holder's into the local storage, from `bytes`, which begin at `offset`.
    fn install(&self, writing: Writing<'_>, bytes: &[u8], offset: u64) -> io::Result<()> {
        for &run in writing.runs() {
            let range = self.cut.bytes_of(run);
            let written = self
                .local
                .write_all_at(piece(bytes, offset, &range), range.start);
            if let Err(error) = written {
                writing.fail(&error);
                return Err(error);
            }
        }
        self.arrived(writing);
        Ok(())
    }

    fn read(&self, buf: &mut [u8], offset: u64, from: Reading) -> io::Result<()> {
        let range = self.check(offset, buf.len() as u64)?;
        let run = self.cut.touched(&range);
        if self.residency.is_resident(run) {
            return self.local.read_exact_at(buf, offset);
        }
        let deadline = Instant::now() + self.patience;
        let overtakes = buf.len() as u64 <= OVERTAKES;
        let left = self.read_absent(buf, range, from, overtakes, deadline)?;
        if let Some(left) = left {
            // Others failed to bring it; this read learns why.
            let rest = piece_mut(buf, offset, &left);
            self.read_absent(rest, left, from, true, deadline)?;
        }
        Ok(())
    }

    /// Reads `range`, of which something is not here: at once what nobody brings, or everything if it `overtakes`; what others bring,
    /// when it comes. If it does not come, returns the rest, which is not read then.
    fn read_absent(
        &self,
        buf: &mut [u8],
        range: Range<u64>,
        from: Reading,
        overtakes: bool,
        deadline: Instant,
    ) -> io::Result<Option<Range<u64>>> {
        let run = self.cut.touched(&range);
        let states = self.cut.states(&self.residency, run);
        let mut busy = Vec::new();
        let mut here = Vec::new();
        let mut spans: Vec<ChunkRun> = Vec::new();
        for &(state, run) in &states {
            match state {
                ChunkState::Resident => here.push(run),
                ChunkState::Fetching | ChunkState::Writing if !overtakes => busy.push(run),
                _ => match spans.last_mut() {
                    Some(last) if self.cut.gap(*last, run) <= BRIDGE => {
                        *last = ChunkRun::new(last.start.0, run.end() - last.start.0);
                    }
                    _ => spans.push(run),
                },
            }
        }
        for span in spans {
            self.read_span(buf, &range, span, from)?;
        }
        // After the spans, which may have bridged them with older bytes.
        for run in here {
            let range_here = intersection(&self.cut.bytes_of(run), &range);
            let part = piece_mut(buf, range.start, &range_here);
            self.local.read_exact_at(part, range_here.start)?;
        }
        for run in busy {
            for chunk in run.range() {
                let chunk = ChunkRun::new(chunk, 1);
                let bytes = intersection(&self.cut.bytes_of(chunk), &range);
                match self.residency.settle(chunk.start, deadline)? {
                    ChunkState::Resident => {
                        let part = piece_mut(buf, range.start, &bytes);
                        self.local.read_exact_at(part, bytes.start)?;
                    }
                    _ => return Ok(Some(bytes.start..range.end)),
                }
            }
        }
        Ok(None)
    }

    /// Reads those bytes of `range` from the remote end that lie in `span`, and keeps the chunks that are whole.
    fn read_span(
        &self,
        buf: &mut [u8],
        range: &Range<u64>,
        span: ChunkRun,
        from: Reading,
    ) -> io::Result<()> {
        let bytes = intersection(&self.cut.bytes_of(span), range);
        let part = piece_mut(buf, range.start, &bytes);
        let whole = self.cut.covered(&bytes);
        // One run, but where others fetch or have chunks in between.
        let mut claims = Vec::new();
        let mut left = whole;
        while let Some(claim) = self.residency.claim(left, u64::MAX) {
            let end = claim.run().end();
            claims.push(claim);
            left = ChunkRun::new(end, whole.end() - end);
        }
        let read = match from {
            Reading::Urgent => self.remote.read_exact_at(part, bytes.start),
            Reading::Ahead => self.remote.read_ahead_at(part, bytes.start),
        };
        if let Err(error) = read {
            for claim in claims {
                claim.fail(&error);
            }
            return Err(error);
        }
        for claim in claims {
            // The reader has what it asked for; that there is no room to keep it is for the next writer to learn.
            let _ = self.install(claim.land(), part, bytes.start);
        }
        for edge in self.cut.edges(span, whole) {
            self.listener.wanted(edge);
        }
        Ok(())
    }

    /// Makes a chunk that is going to be written in part, or two that follow each other, wholly here.
    fn bring(&self, run: ChunkRun, deadline: Instant) -> io::Result<()> {
        let mut buf = Vec::new();
        // More than once only if another was writing these chunks and failed.
        while !self.residency.is_resident(run) {
            if !buf.is_empty() && Instant::now() >= deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let range = self.cut.bytes_of(run);
            // Also if others fetch it: they may be a long time about it.
            buf.resize(length(&range), 0);
            self.remote.read_exact_at(&mut buf, range.start)?;
            self.install(self.residency.fill(run), &buf, range.start)?;
            for chunk in run.range() {
                self.residency
                    .settle(ChunkRun::new(chunk, 1).start, deadline)?;
            }
        }
        Ok(())
    }

    /// Changes `range` by `change`, which writes it into the local storage.
    fn change(
        &self,
        range: &Range<u64>,
        change: impl FnOnce(&dyn Storage) -> io::Result<()>,
    ) -> io::Result<()> {
        let run = self.cut.touched(range);
        if self.residency.is_resident(run) {
            return change(&*self.local);
        }
        let deadline = Instant::now() + self.patience;
        let whole = self.cut.covered(range);
        for edge in self.cut.edges(run, whole) {
            self.bring(edge, deadline)?;
        }
        let writing = self.residency.overwrite(whole, deadline)?;
        match change(&*self.local) {
            Ok(()) => {
                self.arrived(writing);
                Ok(())
            }
            Err(error) => {
                writing.fail(&error);
                Err(error)
            }
        }
    }
}

/// Whether somebody waits for what is read.
#[derive(Debug, Clone, Copy)]
enum Reading {
    Urgent,
    Ahead,
}

impl Storage for Synced {
    fn len(&self) -> u64 {
        self.cut.len
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.read(buf, offset, Reading::Urgent)
    }

    fn read_ahead_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.read(buf, offset, Reading::Ahead)
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let range = self.check(offset, buf.len() as u64)?;
        self.change(&range, |local| local.write_all_at(buf, offset))
    }

    fn zero(&self, range: Range<u64>) -> io::Result<()> {
        let count = range
            .end
            .checked_sub(range.start)
            .ok_or(io::ErrorKind::InvalidInput)?;
        self.check(range.start, count)?;
        self.change(&range, |local| local.zero(range.clone()))
    }

    /// Makes durable what is here; nothing of it goes to the remote end.
    fn flush(&self) -> io::Result<()> {
        self.local.flush()
    }

    /// Asks the remote end once if not all of the range is here.
    fn data_ranges(&self, within: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let within = within.start.min(self.cut.len)..within.end.min(self.cut.len);
        if within.is_empty() {
            return Ok(Vec::new());
        }
        let run = self.cut.touched(&within);
        let states = self.cut.states(&self.residency, run);
        let here = |state| state == ChunkState::Resident;
        let local = match states.iter().any(|&(state, _)| here(state)) {
            true => self.local.data_ranges(within.clone())?,
            false => Vec::new(),
        };
        let remote = match states.iter().all(|&(state, _)| here(state)) {
            true => Vec::new(),
            false => self.remote.data_ranges(within.clone())?,
        };
        let mut ranges = Vec::new();
        for (state, run) in states {
            let bytes = intersection(&self.cut.bytes_of(run), &within);
            clip_into(
                &mut ranges,
                if here(state) { &local } else { &remote },
                &bytes,
            );
        }
        Ok(ranges)
    }

    fn is_at_hand(&self, range: Range<u64>) -> bool {
        range.end <= self.cut.len
            && range.start <= range.end
            && self.residency.is_resident(self.cut.touched(&range))
            && self.local.is_at_hand(range)
    }
}

fn length(range: &Range<u64>) -> usize {
    usize::try_from(range.end - range.start).expect("what is read at once fits the memory")
}

fn intersection(a: &Range<u64>, b: &Range<u64>) -> Range<u64> {
    let start = a.start.max(b.start);
    start..a.end.min(b.end).max(start)
}

#[cfg(not(loom))]
#[cfg(test)]
mod tests;
