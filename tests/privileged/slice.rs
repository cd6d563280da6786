//! A region as memory: what becomes of threads and processes that access it.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use memferry::backend::MemoryStorage;
use memferry::chunk::{Fault, Faulty, Storage};
use memferry::frontend::{Failure, FaultServer, HandedRange, Slice, SliceOptions, hand_over};
use memferry::sys::memory::Memory;
use memferry::sys::uffd::Scope;

use crate::victim::{PATIENCE, this_binary, wait_until};

/// What a process of this binary does instead of tests.
pub(crate) const ROLE: &str = "MEMFERRY_SLICE";
const SOCKET: &str = "MEMFERRY_SLICE_SOCKET";

const PAGE: u64 = 4096;
const PAGES: u64 = 100;

pub(crate) fn region() -> Arc<dyn Storage> {
    let storage = MemoryStorage::new(PAGES * PAGE);
    for page in 0..PAGES {
        let bytes = [u8::try_from(page + 1).unwrap(); 4096];
        storage.write_all_at(&bytes, page * PAGE).unwrap();
    }
    Arc::new(storage)
}

fn options() -> SliceOptions {
    SliceOptions {
        scope: Some(Scope::UserModeOnly),
        ..SliceOptions::default()
    }
}

/// The first byte of a page, as any program loads it.
pub(crate) fn first_byte(slice: &Slice, page: u64) -> u8 {
    let at = usize::try_from(page * PAGE).unwrap();
    // SAFETY: within the memory, which lives as long as `slice`.
    let pointer = unsafe { slice.as_ptr().add(at) };
    // SAFETY: valid for reads, and volatile since others may write.
    unsafe { pointer.read_volatile() }
}

/// How a child that plays `role` ends.
fn end_of(role: &str) -> ExitStatus {
    let mut child = this_binary().env(ROLE, role).spawn().unwrap();
    let mut ended = None;
    wait_until("the child ends", || {
        ended = child.try_wait().unwrap();
        ended.is_some()
    });
    ended.unwrap()
}

pub(crate) fn play(role: &str) -> ! {
    // SAFETY: asks to be killed when the parent dies.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    // A process that is killed on purpose leaves no core behind.
    let none = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the structure lives through the call.
    unsafe { libc::setrlimit(libc::RLIMIT_CORE, &raw const none) };
    match role {
        "poison" => access_what_cannot_be_had(),
        "drop" => drop_while_somebody_waits(),
        "program" => be_served(),
        _ => std::process::abort(),
    }
}

#[expect(clippy::exit, reason = "a child without tests tells its parent so")]
fn access_what_cannot_be_had() -> ! {
    let faulty = Faulty::new(region());
    let faults = faulty.faults();
    let options = SliceOptions {
        failure: Failure::Poison {
            after: Duration::from_millis(50),
        },
        ..options()
    };
    let slice = Slice::new(Arc::new(faulty), &options).unwrap();
    assert_eq!(first_byte(&slice, 3), 4);
    faults.add(Fault::error(io::ErrorKind::TimedOut));
    let byte = first_byte(&slice, 50);
    println!("it has read {byte}");
    std::process::exit(7)
}

#[expect(clippy::exit, reason = "a child without tests tells its parent so")]
fn drop_while_somebody_waits() -> ! {
    let faulty = Faulty::new(region());
    let faults = faulty.faults();
    faults.add(Fault::error(io::ErrorKind::TimedOut));
    let options = SliceOptions {
        failure: Failure::Wait,
        ..options()
    };
    let slice = Slice::new(Arc::new(faulty), &options).unwrap();
    let address = slice.as_ptr().expose_provenance();
    thread::spawn(move || {
        let pointer: *const u8 = std::ptr::with_exposed_provenance(address);
        // SAFETY: that it is not valid any more when the slice is dropped is what this process dies of.
        let byte = unsafe { pointer.read_volatile() };
        println!("it has read {byte}");
        std::process::exit(7)
    });
    wait_until("the thread waits", || faults.struck() > 0);
    drop(slice);
    loop {
        thread::park();
    }
}

#[test]
fn who_accesses_what_cannot_be_had_is_killed_and_reads_no_zeros() {
    let ended = end_of("poison");
    assert_eq!(ended.signal(), Some(libc::SIGBUS), "{ended}");
}

