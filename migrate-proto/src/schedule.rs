//! Which chunk next: urgent ones first, then what is pending, cold before hot or hot before cold.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use crate::bitmap::ChunkBitmap;
use crate::chunk::ChunkRun;
use crate::limits::MAX_RUNS;

/// In which order pending chunks are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// While the guest runs here: a chunk that is written again and again is sent last, and so least often in vain.
    ColdFirst,
    /// When the guest runs there: it will touch the hot ones first.
    HotFirst,
}

/// The chunks that are still to be sent. Every chunk is handed out at most once.
#[derive(Debug)]
pub(crate) struct Scheduler {
    cold: ChunkBitmap,
    hot: ChunkBitmap,
    order: Order,
    cursor: u64,
    urgent: VecDeque<ChunkRun>,
}

impl Scheduler {
    pub(crate) fn new(chunks: u64) -> Self {
        Self {
            cold: ChunkBitmap::empty(chunks),
            hot: ChunkBitmap::empty(chunks),
            order: Order::ColdFirst,
            cursor: 0,
            urgent: VecDeque::new(),
        }
    }

    /// Adds `set` to what is pending; those that are also in `hot` count as hot.
    pub(crate) fn add(&mut self, set: &ChunkBitmap, hot: &ChunkBitmap) {
        let mut hottest = set.clone();
        hottest.intersect_with(hot);
        self.cold.union_with(set);
        self.cold.subtract(&hottest);
        self.hot.union_with(&hottest);
        self.cursor = 0;
    }

    /// Adds chunks of the first pass to what is pending.
    pub(crate) fn add_runs(&mut self, runs: &[ChunkRun]) {
        for &run in runs {
            self.cold.insert_run(run);
        }
    }

    pub(crate) fn set_order(&mut self, order: Order) {
        self.order = order;
        self.cursor = 0;
    }

    /// The next pending chunks, at most `longest` of them, which are pending no more.
    pub(crate) fn next(&mut self, longest: u64) -> Vec<ChunkRun> {
        let mut runs = Vec::new();
        let mut room = longest;
        while room > 0 && runs.len() < MAX_RUNS {
            let Some(run) = self.next_run(room) else {
                break;
            };
            room -= run.count;
            runs.push(run);
        }
        runs
    }

    fn next_run(&mut self, longest: u64) -> Option<ChunkRun> {
        let sets = match self.order {
            Order::ColdFirst => [&mut self.cold, &mut self.hot],
            Order::HotFirst => [&mut self.hot, &mut self.cold],
        };
        for set in sets {
            // From the cursor to the end, then what a hint has skipped.
            let run = set
                .run_from(self.cursor, longest)
                .or_else(|| set.run_from(0, longest));
            if let Some(run) = run {
                set.remove_run(run);
                self.cursor = run.end();
                return Some(run);
            }
        }
        None
    }

    /// The leecher waits for `run`: it overtakes everything, and its neighbours are likely to follow.
    pub(crate) fn fetch(&mut self, run: ChunkRun) {
        self.cold.remove_run(run);
        self.hot.remove_run(run);
        self.cursor = run.end();
        self.urgent.push_back(run);
    }

    pub(crate) fn next_urgent(&mut self) -> Option<ChunkRun> {
        self.urgent.pop_front()
    }

    /// How many fetches wait for their answers.
    pub(crate) fn urgent_len(&self) -> usize {
        self.urgent.len()
    }

    /// Whether nothing is pending; what is urgent does not count.
    pub(crate) fn is_empty(&self) -> bool {
        // Asked at every acknowledgement: what is left mostly follows the cursor, so it is found there at once.
        self.cold.run_from(self.cursor, 1).is_none() && self.cold.is_empty() && self.hot.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    fn set(chunks: &[u64]) -> ChunkBitmap {
        let mut set = ChunkBitmap::empty(100);
        for &chunk in chunks {
            set.insert(chunk);
        }
        set
    }

    #[test]
    fn cold_chunks_go_first_while_the_guest_runs_here_and_hot_ones_when_it_runs_there() {
        let mut scheduler = Scheduler::new(100);
        scheduler.add(&set(&[1, 2, 3, 9]), &set(&[2, 50]));
        assert_eq!(
            scheduler.next(2),
            vec![ChunkRun::new(1, 1), ChunkRun::new(3, 1)]
        );
        scheduler.set_order(Order::HotFirst);
        assert_eq!(
            scheduler.next(10),
            vec![ChunkRun::new(2, 1), ChunkRun::new(9, 1)]
        );
        assert!(scheduler.is_empty());
    }

    #[test]
    fn a_fetched_chunk_is_handed_out_once_and_its_neighbours_next() {
        let mut scheduler = Scheduler::new(100);
        scheduler.add(&set(&[1, 40, 41, 42]), &set(&[]));
        scheduler.fetch(ChunkRun::new(40, 1));
        assert_eq!(scheduler.next_urgent(), Some(ChunkRun::new(40, 1)));
        assert_eq!(
            scheduler.next(10),
            vec![ChunkRun::new(41, 2), ChunkRun::new(1, 1)]
        );
    }
}
