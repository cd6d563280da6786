use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Mutex;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags};
use rustix::thread::CpuSet;

use super::*;
use crate::backend::MemoryStorage;
use crate::chunk::{Fault, Faults, Faulty, Operation};
use crate::sys::uffd::Event;

const PAGE: u64 = 4096;
const PATIENCE: Duration = Duration::from_secs(20);

/// A storage that remembers what is asked of it.
#[derive(Debug)]
struct Watched {
    memory: MemoryStorage,
    reads: Mutex<Vec<Range<u64>>>,
    writes: Mutex<Vec<Range<u64>>>,
    at_hand: bool,
    latency: Duration,
}

impl Watched {
    fn new(len: u64) -> Arc<Self> {
        Self::with(len, false, Duration::ZERO)
    }

    fn with(len: u64, at_hand: bool, latency: Duration) -> Arc<Self> {
        let watched = Self {
            memory: MemoryStorage::new(len),
            reads: Mutex::default(),
            writes: Mutex::default(),
            at_hand,
            latency,
        };
        for page in 0..len.div_ceil(PAGE) {
            let bytes = bytes_of(page);
            let len = PAGE.min(len - page * PAGE);
            let bytes = &bytes[..usize::try_from(len).unwrap()];
            watched.memory.write_all_at(bytes, page * PAGE).unwrap();
        }
        Arc::new(watched)
    }

    fn written(&self) -> Vec<Range<u64>> {
        let mut written = std::mem::take(&mut *self.writes.lock().unwrap());
        written.sort_by_key(|range| range.start);
        written
    }

    fn bytes_read(&self) -> u64 {
        let reads = self.reads.lock().unwrap();
        reads.iter().map(|range| range.end - range.start).sum()
    }
}

impl Storage for Watched {
    fn len(&self) -> u64 {
        self.memory.len()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let range = offset..offset + buf.len() as u64;
        self.reads.lock().unwrap().push(range);
        if !self.latency.is_zero() {
            thread::park_timeout(self.latency);
        }
        self.memory.read_exact_at(buf, offset)
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let range = offset..offset + buf.len() as u64;
        self.writes.lock().unwrap().push(range);
        self.memory.write_all_at(buf, offset)
    }

    fn flush(&self) -> io::Result<()> {
        self.memory.flush()
    }

    fn data_ranges(&self, within: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        self.memory.data_ranges(within)
    }

    fn is_at_hand(&self, _: Range<u64>) -> bool {
        self.at_hand
    }
}

/// What page `page` holds at first; no two are equal.
fn bytes_of(page: u64) -> Vec<u8> {
    let mut bytes = page
        .wrapping_mul(0x9E37_79B9_7F4A_7C15)
        .to_le_bytes()
        .repeat(512);
    bytes[9] = 1;
    bytes
}

fn options() -> SliceOptions {
    SliceOptions {
        scope: Some(Scope::UserModeOnly),
        read_ahead: 0,
        ..SliceOptions::default()
    }
}

/// Both ways to know what was written.
fn both(options: &SliceOptions) -> [SliceOptions; 2] {
    [false, true].map(|track_by_faults| SliceOptions {
        track_by_faults,
        ..options.clone()
    })
}

/// Loads from the memory as a program does, which faults.
fn load(slice: &Slice, offset: u64, len: usize) -> Vec<u8> {
    let mut buf = vec![0; len];
    slice.memory.load(offset, &mut buf).unwrap();
    buf
}

fn in_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Receiver<T> {
    let (answer, answers) = mpsc::sync_channel(1);
    thread::spawn(move || answer.send(work()));
    answers
}

fn one(range: Range<u64>) -> Vec<Range<u64>> {
    vec![range]
}

/// Waits until `holds`, looking every millisecond.
fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < PATIENCE, "gave up waiting until {what}");
        thread::park_timeout(Duration::from_millis(1));
    }
}

