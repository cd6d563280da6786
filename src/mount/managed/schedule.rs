//! What is fetched next.

use std::collections::VecDeque;

use super::super::options::Priority;
use crate::chunk::{ChunkRun, ChunkState, Claim, Residency};

/// More wishes than these are forgotten, the oldest first: what was read longest ago.
const WISHES: usize = 256;
/// More runs of chunks of one priority than these are made fewer, by joining neighbours: 24 MB.
const RUNS: usize = 1 << 20;

/// What is fetched next: what somebody reads at this moment, what is likely to be read, and then the rest.
#[derive(Debug)]
pub(super) struct Schedule {
    /// Of chunks that were read in part.
    wanted: VecDeque<ChunkRun>,
    /// Ahead of readers.
    likely: VecDeque<ChunkRun>,
    /// Around places that were read; the last of them comes first.
    near: VecDeque<ChunkRun>,
    background: Option<Background>,
}

/// All chunks, in the order of their priority, over and over until none is remote.
#[derive(Debug)]
struct Background {
    runs: Vec<ChunkRun>,
    /// The run that is being fetched, and the first of its chunks that may still be remote.
    current: usize,
    next: u64,
    /// How often all runs have been gone through, and single pieces were left.
    passes: u32,
}

/// What there is to do.
#[derive(Debug)]
pub(super) enum Next<'a> {
    /// To fetch these.
    Fetch(Claim<'a>),
    /// All was gone through, and some is still remote, because it could not be fetched.
    Again,
    /// Others fetch what is still remote.
    Wait,
    /// Nothing, until somebody wishes something.
    Nothing,
}

impl Schedule {
    pub(super) fn new() -> Self {
        Self {
            wanted: VecDeque::new(),
            likely: VecDeque::new(),
            near: VecDeque::new(),
            background: None,
        }
    }

    /// From now on everything is fetched, in this order.
    pub(super) fn pull_all(&mut self, runs: Vec<ChunkRun>) {
        let next = runs.first().map_or(0, |run| run.start.0);
        self.background = Some(Background {
            runs,
            current: 0,
            next,
            passes: 0,
        });
    }

    /// Chunks that somebody reads at this moment.
    pub(super) fn want(&mut self, run: ChunkRun) {
        wish(&mut self.wanted, run);
    }

    /// Chunks that somebody is likely to read.
    pub(super) fn expect(&mut self, run: ChunkRun) {
        wish(&mut self.likely, run);
    }

    /// Chunks around a place that somebody reads.
    pub(super) fn come_near(&mut self, run: ChunkRun) {
        if self.near.back() != Some(&run) {
            wish(&mut self.near, run);
        }
    }

    /// Claims what is to be fetched next, at most `longest` chunks.
    pub(super) fn next<'a>(&mut self, residency: &'a Residency, longest: u64) -> Next<'a> {
        for wishes in [&mut self.wanted, &mut self.likely] {
            while let Some(run) = wishes.pop_front() {
                if let Some(claim) = residency.claim(run, longest) {
                    let end = claim.run().end();
                    if end < run.end() {
                        wishes.push_front(ChunkRun::new(end, run.end() - end));
                    }
                    return Next::Fetch(claim);
                }
            }
        }
        while let Some(run) = self.near.pop_back() {
            if let Some(claim) = residency.claim(run, longest) {
                let end = claim.run().end();
                if end < run.end() {
                    self.near.push_back(ChunkRun::new(end, run.end() - end));
                }
                return Next::Fetch(claim);
            }
        }
        match &mut self.background {
            Some(background) => background.next(residency, longest),
            None => Next::Nothing,
        }
    }

    /// Begins from the beginning. If single pieces could not be fetched, those are made smaller, so that each holds back few others; not
    /// if none could.
    pub(super) fn again(&mut self, single: bool) {
        if let Some(background) = &mut self.background {
            background.passes += u32::from(single);
            background.current = 0;
            background.next = background.runs.first().map_or(0, |run| run.start.0);
        }
    }
}

fn wish(wishes: &mut VecDeque<ChunkRun>, run: ChunkRun) {
    if run.count == 0 || wishes.contains(&run) {
        return;
    }
    wishes.push_back(run);
    if wishes.len() > WISHES {
        wishes.pop_front();
    }
}

impl Background {
    fn next<'a>(&mut self, residency: &'a Residency, longest: u64) -> Next<'a> {
        let longest = (longest >> (3 * self.passes.min(10))).max(1);
        while let Some(run) = self.runs.get(self.current) {
            let left = ChunkRun::new(self.next, run.end() - self.next);
            if let Some(claim) = residency.claim(left, longest) {
                self.next = claim.run().end();
                return Next::Fetch(claim);
            }
            self.current += 1;
            self.next = self.runs.get(self.current).map_or(0, |run| run.start.0);
        }
        let all = residency.all_chunks();
        let any = |state| residency.find(all, 1, state).is_some();
        if any(ChunkState::Remote) {
            Next::Again
        } else if any(ChunkState::Fetching) || any(ChunkState::Writing) {
            Next::Wait
        } else {
            Next::Nothing
        }
    }
}

