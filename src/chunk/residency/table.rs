//! Two bits a chunk, changed 32 chunks at a time.

use std::cell::Cell;
use std::fmt;
use std::sync::OnceLock;

use super::super::sync::atomic::{AtomicU64, Ordering};
use super::super::{ChunkIndex, ChunkRun};

/// Where the newest bytes of a chunk are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ChunkState {
    /// At the remote end alone.
    Remote = 0b00,
    /// At the remote end; somebody has asked for them.
    Fetching = 0b01,
    /// Being written here by the one who brought it to this state: bytes that came, or new ones.
    Writing = 0b10,
    /// Here.
    Resident = 0b11,
}

impl ChunkState {
    const ALL: [Self; 4] = [Self::Remote, Self::Fetching, Self::Writing, Self::Resident];

    const fn bit(self) -> u8 {
        1 << self as u8
    }

    /// This state in all lanes of a word.
    const fn pattern(self) -> u64 {
        LOW * self as u64
    }
}

/// A set of states.
#[derive(Debug, Clone, Copy)]
pub(super) struct States(u8);

impl States {
    pub(super) const fn of(states: &[ChunkState]) -> Self {
        let mut bits = 0;
        let mut index = 0;
        while index < states.len() {
            bits |= states[index].bit();
            index += 1;
        }
        Self(bits)
    }

    /// The low bits of the lanes of `word` that are in one of these states.
    fn lanes(self, word: u64) -> u64 {
        let mut lanes = 0;
        for state in ChunkState::ALL {
            if self.0 & state.bit() != 0 {
                let differs = word ^ state.pattern();
                lanes |= !(differs | differs >> 1) & LOW;
            }
        }
        lanes
    }
}

/// Chunks in a word.
pub(super) const LANES: u64 = 32;
/// The low bit of every lane.
const LOW: u64 = 0x5555_5555_5555_5555;
/// Words that are allocated together: 4 KiB, the states of 64 MiB in chunks of 4 KiB. What lies in no leaf is in the state of the
/// beginning, so that a region of any size is opened at once.
const WORDS: usize = if cfg!(any(test, loom)) { 4 } else { 512 };
const LEAF: u64 = WORDS as u64 * LANES;

type Leaf = Box<[AtomicU64]>;

/// The states of all chunks.
pub(super) struct Table {
    chunks: u64,
    beginning: ChunkState,
    leaves: Box<[OnceLock<Leaf>]>,
}

/// A part of a run that lies in one word.
#[derive(Clone, Copy)]
struct Piece {
    /// The first chunk of the word.
    base: u64,
    /// The low bits of the lanes.
    lanes: u64,
}

impl Table {
    pub(super) fn new(chunks: u64, beginning: ChunkState) -> Self {
        let leaves = usize::try_from(chunks.div_ceil(LEAF)).expect("a table that fits the memory");
        let table = Self {
            chunks,
            beginning,
            leaves: (0..leaves).map(|_| OnceLock::new()).collect(),
        };
        if cfg!(loom) {
            // Loom does not see that a lock of the standard library orders what it made before all that uses it.
            for leaf in 0..leaves {
                table.leaf(leaf as u64 * LEAF);
            }
        }
        table
    }

    pub(super) fn chunks(&self) -> u64 {
        self.chunks
    }

    /// How many leaves there are.
    #[cfg(all(test, not(loom)))]
    pub(super) fn allocated(&self) -> usize {
        let exists = |leaf: &&OnceLock<Leaf>| leaf.get().is_some();
        self.leaves.iter().filter(exists).count()
    }

    /// # Panics
    /// If the run reaches beyond the chunks.
    pub(super) fn check(&self, run: ChunkRun) {
        assert!(
            run.start
                .0
                .checked_add(run.count)
                .is_some_and(|end| end <= self.chunks),
            "{run:?} is not of {} chunks",
            self.chunks
        );
    }

    fn existing_leaf(&self, chunk: u64) -> Option<&Leaf> {
        self.leaves[index(chunk / LEAF)].get()
    }

    fn leaf(&self, chunk: u64) -> &Leaf {
        self.leaves[index(chunk / LEAF)].get_or_init(|| {
            (0..WORDS)
                .map(|_| AtomicU64::new(self.beginning.pattern()))
                .collect()
        })
    }

