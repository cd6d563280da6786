//! Which chunks are here, which are asked for, and what becomes of those that come.

use alloc::collections::VecDeque;
use alloc::vec;
use alloc::vec::Vec;

use crate::bitmap::ChunkBitmap;
use crate::chunk::{ChunkRun, Layout};
use crate::error::ProtocolError;
use crate::message::{Chunks, Content};

/// What to do with a frame of chunks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Admission {
    /// Receive the payload; install the parts that say so.
    Install {
        /// The frame in pieces, in the order of the payload.
        parts: Vec<Part>,
        /// Nobody else looks at the memory yet: the payload may be received straight into it. Otherwise a chunk is
        /// installed whole, and a resident page is left as it is.
        direct: bool,
    },
    /// Its round has not begun here, or what is stale has not been made absent: leave the payload unread, and ask
    /// again when a message was handled or an event was polled, or after a moment.
    Wait,
    /// It was seen before, or the session is over: read the payload and forget it.
    Ignore,
}

/// A piece of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// The chunks.
    pub run: ChunkRun,
    /// What they hold.
    pub content: Content,
    /// Whether they are wanted; if not, their bytes are skipped.
    pub install: bool,
}

/// What a fault leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The chunk is fetched now.
    Requested,
    /// The chunk is on its way.
    Awaited,
    /// The chunk is here: a page of it that is absent is zero.
    Resident,
    /// The session is over and the chunk will not come over it.
    Lost,
}

/// The state of every chunk: two bits, and a digest where copies are compared.
#[derive(Debug)]
pub(super) struct Residency {
    remote: ChunkBitmap,
    /// Remote chunks that somebody waits for; one stays here until it is installed in its newest version.
    requested: ChunkBitmap,
    /// Requested chunks whose fetch has not left yet, so that none is queued twice.
    queued: ChunkBitmap,
    queue: VecDeque<u64>,
    digests: Vec<u64>,
    lanes: Vec<Lane>,
    /// No chunk below this one is remote; only ever used once nothing becomes remote any more.
    lowest: u64,
}

#[derive(Debug, Clone, Default)]
struct Lane {
    last: u64,
    credited: u64,
    /// More frames wait on the lane, so that its credit can wait for theirs.
    deferred: bool,
    /// The frame that is being received and installed, outside of this machine and at the same time as it goes on.
    receiving: Option<Receiving>,
}

#[derive(Debug, Clone)]
struct Receiving {
    /// What is being installed of it.
    runs: Vec<ChunkRun>,
    /// What of that a dirty set has named meanwhile: those bytes are stale wherever they are now.
    overtaken: Vec<ChunkRun>,
}

/// So few frames that what they hold is a small part of any window.
const MOST_DEFERRED: u64 = 4;

/// Checks what the fields of a frame say against the chunk space and the payload.
pub(super) fn check(layout: &Layout, chunks: &Chunks, payload: u64) -> Result<(), ProtocolError> {
    let mut bytes = 0;
    let mut covered = 0_u64;
    let mut data = 0_u64;
    for run in &chunks.runs {
        let end = run.run.start.0.checked_add(run.run.count);
        if run.run.count == 0 || end.is_none_or(|end| end > layout.chunks()) {
            return Err(ProtocolError::Violation {
                reason: "it sends chunks that do not exist",
            });
        }
        // Each addend is within the space, and a frame's runs are limited.
        covered += run.run.count;
        if run.content == Content::Data {
            data += run.run.count;
            bytes += layout.bytes_in(run.run);
        }
    }
    // So what a frame costs to sort is bounded by the memory that is moved, however often it names a chunk.
    if covered > layout.chunks() {
        return Err(ProtocolError::Violation {
            reason: "it sends a chunk twice in a frame",
        });
    }
    if bytes == payload && data == chunks.digests.len() as u64 {
        Ok(())
    } else {
        Err(ProtocolError::Violation {
            reason: "a payload is not as long as its chunks",
        })
    }
}

/// Whether everything that a frame says is kept was offered and is still as it was.
pub(super) fn may_keep(chunks: &Chunks, offered: Option<&ChunkBitmap>) -> bool {
    let mut kept = chunks
        .runs
        .iter()
        .filter(|run| run.content == Content::Kept);
    kept.all(|run| offered.is_some_and(|offered| offered.runs_within(run.run).eq([run.run])))
}

impl Residency {
    pub(super) fn new(chunks: u64, bulk_lanes: u8, digests: bool) -> Self {
        let kept = if digests { chunks } else { 0 };
        Self {
            remote: ChunkBitmap::full(chunks),
            requested: ChunkBitmap::empty(chunks),
            queued: ChunkBitmap::empty(chunks),
            queue: VecDeque::new(),
            digests: vec![0; usize::try_from(kept).expect("limited by MAX_CHUNKS")],
            lanes: vec![Lane::default(); usize::from(bulk_lanes) + 1],
            lowest: 0,
        }
    }

