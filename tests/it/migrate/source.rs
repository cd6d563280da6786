//! The source: memory that a thread writes, and the thread as a subject that can be suspended.

use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use memferry::backend::FileStorage;
use memferry::chunk::ChunkSize;
use memferry::dirty::{Area, DirtyTracker, WriteProtect};
use memferry::migrate::SourceRegion;
use memferry::subject::{Description, Outgoing, SubjectError};
use memferry::sys::mapping::Mapping;
use memferry::sys::pagemap::Pagemap;
use memferry::sys::uffd::{Features, Scope, Uffd};

pub(crate) const PAGE: u64 = 4096;

/// Long enough for a busy machine.
pub(crate) const LONG: Duration = Duration::from_secs(20);

/// Who runs, as the subjects themselves see it.
#[derive(Debug, Default)]
pub(crate) struct Ownership {
    source: AtomicBool,
    destination: AtomicBool,
    violations: AtomicU32,
}

impl Ownership {
    fn check(&self) {
        if self.source.load(Ordering::SeqCst) && self.destination.load(Ordering::SeqCst) {
            self.violations.fetch_add(1, Ordering::SeqCst);
        }
    }

    pub(crate) fn destination_runs(&self) {
        self.destination.store(true, Ordering::SeqCst);
        self.check();
    }

    pub(crate) fn source_runs(&self, runs: bool) {
        self.source.store(runs, Ordering::SeqCst);
        self.check();
    }

    #[track_caller]
    pub(crate) fn assert_never_two(&self) {
        assert_eq!(self.violations.load(Ordering::SeqCst), 0, "two owners");
    }

    pub(crate) fn runs_at_destination(&self) -> bool {
        self.destination.load(Ordering::SeqCst)
    }
}

/// What the source's memory holds at first.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Fill {
    /// Every byte is random.
    Dense,
    /// One page of so many has bytes; the others are holes.
    OneIn(u64),
}

/// Memory of this process, a thread that writes it, and trackers of it.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) memory: Vec<Arc<Mapping>>,
    trackers: Vec<Arc<dyn DirtyTracker>>,
    pub(crate) ownership: Arc<Ownership>,
    writer: Arc<Writer>,
    thread: Option<JoinHandle<()>>,
    /// What goes wrong, at the next migration.
    pub(crate) trouble: Option<Trouble>,
    pub(crate) chunk_size: ChunkSize,
}

/// What the subject fails at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Trouble {
    Suspend(How),
    Save(How),
}

/// How a call fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum How {
    AtOnce,
    AtItsDeadline,
}

#[derive(Debug)]
struct Writer {
    wishes: Mutex<Wishes>,
    changed: Condvar,
    stamps: AtomicU64,
    /// Stamps a millisecond.
    rate: AtomicU64,
}

#[derive(Debug, Default)]
struct Wishes {
    run: bool,
    stands: bool,
    quit: bool,
}

/// A number without pattern for each number.
pub(crate) fn scramble(number: u64) -> u64 {
    let mut x = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn fill(memory: &Mapping, seed: u64, fill: Fill) {
    let mut page = [0; 4096];
    for number in 0..memory.len().div_ceil(PAGE) {
        let start = number * PAGE;
        if let Fill::OneIn(pages) = fill
            && !number.is_multiple_of(pages)
        {
            continue;
        }
        for (index, word) in page.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            *word = scramble(seed << 40 ^ number << 12 ^ index as u64).to_le_bytes();
        }
        let len = usize::try_from((memory.len() - start).min(PAGE)).unwrap();
        memory.write(start, &page[..len]).unwrap();
    }
}

impl Source {
    /// Regions of these lengths, full, with a writer of some 10 MB/s by the page.
    pub(crate) fn new(lens: &[u64]) -> Self {
        Self::with(lens, Fill::Dense, ChunkSize::PAGE)
    }