/// The runs of equal priority of all `chunks`, the highest first.
pub(super) fn in_order(chunks: u64, priority: Option<&Priority>) -> Vec<ChunkRun> {
    let Some(priority) = priority else {
        return vec![ChunkRun::new(0, chunks)];
    };
    let mut runs: Vec<(i64, ChunkRun)> = Vec::new();
    // Chunks that count as one, of the priority of their highest.
    let mut grain = 1;
    let mut chunk = 0;
    while chunk < chunks {
        let count = grain.min(chunks - chunk);
        let highest = (chunk..chunk + count).map(|chunk| priority.of(chunk)).max();
        let highest = highest.unwrap_or(0);
        match runs.last_mut() {
            Some((last, run)) if *last == highest => run.count += count,
            _ => runs.push((highest, ChunkRun::new(chunk, count))),
        }
        chunk += count;
        if runs.len() > RUNS {
            grain *= 2;
            runs = runs
                .chunks(2)
                .map(|pair| {
                    let highest = pair.iter().map(|(priority, _)| *priority).max();
                    let count = pair.iter().map(|(_, run)| run.count).sum();
                    (
                        highest.unwrap_or(0),
                        ChunkRun::new(pair[0].1.start.0, count),
                    )
                })
                .collect();
        }
    }
    // Stable: of equal ones the lower chunk stays first.
    runs.sort_by_key(|(priority, _)| std::cmp::Reverse(*priority));
    runs.into_iter().map(|(_, run)| run).collect()
}

#[cfg(not(loom))]
#[cfg(test)]
mod tests {
    use super::*;

    fn fetched(schedule: &mut Schedule, residency: &Residency, longest: u64) -> Vec<ChunkRun> {
        let mut runs = Vec::new();
        while let Next::Fetch(claim) = schedule.next(residency, longest) {
            runs.push(claim.run());
            let _ = claim.land().done();
        }
        runs
    }

    fn fetched_first(schedule: &mut Schedule, residency: &Residency) -> u64 {
        match schedule.next(residency, 64) {
            Next::Fetch(claim) => claim.run().count,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_was_read_last_has_its_neighbours_fetched_first() {
        let residency = Residency::new(100);
        let mut schedule = Schedule::new();
        schedule.come_near(ChunkRun::new(10, 5));
        schedule.come_near(ChunkRun::new(50, 5));
        schedule.expect(ChunkRun::new(90, 5));
        assert_eq!(
            fetched(&mut schedule, &residency, 5)
                .iter()
                .map(|run| run.start.0)
                .collect::<Vec<_>>(),
            [90, 50, 10]
        );
    }

    #[test]
    fn what_is_read_comes_before_what_is_likely_and_that_before_the_rest() {
        let residency = Residency::new(100);
        let mut schedule = Schedule::new();
        schedule.pull_all(in_order(100, None));
        schedule.expect(ChunkRun::new(50, 10));
        schedule.want(ChunkRun::new(70, 1));
        assert_eq!(
            fetched(&mut schedule, &residency, 8),
            [
                (70, 1),
                (50, 8),
                (58, 2),
                (0, 8),
                (8, 8),
                (16, 8),
                (24, 8),
                (32, 8),
                (40, 8),
                (48, 2),
                (60, 8),
                (68, 2),
                (71, 8),
                (79, 8),
                (87, 8),
                (95, 5)
            ]
            .map(|(start, count)| ChunkRun::new(start, count))
        );
        assert!(matches!(schedule.next(&residency, 8), Next::Nothing));
    }

    #[test]
    fn the_priority_of_a_chunk_says_when_it_comes() {
        let priority = Priority::new(|chunk| match chunk.0 {
            20..30 => 2,
            70.. => 1,
            _ => 0,
        });
        let order = in_order(100, Some(&priority));
        let expected = [(20, 10), (70, 30), (0, 20), (30, 40)];
        assert_eq!(
            order,
            expected.map(|(start, count)| ChunkRun::new(start, count))
        );
    }

    #[test]
    fn priorities_that_all_differ_take_bounded_memory_and_leave_no_chunk_out() {
        let chunks = 3 * RUNS as u64 + 5;
        let order = in_order(
            chunks,
            Some(&Priority::new(|chunk| i64::try_from(chunk.0).unwrap())),
        );
        assert!(order.len() <= RUNS);
        assert_eq!(order.iter().map(|run| run.count).sum::<u64>(), chunks);
        assert_eq!(order[0].end(), chunks);
    }

    #[test]
    fn what_could_not_be_fetched_is_gone_through_again_in_smaller_pieces() {
        let residency = Residency::new(64);
        let mut schedule = Schedule::new();
        schedule.pull_all(in_order(64, None));
        let Next::Fetch(claim) = schedule.next(&residency, 64) else {
            panic!("there is something to fetch");
        };
        assert!(matches!(schedule.next(&residency, 64), Next::Wait));
        drop(claim);
        assert!(matches!(schedule.next(&residency, 64), Next::Again));
        schedule.again(false);
        assert_eq!(fetched_first(&mut schedule, &residency), 64);
        schedule.again(true);
        assert_eq!(fetched(&mut schedule, &residency, 64).len(), 8);
    }
}