mod conformance {
    use super::*;
    crate::chunk::conformance::storage_conformance!(|len| {
        let storage = Arc::new(MemoryStorage::new(len));
        Arc::new(Slice::new(storage, &options()).unwrap()) as _
    });

    mod by_faults {
        use super::*;
        crate::chunk::conformance::storage_conformance!(|len| {
            let storage = Arc::new(MemoryStorage::new(len));
            Arc::new(Slice::new(storage, &both(&options())[1]).unwrap()) as _
        });
    }
}

#[test]
fn faults_of_many_threads_at_random_get_their_pages() {
    const PAGES: u64 = 2000;
    for (at_hand, read_ahead) in [(false, 0), (true, 0), (false, 1 << 20), (true, 1 << 20)] {
        let storage = Watched::with(PAGES * PAGE - 5, at_hand, Duration::ZERO);
        let options = SliceOptions {
            read_ahead,
            ..options()
        };
        let slice = Slice::new(storage.clone(), &options).unwrap();
        thread::scope(|scope| {
            for seed in 1..=8_u64 {
                let slice = &slice;
                scope.spawn(move || {
                    let mut state = seed;
                    for _ in 0..1250 {
                        state = state
                            .wrapping_mul(6_364_136_223_846_793_005)
                            .wrapping_add(seed);
                        let page = (state >> 33) % PAGES;
                        let offset = page * PAGE + (state >> 20) % 4000;
                        let at = usize::try_from(offset % PAGE).unwrap();
                        assert_eq!(load(slice, offset, 90), bytes_of(page)[at..at + 90]);
                    }
                });
            }
        });
        let read_all = storage.bytes_read() <= (PAGES + 200) * PAGE;
        assert!(read_all, "{} bytes", storage.bytes_read());
    }
}

#[test]
fn a_fault_reads_its_page_and_no_more() {
    let storage = Watched::new(100 * PAGE);
    let slice = Slice::new(storage.clone(), &options()).unwrap();
    assert_eq!(load(&slice, 50 * PAGE, 4096), bytes_of(50));
    assert_eq!(load(&slice, 50 * PAGE, 4096), bytes_of(50));
    assert_eq!(*storage.reads.lock().unwrap(), one(50 * PAGE..51 * PAGE));
    // Told of right after the program goes on.
    wait_until("it is resident", || slice.resident(0..u64::MAX) == PAGE);
}

#[test]
fn who_goes_on_in_sequence_finds_the_pages_there() {
    for (at_hand, latency) in [(false, Duration::from_millis(5)), (true, Duration::ZERO)] {
        let storage = Watched::with(4096 * PAGE, at_hand, latency);
        let options = SliceOptions {
            read_ahead: 4 << 20,
            ..options()
        };
        let slice = Slice::new(storage.clone(), &options).unwrap();
        for page in 0..4096 {
            assert_eq!(load(&slice, page * PAGE, 4096), bytes_of(page));
        }
        let reads = storage.reads.lock().unwrap().len();
        assert!(reads < 200, "{reads} reads of 4096 pages");
    }
}

#[test]
fn every_tenth_page_is_read_ahead_and_those_between_are_not() {
    let storage = Watched::new(4096 * PAGE);
    let options = SliceOptions {
        read_ahead: 4 << 20,
        ..options()
    };
    let slice = Slice::new(storage.clone(), &options).unwrap();
    for step in 0..20 {
        assert_eq!(load(&slice, step * 10 * PAGE, 4096), bytes_of(step * 10));
    }
    wait_until("the next is there", || {
        slice.is_at_hand(210 * PAGE..211 * PAGE)
    });
    assert!(!slice.is_at_hand(0..2 * PAGE));
    assert!(storage.bytes_read() < 200 * PAGE);
}

