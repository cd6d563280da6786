use std::fs::File;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::mm::Advice;
use xxhash_rust::xxh3::xxh3_64;

use super::*;
use crate::sys::mapping::Mapping;

const PAGE: u64 = 4096;

const MISSING: Mode = Mode {
    missing: true,
    wp: false,
    minor: false,
};

/// Sixteen pages of memory, all missing, whose faults the userfaultfd gets.
fn watched(features: Features, mode: Mode) -> (Arc<Mapping>, Uffd) {
    let memory = Arc::new(Mapping::anonymous(16 * PAGE).unwrap());
    let uffd = Uffd::create(Scope::UserModeOnly, features).unwrap();
    uffd.register(memory.addresses(), mode).unwrap();
    (memory, uffd)
}

fn missing() -> (Arc<Mapping>, Uffd) {
    watched(Features::MISSING_SHMEM, MISSING)
}

/// The next `count` events; panics if they do not come in ten seconds.
fn next_events(uffd: &Uffd, count: usize) -> Vec<Event> {
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut events = Vec::new();
    while events.len() < count {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).unwrap();
        let mut polled = [PollFd::new(uffd, PollFlags::IN)];
        let ready = rustix::event::poll(&mut polled, Some(&timeout)).unwrap();
        assert_eq!(ready, 1, "{events:?} and then nothing");
        uffd.read_events(&mut events).unwrap();
    }
    events
}

/// Loads the bytes of a page in another thread, which faults, and answers with their digest.
fn load(memory: &Arc<Mapping>, page: u64) -> Receiver<u64> {
    let memory = Arc::clone(memory);
    in_thread(move || memory.digest(page * PAGE..(page + 1) * PAGE).unwrap())
}

/// Runs `work` in a thread. One that never ends is woken when the test fails and drops its userfaultfd.
fn in_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Receiver<T> {
    let (answer, answers) = mpsc::sync_channel(1);
    thread::spawn(move || answer.send(work()));
    answers
}

/// What the thread answers; panics if it does not in ten seconds.
fn answer<T>(thread: &Receiver<T>) -> T {
    thread
        .recv_timeout(Duration::from_secs(10))
        .expect("the thread was woken and went on")
}

fn pages(memory: &Mapping, pages: Range<u64>) -> Range<u64> {
    let start = memory.addresses().start;
    start + pages.start * PAGE..start + pages.end * PAGE
}

#[test]
fn a_thread_that_faults_gets_the_page_that_is_installed() {
    let (memory, uffd) = missing();
    let reader = load(&memory, 3);
    let address = pages(&memory, 3..4).start;
    match &next_events(&uffd, 1)[..] {
        [
            Event::Fault {
                address: at,
                write: false,
                wp: false,
                minor: false,
            },
        ] => {
            assert_eq!(*at, address);
        }
        other => panic!("{other:?}"),
    }
    let data = [7; 4096];
    let installed = uffd.install(address, &data, PAGE).unwrap();
    assert_eq!(
        (installed.bytes, installed.done, installed.stopped),
        (PAGE, PAGE, None)
    );
    assert_eq!(answer(&reader), xxh3_64(&data));
}

#[test]
fn the_faults_of_many_threads_are_all_reported() {
    let (memory, uffd) = missing();
    let readers: Vec<_> = (0..8).map(|page| load(&memory, page)).collect();
    let mut faults: Vec<_> = next_events(&uffd, 8)
        .into_iter()
        .map(|event| match event {
            Event::Fault { address, .. } => (address - memory.addresses().start) / PAGE,
            other => panic!("{other:?}"),
        })
        .collect();
    faults.sort_unstable();
    assert_eq!(faults, [0, 1, 2, 3, 4, 5, 6, 7]);
    uffd.zero(pages(&memory, 0..8), PAGE).unwrap();
    for reader in readers {
        assert_eq!(answer(&reader), xxh3_64(&[0; 4096]));
    }
}

#[test]
fn a_page_that_is_there_already_is_left_alone() {
    let (memory, uffd) = missing();
    memory.file().write_all_at(&[1; 4096], 2 * PAGE).unwrap();
    let all = pages(&memory, 0..5);
    let installed = uffd.install(all.start, &[9; 5 * 4096], PAGE).unwrap();
    assert_eq!(
        (installed.bytes, installed.done, installed.stopped),
        (4 * PAGE, 5 * PAGE, None)
    );
    let zeroed = uffd.zero(pages(&memory, 4..6), PAGE).unwrap();
    assert_eq!((zeroed.bytes, zeroed.done), (PAGE, 2 * PAGE));
    let first_bytes: Vec<_> = (0..6)
        .map(|page| {
            let mut byte = [0];
            memory
                .read(page * PAGE..page * PAGE + 1, &mut byte)
                .unwrap();
            byte[0]
        })
        .collect();
    assert_eq!(first_bytes, [9, 9, 1, 9, 9, 0]);
}

