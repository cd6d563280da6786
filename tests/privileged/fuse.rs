//! A region as a file, through the kernel.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

use memferry::backend::{FileStorage, MemoryStorage};
use memferry::chunk::{Caches, Fault, Faulty, Operation, Storage};
use memferry::frontend::{Cache, FuseFile, FuseMountError, FuseOptions, FuseUnmountError};
use memferry::sys::mapping::Mapping;
use rustix::fs::{FallocateFlags, SeekFrom};
use tempfile::TempDir;

use crate::victim::{PATIENCE, this_binary, wait_until};

/// Where the process that is killed mounts.
pub(crate) const MOUNT_AT: &str = "MEMFERRY_FUSE_AT";

const LEN: u64 = (1 << 20) + 100;
const PAGE: u64 = 4096;

/// Memory that can be told to fail, and to let readers wait.
#[derive(Debug)]
struct Moody {
    memory: MemoryStorage,
    fails: AtomicBool,
    flushes: AtomicUsize,
    waiting: Mutex<(bool, usize)>,
    changed: Condvar,
}

impl Moody {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            memory: MemoryStorage::new(LEN),
            fails: AtomicBool::new(false),
            flushes: AtomicUsize::new(0),
            waiting: Mutex::new((false, 0)),
            changed: Condvar::new(),
        })
    }

    fn fail(&self, fails: bool) {
        self.fails.store(fails, Ordering::SeqCst);
    }

    /// Says whether readers wait from now on.
    fn hold(&self, holds: bool) {
        self.waiting.lock().unwrap().0 = holds;
        self.changed.notify_all();
    }

    /// Waits until so many readers wait.
    fn wait_for_readers(&self, count: usize) {
        let waiting = self.waiting.lock().unwrap();
        let (waiting, timeout) = self
            .changed
            .wait_timeout_while(waiting, PATIENCE, |(_, now)| *now < count)
            .unwrap();
        assert!(!timeout.timed_out(), "{} readers wait", waiting.1);
    }

    fn check(&self) -> io::Result<()> {
        if self.fails.load(Ordering::SeqCst) {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "as it was told"));
        }
        Ok(())
    }
}

impl Storage for Moody {
    fn len(&self) -> u64 {
        LEN
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let mut waiting = self.waiting.lock().unwrap();
        waiting.1 += 1;
        self.changed.notify_all();
        let (mut waiting, timeout) = self
            .changed
            .wait_timeout_while(waiting, PATIENCE, |(holds, _)| *holds)
            .unwrap();
        waiting.1 -= 1;
        drop(waiting);
        assert!(!timeout.timed_out());
        self.check()?;
        self.memory.read_exact_at(buf, offset)
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.check()?;
        self.memory.write_all_at(buf, offset)
    }

    fn zero(&self, range: Range<u64>) -> io::Result<()> {
        self.check()?;
        self.memory.zero(range)
    }

    fn flush(&self) -> io::Result<()> {
        self.check()?;
        self.flushes.fetch_add(1, Ordering::SeqCst);
        self.memory.flush()
    }

    fn data_ranges(&self, within: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        self.memory.data_ranges(within)
    }
}

fn options(cache: Cache) -> FuseOptions {
    FuseOptions {
        cache,
        ..FuseOptions::default()
    }
}

const CACHES: [Cache; 2] = [Cache::Writeback, Cache::Direct];

struct Mounted {
    file: FuseFile,
    storage: Arc<Moody>,
    // After what is mounted in it.
    _folder: TempDir,
}

fn mounted(cache: Cache) -> Mounted {
    let folder = tempfile::tempdir().unwrap();
    let storage = Moody::new();
    let file = FuseFile::mount(storage.clone(), folder.path(), &options(cache)).unwrap();
    Mounted {
        file,
        storage,
        _folder: folder,
    }
}

impl Mounted {
    fn open(&self) -> File {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(self.file.path())
            .unwrap()
    }