#[test]
fn what_was_written_is_written_back_and_nothing_else() {
    for options in both(&options()) {
        let storage = Watched::new(100 * PAGE + 100);
        let slice = Slice::new(storage.clone(), &options).unwrap();
        slice.sync().unwrap();
        assert_eq!(load(&slice, 3 * PAGE, 1), bytes_of(3)[..1]);
        slice.populate(10 * PAGE..20 * PAGE).unwrap();
        slice.sync().unwrap();
        assert_eq!(storage.written(), [], "{options:?}");
        slice.memory.store(11 * PAGE + 5, b"stored").unwrap();
        slice.memory.store(12 * PAGE, b"stored").unwrap();
        slice.memory.store(50 * PAGE, b"where nothing was").unwrap();
        slice.write_all_at(b"the end", 100 * PAGE + 93).unwrap();
        assert_eq!(
            slice.marked(0..u64::MAX),
            [
                11 * PAGE..13 * PAGE,
                50 * PAGE..51 * PAGE,
                100 * PAGE..100 * PAGE + 100
            ]
        );
        slice.sync().unwrap();
        assert_eq!(
            storage.written(),
            [
                11 * PAGE..13 * PAGE,
                50 * PAGE..51 * PAGE,
                100 * PAGE..100 * PAGE + 100
            ],
            "{options:?}"
        );
        let mut stored = [0; 6];
        storage.read_exact_at(&mut stored, 11 * PAGE + 5).unwrap();
        assert_eq!(&stored, b"stored");
        slice.sync().unwrap();
        assert_eq!(storage.written(), []);
        slice.memory.store(11 * PAGE, &[1]).unwrap();
        slice.sync().unwrap();
        assert_eq!(storage.written(), one(11 * PAGE..12 * PAGE), "{options:?}");
    }
}

/// A slice fetched what was overwritten whole a moment later.
#[test]
fn a_write_of_whole_pages_fetches_none() {
    for options in both(&options()) {
        let storage = Watched::new(100 * PAGE + 100);
        let slice = Slice::new(storage.clone(), &options).unwrap();
        slice.write_all_at(&[7; 3 * 4096], PAGE).unwrap();
        slice.write_all_at(&[7; 4096 + 100], 99 * PAGE).unwrap();
        assert_eq!(storage.bytes_read(), 0);
        slice.write_all_at(&[8; 4096], 10 * PAGE + 50).unwrap();
        // The two that it is part of.
        assert_eq!(storage.bytes_read(), 2 * PAGE);
        assert_eq!(load(&slice, 10 * PAGE + 49, 2), [bytes_of(10)[49], 8]);
        slice.sync().unwrap();
        assert_eq!(
            storage.written(),
            [
                PAGE..4 * PAGE,
                10 * PAGE..12 * PAGE,
                99 * PAGE..100 * PAGE + 100
            ]
        );
    }
}

#[test]
fn writes_of_many_threads_are_written_back_all() {
    for options in both(&options()) {
        let storage = Watched::new(256 * PAGE);
        let slice = Slice::new(storage.clone(), &options).unwrap();
        thread::scope(|scope| {
            for writer in 0..4_u8 {
                let slice = &slice;
                scope.spawn(move || {
                    for page in 0..256 {
                        let at = page * PAGE + u64::from(writer) * 16;
                        if page % 2 == 0 {
                            slice.memory.store(at, &[writer + 1; 16]).unwrap();
                        } else {
                            slice.write_all_at(&[writer + 1; 16], at).unwrap();
                        }
                    }
                });
            }
            for _ in 0..20 {
                slice.sync().unwrap();
            }
        });
        slice.sync().unwrap();
        for page in 0..256 {
            let mut stored = [0; 65];
            storage
                .memory
                .read_exact_at(&mut stored, page * PAGE)
                .unwrap();
            let expected: Vec<u8> = (1..=4).flat_map(|writer| [writer; 16]).collect();
            assert_eq!(stored[..64], expected, "page {page}, {options:?}");
            assert_eq!(stored[64], bytes_of(page)[64]);
        }
    }
}