/// The background push writes to the file; a thread that was waiting must not wait for ever.
#[test]
fn an_install_that_comes_second_still_wakes_who_waits() {
    let (memory, uffd) = missing();
    let reader = load(&memory, 0);
    next_events(&uffd, 1);
    memory.file().write_all_at(&[1; 4096], 0).unwrap();
    let installed = uffd
        .install(memory.addresses().start, &[2; 4096], PAGE)
        .unwrap();
    assert_eq!((installed.bytes, installed.done), (0, PAGE));
    assert_eq!(answer(&reader), xxh3_64(&[1; 4096]));
}

#[test]
fn memory_that_is_not_registered_any_more_stops_an_install() {
    let (memory, uffd) = missing();
    uffd.unregister(memory.addresses()).unwrap();
    let installed = uffd
        .install(memory.addresses().start, &[1; 4096], PAGE)
        .unwrap();
    assert_eq!(
        (installed.done, installed.stopped),
        (0, Some(Stop::Unmapped))
    );
}

#[test]
fn bytes_that_are_no_whole_pages_are_refused() {
    let (memory, uffd) = missing();
    let start = memory.addresses().start;
    let refused = uffd.install(start, &[1; 4095], PAGE).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::InvalidInput);
    assert!(uffd.install(start + 1, &[1; 4096], PAGE).is_err());
    let (start, end) = (start + PAGE, start);
    assert!(uffd.zero(start..end, PAGE).is_err());
}

#[test]
fn a_minor_fault_is_resolved_with_what_the_file_has() {
    let minor = Mode {
        minor: true,
        ..Mode::default()
    };
    let (memory, uffd) = watched(Features::MINOR_SHMEM, minor);
    memory.file().write_all_at(&[5; 4096], PAGE).unwrap();
    let reader = load(&memory, 1);
    assert!(matches!(
        next_events(&uffd, 1)[..],
        [Event::Fault { minor: true, .. }]
    ));
    let mapped = uffd.map_present(pages(&memory, 1..2), PAGE).unwrap();
    assert_eq!(mapped.bytes, PAGE);
    assert_eq!(answer(&reader), xxh3_64(&[5; 4096]));
}

#[test]
fn a_write_to_a_protected_page_waits_until_the_protection_is_lifted() {
    let wp = Mode {
        wp: true,
        ..Mode::default()
    };
    let features = Features::WRITE_PROTECT | Features::WRITE_PROTECT_SHARED;
    let (memory, uffd) = watched(features, wp);
    memory.write(0, &[1]).unwrap();
    uffd.write_protect(pages(&memory, 0..1), true).unwrap();
    let writer = in_thread({
        let memory = Arc::clone(&memory);
        move || memory.write(10, &[2])
    });
    // Populating is a fault in the kernel, which a descriptor for user mode refuses: the write fails, and says so.
    assert!(answer(&writer).is_err());
    let writer = in_thread({
        let memory = Arc::clone(&memory);
        move || memory.store_unpopulated(10, &[2])
    });
    let events = next_events(&uffd, 1);
    assert!(
        matches!(
            events[..],
            [Event::Fault {
                wp: true,
                write: true,
                ..
            }]
        ),
        "{events:?}"
    );
    uffd.write_protect(pages(&memory, 0..1), false).unwrap();
    answer(&writer);
    let mut bytes = [0; 11];
    memory.read(0..11, &mut bytes).unwrap();
    assert_eq!((bytes[0], bytes[10]), (1, 2));
}

#[test]
fn memory_that_is_given_back_or_unmapped_is_reported() {
    let features = Features::MISSING_SHMEM | Features::EVENT_REMOVE | Features::EVENT_UNMAP;
    let (memory, uffd) = watched(features, MISSING);
    let (given_back, all) = (pages(&memory, 2..4), memory.addresses());
    let owner = in_thread({
        let address = usize::try_from(given_back.start).unwrap();
        move || {
            // SAFETY: two pages of the mapping below, which nobody has a reference into.
            let done = unsafe {
                rustix::mm::madvise(
                    ptr::with_exposed_provenance_mut(address),
                    2 * 4096,
                    Advice::LinuxRemove,
                )
            };
            drop(memory);
            done
        }
    });
    let events = next_events(&uffd, 1);
    assert!(
        matches!(&events[..], [Event::Remove { range }] if *range == given_back),
        "{events:?}"
    );
    let events = next_events(&uffd, 1);
    assert!(
        matches!(&events[..], [Event::Unmap { range }] if *range == all),
        "{events:?}"
    );
    answer(&owner).unwrap();
}

