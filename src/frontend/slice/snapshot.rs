//! What a VMM says of its memory when it restores a snapshot, as Firecracker says it.
//!
//! ```text
//!  the VMM                                         who serves it
//!  makes a userfaultfd with EVENT_REMOVE
//!  maps its memory, registers all of it
//!  one message: [{"base_host_virt_addr": 140…,
//!    "size": 134217728, "offset": 0,
//!    "page_size": 4096, "page_size_kib": 4096}]
//!  + the descriptor                          ──►   checks all of it
//!  restores, runs                                  serves the faults
//! ```
//!
//! There is no answer and no further message: the VMM goes on at once. It keeps its own descriptor open, so if nobody serves its faults
//! it waits at the first absent page for ever; who refuses it has to see to that.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags};
use serde::Deserialize;

use crate::sys::mapping::page_size;
use crate::sys::uffd;

/// Most mappings of one VMM: memory that is plugged in piece by piece has hundreds.
pub const MOST_MAPPINGS: usize = 4096;
/// Longest message, which has room for as many mappings.
const LONGEST: usize = 1 << 20;
/// What one read takes.
const PIECE: usize = 64 << 10;
/// Most descriptors that are looked at; the kernel closes what is beyond.
const DESCRIPTORS: usize = 4;
/// The largest pages: each is read at once, and is one buffer a thread.
const LARGEST_PAGE: u64 = 2 << 20;

/// Memory of a VMM, and what of the snapshot's memory it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryMapping {
    /// The address of its first byte in the VMM; begins a page.
    pub address: u64,
    /// Its length in bytes, whole pages.
    pub len: u64,
    /// Where in the snapshot's memory it begins; a multiple of the page size.
    pub offset: u64,
    /// The size of its pages in bytes.
    pub page_size: u64,
}

/// As it is written. Fields that a later version adds are left alone.
#[derive(Debug, Deserialize)]
struct Written {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: Option<u64>,
    /// Bytes, too: the name is a mistake that older versions have alone.
    page_size_kib: Option<u64>,
}

/// Why the memory of a VMM is not served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// The socket, or the kernel.
    #[error("talking to the VMM failed: {0}")]
    Io(#[from] io::Error),
    /// It said nothing, or not all, in time.
    #[error("whoever connected did not say in time what its memory is")]
    Late,
    /// It closed the socket before it had said all.
    #[error("whoever connected left before it had said what its memory is")]
    Left,
    /// What came is no description of memory.
    #[error("what came over the socket does not describe the memory of a VMM: {0}")]
    Foreign(#[source] serde_json::Error),
    /// More came than any description needs.
    #[error("the description of the VMM's memory has more than {LONGEST} bytes")]
    Long,
    /// More followed the description.
    #[error("something follows the description of the VMM's memory: no VMM sends more than that")]
    More,
    /// There is none, or there are too many.
    #[error("the VMM has {0} mappings: from 1 to {MOST_MAPPINGS} can be served")]
    Count(usize),
    /// One makes no sense.
    #[error("mapping {number} of the VMM ({mapping}) {what}")]
    Mapping {
        /// Which, counted from 0.
        number: usize,
        /// It.
        mapping: MemoryMapping,
        /// What is wrong with it.
        what: &'static str,
    },
    /// Two claim the same.
    #[error("mappings {first} and {second} of the VMM have the same {what}")]
    Overlap {
        /// One of them.
        first: usize,
        /// The other.
        second: usize,
        /// What they have.
        what: &'static str,
    },
    /// The snapshot's memory is shorter.
    #[error(
        "mapping {number} of the VMM ends at byte {end} of the snapshot's memory, which has {len} bytes: it is the memory of another \
         snapshot"
    )]
    Outside {
        /// Which, counted from 0.
        number: usize,
        /// Where it ends.
        end: u64,
        /// How much there is.
        len: u64,
    },
    /// No descriptor came.
    #[error("no userfaultfd came with the description of the VMM's memory")]
    NoDescriptor,
    /// Several came.
    #[error("several descriptors came with the description of the VMM's memory: a VMM sends one")]
    Descriptors,
    /// It is of another kind.
    #[error(
        "the descriptor that came is not that of a userfaultfd (which /proc tells: is it mounted here?)"
    )]
    Kind,
    /// It cannot be used.
    #[error("the userfaultfd of the VMM cannot be used: {0}")]
    Unusable(#[source] io::Error),
    /// It does not tell which pages are given back.
    #[error(
        "the userfaultfd of the VMM was made without EVENT_REMOVE: what its guest gives back would have its old bytes again"
    )]
    NoRemove,
    /// A mapping is not what was said.
    #[error("mapping {number} of the VMM cannot be served: {source}")]
    Unmapped {
        /// Which, counted from 0.
        number: usize,
        /// What the kernel says.
        source: io::Error,
    },
}