    fn stored(&self, range: Range<u64>) -> Vec<u8> {
        let mut buf = vec![0; usize::try_from(range.end - range.start).unwrap()];
        self.storage
            .memory
            .read_exact_at(&mut buf, range.start)
            .unwrap();
        buf
    }
}

fn is_mounted(path: &Path) -> bool {
    let list = fs::read_to_string("/proc/self/mountinfo").unwrap();
    list.lines()
        .any(|line| line.split(' ').nth(4) == path.to_str())
}

fn errno<T: std::fmt::Debug>(result: io::Result<T>) -> i32 {
    result.unwrap_err().raw_os_error().unwrap()
}

#[test]
#[ignore = "privileged: needs root and /dev/fuse"]
fn a_directory_gets_one_file_and_a_file_is_replaced_until_it_is_unmounted() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk image");
    fs::write(&image, "what was there").unwrap();
    let storage = Arc::new(MemoryStorage::new(LEN));
    storage.write_all_at(b"region", 0).unwrap();
    for at in [folder.path(), &image] {
        let options = FuseOptions {
            name: "disk image".into(),
            ..FuseOptions::default()
        };
        let file = FuseFile::mount(storage.clone(), at, &options).unwrap();
        assert_eq!(file.path(), image);
        let names: Vec<_> = fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(names, ["disk image"]);
        assert_eq!(fs::metadata(&image).unwrap().len(), LEN);
        assert_eq!(&fs::read(&image).unwrap()[..6], b"region");
        file.unmount().unwrap();
        file.unmount().unwrap();
        assert!(file.wait(PATIENCE));
        assert_eq!(fs::read(&image).unwrap(), b"what was there");
    }
}

#[test]
#[ignore = "privileged: needs root and /dev/fuse"]
fn it_is_a_storage_up_to_its_last_byte() {
    for cache in CACHES {
        let mounted = mounted(cache);
        let file = FileStorage::new(mounted.open()).unwrap();
        assert_eq!(file.len(), LEN);
        let bytes: Vec<u8> = (0..300_000_u32).map(|n| (n % 251) as u8).collect();
        file.write_all_at(&bytes, LEN - bytes.len() as u64).unwrap();
        let mut read = vec![0; bytes.len()];
        file.read_exact_at(&mut read, LEN - bytes.len() as u64)
            .unwrap();
        assert_eq!(read, bytes);
        file.flush().unwrap();
        assert_eq!(mounted.stored(LEN - bytes.len() as u64..LEN), bytes);
        file.zero(LEN - 200_000..LEN - 100_000).unwrap();
        file.flush().unwrap();
        assert!(
            mounted
                .stored(LEN - 200_000..LEN - 100_000)
                .iter()
                .all(|&byte| byte == 0)
        );
        assert_eq!(mounted.stored(LEN - 1..LEN), bytes[299_999..]);
    }
}

#[test]
#[ignore = "privileged: needs root and /dev/fuse"]
fn a_shared_mapping_reads_and_writes_the_region() {
    for cache in CACHES {
        let mounted = mounted(cache);
        mounted
            .storage
            .memory
            .write_all_at(&[7; 100], LEN - 100)
            .unwrap();
        let mapping = Mapping::new(mounted.open(), LEN).unwrap();
        assert_eq!(
            mapping.digest(LEN - 100..LEN).unwrap(),
            xxhash(&[7; 100]),
            "{cache:?}"
        );
        mapping.write(5 * PAGE + 3, b"mapped").unwrap();
        mounted.file.sync().unwrap();
        assert_eq!(mounted.stored(5 * PAGE + 3..5 * PAGE + 9), b"mapped");
        let mut read = [0; 6];
        mounted
            .open()
            .read_exact_at(&mut read, 5 * PAGE + 3)
            .unwrap();
        assert_eq!(&read, b"mapped");
    }
}

fn xxhash(bytes: &[u8]) -> u64 {
    let mapping = Mapping::anonymous(bytes.len() as u64).unwrap();
    mapping.write(0, bytes).unwrap();
    mapping.digest(0..bytes.len() as u64).unwrap()
}