    fn load(&self, chunk: u64) -> u64 {
        match self.existing_leaf(chunk) {
            Some(leaf) => leaf[index(chunk % LEAF / LANES)].load(Ordering::Acquire),
            None => self.beginning.pattern(),
        }
    }

    pub(super) fn state(&self, chunk: ChunkIndex) -> ChunkState {
        self.check(ChunkRun::new(chunk.0, 1));
        let lane = self.load(chunk.0) >> (chunk.0 % LANES * 2) & 0b11;
        ChunkState::ALL[index(lane)]
    }

    /// The pieces of `run`, word by word.
    fn pieces(run: ChunkRun) -> impl Iterator<Item = Piece> {
        let (mut next, end) = (run.start.0, run.end());
        std::iter::from_fn(move || {
            (next < end).then(|| {
                let base = next - next % LANES;
                let upto = end.min(base + LANES);
                let lanes = lanes_between(next - base, upto - base);
                next = upto;
                Piece { base, lanes }
            })
        })
    }

    /// Whether all of `run` is in one of `states`.
    pub(super) fn all(&self, run: ChunkRun, states: States) -> bool {
        self.check(run);
        Self::pieces(run)
            .all(|piece| states.lanes(self.load(piece.base)) & piece.lanes == piece.lanes)
    }

    /// How many chunks of `run` are in one of `states`.
    pub(super) fn count(&self, run: ChunkRun, states: States) -> u64 {
        self.check(run);
        let (mut next, end) = (run.start.0, run.end());
        let mut count = 0;
        while next < end {
            let upto = end.min(next - next % LEAF + LEAF);
            if self.existing_leaf(next).is_none() {
                let all = states.lanes(self.beginning.pattern()) != 0;
                count += if all { upto - next } else { 0 };
            } else {
                for piece in Self::pieces(ChunkRun::new(next, upto - next)) {
                    let lanes = states.lanes(self.load(piece.base)) & piece.lanes;
                    count += u64::from(lanes.count_ones());
                }
            }
            next = upto;
        }
        count
    }

    /// The first run within `within` whose chunks are in one of `states`, as long as it goes but for `longest`; it may have
    /// changed by the time it is looked at.
    pub(super) fn find(&self, within: ChunkRun, longest: u64, states: States) -> Option<ChunkRun> {
        self.check(within);
        let trim = |found: ChunkRun| ChunkRun::new(found.start.0, found.count.min(longest));
        let (mut next, end) = (within.start.0, within.end());
        let mut found: Option<ChunkRun> = None;
        while next < end && found.is_none_or(|found| found.count < longest) {
            // A leaf that does not exist is passed at one step.
            let (base, span, lanes) = if self.existing_leaf(next).is_some() {
                let base = next - next % LANES;
                (base, LANES, states.lanes(self.load(base)))
            } else {
                let all = states.lanes(self.beginning.pattern()) != 0;
                (next - next % LEAF, LEAF, if all { LOW } else { 0 })
            };
            let upto = end.min(base + span);
            if lanes == LOW || lanes == 0 {
                match (&mut found, lanes == LOW) {
                    (None, true) => found = Some(ChunkRun::new(next, upto - next)),
                    (Some(found), true) => found.count += upto - next,
                    (Some(_), false) => return found.map(trim),
                    (None, false) => {}
                }
                next = upto;
                continue;
            }
            while next < upto {
                let rest = lanes >> ((next - base) * 2);
                let here = if rest & 1 == 0 {
                    if found.is_some() {
                        return found.map(trim);
                    }
                    u64::from((rest & LOW).trailing_zeros()) / 2
                } else {
                    let here = u64::from((!rest & LOW).trailing_zeros()) / 2;
                    let here = here.min(upto - next);
                    match &mut found {
                        None => found = Some(ChunkRun::new(next, here)),
                        Some(found) => found.count += here,
                    }
                    here
                };
                next = upto.min(next + here);
            }
        }
        found.map(trim)
    }

    /// Brings those chunks of `run` that are in one of `from` to the state `to`, and says which they were.
    pub(super) fn change(&self, run: ChunkRun, from: States, to: ChunkState) -> Vec<ChunkRun> {
        let mut changed = Vec::new();
        self.change_until(run, States(0), from, to, &mut changed);
        changed
    }

