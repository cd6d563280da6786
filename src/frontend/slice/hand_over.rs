//! Handing the faults of one process to another over a Unix socket.
//!
//! ```text
//!  the program                              who serves it
//!  makes a userfaultfd, and does not use it
//!  "MFHO" version count (start len offset)* ──► checks all of it
//!  + the descriptor                             registers the ranges
//!                                         ◄──── status
//!  accesses its memory                          serves the faults
//! ```
//!
//! All numbers are little-endian: the version and the count have two bytes, a start, a length and an offset eight, the status four.
//! The program keeps its own descriptor open: if the server dies, whoever accesses an absent page waits, and never reads zeros.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

use super::SliceOptions;
use super::pager::{Area, Pager};
use super::serve::{Running, Service};
use crate::chunk::Storage;
use crate::sys::mapping::page_size;
use crate::sys::uffd::{self, Features, Mode, Scope, Uffd};

const MAGIC: [u8; 4] = *b"MFHO";
const VERSION: u16 = 1;
const HEADER: usize = 8;
const RANGE: usize = 24;
/// Most ranges: a virtual machine has a handful.
const MOST: usize = 64;

/// Memory of a program, and what of a region it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HandedRange {
    /// The address of its first byte, which begins a page.
    pub start: u64,
    /// Its length in bytes, whole pages.
    pub len: u64,
    /// Where in the region it begins; a multiple of the page size.
    pub offset: u64,
}

/// Why faults were not handed over.
#[derive(Debug, thiserror::Error)]
pub enum HandOverError {
    /// The socket, or the kernel.
    #[error("handing over a userfaultfd failed: {0}")]
    Io(#[from] io::Error),
    /// What came is something else.
    #[error("what came over the socket is no hand-over: is the peer another program?")]
    Foreign,
    /// The peer speaks another version.
    #[error(
        "the peer hands over in version {0}, and this is version {VERSION}: update the older of the two"
    )]
    Version(u16),
    /// The ranges make no sense, or are not in the region.
    #[error("the ranges of the hand-over are wrong: {0}")]
    Ranges(&'static str),
    /// No descriptor came, or not one of a userfaultfd.
    #[error("no userfaultfd came with the hand-over")]
    NoDescriptor,
    /// The peer refused.
    #[error("the server refused the hand-over (status {0}): its own error says why")]
    Refused(u32),
}

impl HandOverError {
    /// What the peer is told.
    fn status(&self) -> u32 {
        match self {
            Self::Io(_) => 1,
            Self::Foreign => 2,
            Self::Version(_) => 3,
            Self::Ranges(_) => 4,
            Self::NoDescriptor => 5,
            Self::Refused(status) => *status,
        }
    }
}

/// Serves faults of another process's memory: restoring a virtual machine, for example, whose memory is fetched when it is accessed.
///
/// What the program writes stays with it: nothing is written back. Pages that it gives back (`MADV_DONTNEED`) are zeros afterwards.
/// Dropping this ends the service: whoever accesses an absent page waits from then on.
#[derive(Debug)]
pub struct FaultServer {
    _running: Running,
    program: UnixStream,
}

/// The program's part of a hand-over. Dropping it while pages are absent makes them zeros if the server has died, so it is kept as
/// long as the memory.
#[derive(Debug)]
pub struct HandedOver {
    _uffd: OwnedFd,
    _server: UnixStream,
}

impl FaultServer {
    /// Receives a hand-over from `program`, and serves its faults from `storage` until this is dropped. Of the options, threads,
    /// read-ahead and failure count: a program that runs a guest of KVM wants [`Failure::Wait`](super::Failure::Wait).
    ///
    /// # Errors
    /// See [`HandOverError`]; the program is told. [`io::ErrorKind::TimedOut`] if it takes longer than `at_most`.
    pub fn accept(
        program: UnixStream,
        storage: Arc<dyn Storage>,
        options: &SliceOptions,
        at_most: Duration,
    ) -> Result<Self, HandOverError> {
        let accepted = receive(&program, at_most)
            .and_then(|(uffd, ranges)| serve(uffd, &ranges, storage, options));
        let status = accepted.as_ref().err().map_or(0, HandOverError::status);
        program.set_write_timeout(Some(at_most))?;
        let told = (&program).write_all(&status.to_le_bytes());
        let running = accepted?;
        told?;
        Ok(Self {
            _running: running,
            program,
        })
    }