/// Bytes that a migration had received were hidden by pages that had been read before: a guest saw the old ones.
#[test]
#[ignore = "privileged: needs root and /dev/fuse"]
fn what_comes_from_elsewhere_is_seen_after_its_range_is_invalidated() {
    for cache in CACHES {
        let mounted = mounted(cache);
        let mapping = Mapping::new(mounted.open(), LEN).unwrap();
        let first = |at: u64| mapping.digest(at..at + 1).unwrap();
        assert_eq!((first(0), first(PAGE)), (xxhash(&[0]), xxhash(&[0])));
        let old = fs::read(mounted.file.path()).unwrap();
        assert!(old.iter().all(|&byte| byte == 0));
        mounted
            .storage
            .memory
            .write_all_at(&[9; 2 * 4096], 0)
            .unwrap();
        mounted.file.invalidate(PAGE..2 * PAGE).unwrap();
        assert_eq!(first(PAGE), xxhash(&[9]), "{cache:?}");
        mounted.file.invalidate(0..u64::MAX).unwrap();
        mounted.file.invalidate(LEN..LEN + 1).unwrap();
        assert_eq!(first(0), xxhash(&[9]), "{cache:?}");
        assert_eq!(fs::read(mounted.file.path()).unwrap()[..8192], [9; 8192]);
    }
}

#[test]
#[ignore = "privileged: needs root and /dev/fuse"]
fn holes_are_found_where_nothing_is_cached_and_all_is_data_elsewhere() {
    let direct = mounted(Cache::Direct);
    direct
        .storage
        .memory
        .write_all_at(&[1; 4096], 64 << 10)
        .unwrap();
    let file = direct.open();
    let seek = |file: &File, to| rustix::fs::seek(file, to);
    assert_eq!(seek(&file, SeekFrom::Data(0)).unwrap(), 64 << 10);
    assert_eq!(seek(&file, SeekFrom::Hole(64 << 10)).unwrap(), 68 << 10);
    assert_eq!(seek(&file, SeekFrom::Hole(68 << 10)).unwrap(), 68 << 10);
    assert!(seek(&file, SeekFrom::Data(68 << 10)).is_err());
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&file, punch, 64 << 10, 4096).unwrap();
    assert_eq!(direct.storage.data_ranges(0..LEN).unwrap(), []);

    let cached = mounted(Cache::Writeback);
    let file = cached.open();
    // Still in the cache: to the storage it is a hole.
    file.write_all_at(&[1; 4096], 64 << 10).unwrap();
    let data = seek(&file, SeekFrom::Data(64 << 10)).unwrap();
    assert_eq!(data, 64 << 10);
    rustix::fs::fallocate(&file, punch, 64 << 10, 4096).unwrap();
    let mut byte = [1];
    file.read_exact_at(&mut byte, 64 << 10).unwrap();
    assert_eq!(byte, [0]);
    file.sync_all().unwrap();
    assert_eq!(cached.stored(64 << 10..(64 << 10) + 1), [0]);
}

#[test]
#[ignore = "privileged: needs root and /dev/fuse"]
fn its_length_stays_what_it_is() {
    for cache in CACHES {
        let mounted = mounted(cache);
        mounted.storage.memory.write_all_at(b"kept", 0).unwrap();
        let file = mounted.open();
        file.set_len(LEN).unwrap();
        assert_eq!(errno(file.set_len(LEN - 1)), libc::EPERM);
        assert_eq!(errno(file.set_len(LEN + 1)), libc::EPERM);
        assert_eq!(errno(File::create(mounted.file.path())), libc::EPERM);
        let grow = rustix::fs::fallocate(&file, FallocateFlags::empty(), LEN, 1);
        assert_eq!(grow.unwrap_err().raw_os_error(), libc::EPERM);
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, LEN).unwrap();
        let beyond = file.write_all_at(&[1], LEN).and_then(|()| file.sync_all());
        assert_eq!(errno(beyond), libc::ENOSPC, "{cache:?}");
        assert_eq!(mounted.stored(0..4), b"kept");
        assert!(
            OpenOptions::new()
                .write(true)
                .create_new(true)
                .open(mounted.file.path().with_file_name("new"))
                .is_err()
        );
    }
}