    pub(crate) fn with(lens: &[u64], content: Fill, chunk_size: ChunkSize) -> Self {
        let memory: Vec<_> = (0..)
            .zip(lens)
            .map(|(seed, &len)| {
                let memory = Mapping::anonymous(len).unwrap();
                fill(&memory, seed, content);
                Arc::new(memory)
            })
            .collect();
        let trackers = memory
            .iter()
            .map(|memory| tracker(memory, chunk_size))
            .collect();
        let ownership = Arc::new(Ownership::default());
        ownership.source_runs(true);
        let writer = Arc::new(Writer {
            wishes: Mutex::new(Wishes {
                run: true,
                ..Wishes::default()
            }),
            changed: Condvar::new(),
            stamps: AtomicU64::new(0),
            rate: AtomicU64::new(3),
        });
        let thread = {
            let (writer, memory) = (writer.clone(), memory.clone());
            std::thread::spawn(move || writer.write(&memory))
        };
        Self {
            memory,
            trackers,
            ownership,
            writer,
            thread: Some(thread),
            trouble: None,
            chunk_size,
        }
    }

    /// How many stamps a millisecond are written; 0 leaves the memory alone.
    pub(crate) fn set_rate(&self, stamps: u64) {
        self.writer.rate.store(stamps, Ordering::Relaxed);
    }

    /// Puts something between the tracker of the first region and the engine.
    pub(crate) fn wrap_tracker(
        &mut self,
        wrap: impl FnOnce(Arc<dyn DirtyTracker>) -> Arc<dyn DirtyTracker>,
    ) {
        self.trackers[0] = wrap(self.trackers[0].clone());
    }

    pub(crate) fn regions(&self) -> Vec<SourceRegion> {
        self.memory
            .iter()
            .zip(&self.trackers)
            .enumerate()
            .map(|(index, (memory, tracker))| SourceRegion {
                name: format!("r{index}"),
                storage: Arc::new(FileStorage::new(memory.file().try_clone().unwrap()).unwrap()),
                tracker: tracker.clone(),
                late: None,
            })
            .collect()
    }

    pub(crate) fn subject(&self) -> Guest {
        Guest {
            writer: self.writer.clone(),
            ownership: self.ownership.clone(),
            trouble: self.trouble,
            suspended: false,
        }
    }

    /// Returns when the writer has gone on since the call.
    #[track_caller]
    pub(crate) fn assert_writer_goes_on(&self) {
        let from = self.writer.stamps.load(Ordering::Relaxed);
        let deadline = Instant::now() + LONG;
        while self.writer.stamps.load(Ordering::Relaxed) <= from + 10 {
            assert!(Instant::now() < deadline, "the writer stands still");
            std::thread::yield_now();
        }
    }

    #[track_caller]
    pub(crate) fn assert_writer_stands(&self) {
        assert!(self.writer.wishes.lock().unwrap().stands);
    }

    /// Bytes that its memory occupies.
    pub(crate) fn allocated(&self) -> u64 {
        allocated(&self.memory)
    }
}

pub(crate) fn allocated(memory: &[Arc<Mapping>]) -> u64 {
    use std::os::unix::fs::MetadataExt;
    memory
        .iter()
        .map(|memory| memory.file().metadata().unwrap().blocks() * 512)
        .sum()
}

fn tracker(memory: &Mapping, chunk_size: ChunkSize) -> Arc<dyn DirtyTracker> {
    let areas = vec![Area {
        address: memory.addresses(),
        offset: 0,
    }];
    let uffd = Uffd::create(Scope::UserModeOnly, Features::TRACKING).unwrap();
    let pagemap = Pagemap::of_this_process().unwrap();
    let file = memory.file().try_clone().unwrap();
    let tracker = WriteProtect::new(uffd, pagemap, areas, memory.len(), chunk_size).unwrap();
    Arc::new(tracker.sparse(file))
}

impl Drop for Source {
    fn drop(&mut self) {
        self.writer.wishes.lock().unwrap().quit = true;
        self.writer.changed.notify_all();
        let _ = self.thread.take().unwrap().join();
    }
}