#[test]
fn nothing_to_read_is_no_error_and_does_not_block() {
    let (_memory, uffd) = missing();
    let mut events = Vec::new();
    assert_eq!(uffd.read_events(&mut events).unwrap(), 0);
}

#[test]
fn a_feature_that_the_kernel_lacks_is_named() {
    let future = Features::from_bits(1 << 40) | Features::MISSING_SHMEM;
    let refused = Uffd::create(Scope::UserModeOnly, future).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unsupported);
    let message = refused.to_string();
    assert!(message.contains("lacks 0x10000000000"), "{message}");
}

#[test]
fn a_descriptor_that_was_used_before_is_not_adopted() {
    let (_memory, uffd) = missing();
    let again = uffd.as_fd().try_clone_to_owned().unwrap();
    let refused = Uffd::adopt(again, Features::MISSING_SHMEM).unwrap_err();
    assert!(refused.to_string().contains("in use already"), "{refused}");
}

/// Runs `test` with a file of 64 pages on a tmpfs that has room for 16, mounted where nobody else sees it.
fn on_a_full_tmpfs(test: impl FnOnce(File) + Send) {
    thread::scope(|scope| {
        scope
            .spawn(|| {
                let folder = tempfile::tempdir().unwrap();
                let path = std::ffi::CString::new(folder.path().to_str().unwrap()).unwrap();
                let check = |result: i32| assert_eq!(result, 0, "{}", io::Error::last_os_error());
                // SAFETY: gives this thread mounts of its own; no memory is concerned.
                check(unsafe { libc::unshare(libc::CLONE_NEWNS) });
                let (root, none) = (c"/".as_ptr(), ptr::null());
                // SAFETY: strings that end in zero, or null where the call allows it.
                check(unsafe {
                    libc::mount(
                        none,
                        root,
                        none,
                        libc::MS_REC | libc::MS_PRIVATE,
                        none.cast(),
                    )
                });
                let (tmpfs, options) = (c"tmpfs".as_ptr(), c"size=64k".as_ptr());
                // SAFETY: strings that end in zero.
                check(unsafe { libc::mount(tmpfs, path.as_ptr(), tmpfs, 0, options.cast()) });
                let file = File::options()
                    .read(true)
                    .write(true)
                    .create_new(true)
                    .open(folder.path().join("ram"))
                    .unwrap();
                file.set_len(64 * PAGE).unwrap();
                test(file);
                // SAFETY: a string that ends in zero.
                check(unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) });
            })
            .join()
            .unwrap();
    });
}

#[test]
#[ignore = "privileged: needs root (mount)"]
fn an_install_into_a_full_file_system_stops_and_says_so() {
    on_a_full_tmpfs(|file| {
        let memory = Mapping::new(file, 64 * PAGE).unwrap();
        let uffd = Uffd::create(Scope::UserModeOnly, Features::MISSING_SHMEM).unwrap();
        uffd.register(memory.addresses(), MISSING).unwrap();
        let data = vec![1; 64 * 4096];
        let installed = uffd.install(memory.addresses().start, &data, PAGE).unwrap();
        assert_eq!(installed.stopped, Some(Stop::NoRoom));
        assert_eq!((installed.bytes, installed.done), (16 * PAGE, 16 * PAGE));
    });
}

#[test]
#[ignore = "privileged: needs root (mount)"]
fn writing_to_a_full_file_system_fails_and_kills_nobody() {
    use std::io::Write;
    on_a_full_tmpfs(|file| {
        let memory = Mapping::new(file, 64 * PAGE).unwrap();
        memory.populate(0..16 * PAGE).unwrap();
        let refused = memory.populate(16 * PAGE..64 * PAGE).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::StorageFull);
        assert!(refused.to_string().contains("no room"), "{refused}");
        let refused = memory.write(20 * PAGE, &[1]).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::StorageFull);
        let (read, mut write) = io::pipe().unwrap();
        write.write_all(&[1; 10]).unwrap();
        let span = 30 * PAGE..30 * PAGE + 10;
        assert!(
            memory
                .read_vectored_from(read.as_fd(), std::slice::from_ref(&span))
                .is_err()
        );
    });
}