/// A VMM is not served.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct RefusedSnapshot {
    /// Why.
    #[source]
    pub error: SnapshotError,
    /// Whether a userfaultfd had come: the VMM waits at its first absent page then, for ever.
    pub waits: bool,
}

/// The memory of a VMM that restores a snapshot, as it describes it, and the descriptor of its faults.
#[derive(Debug)]
pub struct Snapshot {
    pub(super) descriptor: OwnedFd,
    pub(super) mappings: Vec<MemoryMapping>,
}

impl std::fmt::Display for MemoryMapping {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            address,
            len,
            offset,
            page_size,
        } = self;
        write!(
            f,
            "{len} bytes at {address:#x}, from {offset} on, in pages of {page_size}"
        )
    }
}

impl Snapshot {
    /// Receives what the VMM at the other end of `vmm` says, which is checked but for what only the snapshot's memory and the kernel
    /// know. It takes at most so long.
    ///
    /// # Errors
    /// See [`SnapshotError`].
    pub fn receive(vmm: &UnixStream, at_most: Duration) -> Result<Self, RefusedSnapshot> {
        let mut descriptors = Vec::new();
        let mappings = receive(vmm, Instant::now() + at_most, &mut descriptors);
        let of_faults = |descriptor: &OwnedFd| uffd::is_userfaultfd(descriptor.as_fd());
        let waits = descriptors.iter().any(of_faults);
        let checked = mappings.and_then(|mappings| {
            if descriptors.len() > 1 {
                return Err(SnapshotError::Descriptors);
            }
            // Anything may have come: a descriptor whose server never answers, for example.
            match descriptors.pop() {
                None => Err(SnapshotError::NoDescriptor),
                Some(_) if !waits => Err(SnapshotError::Kind),
                Some(descriptor) => Ok(Self {
                    descriptor,
                    mappings,
                }),
            }
        });
        checked.map_err(|error| RefusedSnapshot { error, waits })
    }

    /// What the VMM says of its memory.
    #[must_use]
    pub fn mappings(&self) -> &[MemoryMapping] {
        &self.mappings
    }
}

/// The mappings in a message, checked but for whether the snapshot has their bytes, and the VMM such memory.
///
/// # Errors
/// See [`SnapshotError`].
pub fn parse_mappings(message: &[u8]) -> Result<Vec<MemoryMapping>, SnapshotError> {
    parse(message)?.ok_or(SnapshotError::Left)
}

/// `None` if the message has not ended.
fn parse(message: &[u8]) -> Result<Option<Vec<MemoryMapping>>, SnapshotError> {
    let mut values = serde_json::Deserializer::from_slice(message).into_iter::<Vec<Written>>();
    let written = match values.next() {
        None => return Ok(None),
        Some(Err(error)) if error.is_eof() || ends_in_a_number(message) => return Ok(None),
        Some(Err(error)) => return Err(SnapshotError::Foreign(error)),
        Some(Ok(written)) => written,
    };
    let rest = &message[values.byte_offset()..];
    // C programs send the byte that ends their text, too.
    if !rest
        .iter()
        .all(|&byte| byte.is_ascii_whitespace() || byte == 0)
    {
        return Err(SnapshotError::More);
    }
    if !(1..=MOST_MAPPINGS).contains(&written.len()) {
        return Err(SnapshotError::Count(written.len()));
    }
    let mappings: Vec<_> = written.iter().map(MemoryMapping::from).collect();
    check(&mappings)?;
    Ok(Some(mappings))
}