    /// Waits until the program has ended, or has closed its end of the socket; says whether it has.
    #[must_use]
    pub fn wait(&self, at_most: Duration) -> bool {
        // Hanging up is always told of.
        let mut polled = [PollFd::from_borrowed_fd(
            self.program.as_fd(),
            PollFlags::empty(),
        )];
        let timeout = Timespec::try_from(at_most).ok();
        rustix::event::poll(&mut polled, timeout.as_ref()).is_ok_and(|ready| ready > 0)
    }
}

/// Hands the faults in `ranges` of this process to whoever has the other end of `socket`. Once this returns, an access to an absent page
/// of them waits for the server. Memory that is present keeps what it has.
///
/// `scope` says whose faults those are; see [`Scope`]. Until this returns the memory must not be accessed.
///
/// # Errors
/// See [`HandOverError`]; [`io::ErrorKind::PermissionDenied`] if this process may not make such a userfaultfd,
/// [`io::ErrorKind::TimedOut`] if the server takes longer than `at_most`.
pub fn hand_over(
    socket: UnixStream,
    ranges: &[HandedRange],
    scope: Scope,
    at_most: Duration,
) -> Result<HandedOver, HandOverError> {
    check(ranges)?;
    let uffd = uffd::unused(scope)?;
    let mut message = Vec::with_capacity(HEADER + RANGE * MOST);
    message.extend(MAGIC);
    message.extend(VERSION.to_le_bytes());
    message.extend(
        u16::try_from(ranges.len())
            .expect("few, as was checked")
            .to_le_bytes(),
    );
    for range in ranges {
        for number in [range.start, range.len, range.offset] {
            message.extend(number.to_le_bytes());
        }
    }
    socket.set_write_timeout(Some(at_most))?;
    socket.set_read_timeout(Some(at_most))?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors = [uffd.as_fd()];
    ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    let sent = rustix::net::sendmsg(
        &socket,
        &[IoSlice::new(&message)],
        &mut ancillary,
        SendFlags::NOSIGNAL,
    )
    .map_err(io::Error::from)?;
    (&socket).write_all(&message[sent..])?;
    let mut status = [0; 4];
    (&socket).read_exact(&mut status).map_err(late)?;
    match u32::from_le_bytes(status) {
        0 => Ok(HandedOver {
            _uffd: uffd,
            _server: socket,
        }),
        status => Err(HandOverError::Refused(status)),
    }
}

/// The ranges in a message, checked but for whether the region has them.
///
/// # Errors
/// See [`HandOverError`].
pub fn parse_hand_over(message: &[u8]) -> Result<Vec<HandedRange>, HandOverError> {
    let (header, body) = message
        .split_first_chunk::<HEADER>()
        .ok_or(HandOverError::Foreign)?;
    let count = count_of(header)?;
    let (ranges, rest) = body.as_chunks::<RANGE>();
    if ranges.len() != count || !rest.is_empty() {
        return Err(HandOverError::Ranges("there are not as many as announced"));
    }
    let number = |bytes: &[u8]| {
        u64::from_le_bytes(bytes.try_into().expect("a third of a range is eight bytes"))
    };
    let ranges: Vec<_> = ranges
        .iter()
        .map(|range| HandedRange {
            start: number(&range[..8]),
            len: number(&range[8..16]),
            offset: number(&range[16..]),
        })
        .collect();
    check(&ranges)?;
    Ok(ranges)
}

/// How many ranges follow a header.
fn count_of(header: &[u8; HEADER]) -> Result<usize, HandOverError> {
    let [a, b, c, d, version @ .., low, high] = *header;
    if [a, b, c, d] != MAGIC {
        return Err(HandOverError::Foreign);
    }
    let version = u16::from_le_bytes(version);
    if version != VERSION {
        return Err(HandOverError::Version(version));
    }
    let count = usize::from(u16::from_le_bytes([low, high]));
    if !(1..=MOST).contains(&count) {
        return Err(HandOverError::Ranges("there are none, or too many"));
    }
    Ok(count)
}