#[test]
fn who_waits_while_the_memory_goes_is_killed_and_reads_no_zeros() {
    let ended = end_of("drop");
    assert_eq!(ended.signal(), Some(libc::SIGSEGV), "{ended}");
}

#[test]
fn a_forked_child_has_none_of_the_memory_and_its_parent_all() {
    let slice = Slice::new(region(), &options()).unwrap();
    assert_eq!(first_byte(&slice, 0), 1);
    // SAFETY: the child only reads memory and ends, which is allowed in a copy of one thread.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: no core, and an end whatever happens.
        unsafe { libc::alarm(10) };
        let byte = first_byte(&slice, 0);
        // SAFETY: ends this process, without running what its parent has registered.
        unsafe { libc::_exit(byte.into()) };
    }
    let mut status = 0;
    // SAFETY: `status` lives through the call; the child ends by itself, at the latest by its alarm.
    let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
    assert_eq!(waited, child);
    assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGSEGV);
    for page in 0..PAGES {
        assert_eq!(u64::from(first_byte(&slice, page)), page + 1);
    }
    slice.write_all_at(&[200; 4096], 0).unwrap();
    slice.sync().unwrap();
}

/// What `read` says of a page of the slice that is absent.
pub(crate) fn read_into(slice: &Slice, page: u64) -> io::Result<isize> {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    io::Write::write_all(&mut ours, &[99; 10]).unwrap();
    let at = usize::try_from(page * PAGE).unwrap();
    // SAFETY: within the memory, into which nobody has a reference.
    let pointer = unsafe { slice.as_ptr().add(at) };
    // SAFETY: valid for so many bytes.
    let read = unsafe { libc::read(theirs.as_raw_fd(), pointer.cast(), 10) };
    if read < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(read)
    }
}

#[test]
fn a_system_call_that_faults_fails_where_programs_alone_are_served() {
    let slice = Slice::new(region(), &options()).unwrap();
    let refused = read_into(&slice, 5).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EFAULT));
    assert_eq!(first_byte(&slice, 5), 6);
}

#[test]
#[ignore = "privileged: needs CAP_SYS_PTRACE"]
fn a_system_call_that_faults_is_served_and_its_write_is_written_back() {
    let storage = region();
    let slice = Slice::new(storage.clone(), &SliceOptions::default()).unwrap();
    assert_eq!(slice.scope(), Scope::UserAndKernel);
    assert_eq!(read_into(&slice, 5).unwrap(), 10);
    slice.sync().unwrap();
    let mut stored = [0; 11];
    storage.read_exact_at(&mut stored, 5 * PAGE).unwrap();
    assert_eq!(stored, [99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 6]);
}

/// Hands its memory over, checks all of it from several threads, and ends well if it is right.
#[expect(clippy::exit, reason = "a child without tests tells its parent so")]
fn be_served() -> ! {
    let socket = UnixStream::connect(std::env::var(SOCKET).unwrap()).unwrap();
    let memory = Memory::reserve(PAGES * PAGE).unwrap();
    let all = HandedRange {
        start: memory.addresses().start,
        len: PAGES * PAGE,
        offset: 0,
    };
    let _handed = hand_over(socket, &[all], Scope::UserModeOnly, PATIENCE).unwrap();
    thread::scope(|scope| {
        for first in 0..4 {
            let memory = &memory;
            scope.spawn(move || {
                for page in (first..PAGES).step_by(4).chain((0..PAGES).rev()) {
                    let mut byte = [0];
                    memory.load(page * PAGE + 17, &mut byte).unwrap();
                    assert_eq!(u64::from(byte[0]), page + 1);
                }
            });
        }
    });
    std::process::exit(0)
}

#[test]
fn the_memory_of_another_process_is_filled_as_it_is_accessed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let program = |command: &mut Command| {
        command
            .env(ROLE, "program")
            .env(SOCKET, &path)
            .spawn()
            .unwrap()
    };
    let mut child = program(&mut this_binary());
    listener.set_nonblocking(true).unwrap();
    let mut connection = None;
    wait_until("the program connects", || {
        connection = listener.accept().ok();
        connection.is_some()
    });
    let (connection, _) = connection.unwrap();
    connection.set_nonblocking(false).unwrap();
    let server =
        FaultServer::accept(connection, region(), &SliceOptions::default(), PATIENCE).unwrap();
    assert!(server.wait(PATIENCE));
    assert!(child.wait().unwrap().success());
}
