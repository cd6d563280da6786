use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use super::*;
use crate::backend::MemoryStorage;
use crate::chunk::{ChunkIndex, ChunkSize, Fault, Faults, Faulty, Operation};
use crate::mount::{ManagedOptions, Priority, Push};

mod model;
mod together;

const PAGE: u64 = 4096;
const LONG: Duration = Duration::from_secs(20);

/// A link to memory: so far away, and so narrow. Urgent reads do not queue behind the others.
#[derive(Debug)]
struct Far {
    memory: Arc<MemoryStorage>,
    trip: Duration,
    rate: f64,
    /// When the link is free again.
    free: Mutex<Instant>,
    read: AtomicU64,
    reads: AtomicU64,
}

impl Far {
    fn new(memory: Arc<MemoryStorage>, trip: Duration, rate: f64) -> Arc<Self> {
        Arc::new(Self {
            memory,
            trip,
            rate,
            free: Mutex::new(Instant::now()),
            read: AtomicU64::new(0),
            reads: AtomicU64::new(0),
        })
    }

    fn carry(&self, len: usize) {
        let comes = {
            let mut free = self.free.lock().unwrap();
            *free = (*free).max(Instant::now() + self.trip)
                + Duration::from_secs_f64(len as f64 / self.rate);
            *free
        };
        loop {
            let left = comes.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            thread::park_timeout(left);
        }
    }
}

impl Storage for Far {
    fn len(&self) -> u64 {
        self.memory.len()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.read.fetch_add(buf.len() as u64, Ordering::Relaxed);
        self.carry(buf.len());
        self.memory.read_exact_at(buf, offset)
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.carry(buf.len());
        self.memory.write_all_at(buf, offset)
    }

    fn zero(&self, range: Range<u64>) -> io::Result<()> {
        self.memory.zero(range)
    }

    fn flush(&self) -> io::Result<()> {
        self.memory.flush()
    }

    fn data_ranges(&self, within: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        self.memory.data_ranges(within)
    }
}

fn filled(len: u64) -> (Arc<MemoryStorage>, Vec<u8>) {
    let memory = Arc::new(MemoryStorage::new(len));
    let bytes: Vec<u8> = (0..len)
        .map(|at| u8::try_from((at / PAGE * 7 + at % 251) % 255).unwrap() + 1)
        .collect();
    memory.write_all_at(&bytes, 0).unwrap();
    (memory, bytes)
}

struct Mount {
    managed: Managed,
    remote: Arc<MemoryStorage>,
    remote_faults: Faults,
    local_faults: Faults,
    bytes: Vec<u8>,
}

fn quiet() -> ManagedOptions {
    ManagedOptions {
        pull: false,
        read_ahead: false,
        push: Push::OnFlush,
        deadline: LONG,
        ..ManagedOptions::default()
    }
}

fn mount(len: u64, options: &ManagedOptions) -> Mount {
    mount_with(len, options, |_, _| {})
}

fn mount_with(len: u64, options: &ManagedOptions, first: impl FnOnce(&Faults, &Faults)) -> Mount {
    let (remote, bytes) = filled(len);
    let faulty_remote = Faulty::new(remote.clone());
    let faulty_local = Faulty::new(Arc::new(MemoryStorage::new(len)));
    let (remote_faults, local_faults) = (faulty_remote.faults(), faulty_local.faults());
    first(&remote_faults, &local_faults);
    let managed = Managed::open(Arc::new(faulty_remote), Arc::new(faulty_local), options).unwrap();
    Mount {
        managed,
        remote,
        remote_faults,
        local_faults,
        bytes,
    }
}

fn all_of(storage: &dyn Storage) -> io::Result<Vec<u8>> {
    let mut buf = vec![0xEE; usize::try_from(storage.len()).unwrap()];
    storage.read_exact_at(&mut buf, 0)?;
    Ok(buf)
}