    pub(super) fn chunks(&self) -> u64 {
        self.remote.chunks()
    }

    pub(super) fn remote(&self) -> &ChunkBitmap {
        &self.remote
    }

    pub(super) fn missing(&self) -> u64 {
        self.remote.count()
    }

    /// Whether every chunk is here. To be asked only once nothing becomes remote any more.
    pub(super) fn is_complete(&mut self) -> bool {
        match self.remote.run_from(self.lowest, 1) {
            Some(run) => {
                self.lowest = run.start.0;
                false
            }
            None => true,
        }
    }

    /// A dirty set names these chunks.
    ///
    /// Who waits for one of them goes on waiting: the answer that is on its way is too old.
    pub(super) fn invalidate(&mut self, set: &ChunkBitmap) {
        self.remote.union_with(set);
        for receiving in self
            .lanes
            .iter_mut()
            .filter_map(|lane| lane.receiving.as_mut())
        {
            for &run in &receiving.runs {
                receiving.overtaken.extend(set.runs_within(run));
            }
        }
        if !self.digests.is_empty() {
            for run in set.runs() {
                self.digests_mut(run).fill(0);
            }
        }
    }

    /// Whether this is the lane's next frame; `false` if it was seen before.
    pub(super) fn is_next(&self, lane: u8, sequence: u64) -> Result<bool, ProtocolError> {
        let lane = self
            .lanes
            .get(usize::from(lane))
            .ok_or(ProtocolError::Violation {
                reason: "it uses a lane that was not agreed on",
            })?;
        let next = lane.last.saturating_add(1);
        if sequence > next {
            return Err(ProtocolError::Violation {
                reason: "a frame is missing on a lane",
            });
        }
        Ok(sequence == next && sequence > lane.last)
    }

    /// The frame that was sorted into `parts` is received and installed from now on.
    pub(super) fn receive(&mut self, lane: u8, parts: &[Part]) {
        if let Some(lane) = self.lanes.get_mut(usize::from(lane)) {
            let wanted = parts.iter().filter(|part| part.install);
            lane.receiving = Some(Receiving {
                runs: wanted.map(|part| part.run).collect(),
                overtaken: Vec::new(),
            });
        }
    }

    /// Whether a bulk frame is being received.
    pub(super) fn is_receiving_bulk(&self) -> bool {
        self.lanes[1..].iter().any(|lane| lane.receiving.is_some())
    }

    /// Whether stale bytes are being installed, of a frame that a dirty set has overtaken.
    pub(super) fn is_overtaken(&self) -> bool {
        self.lanes
            .iter()
            .filter_map(|lane| lane.receiving.as_ref())
            .any(|receiving| !receiving.overtaken.is_empty())
    }

    /// Cuts the runs of a frame into pieces that are wanted and pieces that are not.
    pub(super) fn sort(&self, chunks: &Chunks, stale: bool) -> Vec<Part> {
        let mut parts = Vec::with_capacity(chunks.runs.len());
        for run in &chunks.runs {
            let content = run.content;
            if stale {
                parts.push(Part {
                    run: run.run,
                    content,
                    install: false,
                });
                continue;
            }
            let part = |start: u64, end: u64, install| Part {
                run: ChunkRun::new(start, end - start),
                content,
                install,
            };
            let mut next = run.run.start.0;
            for wanted in self.remote.runs_within(run.run) {
                if wanted.start.0 > next {
                    parts.push(part(next, wanted.start.0, false));
                }
                next = wanted.end();
                parts.push(part(wanted.start.0, next, true));
            }
            if next < run.run.end() {
                parts.push(part(next, run.run.end(), false));
            }
        }
        parts
    }

    /// The bytes of `run` came too old: who waits for one of its chunks has to ask again.
    pub(super) fn ask_again(&mut self, run: ChunkRun) {
        for waiting in self.requested.runs_within(run) {
            for chunk in waiting.range() {
                if self.queued.insert(chunk) {
                    self.queue.push_back(chunk);
                }
            }
        }
    }

