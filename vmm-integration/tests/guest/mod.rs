//! A program that writes like a guest: it maps its RAM through `vm-memory` and has processors that stamp pages, all the time.
//!
//! It is this test binary again, in a process of its own, as a monitor's would be: a process that serves a file must not map it.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

const PAGE: usize = 4096;
const LONG: Duration = Duration::from_secs(30);
const RAM: &str = "MEMFERRY_GUEST_RAM";
const SOCKET: &str = "MEMFERRY_GUEST_SOCKET";

/// How many processors it has. Each has pages of its own, so that a page's stamps are in order.
const PROCESSORS: u64 = 2;

/// A guest in a process of its own. Killed on drop.
pub(crate) struct Guest {
    child: Child,
    socket: UnixStream,
    pages: usize,
}

impl Guest {
    /// Starts a guest that has written each page of its RAM so many times.
    pub(crate) fn start(ram: &Path, stamps: &[u64]) -> Self {
        let place = tempfile::tempdir().unwrap();
        let address = place.path().join("guest");
        let listener = UnixListener::bind(&address).unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["guest::runs_as_a_guest", "--exact"])
            .env(RAM, ram)
            .env(SOCKET, &address)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let (socket, _) = listener.accept().unwrap();
        socket.set_read_timeout(Some(LONG)).unwrap();
        let mut guest = Self {
            child,
            socket,
            pages: stamps.len(),
        };
        let state: Vec<u8> = stamps.iter().flat_map(|n| n.to_le_bytes()).collect();
        let len = u64::try_from(state.len()).unwrap();
        guest.socket.write_all(&len.to_le_bytes()).unwrap();
        guest.socket.write_all(&state).unwrap();
        guest
    }

    fn ask(&mut self, what: u8) -> u64 {
        self.socket.write_all(&[what]).unwrap();
        let mut answer = [0; 8];
        self.socket.read_exact(&mut answer).unwrap();
        u64::from_le_bytes(answer)
    }

    /// Stops its processors; how often each page was written.
    pub(crate) fn suspend(&mut self) -> Vec<u64> {
        self.ask(b's');
        let mut state = vec![0; self.pages * 8];
        self.socket.read_exact(&mut state).unwrap();
        let numbers = state.as_chunks::<8>().0.iter();
        numbers.map(|number| u64::from_le_bytes(*number)).collect()
    }

    /// Lets its processors run on.
    pub(crate) fn resume(&mut self) {
        self.ask(b'r');
    }

    /// Returns when it has written some pages more.
    pub(crate) fn assert_writes_on(&mut self) {
        let from = self.ask(b'n');
        let deadline = Instant::now() + LONG;
        while self.ask(b'n') < from + 50 {
            assert!(Instant::now() < deadline, "the guest stands still");
            thread::park_timeout(Duration::from_millis(1));
        }
    }

    /// Looks at all of its memory, as itself.
    pub(crate) fn assert_memory_is_right(&mut self) {
        assert_eq!(
            self.ask(b'c'),
            0,
            "pages are not what the guest has written"
        );
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the page holds that was stamped for the `count`th time.
fn stamped(page: u64, count: u64) -> Vec<u8> {
    if count == 0 {
        return vec![0; PAGE];
    }
    let seed = (page << 32 ^ count).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let words = (0..PAGE as u64 / 8).map(|word| seed.rotate_left(17).wrapping_add(word * count));
    words.flat_map(u64::to_le_bytes).collect()
}

/// The guest's memory and how often each page was written.
struct Machine {
    memory: GuestMemoryMmap<()>,
    stamps: Vec<AtomicU64>,
    written: AtomicU64,
    wrong: AtomicU64,
    run: AtomicBool,
}

impl Machine {
    fn address(page: u64) -> GuestAddress {
        GuestAddress(page * PAGE as u64)
    }

    fn is_right(&self, page: u64) -> bool {
        let mut is = vec![0; PAGE];
        self.memory
            .read_slice(&mut is, Self::address(page))
            .unwrap();
        let count = self.stamps[usize::try_from(page).unwrap()].load(Ordering::Relaxed);
        is == stamped(page, count)
    }

    /// Stamps one page after the other, and looks before it does.
    fn processor(&self, number: u64) {
        let pages = self.stamps.len() as u64 / PROCESSORS;
        let mut random = number + 1;
        while self.run.load(Ordering::Acquire) {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            // Most of what it writes is in a quarter of its memory.
            let reach = if random.is_multiple_of(8) {
                pages
            } else {
                pages / 4
            };
            let page = random % reach * PROCESSORS + number;
            if !self.is_right(page) {
                self.wrong.fetch_add(1, Ordering::Relaxed);
            }
            let stamps = &self.stamps[usize::try_from(page).unwrap()];
            let count = stamps.load(Ordering::Relaxed) + 1;
            let bytes = stamped(page, count);
            self.memory
                .write_slice(&bytes, Self::address(page))
                .unwrap();
            stamps.store(count, Ordering::Relaxed);
            if self
                .written
                .fetch_add(1, Ordering::Relaxed)
                .is_multiple_of(8)
            {
                thread::park_timeout(Duration::from_micros(500));
            }
        }
    }

    /// Does what it is told, with its processors running in between.
    fn serve(&self, socket: &mut UnixStream) {
        loop {
            let (told, suspended) = thread::scope(|scope| {
                self.run.store(true, Ordering::Release);
                for number in 0..PROCESSORS {
                    scope.spawn(move || self.processor(number));
                }
                loop {
                    let mut told = [0];
                    if socket.read_exact(&mut told).is_err() {
                        // Nobody is there any more.
                        std::process::exit(0);
                    }
                    if told == *b"n" {
                        let written = self.written.load(Ordering::Relaxed);
                        socket.write_all(&written.to_le_bytes()).unwrap();
                        continue;
                    }
                    self.run.store(false, Ordering::Release);
                    return (told, told == *b"s");
                }
            });
            let mut answer = 0;
            if told == *b"c" {
                let wrong = (0..self.stamps.len() as u64).filter(|&page| !self.is_right(page));
                answer = wrong.count() as u64 + self.wrong.load(Ordering::Relaxed);
            }
            socket.write_all(&answer.to_le_bytes()).unwrap();
            if suspended {
                for stamps in &self.stamps {
                    let count = stamps.load(Ordering::Relaxed);
                    socket.write_all(&count.to_le_bytes()).unwrap();
                }
                let mut told = [0];
                if socket.read_exact(&mut told).is_err() {
                    std::process::exit(0);
                }
                socket.write_all(&[0; 8]).unwrap();
            }
        }
    }
}

/// The guest itself, when it is told where its RAM is; else there is nothing to do.
#[test]
fn runs_as_a_guest() {
    let (Some(ram), Some(socket)) = (std::env::var_os(RAM), std::env::var_os(SOCKET)) else {
        return;
    };
    let mut socket = UnixStream::connect(socket).unwrap();
    let mut len = [0; 8];
    socket.read_exact(&mut len).unwrap();
    let mut state = vec![0; usize::try_from(u64::from_le_bytes(len)).unwrap()];
    socket.read_exact(&mut state).unwrap();
    let numbers = state.as_chunks::<8>().0.iter();
    let stamps: Vec<_> = numbers
        .map(|number| AtomicU64::new(u64::from_le_bytes(*number)))
        .collect();
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(ram)
        .unwrap();
    let len = stamps.len() * PAGE;
    let range = (GuestAddress(0), len, Some(FileOffset::new(file, 0)));
    let machine = Machine {
        memory: GuestMemoryMmap::from_ranges_with_files([range]).unwrap(),
        stamps,
        written: AtomicU64::new(0),
        wrong: AtomicU64::new(0),
        run: AtomicBool::new(true),
    };
    machine.serve(&mut socket);
}