fn check(ranges: &[HandedRange]) -> Result<(), HandOverError> {
    let wrong = |what| Err(HandOverError::Ranges(what));
    if !(1..=MOST).contains(&ranges.len()) {
        return wrong("there are none, or too many");
    }
    let mut addresses = Vec::with_capacity(ranges.len());
    for range in ranges {
        let whole = [range.start, range.len, range.offset]
            .iter()
            .all(|number| number.is_multiple_of(page_size()));
        let end = range.start.checked_add(range.len);
        let (Some(end), true, true) = (end, whole, range.len > 0) else {
            return wrong("one is no whole pages");
        };
        if range.offset.checked_add(range.len).is_none() {
            return wrong("one is outside of the region");
        }
        addresses.push(range.start..end);
    }
    addresses.sort_by_key(|range| range.start);
    if addresses.windows(2).any(|pair| pair[0].end > pair[1].start) {
        return wrong("two overlap");
    }
    Ok(())
}

fn receive(
    program: &UnixStream,
    at_most: Duration,
) -> Result<(OwnedFd, Vec<HandedRange>), HandOverError> {
    let deadline = Instant::now() + at_most;
    let mut message = [0; HEADER + RANGE * MOST];
    let mut descriptor = None;
    let mut received = 0;
    let mut wanted = HEADER;
    // One read may bring a part, and the announced length decides how much of the buffer, never how large it is.
    while received < wanted {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(late(io::ErrorKind::WouldBlock.into()).into());
        }
        program.set_read_timeout(Some(left))?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let read = match rustix::net::recvmsg(
            program,
            &mut [IoSliceMut::new(&mut message[received..wanted])],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        ) {
            Ok(read) => read.bytes,
            Err(rustix::io::Errno::INTR) => continue,
            Err(errno) => return Err(late(errno.into()).into()),
        };
        for came in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = came {
                // All are ours now, and all but the last are closed.
                descriptor = descriptors.last().or(descriptor);
            }
        }
        if read == 0 {
            return Err(HandOverError::Foreign);
        }
        received += read;
        if received == HEADER {
            let header = message.first_chunk().expect("longer than a header");
            wanted = HEADER + RANGE * count_of(header)?;
        }
    }
    let ranges = parse_hand_over(&message[..wanted])?;
    let descriptor = descriptor.ok_or(HandOverError::NoDescriptor)?;
    // Anything may have come: a descriptor whose server never answers, for example.
    if !uffd::is_userfaultfd(descriptor.as_fd()) {
        return Err(HandOverError::NoDescriptor);
    }
    Ok((descriptor, ranges))
}

fn serve(
    descriptor: OwnedFd,
    ranges: &[HandedRange],
    storage: Arc<dyn Storage>,
    options: &SliceOptions,
) -> Result<Running, HandOverError> {
    let room = storage
        .len()
        .checked_next_multiple_of(page_size())
        .unwrap_or(u64::MAX);
    if ranges.iter().any(|range| range.offset + range.len > room) {
        return Err(HandOverError::Ranges("one is outside of the region"));
    }
    let wished = Features::MISSING_SHMEM | Features::EVENT_REMOVE | Features::POISON;
    let features = wished.intersection(uffd::offered()?);
    let uffd = Uffd::adopt(descriptor, features)?;
    let missing = Mode {
        missing: true,
        ..Mode::default()
    };
    let mut areas = Vec::with_capacity(ranges.len());
    for range in ranges {
        let addresses = range.start..range.start + range.len;
        uffd.register(addresses.clone(), missing)?;
        areas.push(Area {
            addresses,
            offset: range.offset,
        });
    }
    let pager = Pager::new(uffd, storage, areas, false);
    let service = Arc::new(Service::new(pager, None, options)?);
    Ok(service.start()?)
}