#[test]
#[ignore = "privileged: needs root and /dev/fuse"]
fn a_region_that_is_read_only_is_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let options = FuseOptions {
        read_only: true,
        ..FuseOptions::default()
    };
    let file = FuseFile::mount(Moody::new(), folder.path(), &options).unwrap();
    let refused = OpenOptions::new().write(true).open(file.path());
    assert_eq!(errno(refused), libc::EROFS);
    assert_eq!(fs::read(file.path()).unwrap().len() as u64, LEN);
    let mode = fs::metadata(file.path()).unwrap().mode();
    assert_eq!(mode & 0o777, 0o400);
}

#[test]
#[ignore = "privileged: needs root and /dev/fuse"]
fn closing_and_syncing_flush_what_was_written_and_reading_flushes_nothing() {
    for cache in CACHES {
        let mounted = mounted(cache);
        let flushes = || mounted.storage.flushes.load(Ordering::SeqCst);
        drop(mounted.open());
        fs::read(mounted.file.path()).unwrap();
        assert_eq!(flushes(), 0);
        let file = mounted.open();
        file.write_all_at(&[3], 10).unwrap();
        drop(file);
        assert_eq!(flushes(), 1, "{cache:?}");
        assert_eq!(mounted.stored(10..11), [3]);
        mounted.file.sync().unwrap();
        assert_eq!(flushes(), 2, "{cache:?}");
    }
}

#[test]
#[ignore = "privileged: needs root and /dev/fuse"]
fn what_the_storage_fails_at_fails_for_the_program_and_works_again_afterwards() {
    for cache in CACHES {
        let mounted = mounted(cache);
        let file = mounted.open();
        mounted.storage.fail(true);
        let mut byte = [0];
        assert_eq!(errno(file.read_exact_at(&mut byte, 0)), libc::EIO);
        let written = file.write_all_at(&[1; 4096], PAGE);
        assert_eq!(errno(written.and_then(|()| file.sync_all())), libc::EIO);
        assert_eq!(
            errno(file.sync_all().and_then(|()| mounted.file.sync())),
            libc::EIO
        );
        mounted.storage.fail(false);
        file.write_all_at(&[2; 4096], PAGE).unwrap();
        file.sync_all().unwrap();
        file.read_exact_at(&mut byte, PAGE).unwrap();
        assert_eq!(byte, [2]);
        assert_eq!(mounted.stored(PAGE..PAGE + 1), [2]);
    }
}

/// The kernel tells a failed write-back once to who has the file open, and takes the page for written: what a program had been told was
/// not told to who moves the region, and the bytes stayed behind.
#[test]
#[ignore = "privileged: needs root and /dev/fuse"]
fn what_could_not_be_written_back_is_told_until_it_is_written_again_or_given_up() {
    for cache in CACHES {
        let folder = tempfile::tempdir().unwrap();
        let faulty = Arc::new(Faulty::new(Arc::new(MemoryStorage::new(LEN))));
        let faults = faulty.faults();
        let region = FuseFile::mount(faulty.clone(), folder.path(), &options(cache)).unwrap();
        let open = || {
            let mut how = OpenOptions::new();
            how.read(true).write(true).open(region.path()).unwrap()
        };
        let (file, mapping) = (open(), Mapping::new(open(), LEN).unwrap());
        let fail = |byte: u8| {
            faults.add(Fault::error(io::ErrorKind::TimedOut).on(Operation::Write));
            mapping.write(PAGE, &[byte; 100]).unwrap();
            assert_eq!(errno(file.sync_all()), libc::EIO, "{cache:?}");
            faults.clear();
            file.sync_all().unwrap();
            for _ in 0..2 {
                let told = region.write_back().unwrap_err().to_string();
                assert!(told.contains("written again"), "{told}");
            }
        };
        let stored = || {
            let mut byte = [0];
            faulty.read_exact_at(&mut byte, PAGE).unwrap();
            byte[0]
        };
        fail(1);
        // Another page changes nothing.
        mapping.write(5 * PAGE, &[1]).unwrap();
        file.sync_all().unwrap();
        region.sync().unwrap_err();
        assert_eq!(stored(), 0);
        mapping.write(PAGE, &[2; 100]).unwrap();
        region.sync().unwrap();
        assert_eq!(stored(), 2);
        fail(3);
        region.invalidate(0..PAGE).unwrap();
        region.sync().unwrap_err();
        region.invalidate(PAGE + 10..PAGE + 20).unwrap();
        region.sync().unwrap();
        fail(4);
        region.forget().unwrap();
        region.sync().unwrap();
        assert_eq!(stored(), 2);
    }
}