/// Whether a message that is refused only ends within a number, as `1.` or `-`: the parser takes that for a wrong number. With a digit
/// more it is a right one, and what follows is all that lacks.
fn ends_in_a_number(message: &[u8]) -> bool {
    let longer = [message, b"0"].concat();
    let mut values = serde_json::Deserializer::from_slice(&longer).into_iter::<Vec<Written>>();
    values
        .next()
        .is_some_and(|value| value.is_err_and(|error| error.is_eof()))
}

impl From<&Written> for MemoryMapping {
    fn from(written: &Written) -> Self {
        Self {
            address: written.base_host_virt_addr,
            len: written.size,
            offset: written.offset,
            // The oldest versions know no other pages than the system's.
            page_size: written
                .page_size
                .or(written.page_size_kib)
                .unwrap_or_else(page_size),
        }
    }
}

fn check(mappings: &[MemoryMapping]) -> Result<(), SnapshotError> {
    let pages = mappings[0].page_size;
    for (number, &mapping) in mappings.iter().enumerate() {
        let wrong = |what| {
            Err(SnapshotError::Mapping {
                number,
                mapping,
                what,
            })
        };
        if !pages.is_power_of_two() || !(page_size()..=LARGEST_PAGE).contains(&pages) {
            return wrong("has pages of a size that cannot be served");
        }
        if mapping.page_size != pages {
            return wrong("has pages of another size than the first, which cannot be served");
        }
        if mapping.len == 0 {
            return wrong("has no bytes");
        }
        let numbers = [mapping.address, mapping.len, mapping.offset];
        if !numbers.iter().all(|number| number.is_multiple_of(pages)) {
            return wrong("does not begin and end at pages");
        }
        if mapping.address.checked_add(mapping.len).is_none() {
            return wrong("is outside of the address space");
        }
        if mapping.offset.checked_add(mapping.len).is_none() {
            return wrong("is outside of the snapshot's memory");
        }
    }
    // Bytes of the snapshot that are shared would let a message of a few bytes claim terabytes.
    disjoint(mappings, "addresses", |mapping| mapping.address)?;
    disjoint(mappings, "bytes of the snapshot", |mapping| mapping.offset)
}

fn disjoint(
    mappings: &[MemoryMapping],
    what: &'static str,
    start: impl Fn(&MemoryMapping) -> u64,
) -> Result<(), SnapshotError> {
    let mut ranges: Vec<(Range<u64>, usize)> = mappings
        .iter()
        .enumerate()
        .map(|(number, mapping)| (start(mapping)..start(mapping) + mapping.len, number))
        .collect();
    ranges.sort_by_key(|(range, _)| range.start);
    for pair in ranges.windows(2) {
        let [(low, first), (high, second)] = pair else {
            continue;
        };
        if low.end > high.start {
            return Err(SnapshotError::Overlap {
                first: *first.min(second),
                second: *first.max(second),
                what,
            });
        }
    }
    Ok(())
}

