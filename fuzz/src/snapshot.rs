//! What a VMM says of its memory.

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use memferry::frontend::{MOST_MAPPINGS, MemoryMapping, Snapshot, SnapshotError, parse_mappings};

/// No input takes so long.
const PATIENCE: Duration = Duration::from_secs(10);

/// The description of a VMM's memory: a byte that says where it is cut in two, then its bytes.
///
/// What is understood makes sense, and is understood in the same way when it is written anew. Over a socket the same is found as in one piece.
pub fn snapshot_mappings(data: &[u8]) {
    let Some((&cut, message)) = data.split_first() else {
        return;
    };
    let parsed = parse_mappings(message);
    if let Ok(mappings) = &parsed {
        makes_sense(mappings);
        let again = parse_mappings(written(mappings).as_bytes()).expect("it was understood");
        assert_eq!(&again, mappings);
    }
    let received = receive(message, usize::from(cut));
    match (&parsed, &received) {
        // None came with it.
        (Ok(_), SnapshotError::NoDescriptor) => {}
        // What follows may not have come when the rest was understood.
        (Err(SnapshotError::More), _) => {}
        (Ok(_), wrong) => panic!("{wrong}"),
        (Err(one), other) => assert_eq!(
            std::mem::discriminant(one),
            std::mem::discriminant(other),
            "{one}, and over a socket {other}"
        ),
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
fn receive(message: &[u8], cut: usize) -> SnapshotError {
    let (ours, mut theirs) = UnixStream::pair().expect("a pair of sockets");
    let (first, rest) = message.split_at(cut.min(message.len()));
    let sender = std::thread::spawn({
        let (first, rest) = (first.to_vec(), rest.to_vec());
        move || {
            // It fails once the first piece was refused.
            let _ = theirs
                .write_all(&first)
                .and_then(|()| theirs.write_all(&rest));
            let _ = theirs.shutdown(Shutdown::Write);
        }
    });
    let refused = Snapshot::receive(&ours, PATIENCE).expect_err("no descriptor came");
    assert!(!refused.waits);
    drop(ours);
    sender.join().expect("a sender that does not panic");
    refused.error
}