fn faulty(pages: u64, options: &SliceOptions) -> (Arc<Watched>, Faults, Slice) {
    let storage = Watched::new(pages * PAGE);
    let faulty = Faulty::new(storage.clone());
    let faults = faulty.faults();
    let slice = Slice::new(Arc::new(faulty), options).unwrap();
    (storage, faults, slice)
}

/// A write-back failed, and the next one called everything saved.
#[test]
fn what_could_not_be_written_back_is_not_called_saved_until_it_is() {
    for options in both(&options()) {
        for operation in [Operation::Write, Operation::Flush] {
            let (storage, faults, slice) = faulty(10, &options);
            slice.write_all_at(&[7; 4096], 0).unwrap();
            slice.write_all_at(&[7; 4096], 5 * PAGE).unwrap();
            // The first two syncs; each writes twice.
            let times = if operation == Operation::Write { 4 } else { 2 };
            let fault = Fault::error(io::ErrorKind::TimedOut);
            faults.add(fault.on(operation).times(times));
            for _ in 0..2 {
                let failed = slice.sync();
                assert_eq!(failed.unwrap_err().kind(), io::ErrorKind::TimedOut);
                storage.written();
            }
            assert_eq!(
                slice.marked(0..u64::MAX),
                [0..PAGE, 5 * PAGE..6 * PAGE],
                "{operation:?}"
            );
            slice.sync().unwrap();
            assert_eq!(storage.written(), [0..PAGE, 5 * PAGE..6 * PAGE]);
            assert_eq!(slice.marked(0..u64::MAX), []);
        }
    }
}

#[test]
fn who_waits_for_a_storage_that_fails_gets_the_page_when_it_is_well_again() {
    let options = SliceOptions {
        failure: Failure::Wait,
        ..options()
    };
    let (_, faults, slice) = faulty(10, &options);
    faults.add(Fault::error(io::ErrorKind::ConnectionReset).times(3));
    assert_eq!(load(&slice, 3 * PAGE, 4096), bytes_of(3));
    assert_eq!(faults.struck(), 3);
}

#[test]
fn a_stalled_page_holds_up_nobody_who_waits_for_another() {
    let (_, faults, slice) = faulty(10, &options());
    let slice = Arc::new(slice);
    faults.add(Fault::stall(PATIENCE).within(0..8 * PAGE));
    // No neighbours, which would be one read.
    let stalled: Vec<_> = [0, 2, 4, 6]
        .into_iter()
        .map(|page| {
            let slice = Arc::clone(&slice);
            (page, in_thread(move || load(&slice, page * PAGE, 4096)))
        })
        .collect();
    faults.await_stalled(4, PATIENCE);
    assert_eq!(load(&slice, 9 * PAGE, 4096), bytes_of(9));
    faults.clear();
    for (page, stalled) in stalled {
        assert_eq!(stalled.recv_timeout(PATIENCE).unwrap(), bytes_of(page));
    }
}

#[test]
fn the_methods_report_a_storage_that_fails_and_work_once_it_does_not() {
    let options = SliceOptions {
        failure: Failure::Poison {
            after: Duration::ZERO,
        },
        ..options()
    };
    let (_, faults, slice) = faulty(10, &options);
    faults.add(Fault::error(io::ErrorKind::TimedOut).on(Operation::Read));
    let failed = slice.read_exact_at(&mut [0; 10], PAGE - 5);
    assert_eq!(failed.unwrap_err().kind(), io::ErrorKind::TimedOut);
    assert!(slice.write_all_at(&[1], 9 * PAGE).is_err());
    assert!(slice.populate(0..10 * PAGE).is_err());
    // As a fault does; what was written is asked for while some are poisoned.
    assert!(slice.service.pager.poison(&(4..6)).unwrap());
    assert_eq!(slice.marked(0..u64::MAX), []);
    slice.sync().unwrap();
    faults.clear();
    let mut buf = [0; 4096];
    slice.read_exact_at(&mut buf, 4 * PAGE).unwrap();
    assert_eq!(buf[..], bytes_of(4));
    slice.write_all_at(&[3; 4096], 5 * PAGE).unwrap();
    assert_eq!(load(&slice, 5 * PAGE, 1), [3]);
    assert_eq!(slice.marked(0..u64::MAX), one(5 * PAGE..6 * PAGE));
}