#[test]
#[ignore = "privileged: needs root and /dev/fuse"]
fn many_reads_wait_at_once() {
    let mounted = mounted(Cache::Direct);
    mounted.storage.hold(true);
    thread::scope(|scope| {
        for reader in 0..8 {
            let file = mounted.open();
            scope.spawn(move || file.read_exact_at(&mut [0; 4096], reader * PAGE).unwrap());
        }
        mounted.storage.wait_for_readers(8);
        mounted.storage.hold(false);
    });
}

#[test]
#[ignore = "privileged: needs root and /dev/fuse"]
fn a_file_in_use_is_not_unmounted_but_can_be_detached_and_is_served_until_it_is_closed() {
    let mounted = mounted(Cache::Writeback);
    let place = mounted.file.path().parent().unwrap().to_owned();
    let file = mounted.open();
    let busy = mounted.file.unmount();
    assert!(
        matches!(busy, Err(FuseUnmountError::Busy { .. })),
        "{busy:?}"
    );
    assert!(is_mounted(&place));
    mounted.file.detach().unwrap();
    assert!(!is_mounted(&place) && !mounted.file.has_ended());
    file.write_all_at(b"late", 0).unwrap();
    file.sync_all().unwrap();
    assert_eq!(mounted.stored(0..4), b"late");
    drop(file);
    assert!(mounted.file.wait(PATIENCE));
    assert_eq!(
        mounted.file.sync().unwrap_err().kind(),
        io::ErrorKind::NotConnected
    );
    let refused = mounted.file.invalidate(0..1).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::NotConnected);
}

#[test]
#[ignore = "privileged: needs root and /dev/fuse"]
fn a_file_that_is_dropped_is_taken_away_from_who_has_it_open() {
    let Mounted { file, _folder, .. } = mounted(Cache::Writeback);
    let place = file.path().parent().unwrap().to_owned();
    let open = File::open(file.path()).unwrap();
    drop(file);
    assert!(!is_mounted(&place));
    assert!(open.read_exact_at(&mut [0], 100_000).is_err());
}

#[test]
#[ignore = "privileged: needs root and /dev/fuse"]
fn dropping_does_not_wait_for_who_waits_for_a_stalled_storage() {
    let Mounted {
        file,
        storage,
        _folder,
    } = mounted(Cache::Direct);
    storage.hold(true);
    let open = File::open(file.path()).unwrap();
    let reader = thread::spawn(move || open.read_exact_at(&mut [0], 0));
    storage.wait_for_readers(1);
    let dropping = thread::spawn(move || drop(file));
    assert!(reader.join().unwrap().is_err());
    storage.hold(false);
    dropping.join().unwrap();
}

