//! What is measured of a mount. Everything that is read, and everything that arrives, is compared byte by byte.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use memferry::backend::MemoryStorage;
use memferry::chunk::Storage;

use super::faults::{self, Faults, Processors};
use super::link::Shape;
use super::options::{FrontEnd, Plan, Way};
use super::pattern::Pattern;
use super::rig::{Far, Mounted, STEP, region, steps};
use super::route::By;

/// One mount's figures.
#[derive(Debug, Clone, Default)]
pub(super) struct Sample {
    /// From nothing to a mount that can be read, in milliseconds.
    pub(super) open: f64,
    /// First accesses to pages that nobody has fetched, in milliseconds each.
    pub(super) touches: Vec<f64>,
    /// In MB a second, opening included.
    pub(super) read: f64,
    /// In MB a second, opening and the durability of all of it included.
    pub(super) write: f64,
}

/// What is the same for all measurements of a run.
#[derive(Debug)]
pub(super) struct Bench {
    /// What the server has.
    source: Arc<MemoryStorage>,
    pattern: Pattern,
    size: u64,
    limit: Duration,
    touches: u64,
    by: By,
    /// What was read, to be compared when the clock stands.
    buffer: Vec<u8>,
}

/// What is written differs from what is there.
const WRITTEN: u64 = 0x5eed;
const PAGE: usize = 4096;

impl Bench {
    pub(super) fn new(plan: &Plan) -> Result<Self> {
        let size = plan.size;
        let pattern = Pattern::new(1);
        Ok(Self {
            source: region(size, pattern)?,
            pattern,
            size,
            limit: plan.limit,
            touches: plan.touches,
            by: plan.by,
            buffer: vec![1; usize::try_from(size)?],
        })
    }

    /// Measures one way and front end over one link.
    pub(super) fn measure(
        &mut self,
        shape: Option<Shape>,
        way: Way,
        front_end: FrontEnd,
    ) -> Result<Sample> {
        let source: Arc<dyn Storage> = Arc::clone(&self.source) as _;
        let far = Far::serve(source, shape, self.by)?;
        let open = || Mounted::open(&far, way, front_end);
        let (opened, touches) = self.touch(&open).context("first accesses")?;
        let read = self.read(&open).context("reading")?;
        drop(far);
        let write = self.write(shape, way, front_end).context("writing")?;
        Ok(Sample {
            open: opened,
            touches,
            read,
            write,
        })
    }

    /// First accesses through a slice beside the least that one can cost.
    pub(super) fn faults(&self, count: u64, processors: Processors) -> Result<Faults> {
        let source: Arc<dyn Storage> = Arc::clone(&self.source) as _;
        faults::measure(&source, self.pattern, count, processors)
    }

    /// How long opening takes, and the first access to a page, in milliseconds.
    fn touch(&self, open: &impl Fn() -> Result<Mounted>) -> Result<(f64, Vec<f64>)> {
        let began = Instant::now();
        let mounted = open()?;
        let opened = milliseconds(began.elapsed());
        let mut page = [0; PAGE];
        let mut touches = Vec::new();
        for offset in scattered(self.size, self.touches) {
            let began = Instant::now();
            mounted.read(&mut page, offset)?;
            touches.push(milliseconds(began.elapsed()));
            self.pattern.check(&page, offset)?;
        }
        mounted.close()?;
        Ok((opened, touches))
    }

    /// Reads from the start to the end, or as far as the limit lets it.
    fn read(&mut self, open: &impl Fn() -> Result<Mounted>) -> Result<f64> {
        let began = Instant::now();
        let mounted = open()?;
        let mut done = 0;
        for (piece, (offset, _)) in self.buffer.chunks_mut(STEP).zip(steps(self.size)) {
            mounted.read(piece, offset)?;
            done += piece.len();
            if began.elapsed() > self.limit {
                break;
            }
        }
        let took = began.elapsed();
        self.pattern.check(&self.buffer[..done], 0)?;
        mounted.close()?;
        Ok(rate(done, took))
    }

    /// Writes from the start to the end, or as far as the limit lets it, and looks at the server for what has arrived.
    fn write(&mut self, shape: Option<Shape>, way: Way, front_end: FrontEnd) -> Result<f64> {
        let target = Arc::new(MemoryStorage::new(self.size));
        let far = Far::serve(Arc::clone(&target) as _, shape, self.by)?;
        let pattern = Pattern::new(WRITTEN);
        pattern.fill(&mut self.buffer, 0);
        let began = Instant::now();
        let mounted = Mounted::open(&far, way, front_end)?;
        let mut done = 0;
        for (piece, (offset, _)) in self.buffer.chunks(STEP).zip(steps(self.size)) {
            mounted.write(piece, offset)?;
            done += piece.len();
            if began.elapsed() > self.limit {
                break;
            }
        }
        mounted.sync()?;
        let took = began.elapsed();
        mounted.close()?;
        let arrived = &mut self.buffer[..done];
        target.read_exact_at(arrived, 0)?;
        pattern.check(arrived, 0).context("at the server")?;
        Ok(rate(done, took))
    }
}

/// Pages in the second half of the region, which what is pulled in order reaches late, each far from the one before.
fn scattered(size: u64, count: u64) -> impl Iterator<Item = u64> {
    let (half, page) = (size / 2, PAGE as u64);
    // Steps of a number that shares no factor with a count that is a power of two visit every place once.
    let places = (0..count).map(move |index| index * 5 % count);
    places.map(move |place| half + half / count * place / page * page)
}

pub(super) fn milliseconds(span: Duration) -> f64 {
    span.as_secs_f64() * 1e3
}

/// In MB a second.
#[expect(clippy::cast_precision_loss, reason = "a figure to read")]
pub(super) fn rate(bytes: usize, took: Duration) -> f64 {
    bytes as f64 / 1e6 / took.as_secs_f64()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn first_accesses_are_to_different_pages_of_the_second_half() {
        let pages: BTreeSet<u64> = scattered(8 << 20, 16).collect();
        assert_eq!(pages.len(), 16);
        assert!(
            pages
                .iter()
                .all(|page| page % PAGE as u64 == 0 && (4 << 20..8 << 20).contains(page))
        );
    }
}