impl Mount {
    fn write(&mut self, bytes: &[u8], offset: u64) {
        self.managed.write_all_at(bytes, offset).unwrap();
        let at = usize::try_from(offset).unwrap();
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    #[track_caller]
    fn saved(&self) {
        assert!(all_of(&*self.remote).unwrap() == self.bytes);
    }
}

mod with_everything {
    use super::*;

    crate::chunk::conformance::storage_conformance!(|len| {
        let (remote, local) = (MemoryStorage::new(len), MemoryStorage::new(len));
        let options = ManagedOptions {
            push: Push::Every(Duration::from_millis(1)),
            ..ManagedOptions::default()
        };
        Arc::new(Managed::open(Arc::new(remote), Arc::new(local), &options).unwrap()) as _
    });
}

mod by_large_chunks {
    use super::*;

    crate::chunk::conformance::storage_conformance!(|len| {
        let (remote, local) = (MemoryStorage::new(len), MemoryStorage::new(len));
        let options = ManagedOptions {
            chunk_size: ChunkSize::new(64 << 10).unwrap(),
            ..quiet()
        };
        Arc::new(Managed::open(Arc::new(remote), Arc::new(local), &options).unwrap()) as _
    });
}

#[test]
fn everything_is_pulled_whatever_its_size() {
    for len in [1, 100, 4096, 4097, 1_000_003] {
        for size in [4096, 1 << 20] {
            let options = ManagedOptions {
                chunk_size: ChunkSize::new(size).unwrap(),
                ..ManagedOptions::default()
            };
            let mount = mount(len, &options);
            mount.managed.wait_for_all(LONG).unwrap();
            let progress = mount.managed.progress();
            assert_eq!(
                (progress.bytes, progress.resident, progress.dirty),
                (len, len, 0)
            );
            mount.remote_faults.add(Fault::error(io::ErrorKind::Other));
            assert!(all_of(&mount.managed).unwrap() == mount.bytes);
        }
    }
}

#[test]
fn opening_can_wait_until_everything_is_here() {
    let options = ManagedOptions {
        pull_first: true,
        ..quiet()
    };
    let mount = mount(300_000, &options);
    assert_eq!(mount.managed.progress().resident, 300_000);
    let options = ManagedOptions {
        deadline: Duration::from_millis(50),
        ..options
    };
    let (remote, _) = filled(PAGE);
    let remote = Faulty::new(remote);
    remote
        .faults()
        .add(Fault::error(io::ErrorKind::ConnectionRefused).on(Operation::Read));
    let error = Managed::open(
        Arc::new(remote),
        Arc::new(MemoryStorage::new(PAGE)),
        &options,
    )
    .unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    assert!(
        error.to_string().contains("a fault that a test asked for"),
        "{error}"
    );
}

#[test]
fn the_chunks_of_the_highest_priority_come_first() {
    let came = Arc::new(Mutex::new(Vec::new()));
    let heard = Arc::clone(&came);
    let options = ManagedOptions {
        pull_priority: Some(Priority::new(|chunk| {
            i64::from((50..60).contains(&chunk.0))
        })),
        window: Some(PAGE),
        hooks: Hooks {
            chunk_is_local: Some(Arc::new(move |chunk: ChunkIndex| {
                heard.lock().unwrap().push(chunk.0);
            })),
            ..Hooks::default()
        },
        ..ManagedOptions::default()
    };
    let mount = mount(100 * PAGE, &options);
    mount.managed.wait_for_all(LONG).unwrap();
    let came = came.lock().unwrap();
    assert_eq!(came[..12], [50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 0, 1]);
    assert_eq!(came.len(), 100);
}

#[test]
fn holes_are_not_fetched() {
    let remote = Arc::new(MemoryStorage::new(1 << 30));
    remote.write_all_at(&[7; 8192], 512 << 20).unwrap();
    let far = Far::new(remote, Duration::ZERO, 50e6);
    let local = Arc::new(MemoryStorage::new(1 << 30));
    let managed = Managed::open(far.clone(), local, &ManagedOptions::default()).unwrap();
    managed.wait_for_all(LONG).unwrap();
    assert!(far.read.load(Ordering::Relaxed) < 64 << 20);
    let mut buf = [0; 8192];
    managed.read_exact_at(&mut buf, 512 << 20).unwrap();
    assert_eq!(buf, [7; 8192]);
}

#[test]
fn a_back_end_that_errs_fails_its_readers_and_the_mount_recovers() {
    let mount = mount_with(100 * PAGE, &ManagedOptions::default(), |remote, _| {
        remote.add(Fault::error(io::ErrorKind::ConnectionReset).on(Operation::Read));
    });
    let error = all_of(&mount.managed).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    // What is written whole needs no back end.
    mount.managed.write_all_at(&[1; 4096], 0).unwrap();
    mount.managed.read_exact_at(&mut [0; 4096], 0).unwrap();
    while mount.remote_faults.struck() < 10 {
        thread::yield_now();
    }
    let why = mount.managed.progress().last_pull_error;
    assert!(why.unwrap().contains("a fault"), "the user can see why");
    mount.remote_faults.clear();
    mount.managed.wait_for_all(LONG).unwrap();
}

#[test]
fn one_bad_place_holds_back_nothing_else() {
    let mount = mount_with(1000 * PAGE, &ManagedOptions::default(), |remote, _| {
        remote.add(
            Fault::error(io::ErrorKind::Other)
                .on(Operation::Read)
                .within(500 * PAGE..501 * PAGE),
        );
    });
    let deadline = Instant::now() + LONG;
    while mount.managed.progress().resident < 999 * PAGE {
        assert!(Instant::now() < deadline, "{:?}", mount.managed.progress());
        thread::yield_now();
    }
    mount.remote_faults.clear();
    mount.managed.wait_for_all(LONG).unwrap();
}

#[test]
fn a_back_end_that_stalls_holds_up_those_only_who_need_it() {
    let options = ManagedOptions {
        window: Some(64 << 10),
        ..ManagedOptions::default()
    };
    let mount = mount_with(100 * PAGE, &options, |remote, _| {
        remote.add(Fault::stall(LONG).on(Operation::Read).within(0..PAGE));
    });
    mount.remote_faults.await_stalled(1, LONG);
    mount
        .managed
        .read_exact_at(&mut [0; 4096], 50 * PAGE)
        .unwrap();
    mount.managed.write_all_at(&[1; 4096], 60 * PAGE).unwrap();
    mount.managed.flush().unwrap();
    mount.remote_faults.clear();
    mount.managed.wait_for_all(LONG).unwrap();
}

#[test]
fn what_is_flushed_is_at_the_remote_end_and_what_is_not_is_dirty() {
    let mut mount = mount(100 * PAGE + 10, &quiet());
    mount.write(&[1; 10_000], 5000);
    mount.write(&[2; 10], 100 * PAGE);
    assert_eq!(mount.managed.progress().dirty, 3 * PAGE + 10);
    assert_eq!(mount.managed.dirty().len(), 2);
    mount.managed.flush().unwrap();
    mount.saved();
    assert_eq!(mount.managed.progress().dirty, 0);
    mount.managed.zero(0..20 * PAGE).unwrap();
    mount.bytes[..81_920].fill(0);
    mount.managed.flush().unwrap();
    mount.saved();
    // A hole is pushed as a hole.
    assert_eq!(mount.remote.data_ranges(0..16 * PAGE).unwrap().len(), 0);
}

#[test]
fn a_push_that_failed_is_reported_and_tried_again_and_never_called_saved() {
    let mut mount = mount(100 * PAGE, &quiet());
    mount.write(&[1; 4096], 0);
    mount.write(&[2; 4096], 50 * PAGE);
    mount.remote_faults.add(
        Fault::error(io::ErrorKind::ConnectionReset)
            .on(Operation::Write)
            .within(50 * PAGE..51 * PAGE),
    );
    for _ in 0..3 {
        let error = mount.managed.flush().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        assert_eq!(mount.managed.progress().dirty, 2 * PAGE);
        assert!(mount.managed.progress().last_push_error.is_some());
    }
    mount.remote_faults.clear();
    mount.managed.flush().unwrap();
    mount.saved();
    assert_eq!(mount.managed.progress().last_push_error, None);
}

#[test]
fn what_a_failed_flush_leaves_in_doubt_is_pushed_again() {
    let mut mount = mount(100 * PAGE, &quiet());
    mount.write(&[1; 4096], 0);
    mount.remote_faults.add(
        Fault::error(io::ErrorKind::Other)
            .on(Operation::Flush)
            .times(1),
    );
    assert!(mount.managed.flush().is_err());
    // The server has lost what it had not made durable.
    mount.remote.zero(0..PAGE).unwrap();
    mount.managed.flush().unwrap();
    mount.saved();
}

#[test]
fn a_chunk_that_is_written_while_it_is_pushed_stays_dirty() {
    let mut mount = mount(100 * PAGE, &quiet());
    mount.write(&[1; 4096], 0);
    mount
        .remote_faults
        .add(Fault::stall(LONG).on(Operation::Write).times(1));
    thread::scope(|scope| {
        let managed = &mount.managed;
        let flush = scope.spawn(|| managed.flush());
        mount.remote_faults.await_stalled(1, LONG);
        managed.write_all_at(&[3; 4096], 0).unwrap();
        mount.remote_faults.release();
        flush.join().unwrap().unwrap();
        assert_eq!(managed.progress().dirty, PAGE);
        managed.flush().unwrap();
    });
    mount.bytes[..4096].fill(3);
    mount.saved();
}

#[test]
fn a_flush_waits_for_what_others_push() {
    let mut mount = mount(100 * PAGE, &quiet());
    mount.write(&[1; 4096], 0);
    mount
        .remote_faults
        .add(Fault::stall(LONG).on(Operation::Write).times(1));
    thread::scope(|scope| {
        let managed = &mount.managed;
        let first = scope.spawn(|| managed.flush());
        mount.remote_faults.await_stalled(1, LONG);
        let second = scope.spawn(|| managed.flush());
        for _ in 0..1000 {
            assert!(!second.is_finished(), "nothing is saved yet");
            thread::yield_now();
        }
        mount.remote_faults.release();
        first.join().unwrap().unwrap();
        second.join().unwrap().unwrap();
    });
    mount.saved();
}

#[test]
fn what_is_written_is_pushed_at_intervals_and_again_after_a_failure() {
    let options = ManagedOptions {
        push: Push::Every(Duration::from_millis(2)),
        ..quiet()
    };
    let mut mount = mount(100 * PAGE, &options);
    mount.remote_faults.add(
        Fault::error(io::ErrorKind::Other)
            .on(Operation::Write)
            .times(3),
    );
    mount.write(&[1; 4096], 7 * PAGE);
    let deadline = Instant::now() + LONG;
    while mount.managed.progress().dirty > 0 {
        assert!(Instant::now() < deadline);
        thread::yield_now();
    }
    mount.saved();
}

#[test]
fn what_is_never_pushed_stays_here_and_a_flush_makes_it_durable_here() {
    let mount = mount(
        10 * PAGE,
        &ManagedOptions {
            push: Push::Never,
            ..quiet()
        },
    );
    mount.managed.write_all_at(&[9; 4096], 0).unwrap();
    mount.local_faults.add(
        Fault::error(io::ErrorKind::Other)
            .on(Operation::Flush)
            .times(1),
    );
    assert!(mount.managed.flush().is_err());
    mount.managed.flush().unwrap();
    mount.managed.close(LONG).unwrap();
    mount.saved();
}

#[test]
fn a_mount_that_is_read_only_refuses_to_write() {
    let mount = mount(
        10 * PAGE,
        &ManagedOptions {
            read_only: true,
            ..ManagedOptions::default()
        },
    );
    let error = mount.managed.write_all_at(&[1], 0).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
    assert!(mount.managed.zero(0..PAGE).is_err());
    mount.managed.flush().unwrap();
    mount.managed.close(LONG).unwrap();
    mount.saved();
}

#[test]
fn closing_saves_everything_even_if_it_takes_several_attempts() {
    let mut mount = mount(100 * PAGE, &quiet());
    mount.write(&[5; 20_000], 777);
    mount.remote_faults.add(
        Fault::error(io::ErrorKind::ConnectionReset)
            .on(Operation::Write)
            .times(2),
    );
    mount.managed.close(LONG).unwrap();
    mount.saved();
    assert!(mount.managed.write_all_at(&[1], 0).is_err());
    assert!(mount.managed.read_exact_at(&mut [1], 90 * PAGE).is_err());
    mount.managed.close(LONG).unwrap();
}

#[test]
fn closing_says_what_is_lost_and_does_not_wait_for_ever() {
    let lost = |fault: Fault| {
        let mut mount = mount(100 * PAGE, &quiet());
        mount.write(&[5; 100], 10 * PAGE);
        mount.write(&[5; 100], 20 * PAGE);
        mount
            .remote_faults
            .add(fault.on(Operation::Write).within(20 * PAGE..21 * PAGE));
        let before = Instant::now();
        let error = mount.managed.close(Duration::from_millis(100)).unwrap_err();
        assert!(before.elapsed() < LONG / 2);
        assert!(
            mount.managed.close(Duration::from_millis(20)).is_err(),
            "it is still not saved"
        );
        mount.remote_faults.clear();
        mount.managed.close(LONG).unwrap();
        mount.saved();
        match error {
            CloseError::Lost { ranges, .. } => ranges,
            other => panic!("{other}"),
        }
    };
    let both = [10 * PAGE..11 * PAGE, 20 * PAGE..21 * PAGE];
    assert_eq!(lost(Fault::error(io::ErrorKind::ConnectionReset)), both);
    assert_eq!(lost(Fault::stall(LONG)), both);
}

#[test]
fn hooks_are_called_in_their_order_and_abort_what_called_them() {
    let calls = Arc::new(Mutex::new(Vec::new()));
    let fail = Arc::new(AtomicBool::new(true));
    let hook = |name: &'static str| -> crate::mount::Hook {
        let (calls, fail) = (Arc::clone(&calls), Arc::clone(&fail));
        Arc::new(move || {
            calls.lock().unwrap().push(name);
            if fail.load(Ordering::Relaxed) {
                return Err(io::Error::other(name));
            }
            Ok(())
        })
    };
    let local = Arc::clone(&calls);
    let mount = mount(
        10 * PAGE,
        &ManagedOptions {
            hooks: Hooks {
                before_sync: Some(hook("sync")),
                before_close: Some(hook("close")),
                chunk_is_local: Some(Arc::new(move |_| local.lock().unwrap().push("local"))),
            },
            push: Push::Never,
            ..quiet()
        },
    );
    mount.managed.read_exact_at(&mut [0; 4096], 0).unwrap();
    mount.managed.write_all_at(&[0; 4096], PAGE).unwrap();
    assert!(mount.managed.sync().is_err());
    assert!(matches!(
        mount.managed.close(LONG),
        Err(CloseError::Hook(_))
    ));
    mount.managed.write_all_at(&[0; 4096], PAGE).unwrap();
    fail.store(false, Ordering::Relaxed);
    mount.managed.sync().unwrap();
    mount.managed.close(LONG).unwrap();
    mount.managed.close(LONG).unwrap();
    assert_eq!(
        *calls.lock().unwrap(),
        ["local", "local", "sync", "sync", "sync", "sync", "close"]
    );
}

