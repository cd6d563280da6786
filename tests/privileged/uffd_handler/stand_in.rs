//! A VMM that restores a snapshot as Firecracker does, without a guest: this test binary again, which does what it is told line by line.
//!
//! Its memory is anonymous and private, all of it registered for missing pages with a userfaultfd that has `EVENT_REMOVE`. One message has
//! the mappings and the descriptor; the socket and the descriptor stay open.

use std::collections::BTreeSet;
use std::io::{self, BufRead, IoSlice, Write};
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, ChildStdin, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Instant;

use memferry::sys::uffd::{Features, Mode, Scope, Uffd};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde_json::{Value, json};

use crate::victim::{PATIENCE, this_binary, wait_until};

/// What a process of this binary is told to be instead of tests, as JSON.
pub(crate) const ROLE: &str = "MEMFERRY_VMM";

const THREADS: u64 = 4;

/// What word `word` of the snapshot's memory is; pages 16 to 31 of each 64 are holes.
pub(super) fn word_of(word: u64) -> u64 {
    let page = word / 512;
    if (16..32).contains(&(page % 64)) {
        return 0;
    }
    (word + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

/// The file of a snapshot's memory.
pub(super) fn write_memory(path: &std::path::Path, pages: u64) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::create(path).unwrap();
    file.set_len(pages * 4096).unwrap();
    for page in (0..pages).filter(|page| !(16..32).contains(&(page % 64))) {
        let bytes: Vec<u8> = (page * 512..(page + 1) * 512)
            .flat_map(|word| word_of(word).to_le_bytes())
            .collect();
        file.write_all_at(&bytes, page * 4096).unwrap();
    }
}

/// A stand-in for a VMM, which runs. Killed on drop.
pub(super) struct StandIn {
    child: Child,
    input: ChildStdin,
    lines: Receiver<String>,
}

/// What it is to have.
#[derive(Debug, Clone)]
pub(super) struct Machine {
    /// Lengths and offsets, in pages of 4096.
    pub(super) regions: Vec<(u64, u64)>,
    pub(super) page_size: u64,
    /// The size of pages that it claims to have.
    pub(super) claims: u64,
    pub(super) scope: Scope,
    /// In so many bytes is the message sent each time.
    pub(super) piece: usize,
    /// Pages of the snapshot that can only be read at first, each a mapping of its own to the kernel.
    pub(super) protected: Vec<(u64, u64)>,
    /// What it says of its memory, if that is a lie.
    pub(super) says: Option<String>,
}

impl Machine {
    /// Of two regions, the second of which has what comes first.
    pub(super) fn of(pages: u64) -> Self {
        Self {
            regions: vec![(pages / 4, pages - pages / 4), (pages - pages / 4, 0)],
            page_size: 4096,
            claims: 4096,
            scope: Scope::UserModeOnly,
            piece: usize::MAX,
            protected: Vec::new(),
            says: None,
        }
    }

    pub(super) fn start(&self, socket: &std::path::Path) -> StandIn {
        let what = json!({
            "socket": socket, "regions": self.regions, "page_size": self.page_size,
            "claims": self.claims,
            "kernel": self.scope == Scope::UserAndKernel, "piece": self.piece, "protected": self.protected,
            "says": self.says,
        });
        let mut child = this_binary()
            .env(ROLE, what.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = child.stdin.take().unwrap();
        let output = io::BufReader::new(child.stdout.take().unwrap());
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        StandIn {
            child,
            input,
            lines,
        }
    }
}

impl StandIn {
    pub(super) fn pid(&self) -> i64 {
        self.child.id().into()
    }

    pub(super) fn tell(&mut self, command: &str) {
        writeln!(self.input, "{command}").unwrap();
    }

    pub(super) fn answer(&self) -> String {
        self.lines
            .recv_timeout(PATIENCE)
            .expect("an answer in time")
    }

    /// Panics unless the stand-in does it, and finds all as it should be.
    pub(super) fn must(&mut self, command: &str) {
        self.tell(command);
        assert_eq!(self.answer(), "well", "{command}");
    }

    pub(super) fn is_silent(&self) -> bool {
        self.lines.try_recv().is_err()
    }

    pub(super) fn runs(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    pub(super) fn end(mut self) -> ExitStatus {
        let mut ended = None;
        wait_until("the VMM ends", || {
            ended = self.child.try_wait().unwrap();
            ended.is_some()
        });
        ended.unwrap()
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Memory of the stand-in, and what of the snapshot it holds.
struct Region {
    address: *mut u8,
    bytes: u64,
    /// The first word of the snapshot.
    first: u64,
}

// SAFETY: plain memory that lives as long as the process; all accesses are volatile.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    fn map(bytes: u64, first: u64, huge: bool) -> Self {
        let huge = if huge { libc::MAP_HUGETLB } else { 0 };
        // SAFETY: a new mapping where there is none.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                usize::try_from(bytes).unwrap(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | huge,
                -1,
                0,
            )
        };
        assert_ne!(address, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        Self {
            address: address.cast(),
            bytes,
            first,
        }
    }

    fn at(&self, word: u64) -> *mut u64 {
        assert!(word * 8 < self.bytes);
        // SAFETY: within the mapping, as was just checked.
        let pointer = unsafe { self.address.add(usize::try_from(word * 8).unwrap()) };
        pointer.cast()
    }

    fn load(&self, word: u64) -> u64 {
        // SAFETY: within the mapping, whose bytes are any.
        unsafe { self.at(word).read_volatile() }
    }

    fn store(&self, word: u64, value: u64) {
        // SAFETY: as for loads.
        unsafe { self.at(word).write_volatile(value) }
    }

    /// Gives whole pages back, as a balloon does.
    fn discard(&self, bytes: Range<u64>) {
        let len = usize::try_from(bytes.end - bytes.start).unwrap();
        // SAFETY: within the mapping; nobody has a reference into it.
        let done =
            unsafe { libc::madvise(self.at(bytes.start / 8).cast(), len, libc::MADV_DONTNEED) };
        assert_eq!(done, 0, "{}", io::Error::last_os_error());
    }

    /// Lets a part be read only, or be written again: it is a mapping of its own while it is not.
    fn protect(&self, bytes: Range<u64>, writable: bool) {
        let len = usize::try_from(bytes.end - bytes.start).unwrap();
        let write = if writable { libc::PROT_WRITE } else { 0 };
        // SAFETY: within the mapping; nobody writes there meanwhile.
        let done = unsafe {
            libc::mprotect(
                self.at(bytes.start / 8).cast(),
                len,
                libc::PROT_READ | write,
            )
        };
        assert_eq!(done, 0, "{}", io::Error::last_os_error());
    }

    /// Has the kernel read of a page, as KVM does.
    fn read_by_kernel(&self, word: u64) -> u64 {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        // SAFETY: eight bytes within the mapping.
        let wrote = unsafe { libc::write(writer.as_raw_fd(), self.at(word).cast(), 8) };
        assert_eq!(wrote, 8, "{}", io::Error::last_os_error());
        let mut bytes = [0; 8];
        rustix::io::read(&reader, &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }
}

struct Memory {
    regions: Vec<Region>,
    page: u64,
    /// Pages of the snapshot that were given back.
    zeros: BTreeSet<u64>,
    /// Kept open, as Firecracker does.
    uffd: Uffd,
    socket: UnixStream,
}

fn announce(regions: &[Region], page: u64) -> String {
    let mappings: Vec<String> = regions
        .iter()
        .map(|region| {
            // In the order in which Firecracker writes it.
            format!(
                r#"{{"base_host_virt_addr":{},"size":{},"offset":{},"page_size":{page},"page_size_kib":{page}}}"#,
                region.address.expose_provenance(), region.bytes, region.first * 8
            )
        })
        .collect();
    format!("[{}]", mappings.join(","))
}

fn send(socket: &UnixStream, message: &[u8], piece: usize, uffd: &OwnedFd) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors = [uffd.as_fd()];
    ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    let (first, rest) = message.split_at(piece.min(message.len()));
    let parts = [IoSlice::new(first)];
    let sent = rustix::net::sendmsg(socket, &parts, &mut ancillary, SendFlags::NOSIGNAL).unwrap();
    assert_eq!(sent, first.len());
    for piece in rest.chunks(piece) {
        (&*socket).write_all(piece).unwrap();
    }
}

impl Memory {
    fn restore(what: &Value) -> Self {
        let page = what["page_size"].as_u64().unwrap();
        let scope = if what["kernel"] == true {
            Scope::UserAndKernel
        } else {
            Scope::UserModeOnly
        };
        let uffd = Uffd::create(scope, Features::EVENT_REMOVE).unwrap();
        let number = |value: &Value| value.as_u64().unwrap();
        let regions: Vec<Region> = what["regions"]
            .as_array()
            .unwrap()
            .iter()
            .map(|region| {
                Region::map(
                    number(&region[0]) * 4096,
                    number(&region[1]) * 512,
                    page > 4096,
                )
            })
            .collect();
        for region in &regions {
            let start = region.address.expose_provenance() as u64;
            let mode = Mode {
                missing: true,
                ..Mode::default()
            };
            uffd.register(start..start + region.bytes, mode).unwrap();
        }
        let memory = Self {
            regions,
            page,
            zeros: BTreeSet::new(),
            uffd,
            socket: UnixStream::connect(what["socket"].as_str().unwrap()).unwrap(),
        };
        for pages in what["protected"].as_array().unwrap() {
            memory.protect(number(&pages[0])..number(&pages[1]), false);
        }
        let message = what["says"].as_str().map_or_else(
            || announce(&memory.regions, number(&what["claims"])),
            str::to_owned,
        );
        let piece = usize::try_from(number(&what["piece"])).unwrap();
        let descriptor = memory.uffd.as_fd().try_clone_to_owned().unwrap();
        send(&memory.socket, message.as_bytes(), piece, &descriptor);
        memory
    }

    fn protect(&self, pages: Range<u64>, writable: bool) {
        let (region, at) = self.place(pages.start * 512);
        region.protect(at * 8..at * 8 + (pages.end - pages.start) * 4096, writable);
    }

    /// Where word `word` of the snapshot is.
    fn place(&self, word: u64) -> (&Region, u64) {
        let region = self
            .regions
            .iter()
            .find(|region| (region.first..region.first + region.bytes / 8).contains(&word))
            .expect("a word of the snapshot");
        (region, word - region.first)
    }

    fn expected(&self, word: u64) -> u64 {
        if self.zeros.contains(&(word * 8 / self.page)) {
            0
        } else {
            word_of(word)
        }
    }

    fn check(&self, word: u64) {
        let (region, at) = self.place(word);
        assert_eq!(region.load(at), self.expected(word), "word {word}");
    }

    fn words(&self) -> u64 {
        self.regions.iter().map(|region| region.bytes / 8).sum()
    }

    /// Every page from several threads, each in an order of its own; all of every page.
    fn check_all(&self) {
        let pages = self.words() / 512;
        thread::scope(|scope| {
            for thread in 0..THREADS {
                scope.spawn(move || {
                    // Coprime to any power of two.
                    let step = 2 * (thread * 1000 + 17) + 1;
                    for number in 0..pages {
                        let page = (number * step + thread) % pages;
                        if pages.is_power_of_two() || thread == 0 {
                            self.check(page * 512 + number % 512);
                        }
                        let own = number % THREADS == thread;
                        for word in (number * 512..(number + 1) * 512).filter(|_| own) {
                            self.check(word);
                        }
                    }
                });
            }
        });
    }

    fn discard(&mut self, pages: Range<u64>) {
        for page in pages {
            let (region, at) = self.place(page * self.page / 8);
            region.discard(at * 8..at * 8 + self.page);
            self.zeros.insert(page);
        }
    }

    /// Reads, writes and gives back at random, each thread in pages of its own, and knows what each holds.
    fn churn(&mut self, rounds: u64) {
        let pages = self.words() * 8 / self.page;
        let gone: Vec<BTreeSet<u64>> = thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS)
                .map(|thread| {
                    let memory = &*self;
                    scope.spawn(move || memory.churn_own(thread, pages, rounds))
                })
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect()
        });
        self.zeros.extend(gone.into_iter().flatten());
    }

    fn churn_own(&self, thread: u64, pages: u64, rounds: u64) -> BTreeSet<u64> {
        let mut gone = BTreeSet::new();
        let mut state = thread + 1;
        for _ in 0..rounds {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let page = (state >> 33) % (pages / THREADS) * THREADS + thread;
            let word = page * self.page / 8 + (state >> 20) % 512;
            let (region, at) = self.place(word);
            let expected = if gone.contains(&page) {
                0
            } else {
                self.expected(word)
            };
            assert_eq!(region.load(at), expected, "word {word}");
            match state >> 60 {
                0..4 => {
                    region.discard(at / 512 * 4096..(at / 512) * 4096 + self.page);
                    gone.insert(page);
                }
                4..8 => {
                    region.store(at, !expected);
                    assert_eq!(region.load(at), !expected);
                    region.store(at, expected);
                }
                _ => {}
            }
        }
        gone
    }

    /// Accesses at random by one thread; the first, median, 99th percentile and longest in microseconds.
    fn measure(&self, count: u64) -> String {
        let pages = self.words() / 512;
        let mut state = 1_u64;
        let mut times: Vec<u128> = (0..count)
            .map(|_| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                let begun = Instant::now();
                self.check((state >> 33) % pages * 512);
                begun.elapsed().as_micros()
            })
            .collect();
        let first = times[0];
        times.sort_unstable();
        let part = |parts: usize| times[(times.len() - 1) * parts / 100];
        format!("{first} {} {} {}", part(50), part(99), part(100))
    }

    /// The answer.
    fn obey(&mut self, line: &str) -> String {
        let mut words = line.split(' ');
        let command = words.next().unwrap();
        let numbers: Vec<u64> = words.map(|word| word.parse().unwrap()).collect();
        match (command, &numbers[..]) {
            ("all", []) => self.check_all(),
            ("touch", &[page]) => self.check(page * 512 + 5),
            ("kernel", &[page]) => {
                let (region, at) = self.place(page * 512 + 7);
                assert_eq!(region.read_by_kernel(at), self.expected(page * 512 + 7));
            }
            ("discard", &[first, end]) => self.discard(first..end),
            ("protect", &[first, end, writable]) => self.protect(first..end, writable == 1),
            ("churn", &[rounds]) => self.churn(rounds),
            ("measure", &[count]) => return self.measure(count),
            _ => panic!("no command: {line}"),
        }
        "well".to_owned()
    }
}

/// Is a VMM until nobody tells it anything any more.
#[expect(clippy::exit, reason = "a child without tests tells its parent so")]
pub(crate) fn be_a_vmm(what: &str) -> ! {
    // SAFETY: asks to be killed when the parent dies.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    // A process that is killed on purpose leaves no core behind.
    let none = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the structure lives through the call.
    unsafe { libc::setrlimit(libc::RLIMIT_CORE, &raw const none) };
    let mut memory = Memory::restore(&serde_json::from_str(what).unwrap());
    for line in io::stdin().lines().map_while(Result::ok) {
        println!("{}", memory.obey(&line));
    }
    std::process::exit(0)
}