/// What a socket's own deadline says, by its name.
fn late(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock => io::Error::new(
            io::ErrorKind::TimedOut,
            "the peer of a hand-over does not answer",
        ),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use proptest::prelude::*;

    use super::*;
    use crate::backend::MemoryStorage;
    use crate::sys::memory::Memory;

    const PATIENCE: Duration = Duration::from_secs(20);

    fn message(version: u16, count: u16, ranges: &[[u64; 3]]) -> Vec<u8> {
        let mut message = MAGIC.to_vec();
        message.extend(version.to_le_bytes());
        message.extend(count.to_le_bytes());
        for number in ranges.iter().flatten() {
            message.extend(number.to_le_bytes());
        }
        message
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let good = [[4096, 8192, 0], [16384, 4096, 1 << 20]];
        let parsed = parse_hand_over(&message(1, 2, &good)).unwrap();
        assert_eq!((parsed[1].start, parsed[1].offset), (16384, 1 << 20));
        let wrong: &[&[[u64; 3]]] = &[
            &[],
            &[[4096, 0, 0]],
            &[[1, 4096, 0]],
            &[[0, 4095, 0]],
            &[[0, 4096, 1]],
            &[[u64::MAX - 4095, 8192, 0]],
            &[[0, 8192, u64::MAX - 4095]],
            &[[0, 8192, 0], [4096, 4096, 0]],
        ];
        for ranges in wrong {
            let count = u16::try_from(ranges.len()).unwrap();
            let refused = parse_hand_over(&message(1, count, ranges)).unwrap_err();
            assert!(matches!(refused, HandOverError::Ranges(_)), "{ranges:?}");
        }
        for (version, count) in [(1, 1), (1, 3), (1, u16::MAX)] {
            let refused = parse_hand_over(&message(version, count, &good)).unwrap_err();
            assert!(matches!(refused, HandOverError::Ranges(_)));
        }
        let newer = parse_hand_over(&message(2, 2, &good)).unwrap_err();
        assert!(matches!(newer, HandOverError::Version(2)));
        for foreign in [&b""[..], b"MFH", b"GET / HTTP/1.1"] {
            let refused = parse_hand_over(foreign).unwrap_err();
            assert!(matches!(refused, HandOverError::Foreign));
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse_hand_over(&bytes);
            let mut begun = message(1, 2, &[]);
            begun.extend(bytes);
            if let Ok(ranges) = parse_hand_over(&begun) {
                prop_assert!(check(&ranges).is_ok());
            }
        }
    }

    fn region() -> Arc<MemoryStorage> {
        let storage = Arc::new(MemoryStorage::new(10 * 4096 + 50));
        for page in 0..10_u8 {
            storage
                .write_all_at(&[page + 1; 4096], u64::from(page) * 4096)
                .unwrap();
        }
        storage.write_all_at(&[11; 50], 10 * 4096).unwrap();
        storage
    }

    fn byte(memory: &Memory, offset: u64) -> u8 {
        let mut byte = [0];
        memory.load(offset, &mut byte).unwrap();
        byte[0]
    }

    #[test]
    fn the_faults_of_several_ranges_are_served_until_the_program_goes() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let memory = Memory::reserve(11 * 4096).unwrap();
        let start = memory.addresses().start;
        // The last pages of the region first, and a page between that is not handed over.
        let ranges = [
            HandedRange {
                start,
                len: 3 * 4096,
                offset: 8 * 4096,
            },
            HandedRange {
                start: start + 4 * 4096,
                len: 7 * 4096,
                offset: 0,
            },
        ];
        let server = thread::spawn(move || {
            FaultServer::accept(theirs, region(), &SliceOptions::default(), PATIENCE)
        });
        let handed = hand_over(ours, &ranges, Scope::UserModeOnly, PATIENCE).unwrap();
        let server = server.join().unwrap().unwrap();
        assert_eq!([0, 4096, 8192].map(|at| byte(&memory, at)), [9, 10, 11]);
        assert_eq!(byte(&memory, 2 * 4096 + 50), 0);
        assert_eq!(byte(&memory, 3 * 4096), 0);
        for page in 0..7 {
            assert_eq!(u64::from(byte(&memory, (4 + page) * 4096)), page + 1);
        }
        // What the program gives back is gone, and not fetched again.
        memory.store(5 * 4096, &[77]).unwrap();
        memory.discard(5 * 4096..6 * 4096).unwrap();
        assert_eq!([4, 5, 6].map(|page| byte(&memory, page * 4096)), [1, 0, 3]);
        assert!(!server.wait(Duration::ZERO));
        drop(handed);
        assert!(server.wait(PATIENCE));
    }

    /// A server with one thread tried to install, which the kernel refused until somebody had read that pages were given back.
    #[test]
    fn giving_pages_back_while_others_are_fetched_hangs_nobody() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let memory = Memory::reserve(10 * 4096).unwrap();
        let range = HandedRange {
            start: memory.addresses().start,
            len: 10 * 4096,
            offset: 0,
        };
        let options = SliceOptions {
            threads: 1,
            ..SliceOptions::default()
        };
        let server =
            thread::spawn(move || FaultServer::accept(theirs, region(), &options, PATIENCE));
        let _handed = hand_over(ours, &[range], Scope::UserModeOnly, PATIENCE).unwrap();
        let _server = server.join().unwrap().unwrap();
        thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..300 {
                    memory.discard(9 * 4096..10 * 4096).unwrap();
                    assert!([0, 10].contains(&byte(&memory, 9 * 4096)));
                }
            });
            for round in 0..300 {
                let page = round % 8;
                memory.discard(page * 4096..(page + 1) * 4096).unwrap();
                assert_eq!(byte(&memory, page * 4096), 0);
            }
        });
        assert_eq!(byte(&memory, 8 * 4096), 9);
    }

    #[test]
    fn a_peer_that_lies_or_sends_something_else_is_told_and_refused() {
        let accept = |send: &dyn Fn(&UnixStream)| {
            let (ours, theirs) = UnixStream::pair().unwrap();
            send(&ours);
            let quick = Duration::from_millis(100);
            let refused = FaultServer::accept(theirs, region(), &SliceOptions::default(), quick);
            let mut status = [0; 4];
            (&ours).read_exact(&mut status).unwrap();
            assert_ne!(status, [0; 4]);
            refused.unwrap_err()
        };
        let foreign = accept(&|peer| (&*peer).write_all(b"GET / HTTP/1.1\r\n").unwrap());
        assert!(matches!(foreign, HandOverError::Foreign), "{foreign:?}");
        let short = accept(&|peer| (&*peer).write_all(b"MFHO").unwrap());
        assert!(
            matches!(&short, HandOverError::Io(error) if error.kind() == io::ErrorKind::TimedOut),
            "{short:?}"
        );
        let good = message(1, 1, &[[4096, 4096, 0]]);
        let bare = accept(&|peer| (&*peer).write_all(&good).unwrap());
        assert!(matches!(bare, HandOverError::NoDescriptor), "{bare:?}");
        let with_file = |peer: &UnixStream, message: &[u8]| {
            let file = std::fs::File::open("/dev/null").unwrap();
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            let descriptors = [file.as_fd(); 3];
            ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
            let parts = [IoSlice::new(message)];
            rustix::net::sendmsg(peer, &parts, &mut ancillary, SendFlags::NOSIGNAL).unwrap();
        };
        let file = accept(&|peer| with_file(peer, &good));
        assert!(matches!(file, HandOverError::NoDescriptor), "{file:?}");
        // A userfaultfd, but the region is not as long.
        let (ours, theirs) = UnixStream::pair().unwrap();
        let memory = Memory::reserve(12 * 4096).unwrap();
        let all = HandedRange {
            start: memory.addresses().start,
            len: 12 * 4096,
            offset: 0,
        };
        let server = thread::spawn(move || {
            FaultServer::accept(theirs, region(), &SliceOptions::default(), PATIENCE)
        });
        let refused = hand_over(ours, &[all], Scope::UserModeOnly, PATIENCE).unwrap_err();
        assert!(matches!(refused, HandOverError::Refused(4)), "{refused:?}");
        let wrong = server.join().unwrap().unwrap_err();
        assert!(matches!(wrong, HandOverError::Ranges(_)), "{wrong:?}");
    }
}
