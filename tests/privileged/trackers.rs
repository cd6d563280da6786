//! The trackers' conformance suite over the memory of another process.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::sync::{Arc, Mutex};

use memferry::attach::{Keep, Target};
use memferry::chunk::ChunkSize;
use memferry::dirty::conformance::{Tracked, run_all};
use memferry::dirty::{Area, DirtyTracker, WriteProtect};
use memferry::sys::memfd::memfd;
use memferry::sys::pagemap::Pagemap;
use memferry::sys::uffd::{Features, Uffd};
use rustix::mm::{MapFlags, ProtFlags};

use crate::victim::{Victim, this_binary};

/// Names the descriptor and the length of a region; makes a process of this binary its scribe.
pub(crate) const REGION: &str = "MEMFERRY_TEST_REGION";

/// Maps a region and writes what it is told to, for ever: offset, length, bytes on standard input, a byte on standard
/// output when it is done.
pub(crate) fn be_a_scribe(region: &str) -> ! {
    let (fd, len) = region.split_once(':').unwrap();
    let len: usize = len.parse().unwrap();
    let fd = std::os::fd::RawFd::from(fd.parse::<i32>().unwrap());
    let flags = MapFlags::SHARED;
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: the descriptor was inherited for this, and stays open as long as the process lives.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
    // SAFETY: a new mapping at an address that the kernel chooses.
    let memory = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, access, flags, fd, 0) };
    let memory: *mut u8 = memory.unwrap().cast();
    let (mut input, mut output) = (std::io::stdin().lock(), std::io::stdout().lock());
    loop {
        let mut head = [0; 16];
        if input.read_exact(&mut head).is_err() {
            #[allow(
                clippy::exit,
                reason = "a scribe is a process of its own, and its work is over"
            )]
            std::process::exit(0);
        }
        let (offset, count) = head.split_at(8);
        let offset = usize::try_from(u64::from_le_bytes(offset.try_into().unwrap())).unwrap();
        let count = usize::try_from(u64::from_le_bytes(count.try_into().unwrap())).unwrap();
        let mut bytes = vec![0; count];
        input.read_exact(&mut bytes).unwrap();
        assert!(offset + count <= len);
        let place = memory.wrapping_add(offset);
        // SAFETY: within the mapping, as was just checked.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), place, count) };
        output.write_all(b".").unwrap();
        output.flush().unwrap();
    }
}

/// A region that another process maps and writes.
struct Scribe {
    child: Child,
    pipes: Mutex<(ChildStdin, ChildStdout)>,
    region: File,
    tracker: WriteProtect,
}

impl Scribe {
    fn start(len: u64, chunk_size: ChunkSize) -> Self {
        let region = memfd("region", len).unwrap();
        // Inherited: by its number, so it must survive exec.
        let inherited = rustix::io::dup(&region).unwrap();
        let mut child = this_binary()
            .env(REGION, format!("{}:{len}", inherited.as_raw_fd()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        drop(inherited);
        let pipes = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let pipes = Mutex::new(pipes);
        // Nothing is written, and the answer says that the region is mapped.
        write_by(&pipes, 0, &[]);
        let target = Target::open(child.id()).unwrap();
        let areas: Vec<Area> = target
            .mappings_of(&region)
            .unwrap()
            .into_iter()
            .map(|mapping| Area {
                address: mapping.address,
                offset: mapping.offset,
            })
            .collect();
        assert_eq!(areas.len(), 1);
        let stolen = target.userfaultfd(Keep::Close).unwrap();
        let uffd = Uffd::adopt(stolen.fd, Features::TRACKING).unwrap();
        let pagemap = Pagemap::open(child.id()).unwrap();
        let tracker = WriteProtect::new(uffd, pagemap, areas, len, chunk_size)
            .unwrap()
            .sparse(region.try_clone().unwrap());
        Self {
            child,
            pipes,
            region,
            tracker,
        }
    }
}

fn write_by(pipes: &Mutex<(ChildStdin, ChildStdout)>, offset: u64, bytes: &[u8]) {
    let mut pipes = pipes.lock().unwrap();
    let (input, output) = &mut *pipes;
    input.write_all(&offset.to_le_bytes()).unwrap();
    input
        .write_all(&(bytes.len() as u64).to_le_bytes())
        .unwrap();
    input.write_all(bytes).unwrap();
    output.read_exact(&mut [0]).unwrap();
}

impl Tracked for Scribe {
    fn tracker(&self) -> &dyn DirtyTracker {
        &self.tracker
    }

    fn write(&self, offset: u64, bytes: &[u8]) {
        write_by(&self.pipes, offset, bytes);
    }

    fn read(&self, offset: u64, buf: &mut [u8]) {
        self.region.read_exact_at(buf, offset).unwrap();
    }

    fn allocated(&self) -> u64 {
        self.region.metadata().unwrap().blocks() * 512
    }
}

impl Drop for Scribe {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
#[ignore = "privileged: needs root (ptrace)"]
fn write_protection_of_another_process_keeps_every_promise_of_a_tracker() {
    run_all(Scribe::start);
}

#[test]
#[ignore = "privileged: needs root (ptrace)"]
fn no_thread_of_a_halted_process_writes_and_all_go_on_afterwards() {
    let mut victim = Victim::start("threads");
    let target = Arc::new(Target::open(victim.pid()).unwrap());
    for round in 0..20 {
        let (mut before, mut after) = (0, 0);
        target
            .halted(&mut || {
                before = victim.count();
                // Long enough for a thread that runs to be seen.
                for _ in 0..1000 {
                    std::thread::yield_now();
                }
                after = victim.count();
                Ok(())
            })
            .unwrap();
        assert_eq!(before, after, "in round {round}");
    }
    victim.must_be_well("after it was halted 20 times");
}