#[test]
fn bytes_that_come_on_their_own_are_installed_where_nothing_is() {
    let storage = Watched::new(10 * PAGE + 7);
    let slice = Slice::new(storage.clone(), &options()).unwrap();
    slice.write_all_at(&[1; 4096], PAGE).unwrap();
    slice.install(0, &[9; 3 * 4096]).unwrap();
    slice.install(10 * PAGE, &[9; 7]).unwrap();
    assert_eq!(load(&slice, 0, 1), [9]);
    assert_eq!(load(&slice, PAGE, 1), [1]);
    assert_eq!(load(&slice, 10 * PAGE, 7), [9; 7]);
    assert_eq!(storage.bytes_read(), 0);
    assert_eq!(slice.marked(0..u64::MAX), one(PAGE..2 * PAGE));
    for (offset, len) in [(1, 4096), (0, 100), (10 * PAGE, 8)] {
        assert!(slice.install(offset, &vec![0; len]).is_err());
    }
}

#[test]
fn what_has_changed_in_the_storage_is_seen_after_it_is_invalidated_and_writes_are_kept() {
    for options in both(&options()) {
        let storage = Watched::new(10 * PAGE);
        let slice = Slice::new(storage.clone(), &options).unwrap();
        slice.populate(0..10 * PAGE).unwrap();
        storage.memory.write_all_at(&[9; 10 * 4096], 0).unwrap();
        slice.write_all_at(&[1], 5 * PAGE).unwrap();
        let busy = slice.invalidate(4 * PAGE..6 * PAGE).unwrap_err();
        assert_eq!(busy.kind(), io::ErrorKind::ResourceBusy);
        slice.invalidate(2 * PAGE..3 * PAGE).unwrap();
        slice.invalidate(100 * PAGE..u64::MAX).unwrap();
        assert_eq!(load(&slice, 2 * PAGE, 4096), [9; 4096]);
        assert_eq!(load(&slice, 3 * PAGE, 4096), bytes_of(3));
        slice.sync().unwrap();
        slice.invalidate(0..u64::MAX).unwrap();
        assert_eq!(load(&slice, 4 * PAGE, 4096), [9; 4096]);
        assert_eq!(load(&slice, 5 * PAGE, 2), [1, bytes_of(5)[1]]);
    }
}

#[test]
fn a_page_that_was_read_before_it_was_invalidated_is_not_installed_afterwards() {
    let (storage, faults, slice) = faulty(10, &options());
    let slice = Arc::new(slice);
    faults.add(Fault::stall(PATIENCE).times(1));
    let reader = in_thread({
        let slice = Arc::clone(&slice);
        move || load(&slice, 0, 4096)
    });
    faults.await_stalled(1, PATIENCE);
    storage.memory.write_all_at(&[9; 4096], 0).unwrap();
    slice.invalidate(0..PAGE).unwrap();
    faults.clear();
    assert_eq!(reader.recv_timeout(PATIENCE).unwrap(), [9; 4096]);
}

#[test]
fn a_slice_that_is_read_only_refuses_writes() {
    let options = SliceOptions {
        read_only: true,
        ..options()
    };
    let slice = Slice::new(Watched::new(PAGE), &options).unwrap();
    let refused = slice.write_all_at(&[1], 0).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ReadOnlyFilesystem);
    assert_eq!(load(&slice, 0, 4096), bytes_of(0));
    slice.sync().unwrap();
    assert_eq!(slice.marked(0..PAGE), []);
}

