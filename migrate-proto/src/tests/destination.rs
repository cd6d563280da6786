//! The memory at the destination, and those who look at it: threads that block on what is missing.

use alloc::vec;
use alloc::vec::Vec;

use super::chance::Chance;
use super::source::Source;
use crate::chunk::ChunkRun;
use crate::leecher::{Fault, Leecher};

/// A number a chunk; `None` is absent, which faults, and reads as zeros where the leecher says that the chunk is here.
#[derive(Debug)]
pub(super) struct Destination {
    pub(super) memory: Vec<Option<u64>>,
    /// What it held before the session.
    pub(super) old: Vec<Option<u64>>,
    /// What the destination itself wrote last.
    pub(super) written: Vec<Option<u64>>,
    pub(super) running: bool,
    pub(super) armed: bool,
    pub(super) viewers: Vec<Viewer>,
}

/// A thread that looks at one chunk at a time.
#[derive(Debug, Clone, Default)]
pub(super) struct Viewer {
    pub(super) wants: Option<Access>,
    /// It waits in the kernel; nothing but an install wakes it.
    asleep: bool,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Access {
    pub(super) chunk: u64,
    pub(super) write: Option<u64>,
}

/// How far an access came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Seen {
    Waits,
    Value(u64),
    /// It will never end: the chunk was lost.
    Lost,
}

impl Destination {
    /// It holds what it had of an earlier time: some of it is what the source has now.
    pub(super) fn new(source: &Source, chance: &mut Chance, viewers: usize) -> Self {
        let chunks = usize::try_from(source.chunks()).unwrap();
        let old: Vec<_> = (0..source.chunks())
            .map(|chunk| match chance.below(3) {
                0 => None,
                1 => Some(source.content(chunk)),
                _ => Some(chance.below(1000)),
            })
            .collect();
        Self {
            memory: old.clone(),
            old,
            written: vec![None; chunks],
            running: false,
            armed: false,
            viewers: vec![Viewer::default(); viewers],
        }
    }

    pub(super) fn read(&self, chunk: u64) -> u64 {
        self.memory[at(chunk)].unwrap_or(0)
    }

    /// `UFFDIO_COPY`, or the plain write of a direct install.
    pub(super) fn install(&mut self, chunk: u64, content: u64, direct: bool) {
        let slot = &mut self.memory[at(chunk)];
        if direct {
            assert!(!self.armed, "a direct install after Finalize");
            *slot = (content != 0 || chunk.is_multiple_of(2)).then_some(content);
        } else {
            slot.get_or_insert(content);
            self.wake(chunk);
        }
    }

    pub(super) fn discard(&mut self, run: ChunkRun) {
        for chunk in run.range() {
            self.memory[at(chunk)] = None;
            self.written[at(chunk)] = None;
        }
    }

    fn wake(&mut self, chunk: u64) {
        for viewer in &mut self.viewers {
            if viewer.wants.is_some_and(|wants| wants.chunk == chunk) {
                viewer.asleep = false;
            }
        }
    }

    /// Lets viewer `index` try what it wants, as a processor and userfaultfd do it.
    pub(super) fn step(&mut self, index: usize, leecher: &mut Leecher) -> Seen {
        let Some(access) = self.viewers[index].wants else {
            return Seen::Waits;
        };
        if self.viewers[index].asleep {
            return Seen::Waits;
        }
        if self.memory[at(access.chunk)].is_none() {
            match leecher.handle_fault(access.chunk) {
                Fault::Resident => {
                    self.memory[at(access.chunk)] = Some(0);
                    self.wake(access.chunk);
                }
                Fault::Requested | Fault::Awaited => {
                    self.viewers[index].asleep = true;
                    return Seen::Waits;
                }
                Fault::Lost => return Seen::Lost,
            }
        }
        self.viewers[index].wants = None;
        let seen = self.read(access.chunk);
        if let Some(value) = access.write {
            self.memory[at(access.chunk)] = Some(value);
            self.written[at(access.chunk)] = Some(value);
        }
        Seen::Value(seen)
    }
}

fn at(chunk: u64) -> usize {
    usize::try_from(chunk).unwrap()
}