impl Writer {
    /// Stamps pages here and there until it is told to quit.
    fn write(&self, memory: &[Arc<Mapping>]) {
        let mut number = 0_u64;
        loop {
            let mut wishes = self.wishes.lock().unwrap();
            if !wishes.run {
                wishes.stands = true;
                self.changed.notify_all();
            }
            wishes = self
                .changed
                .wait_while(wishes, |wishes| !wishes.run && !wishes.quit)
                .unwrap();
            wishes.stands = false;
            if wishes.quit {
                return;
            }
            drop(wishes);
            for _ in 0..self.rate.load(Ordering::Relaxed) {
                number += 1;
                let region = &memory[usize::try_from(number).unwrap() % memory.len()];
                let random = scramble(number);
                // Most writes go to a quarter of the pages, as a program's do.
                let reach = if random.is_multiple_of(8) { 1 } else { 4 };
                let pages = (region.len() / PAGE / reach).max(1);
                let offset = (random >> 8) % pages * PAGE;
                let stamp: Vec<u8> = [number, !number].map(u64::to_le_bytes).concat();
                let len = usize::try_from((region.len() - offset).min(16)).unwrap();
                region.write(offset, &stamp[..len]).unwrap();
                self.stamps.fetch_add(1, Ordering::Relaxed);
            }
            std::thread::park_timeout(Duration::from_millis(1));
        }
    }

    fn stop(&self) {
        let mut wishes = self.wishes.lock().unwrap();
        wishes.run = false;
        let stopped = self
            .changed
            .wait_while(wishes, |wishes| !wishes.stands)
            .unwrap();
        drop(stopped);
    }

    fn go_on(&self) {
        self.wishes.lock().unwrap().run = true;
        self.changed.notify_all();
    }
}

/// What the source's device state is: recognizable, and longer than a frame.
pub(crate) fn device_state() -> Vec<u8> {
    (0..40_000_u64)
        .flat_map(|n| scramble(n).to_le_bytes())
        .collect()
}

/// The writer as a subject.
#[derive(Debug)]
pub(crate) struct Guest {
    writer: Arc<Writer>,
    ownership: Arc<Ownership>,
    trouble: Option<Trouble>,
    suspended: bool,
}

fn fail(how: How, what: &str, deadline: Instant) -> SubjectError {
    if how == How::AtItsDeadline {
        while let Some(left) = deadline
            .checked_duration_since(Instant::now())
            .filter(|left| !left.is_zero())
        {
            std::thread::park_timeout(left);
        }
    }
    SubjectError::new(format!("the test wants {what} to fail"))
}

impl Outgoing for Guest {
    fn describe(&self) -> Description {
        Description {
            kind: "test".into(),
            attributes: vec![("shape".into(), "round".into())],
        }
    }

    fn suspend(&mut self, deadline: Instant) -> Result<(), SubjectError> {
        self.suspended = true;
        self.writer.stop();
        self.ownership.source_runs(false);
        match self.trouble {
            Some(Trouble::Suspend(how)) => Err(fail(how, "suspending", deadline)),
            _ => Ok(()),
        }
    }

    fn save(&mut self, sink: &mut dyn Write, deadline: Instant) -> Result<(), SubjectError> {
        assert!(self.suspended, "saved before it was suspended");
        let state = device_state();
        let (first, second) = state.split_at(state.len() / 2);
        let because = |error| SubjectError::because("cannot write the state", error);
        sink.write_all(first).map_err(because)?;
        if let Some(Trouble::Save(how)) = self.trouble {
            return Err(fail(how, "saving", deadline));
        }
        sink.write_all(second).map_err(because)
    }

    fn resume(&mut self, _deadline: Instant) -> Result<(), SubjectError> {
        self.ownership.source_runs(true);
        self.writer.go_on();
        Ok(())
    }

    fn release(&mut self) {
        assert!(self.suspended, "released before it was suspended");
    }
}