#[test]
fn dropping_it_in_the_middle_ends_its_threads() {
    let (remote, _) = filled(64 << 20);
    let far = Far::new(remote, Duration::from_millis(1), 20e6);
    let weak = Arc::downgrade(&far);
    let local = Arc::new(MemoryStorage::new(64 << 20));
    let options = ManagedOptions {
        push: Push::Every(Duration::from_millis(1)),
        ..ManagedOptions::default()
    };
    let managed = Managed::open(far, local, &options).unwrap();
    managed.write_all_at(&[1; 4096], 0).unwrap();
    managed.read_exact_at(&mut [0; 4096], 60 << 20).unwrap();
    drop(managed);
    let deadline = Instant::now() + LONG;
    while weak.strong_count() > 0 {
        assert!(
            Instant::now() < deadline,
            "a thread still has the remote end"
        );
        thread::yield_now();
    }
}

#[test]
fn who_reads_in_sequence_waits_seldom_without_a_pull_of_everything() {
    let (remote, bytes) = filled(16 << 20);
    let far = Far::new(remote, Duration::from_millis(10), 125e6);
    let local = Arc::new(MemoryStorage::new(16 << 20));
    let options = ManagedOptions {
        read_ahead: true,
        ..quiet()
    };
    let managed = Managed::open(far.clone(), local, &options).unwrap();
    let mut buf = vec![0; 16 << 10];
    let before = Instant::now();
    for (offset, expected) in (0..).step_by(16 << 10).zip(bytes.chunks(16 << 10)) {
        managed.read_exact_at(&mut buf, offset).unwrap();
        assert!(buf == expected);
    }
    // One by one it would take 10 s.
    assert!(
        before.elapsed() < Duration::from_secs(4),
        "{:?}",
        before.elapsed()
    );
    assert!(far.read.load(Ordering::Relaxed) < 18 << 20);
}