    /// As [`change`](Self::change), from the beginning of `run` to the first chunk in one of `stop`, which is returned; adds what it
    /// changed to `changed`.
    pub(super) fn change_until(
        &self,
        run: ChunkRun,
        stop: States,
        from: States,
        to: ChunkState,
        changed: &mut Vec<ChunkRun>,
    ) -> Option<ChunkIndex> {
        self.check(run);
        let untouched = States(stop.0 | from.0).lanes(self.beginning.pattern()) == 0;
        let (mut next, end) = (run.start.0, run.end());
        while next < end {
            let upto = end.min(next - next % LEAF + LEAF);
            if untouched && self.existing_leaf(next).is_none() {
                next = upto;
                continue;
            }
            for piece in Self::pieces(ChunkRun::new(next, upto - next)) {
                let stops = Cell::new(0);
                let lanes = self.change_piece(
                    piece,
                    |word| {
                        stops.set(stop.lanes(word) & piece.lanes);
                        from.lanes(word) & below_lowest(stops.get())
                    },
                    to,
                );
                push_runs(changed, piece.base, lanes);
                if stops.get() != 0 {
                    let lane = u64::from(stops.get().trailing_zeros()) / 2;
                    return Some(ChunkIndex(piece.base + lane));
                }
            }
            next = upto;
        }
        None
    }

    /// Brings the first run of at most `longest` chunks within `within` that are in one of `from` to the state `to`, and says
    /// which it was.
    pub(super) fn change_first(
        &self,
        within: ChunkRun,
        longest: u64,
        from: States,
        to: ChunkState,
    ) -> Option<ChunkRun> {
        let mut left = within;
        loop {
            let seen = self.find(left, longest, from)?;
            let mut run = ChunkRun::new(seen.start.0, 0);
            for piece in Self::pieces(seen) {
                // Only what follows without a gap.
                let lanes = self.change_piece(
                    piece,
                    |word| {
                        let gaps = piece.lanes & !from.lanes(word);
                        piece.lanes & below_lowest(gaps)
                    },
                    to,
                );
                run.count += u64::from(lanes.count_ones());
                if lanes != piece.lanes {
                    break;
                }
            }
            if run.count > 0 {
                return Some(run);
            }
            // Somebody was faster.
            left = ChunkRun::new(seen.start.0 + 1, left.end() - seen.start.0 - 1);
        }
    }

    /// Changes the lanes that `choose` picks of the piece's, and says which.
    fn change_piece(&self, piece: Piece, choose: impl Fn(u64) -> u64, to: ChunkState) -> u64 {
        let seen = self.load(piece.base);
        if choose(seen) & piece.lanes == 0 {
            return 0;
        }
        let word = &self.leaf(piece.base)[index(piece.base % LEAF / LANES)];
        // Also who changes nothing must see what was written before a chunk came to the state that it is found in.
        let mut word_now = word.load(Ordering::Acquire);
        loop {
            let lanes = choose(word_now) & piece.lanes;
            if lanes == 0 {
                return 0;
            }
            let both = lanes * 0b11;
            let new = (word_now & !both) | (to.pattern() & both);
            match word.compare_exchange_weak(word_now, new, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return lanes,
                Err(other) => word_now = other,
            }
        }
    }
}

impl fmt::Debug for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Table")
            .field("chunks", &self.chunks)
            .finish_non_exhaustive()
    }
}

/// Appends the chunks of `lanes`; what follows without a gap becomes one run.
fn push_runs(runs: &mut Vec<ChunkRun>, base: u64, mut lanes: u64) {
    while lanes != 0 {
        let skip = u64::from(lanes.trailing_zeros()) / 2;
        let count = u64::from((!(lanes >> (skip * 2)) & LOW).trailing_zeros()) / 2;
        match runs.last_mut() {
            Some(last) if last.end() == base + skip => last.count += count,
            _ => runs.push(ChunkRun::new(base + skip, count)),
        }
        lanes &= !lanes_between(skip, skip + count);
    }
}

/// All bits below the lowest of `lanes`; all if there is none.
fn below_lowest(lanes: u64) -> u64 {
    (lanes & lanes.wrapping_neg()).wrapping_sub(1)
}

/// The low bits of lanes `from..to`, of which there is at least one.
fn lanes_between(from: u64, to: u64) -> u64 {
    let upto = if to == LANES {
        u64::MAX
    } else {
        (1 << (to * 2)) - 1
    };
    upto & LOW & (u64::MAX << (from * 2))
}

fn index(number: u64) -> usize {
    usize::try_from(number).expect("an index of memory that exists")
}