#[test]
#[ignore = "privileged: needs root and /dev/fuse"]
fn a_place_that_is_taken_missing_or_no_file_is_refused() {
    let mounted = mounted(Cache::Writeback);
    let place = mounted.file.path().parent().unwrap();
    let again = FuseFile::mount(Moody::new(), place, &FuseOptions::default());
    assert!(
        matches!(again, Err(FuseMountError::Taken { .. })),
        "{again:?}"
    );
    for nowhere in ["/nonexistent/folder", "/dev/null", ""] {
        let refused = FuseFile::mount(Moody::new(), nowhere.as_ref(), &FuseOptions::default());
        assert!(
            matches!(refused, Err(FuseMountError::MountPoint { .. })),
            "{refused:?}"
        );
    }
}

/// Mounts at `at` and serves until it is killed; says so on standard output.
pub(crate) fn serve_until_killed(at: &Path) -> ! {
    // SAFETY: asks to be killed when the parent dies.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    let storage = Moody::new();
    let options = FuseOptions {
        unmount_after_crash: std::env::var_os(NO_HELPER).is_none(),
        ..options(Cache::Direct)
    };
    let file = FuseFile::mount(storage.clone(), at, &options).unwrap();
    storage.hold(true);
    println!("{}", file.path().display());
    loop {
        thread::park();
    }
}

const NO_HELPER: &str = "MEMFERRY_FUSE_ALONE";

/// A process that serves a region, and a reader that waits for it.
fn served_elsewhere(at: &Path, helper: bool) -> (Child, thread::JoinHandle<io::Result<()>>) {
    let mut command = this_binary();
    if !helper {
        command.env(NO_HELPER, "1");
    }
    let mut child = command
        .env(MOUNT_AT, at)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    let path = PathBuf::from(line.trim_end());
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_CLOEXEC)
        .open(path)
        .unwrap();
    let reader = thread::spawn(move || file.read_exact_at(&mut [0], 0));
    (child, reader)
}

#[test]
#[ignore = "privileged: needs root and /dev/fuse"]
fn after_a_kill_readers_fail_and_the_helper_unmounts() {
    let folder = tempfile::tempdir().unwrap();
    let (mut child, reader) = served_elsewhere(folder.path(), true);
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(reader.join().unwrap().is_err());
    wait_until("the helper has unmounted", || !is_mounted(folder.path()));
}

#[test]
#[ignore = "privileged: needs root and /dev/fuse"]
fn a_dead_mount_is_removed_by_the_next_one() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    fs::write(&image, "").unwrap();
    for at in [folder.path(), &image] {
        let (mut child, reader) = served_elsewhere(at, false);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(reader.join().unwrap().is_err());
        assert!(is_mounted(at));
        let file = FuseFile::mount(Moody::new(), at, &FuseOptions::default()).unwrap();
        let mut all = Vec::new();
        let mut open = OpenOptions::new()
            .read(true)
            .write(true)
            .open(file.path())
            .unwrap();
        open.read_to_end(&mut all).unwrap();
        assert_eq!(all.len() as u64, LEN);
        drop(open);
        file.unmount().unwrap();
        assert!(!is_mounted(at));
    }
}

#[test]
#[ignore = "measurement"]
fn measure_reading_in_sequence() {
    const LEN: u64 = 256 << 20;
    for cache in CACHES {
        let folder = tempfile::tempdir().unwrap();
        let memory = Arc::new(MemoryStorage::new(LEN));
        for offset in (0..LEN).step_by(1 << 20) {
            memory.write_all_at(&[1; 1 << 20], offset).unwrap();
        }
        let region = FuseFile::mount(memory, folder.path(), &options(cache)).unwrap();
        let file = File::open(region.path()).unwrap();
        let mut buf = vec![0; 1 << 20];
        for round in ["first", "second"] {
            let start = std::time::Instant::now();
            for offset in (0..LEN).step_by(1 << 20) {
                file.read_exact_at(&mut buf, offset).unwrap();
            }
            let rate = LEN as f64 / start.elapsed().as_secs_f64() / 1e9;
            println!("{cache:?}, 1 MiB at once, {round} time: {rate:.2} GB/s");
        }
    }
}