#[test]
fn who_reads_here_and_there_gets_just_that() {
    let remote = Arc::new(MemoryStorage::new(1 << 34));
    let far = Far::new(remote, Duration::ZERO, 1e9);
    let options = ManagedOptions {
        read_ahead: true,
        ..quiet()
    };
    let local = Arc::new(MemoryStorage::new(1 << 34));
    let managed = Managed::open(far.clone(), local, &options).unwrap();
    let mut place = 1_u64;
    for _ in 0..200 {
        place = place
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        managed
            .read_exact_at(&mut [0; 4096], (place >> 20) % (1 << 22) * PAGE)
            .unwrap();
    }
    assert!(far.read.load(Ordering::Relaxed) <= 200 * PAGE);
}

/// At 30 ms and 1 Gbit/s, with the default settings and opening included.
#[test]
#[ignore = "measurement"]
fn reading_everything_fills_the_link() {
    const LEN: u64 = 256 << 20;
    let (remote, bytes) = filled(LEN);
    for millis in [1, 10, 30, 100] {
        let far = Far::new(remote.clone(), Duration::from_millis(millis), 125e6);
        let local = Arc::new(MemoryStorage::new(LEN));
        local.write_all_at(&bytes, 0).unwrap();
        let before = Instant::now();
        let managed = Managed::open(far.clone(), local, &ManagedOptions::default()).unwrap();
        let mut buf = vec![0; 256 << 10];
        let mut slowest = Duration::ZERO;
        for (offset, expected) in (0..).step_by(256 << 10).zip(bytes.chunks(256 << 10)) {
            managed.read_exact_at(&mut buf, offset).unwrap();
            assert!(buf == expected);
            slowest = slowest.max(before.elapsed());
        }
        let share = LEN as f64 / 125e6 / before.elapsed().as_secs_f64();
        println!(
            "{millis} ms: {share:.3} of the link; read {:.3} of it over the link in {} requests, {:?}",
            far.read.load(Ordering::Relaxed) as f64 / LEN as f64,
            far.reads.load(Ordering::Relaxed),
            managed.progress(),
        );
    }
}
