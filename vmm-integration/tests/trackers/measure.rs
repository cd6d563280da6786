//! What tracking costs: who asks, and the guest that is tracked.

use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use memferry::chunk::ChunkSize;
use memferry::dirty::DirtyTracker;
use vmm_integration::kvm::{DirtyLog, DirtyRing};

use crate::machine::{Machine, Mode, PAGE, STAMPS, Shape, Stamper, Stamping};

/// A tracker to be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum How {
    /// The log, cleared in ranges.
    Log,
    /// The log, cleared when it is read.
    LogClearedWithRead,
    /// The rings.
    Rings,
}

/// What tracking costs on this machine.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Costs {
    /// The bytes that are tracked.
    pub(crate) len: u64,
    /// A start.
    pub(crate) start: Duration,
    /// A take that finds nothing; the median.
    pub(crate) clean: Duration,
    /// A take that finds [`Self::dirty_pages`]; the median.
    pub(crate) dirty: Duration,
    /// How many pages that was.
    pub(crate) dirty_pages: u64,
    /// What the first write to a page after a take costs the guest more than another one; the median of the mean.
    pub(crate) first_write: Duration,
    /// Words that the guest writes in a second when nobody tracks it, each in another one of the dirty pages.
    pub(crate) free: f64,
    /// The same with a take every 50 ms.
    pub(crate) tracked: f64,
}

impl Costs {
    /// How much slower the guest is while it is tracked.
    pub(crate) fn slowdown(&self) -> f64 {
        self.free / self.tracked
    }

    /// What a dirty page adds to a take.
    pub(crate) fn per_page(&self) -> Duration {
        self.dirty.saturating_sub(self.clean) / count(self.dirty_pages)
    }

    /// Something that was measured, for each GiB that is tracked.
    pub(crate) fn per_gib(&self, time: Duration) -> Duration {
        time * 1024 / count(self.len >> 20)
    }
}

fn count(number: u64) -> u32 {
    u32::try_from(number.max(1)).unwrap_or(u32::MAX)
}

/// Takes a median is of.
const TAKES: usize = 9;
/// How long a guest is watched for its speed.
const WATCH: Duration = Duration::from_secs(1);
/// Time between takes.
const PERIOD: Duration = Duration::from_millis(50);

/// Measures over a guest with `len` bytes of memory, all touched before, that writes to the first `dirty` of their pages,
/// one word in each after the other, and does nothing else. Both are powers of two, and `dirty` is at least a part.
pub(crate) fn measure(how: How, mode: Mode, len: u64, dirty: u64) -> Costs {
    assert!(dirty >= STAMPS);
    let machine = Machine::new(&Shape {
        mode,
        rings: (how == How::Rings).then_some(1 << 16),
        ..Shape::of(len)
    });
    let tracker = tracker(how, &machine);
    let stamper = |len: u64| {
        let pages = Stamping {
            len: Some(len),
            ..Stamping::pages()
        };
        let mut guest = machine.stamper(0, pages);
        guest.stop();
        guest
    };
    stamper(len).run(len / PAGE);
    let mut guest = stamper(dirty * PAGE);
    let free = speed(&mut guest, || {});

    let (start, ()) = timed(|| tracker.start().unwrap());
    let take = || timed(|| tracker.take().unwrap().count());
    take();
    let clean = median(std::array::from_fn(|_| take().0));
    let mut first_writes = [Duration::ZERO; TAKES];
    let mut dirty_pages = 0;
    let times = std::array::from_fn(|turn| {
        let (first, ()) = timed(|| guest.run(dirty));
        let (again, ()) = timed(|| guest.run(dirty));
        first_writes[turn] = first.saturating_sub(again) / count(dirty);
        let (time, found) = take();
        dirty_pages = found;
        time
    });
    let tracked = speed(&mut guest, || {
        take();
    });
    tracker.stop().unwrap();
    Costs {
        len,
        start,
        clean,
        dirty: median(times),
        dirty_pages,
        first_write: median(first_writes),
        free,
        tracked,
    }
}

fn timed<T>(body: impl FnOnce() -> T) -> (Duration, T) {
    let began = Instant::now();
    let result = body();
    (began.elapsed(), result)
}

fn tracker(how: How, machine: &Machine) -> Arc<dyn DirtyTracker> {
    let page = ChunkSize::PAGE;
    match how {
        How::Log => Arc::new(DirtyLog::regions(&machine.slots, page).unwrap().remove(0)),
        How::LogClearedWithRead => {
            let logs = DirtyLog::regions_cleared_with_read(&machine.slots, page);
            Arc::new(logs.unwrap().remove(0))
        }
        How::Rings => DirtyRing::trackers(machine.rings.as_ref().unwrap()).remove(0),
    }
}

fn median(mut times: [Duration; TAKES]) -> Duration {
    times.sort_unstable();
    times[TAKES / 2]
}

/// Words a second that the guest writes, while something else is done again and again.
fn speed(guest: &mut Stamper, mut between: impl FnMut()) -> f64 {
    // Nobody sends: the time-out is the wait.
    let (_keep, never) = mpsc::channel::<()>();
    let before = guest.stamps();
    let began = Instant::now();
    guest.start(u64::MAX);
    while began.elapsed() < WATCH {
        let _ = never.recv_timeout(PERIOD);
        between();
    }
    guest.stop();
    let stamps = u32::try_from(guest.stamps() - before).unwrap_or(u32::MAX);
    f64::from(stamps) / began.elapsed().as_secs_f64()
}

#[test]
#[ignore = "measurement"]
fn measure_trackers() {
    const LEN: u64 = 256 << 20;
    const DIRTY: u64 = 4 << 10;
    for mode in [Mode::User, Mode::Long, Mode::Flat] {
        for how in [How::Log, How::LogClearedWithRead, How::Rings] {
            let costs = measure(how, mode, LEN, DIRTY);
            println!(
                "{mode:?}, {how:?}: start {:.2?}/GiB, clean take {:.2?}/GiB, {} dirty pages {:.2?} each, first write {:.2?}, \
                 {:.3} M words/s free, {:.3} tracked, {:.2} times slower",
                costs.per_gib(costs.start),
                costs.per_gib(costs.clean),
                costs.dirty_pages,
                costs.per_page(),
                costs.first_write,
                costs.free / 1e6,
                costs.tracked / 1e6,
                costs.slowdown(),
            );
        }
    }
}
