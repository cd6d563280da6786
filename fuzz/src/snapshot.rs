//! What a VMM says of its memory.

use std::fs::File;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use memferry::frontend::{MOST_MAPPINGS, MemoryMapping, Snapshot, SnapshotError, parse_mappings};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

/// No input takes so long.
const PATIENCE: Duration = Duration::from_secs(10);
/// What a socket holds and one read takes.
const LONGEST: usize = 64 << 10;

/// The description of a VMM's memory: a byte that says where it is cut in two, then its bytes.
///
/// What is understood makes sense, and is understood in the same way when it is written anew. In two pieces it is understood if it is in one.
pub fn snapshot_mappings(data: &[u8]) {
    let Some((&cut, message)) = data.split_first() else {
        return;
    };
    if message.len() > LONGEST {
        return;
    }
    let parsed = parse_mappings(message);
    if let Ok(mappings) = &parsed {
        makes_sense(mappings);
        let again = parse_mappings(written(mappings).as_bytes()).expect("it was understood");
        assert_eq!(&again, mappings);
    }
    let received = receive(message, usize::from(cut));
    // The descriptor is looked at last.
    let understood = matches!(received, SnapshotError::Kind | SnapshotError::NoDescriptor);
    match &parsed {
        Ok(_) => assert!(understood, "in two pieces {received}"),
        // What follows may not have come when the rest was understood.
        Err(SnapshotError::More) => {}
        // Not always for the same reason: what has come may be wrong, and the whole only short.
        Err(refused) => assert!(!understood, "{refused}, but not in two pieces"),
    }
}

fn makes_sense(mappings: &[MemoryMapping]) {
    assert!((1..=MOST_MAPPINGS).contains(&mappings.len()));
    for (at, one) in mappings.iter().enumerate() {
        assert_eq!(one.page_size, mappings[0].page_size);
        for number in [one.address, one.len, one.offset] {
            assert!(number.is_multiple_of(one.page_size));
        }
        let ends = |start: u64, len: u64| start.checked_add(len).expect("it ends");
        assert!(one.len > 0);
        for other in &mappings[..at] {
            for (a, b) in [(one.address, other.address), (one.offset, other.offset)] {
                assert!(ends(a, one.len) <= b || ends(b, other.len) <= a);
            }
        }
    }
}

/// As a VMM writes it.
fn written(mappings: &[MemoryMapping]) -> String {
    let mappings: Vec<String> = mappings
        .iter()
        .map(|mapping| {
            format!(
                r#"{{"base_host_virt_addr":{},"size":{},"offset":{},"page_size":{}}}"#,
                mapping.address, mapping.len, mapping.offset, mapping.page_size
            )
        })
        .collect();
    format!("[{}]", mappings.join(","))
}

/// Sends it in two pieces, and says why it was refused.
///
/// A descriptor comes with the first, beyond which nothing is read together with it: so they are two reads, and each is there before.
fn receive(message: &[u8], cut: usize) -> SnapshotError {
    let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
    let (first, rest) = message.split_at(cut.min(message.len()));
    let none = File::open("/dev/null").expect("a file that is no userfaultfd");
    for (piece, descriptors) in [(first, &[none.as_fd()][..]), (rest, &[])] {
        if piece.is_empty() {
            continue;
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
        }
        let sent = rustix::net::sendmsg(
            &theirs,
            &[IoSlice::new(piece)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        );
        assert_eq!(sent, Ok(piece.len()));
    }
    theirs
        .shutdown(Shutdown::Write)
        .expect("a socket that is open");
    let refused = Snapshot::receive(&ours, PATIENCE).expect_err("no userfaultfd came");
    assert!(!refused.waits);
    refused.error
}