#[test]
fn a_terabyte_is_there_at_once() {
    let start = Instant::now();
    let storage = Arc::new(MemoryStorage::new(1 << 40));
    let slice = Slice::new(storage, &options()).unwrap();
    slice.write_all_at(&[5], (1 << 40) - 1).unwrap();
    slice.sync().unwrap();
    assert_eq!(load(&slice, (1 << 40) - 2, 2), [0, 5]);
    assert!(start.elapsed() < PATIENCE);
}

/// A connection to who sends a page for each 16 bytes.
#[derive(Debug)]
struct Wire(Mutex<TcpStream>);

impl Wire {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        client.set_nodelay(true).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        server.set_nodelay(true).unwrap();
        thread::spawn(move || {
            let mut request = [0; 16];
            while server.read_exact(&mut request).is_ok() && server.write_all(&[7; 4096]).is_ok() {}
        });
        Self(Mutex::new(client))
    }

    fn page(&self, buf: &mut [u8]) -> io::Result<()> {
        let mut wire = self.0.lock().unwrap();
        wire.write_all(&[1; 16])?;
        wire.read_exact(buf)
    }
}

impl Storage for Wire {
    fn len(&self) -> u64 {
        2000 * PAGE
    }

    fn read_exact_at(&self, buf: &mut [u8], _: u64) -> io::Result<()> {
        self.page(buf)
    }

    fn write_all_at(&self, _: &[u8], _: u64) -> io::Result<()> {
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn data_ranges(&self, within: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        Ok(one(within))
    }
}

/// The latencies of faults at pages in no order, half and 99 of 100, in microseconds.
fn latencies(memory: &Memory) -> (f64, f64) {
    let mut took: Vec<_> = (0..2000)
        .map(|n| {
            let start = Instant::now();
            memory.load(n * 787 % 2000 * PAGE, &mut [0]).unwrap();
            start.elapsed()
        })
        .collect();
    took.sort_unstable();
    (
        took[1000].as_secs_f64() * 1e6,
        took[1980].as_secs_f64() * 1e6,
    )
}

/// Reads a fault, asks for the page, installs it: as little as can be done, in one thread.
fn bare_loop() -> (f64, f64) {
    let memory = Memory::reserve(2000 * PAGE).unwrap();
    let uffd = Uffd::create(Scope::UserModeOnly, Features::none()).unwrap();
    let missing = Mode {
        missing: true,
        ..Mode::default()
    };
    uffd.register(memory.addresses(), missing).unwrap();
    let wire = Wire::new();
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut page = [0; 4096];
            let mut events = Vec::new();
            for _ in 0..2000 {
                while uffd.read_events(&mut events).unwrap() == 0 {
                    let mut polled = [PollFd::new(&uffd, PollFlags::IN)];
                    rustix::event::poll(&mut polled, None).unwrap();
                }
                for event in events.drain(..) {
                    if let Event::Fault { address, .. } = event {
                        wire.page(&mut page).unwrap();
                        uffd.install(address, &page, PAGE).unwrap();
                    }
                }
            }
        });
        latencies(&memory)
    })
}

#[test]
#[ignore = "measurement"]
fn measure_the_first_page() {
    for pinned in [true, false] {
        let measured = in_thread(move || {
            if pinned {
                let mut processors = CpuSet::new();
                processors.set(0);
                // The threads that are started from here stay there, too.
                rustix::thread::sched_setaffinity(None, &processors).unwrap();
            }
            for _ in 0..3 {
                let bare = bare_loop();
                let options = SliceOptions {
                    read_ahead: 8 << 20,
                    ..options()
                };
                let slice = Slice::new(Arc::new(Wire::new()), &options).unwrap();
                let ours = latencies(&slice.memory);
                println!(
                    "pinned {pinned}: bare {:.1}/{:.1} us, slice {:.1}/{:.1} us, {:.2} times as long",
                    bare.0,
                    bare.1,
                    ours.0,
                    ours.1,
                    ours.0 / bare.0
                );
            }
        });
        measured.recv_timeout(PATIENCE * 3).unwrap();
    }
}