/// Reads until the description has ended; keeps what descriptors come.
fn receive(
    vmm: &UnixStream,
    deadline: Instant,
    descriptors: &mut Vec<OwnedFd>,
) -> Result<Vec<MemoryMapping>, SnapshotError> {
    let mut message = Vec::new();
    let mut piece = vec![0; PIECE];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(SnapshotError::Late);
        }
        vmm.set_read_timeout(Some(left))?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = match rustix::net::recvmsg(
            vmm,
            &mut [IoSliceMut::new(&mut piece)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        ) {
            Ok(received) => received,
            Err(rustix::io::Errno::INTR) => continue,
            Err(rustix::io::Errno::AGAIN) => return Err(SnapshotError::Late),
            Err(errno) => return Err(SnapshotError::Io(errno.into())),
        };
        for came in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(came) = came {
                descriptors.extend(came);
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) || descriptors.len() > DESCRIPTORS {
            return Err(SnapshotError::Descriptors);
        }
        if received.bytes == 0 {
            return Err(SnapshotError::Left);
        }
        message.extend_from_slice(&piece[..received.bytes]);
        if message.len() > LONGEST {
            return Err(SnapshotError::Long);
        }
        if let Some(mappings) = parse(&message)? {
            return Ok(mappings);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{IoSlice, Write};

    use proptest::prelude::*;
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

    use super::*;
    use crate::sys::uffd::{Features, Scope, Uffd};

    const PATIENCE: Duration = Duration::from_secs(20);
    const HUGE: u64 = 2 << 20;

    /// As the VMM writes it.
    fn written(mappings: &[[u64; 4]]) -> String {
        let mappings: Vec<String> = mappings
            .iter()
            .map(|[address, len, offset, page]| {
                format!(
                    r#"{{"base_host_virt_addr":{address},"size":{len},"offset":{offset},"page_size":{page},"page_size_kib":{page}}}"#
                )
            })
            .collect();
        format!("[{}]", mappings.join(","))
    }

    #[test]
    fn what_a_vmm_of_any_version_writes_is_understood() {
        let expected = MemoryMapping {
            address: 1 << 40,
            len: HUGE,
            offset: 4 * HUGE,
            page_size: 4096,
        };
        let check = |text: &str, page_size| {
            let parsed = parse_mappings(text.as_bytes()).unwrap();
            let expected = MemoryMapping {
                page_size,
                ..expected
            };
            assert_eq!(parsed, [expected], "{text}");
        };
        check(&written(&[[1 << 40, HUGE, 4 * HUGE, 4096]]), 4096);
        check(&written(&[[1 << 40, HUGE, 4 * HUGE, HUGE]]), HUGE);
        let oldest = r#"[{"base_host_virt_addr":1099511627776,"size":2097152,"offset":8388608}]"#;
        check(oldest, 4096);
        let older = oldest.replace("}]", r#","page_size_kib":2097152}]"#);
        check(&older, HUGE);
        // What a later version may have.
        let later = oldest.replace(
            "}]",
            r#","page_size":4096,"page_size_kib":4,"slot":7,"name":["a"]}]"#,
        );
        check(&later, 4096);
        check(&format!(" {oldest}\n\0"), 4096);
    }

    /// One more field of every kind that there is.
    const RICH: &str = r#" [ {"base_host_virt_addr":1099511627776, "a":0, "b":-0, "c":12.5, "d":-1e9, "e":1.25E-07, "f":3e+2,
        "g":123456789012345678901234567890.125, "":"", "h\u00e9\"\\":"\b\f\n\r\t\/\u0041\ud83d\ude00 é€😀",
        "i":[], "j":{}, "k":[-1, [2.5e1, {"l":[true, false, null]}], "m"], "n":{"size":-7.5, "o":{"p":[0.5]}}, "q":true, "r":false,
        "s":null, "size":2097152, "😀":[[[-0.0e-0]]], "offset":8388608, "page_size":4096, "t":-0.5E+1}
        ] "#;

    #[test]
    fn a_description_is_understood_wherever_it_is_cut() {
        let expected = parse_mappings(RICH.as_bytes()).unwrap();
        assert_eq!(expected[0].offset, 4 * HUGE);
        let end = RICH.trim_end().len();
        for cut in 0..end {
            let begun = parse(&RICH.as_bytes()[..cut]);
            assert!(
                matches!(begun, Ok(None)),
                "{begun:?} of what ends in {:?}",
                String::from_utf8_lossy(&RICH.as_bytes()[..cut])
            );
        }
        assert_eq!(parse(&RICH.as_bytes()[..end]).unwrap(), Some(expected));
    }

    #[test]
    fn mappings_that_make_no_sense_are_refused_by_number() {
        let check = |mappings: &[[u64; 4]], says: &str| {
            let refused = parse_mappings(written(mappings).as_bytes()).unwrap_err();
            assert!(refused.to_string().contains(says), "{refused}");
        };
        let good = [1 << 30, HUGE, 0, 4096];
        check(&[], "0 mappings");
        check(&[[0; 4]; MOST_MAPPINGS + 1], "4097 mappings");
        check(&[good, [1 << 32, 0, HUGE, 4096]], "mapping 1");
        check(&[[1, 4096, 0, 4096]], "begin and end at pages");
        check(&[[4096, 4095, 0, 4096]], "begin and end at pages");
        check(&[[4096, 4096, 1, 4096]], "begin and end at pages");
        check(&[[HUGE + 4096, HUGE, 0, HUGE]], "begin and end at pages");
        check(&[[u64::MAX - 4095, 8192, 0, 4096]], "address space");
        check(&[[0, 8192, u64::MAX - 4095, 4096]], "snapshot's memory");
        for size in [0, 1, 4, 2048, 12288, 1 << 30, 1 << 63] {
            check(&[[0, 1 << 30, 0, size]], "size that cannot be served");
        }
        check(&[good, [HUGE, HUGE, HUGE, HUGE]], "another size");
        let inside = [(1 << 30) + HUGE - 4096, 8192, HUGE, 4096];
        check(
            &[inside, good],
            "0 and 1 of the VMM have the same addresses",
        );
        let same = [1 << 31, 4096, HUGE - 4096, 4096];
        check(&[good, same], "the same bytes of the snapshot");
        check(&[good, [1 << 31, 4096, HUGE, 4096], good], "0 and 2");
    }

    #[test]
    fn what_is_no_description_is_refused_as_soon_as_it_is_known() {
        for foreign in [
            "GET / HTTP/1.1",
            "{}",
            "[1]",
            r#"[{"size":1}]"#,
            r#"[{"base_host_virt_addr":-1,"size":1,"offset":0}]"#,
            r#"[{"base_host_virt_addr":18446744073709551616,"size":1,"offset":0}]"#,
            r#"[{"base_host_virt_addr":1.5,"size":1,"offset":0}]"#,
            r#"[{"size":1,"size":1,"#,
            r#"[{"x":1.x"#,
            r#"[{"x":1.."#,
            r#"[{"x":--"#,
            r#"[{"x":1e+-"#,
            r#"[{"x":tra"#,
            r#"[{"x":"\x"#,
        ] {
            let refused = parse(foreign.as_bytes()).unwrap_err();
            assert!(matches!(refused, SnapshotError::Foreign(_)), "{foreign}");
        }
        let good = written(&[[1 << 30, HUGE, 0, 4096]]);
        for more in ["[", "x", "  1"] {
            let refused = parse(format!("{good}{more}").as_bytes()).unwrap_err();
            assert!(matches!(refused, SnapshotError::More), "{refused}");
        }
        for end in 0..good.len() {
            assert!(parse(&good.as_bytes()[..end]).unwrap().is_none(), "{end}");
        }
    }

    /// Any JSON, as text.
    fn json() -> impl Strategy<Value = String> {
        let text = r#"([ !#-\[\]-~é€😀]|\\["\\/bfnrt]|\\u00[0-9a-fA-F]{2}|\\ud83d\\ude00){0,6}"#
            .prop_map(|text| format!("\"{text}\""))
            .boxed();
        let number = "-?(0|[1-9][0-9]{0,30})(\\.[0-9]{1,20})?([eE][+-]?[0-9]{1,3})?";
        let literal = proptest::sample::select(vec!["true", "false", "null"]);
        let leaf = prop_oneof![literal.prop_map(str::to_owned), number, text.clone()];
        leaf.prop_recursive(4, 24, 4, move |inner| {
            let field = (text.clone(), inner.clone());
            prop_oneof![
                proptest::collection::vec(inner, 0..4)
                    .prop_map(|values| format!("[{}]", values.join(" ,"))),
                proptest::collection::vec(field, 0..4).prop_map(|fields| {
                    let fields: Vec<_> = fields
                        .iter()
                        .map(|(name, value)| format!("{name} :{value}"))
                        .collect();
                    format!("{{{}}}", fields.join(","))
                }),
            ]
        })
    }

    proptest! {
        #[test]
        fn whatever_fields_a_description_has_besides_it_may_be_cut_anywhere(
            fields in proptest::collection::vec(json(), 1..4)
        ) {
            let fields: Vec<_> = fields
                .iter()
                .enumerate()
                .map(|(number, value)| format!(r#""{number}":{value},"#))
                .collect();
            let message = format!(
                r#"[{{{}"base_host_virt_addr":4096,"size":4096,"offset":0}}]"#,
                fields.concat()
            );
            for cut in 0..message.len() {
                let begun = parse(&message.as_bytes()[..cut]);
                prop_assert!(matches!(begun, Ok(None)), "{begun:?} at {cut} of {message}");
            }
            prop_assert!(matches!(parse(message.as_bytes()), Ok(Some(_))), "{message}");
        }

        #[test]
        fn what_is_understood_overlaps_nowhere_and_ends(
            numbers in proptest::collection::vec((0..20_u64, 0..6_u64, 0..20_u64), 1..6)
        ) {
            let mappings: Vec<_> = numbers
                .iter()
                .map(|&(address, len, offset)| [address * 4096, len * 4096, offset * 4096, 4096])
                .collect();
            if let Ok(parsed) = parse_mappings(written(&mappings).as_bytes()) {
                for (at, one) in parsed.iter().enumerate() {
                    prop_assert!(one.len > 0);
                    for other in &parsed[..at] {
                        let apart = |a: u64, b: u64| a + one.len <= b || b + other.len <= a;
                        prop_assert!(apart(one.address, other.address));
                        prop_assert!(apart(one.offset, other.offset));
                    }
                }
            }
        }
    }

    fn send(vmm: &UnixStream, message: &[u8], descriptors: &[OwnedFd]) {
        let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !borrowed.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(&borrowed)));
        }
        let parts = [IoSlice::new(message)];
        let sent = rustix::net::sendmsg(vmm, &parts, &mut ancillary, SendFlags::NOSIGNAL).unwrap();
        assert_eq!(sent, message.len());
    }

    fn userfaultfd() -> OwnedFd {
        let uffd = Uffd::create(Scope::UserModeOnly, Features::EVENT_REMOVE).unwrap();
        uffd.as_fd().try_clone_to_owned().unwrap()
    }

    #[test]
    fn a_message_in_many_pieces_is_one() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mappings: Vec<_> = (1..2000)
            .map(|at| [at << 30, HUGE, at * HUGE, 4096])
            .collect();
        let message = written(&mappings);
        let sender = std::thread::spawn(move || {
            let (first, rest) = message.as_bytes().split_at(1);
            send(&theirs, first, &[userfaultfd()]);
            for piece in rest.chunks(777) {
                (&theirs).write_all(piece).unwrap();
            }
            theirs
        });
        let snapshot = Snapshot::receive(&ours, PATIENCE).unwrap();
        assert_eq!(snapshot.mappings().len(), 1999);
        assert_eq!(snapshot.mappings()[1998].offset, 1999 * HUGE);
        let _ = sender.join().unwrap();
    }

    #[test]
    fn who_sends_something_else_is_refused_and_it_is_known_whether_it_waits() {
        let check = |message: &[u8], descriptors: &[OwnedFd], waits: bool| {
            let (ours, theirs) = UnixStream::pair().unwrap();
            send(&theirs, message, descriptors);
            // It ends, so that what is short is known to be.
            theirs.shutdown(std::net::Shutdown::Write).unwrap();
            let refused = Snapshot::receive(&ours, PATIENCE).unwrap_err();
            assert_eq!(refused.waits, waits, "{refused}");
            refused.error
        };
        let file = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let good = written(&[[1 << 30, HUGE, 0, 4096]]);
        let good = good.as_bytes();
        let error = check(good, &[], false);
        assert!(matches!(error, SnapshotError::NoDescriptor), "{error}");
        let error = check(good, &[file()], false);
        assert!(matches!(error, SnapshotError::Kind), "{error}");
        let error = check(good, &[file(), userfaultfd()], true);
        assert!(matches!(error, SnapshotError::Descriptors), "{error}");
        let many: Vec<_> = (0..8).map(|_| file()).collect();
        let error = check(good, &many, false);
        assert!(matches!(error, SnapshotError::Descriptors), "{error}");
        let error = check(&good[..20], &[userfaultfd()], true);
        assert!(matches!(error, SnapshotError::Left), "{error}");
        let error = check(b"GET /", &[], false);
        assert!(matches!(error, SnapshotError::Foreign(_)), "{error}");
    }

    #[test]
    fn who_says_nothing_or_never_ends_is_not_waited_for() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let refused = Snapshot::receive(&ours, Duration::from_millis(20)).unwrap_err();
        assert!(matches!(refused.error, SnapshotError::Late), "{refused}");
        let sender = std::thread::spawn(move || {
            let blanks = [b' '; 4096];
            // It fails once nobody reads any more.
            while (&theirs).write_all(&blanks).is_ok() {}
        });
        let refused = Snapshot::receive(&ours, PATIENCE).unwrap_err();
        assert!(matches!(refused.error, SnapshotError::Long), "{refused}");
        drop(ours);
        sender.join().unwrap();
    }
}