#[test]
fn private_memory_that_is_installed_protected_names_what_was_written_alone() {
    use crate::sys::memory::Memory;
    use crate::sys::pagemap::Pagemap;
    let memory = Memory::reserve(8 * PAGE).unwrap();
    let uffd = Uffd::create(Scope::UserModeOnly, Features::TRACKING_PRIVATE).unwrap();
    let mode = Mode {
        missing: true,
        wp: true,
        minor: false,
    };
    uffd.register(memory.addresses(), mode).unwrap();
    let start = memory.addresses().start;
    uffd.install_protected(start, &[1; 3 * 4096], PAGE).unwrap();
    uffd.install(start + 5 * PAGE, &[2; 4096], PAGE).unwrap();
    memory.store(PAGE, &[3]).unwrap();
    let mut pagemap = Pagemap::of_this_process().unwrap();
    let mut written = |protect| {
        let mut found = Vec::new();
        let mut add = |range: Range<u64>| found.push((range.start - start) / PAGE);
        if protect {
            pagemap.scan_present_written_and_protect(memory.addresses(), &mut add)
        } else {
            pagemap.peek_present_written(memory.addresses(), &mut add)
        }
        .unwrap();
        found
    };
    assert_eq!(written(false), [1, 5]);
    assert_eq!(written(true), [1, 5]);
    assert_eq!(written(true), [0; 0]);
    // What was absent is so still.
    let installed = uffd
        .install_protected(start + 3 * PAGE, &[4; 4096], PAGE)
        .unwrap();
    assert_eq!(installed.bytes, PAGE);
    memory.store(0, &[1]).unwrap();
    assert_eq!(written(true), [0]);
}

/// Of what was one mapping, part of it protected makes three: the kernel fills none by a call for two.
#[test]
fn memory_that_is_several_mappings_is_filled_as_one() {
    use crate::sys::memory::Memory;
    let check = |fill: &dyn Fn(&Uffd, Range<u64>) -> io::Result<Installed>| {
        let memory = Memory::reserve(256 * PAGE).unwrap();
        let uffd = Uffd::create(Scope::UserModeOnly, Features::none()).unwrap();
        let addresses = memory.addresses();
        uffd.register(addresses.clone(), MISSING).unwrap();
        let at = |page: u64| {
            ptr::with_exposed_provenance_mut(
                usize::try_from(addresses.start + page * PAGE).unwrap(),
            )
        };
        // SAFETY: pages of the mapping, to which nobody has a reference.
        unsafe { rustix::mm::mprotect(at(100), 4096, rustix::mm::MprotectFlags::READ).unwrap() };
        let installed = fill(&uffd, addresses.clone()).unwrap();
        assert_eq!((installed.bytes, installed.stopped), (256 * PAGE, None));
        let mut byte = [9];
        for page in [99, 100, 101, 255] {
            memory.load(page * PAGE, &mut byte).unwrap();
            assert_ne!(byte, [9], "page {page}");
        }
        // What is gone stops it where it is.
        memory.discard(0..256 * PAGE).unwrap();
        uffd.unregister(addresses.start + 77 * PAGE..addresses.start + 78 * PAGE)
            .unwrap();
        let stopped = fill(&uffd, addresses.clone()).unwrap();
        assert_eq!(
            (stopped.done, stopped.stopped),
            (77 * PAGE, Some(Stop::Unmapped))
        );
    };
    check(&|uffd, range| uffd.install(range.start, &[5; 256 * 4096], PAGE));
    check(&|uffd, range| uffd.zero(range, PAGE));
}

#[test]
fn a_page_that_was_poisoned_can_still_be_installed() {
    use crate::sys::memory::Memory;
    let memory = Memory::reserve(4 * PAGE).unwrap();
    let uffd = Uffd::create(Scope::UserModeOnly, Features::POISON).unwrap();
    uffd.register(memory.addresses(), MISSING).unwrap();
    let start = memory.addresses().start;
    uffd.install(start + PAGE, &[1; 4096], PAGE).unwrap();
    let poisoned = uffd.poison(start..start + 2 * PAGE, PAGE).unwrap();
    assert_eq!((poisoned.bytes, poisoned.done), (PAGE, 2 * PAGE));
    let installed = uffd.install(start, &[2; 4096], PAGE).unwrap();
    assert_eq!(installed.bytes, PAGE);
    let mut bytes = [0];
    memory.load(0, &mut bytes).unwrap();
    assert_eq!(bytes, [2]);
}