    /// The wanted parts of a frame are in place. Returns the chunks of it that a dirty set has named since it was
    /// admitted: they are not here, whatever the memory holds.
    pub(super) fn install(
        &mut self,
        lane: u8,
        chunks: &Chunks,
        parts: &[Part],
    ) -> Option<ChunkBitmap> {
        let receiving = self
            .lanes
            .get_mut(usize::from(lane))
            .and_then(|lane| lane.receiving.take());
        let overtaken = receiving.map_or_else(Vec::new, |receiving| receiving.overtaken);
        let waiting: Vec<_> = overtaken
            .iter()
            .flat_map(|&run| self.requested.runs_within(run))
            .collect();
        let mut digests = chunks.digests.as_slice();
        for part in parts {
            let theirs = match part.content {
                Content::Data => {
                    let count = usize::try_from(part.run.count).unwrap_or(usize::MAX);
                    let (these, rest) = digests.split_at(count.min(digests.len()));
                    digests = rest;
                    these
                }
                Content::Zero | Content::Kept => &[],
            };
            if !part.install {
                continue;
            }
            self.remote.remove_run(part.run);
            self.requested.remove_run(part.run);
            if !self.digests.is_empty() {
                let kept = self.digests_mut(part.run);
                match part.content {
                    Content::Data => kept
                        .iter_mut()
                        .zip(theirs)
                        .for_each(|(kept, theirs)| *kept = *theirs),
                    Content::Zero => kept.fill(ZERO_DIGEST),
                    // Known when the caller has looked.
                    Content::Kept => kept.fill(0),
                }
            }
        }
        if let Some(lane) = self.lanes.get_mut(usize::from(lane)) {
            lane.last = chunks.sequence;
            lane.deferred = false;
        }
        if overtaken.is_empty() {
            return None;
        }
        // Who waited was woken by the stale bytes, but may have looked again since they were discarded.
        for run in waiting {
            self.requested.insert_run(run);
            self.ask_again(run);
        }
        let mut stale = ChunkBitmap::empty(self.chunks());
        for run in overtaken {
            stale.insert_run(run);
        }
        self.remote.union_with(&stale);
        if !self.digests.is_empty() {
            for run in stale.runs() {
                self.digests_mut(run).fill(0);
            }
        }
        Some(stale)
    }

    pub(super) fn fault(&mut self, chunk: u64) -> Fault {
        if !self.remote.contains(chunk) {
            Fault::Resident
        } else if self.requested.insert(chunk) {
            if self.queued.insert(chunk) {
                self.queue.push_back(chunk);
            }
            Fault::Requested
        } else {
            Fault::Awaited
        }
    }

    /// The next chunk to fetch; one that has come meanwhile is not asked for.
    pub(super) fn next_fetch(&mut self) -> Option<u64> {
        while let Some(chunk) = self.queue.pop_front() {
            self.queued.remove(chunk);
            if self.remote.contains(chunk) && self.requested.contains(chunk) {
                return Some(chunk);
            }
        }
        None
    }

    /// More frames wait on `lane`: its credit may be given with theirs, for a few of them.
    pub(super) fn defer_credit(&mut self, lane: u8) {
        if let Some(lane) = self.lanes.get_mut(usize::from(lane)) {
            lane.deferred = lane.last - lane.credited < MOST_DEFERRED;
        }
    }

    /// A lane whose last frame the seeder has not been told about.
    pub(super) fn credit(&mut self) -> Option<(u8, u64)> {
        let (index, lane) = self
            .lanes
            .iter_mut()
            .enumerate()
            .find(|(_, lane)| lane.credited < lane.last && !lane.deferred)?;
        lane.credited = lane.last;
        Some((u8::try_from(index).expect("256 lanes at most"), lane.last))
    }

    /// The digests of chunks that are here, and that nothing has named since.
    pub(super) fn note(&mut self, run: ChunkRun, digests: &[u64]) {
        if self.digests.is_empty() {
            return;
        }
        let range = clamp(run, self.digests.len());
        for ((chunk, kept), &digest) in range.clone().zip(&mut self.digests[range]).zip(digests) {
            if !self.remote.contains(chunk as u64) {
                *kept = digest;
            }
        }
    }

    pub(super) fn digests(&self, run: ChunkRun) -> &[u64] {
        if self.digests.is_empty() {
            return &[];
        }
        let range = clamp(run, self.digests.len());
        &self.digests[range]
    }

    fn digests_mut(&mut self, run: ChunkRun) -> &mut [u64] {
        let range = clamp(run, self.digests.len());
        &mut self.digests[range]
    }
}

/// Stands for the digest of a chunk that holds nothing but zeros, whatever its length; no other chunk gets it.
pub const ZERO_DIGEST: u64 = 1;

/// The digest of a chunk with these bytes: XXH3-64, moved away from the values that stand for something else.
#[must_use]
pub fn chunk_digest(bytes: &[u8]) -> u64 {
    reserve(xxhash_rust::xxh3::xxh3_64(bytes))
}

/// Moves an XXH3-64 digest away from the values that stand for "unknown" and "zeros".
#[must_use]
pub const fn reserve(digest: u64) -> u64 {
    if digest <= ZERO_DIGEST {
        digest + 2
    } else {
        digest
    }
}

fn clamp(run: ChunkRun, len: usize) -> core::ops::Range<usize> {
    let end = usize::try_from(run.end()).unwrap_or(len).min(len);
    let start = usize::try_from(run.start.0).unwrap_or(end).min(end);
    start..end
}
