//! Servers that die with writes that they had acknowledged: the flush after it names all of them, and the next one none.

use std::io::{self, Write};
use std::ops::Range;
use std::time::Duration;

use super::fake::{Fake, Manner, request, simple};
use crate::backend::nbd::DoubtfulWrites;
use crate::chunk::Storage;
use crate::nbd::{Command, TransmissionFlags};

const SOON: Duration = Duration::from_secs(20);
const SIZE: u64 = 16 << 30;

/// A server whose first connection acknowledges `answered` of the first `received` requests, and is lost. The others serve.
fn dies(received: usize, answered: usize) -> Fake {
    let manner = Manner {
        flags: TransmissionFlags::HAS_FLAGS
            .with(TransmissionFlags::SEND_FLUSH)
            .with(TransmissionFlags::SEND_WRITE_ZEROES),
        ..Manner::new(SIZE)
    };
    Fake::new(manner, move |number, stream| {
        if number > 0 {
            loop {
                let (request, _) = request(stream)?;
                stream.write_all(&simple(request.cookie, None))?;
            }
        }
        let mut cookies = Vec::new();
        for _ in 0..received {
            let (request, _) = request(stream)?;
            assert_ne!(request.command, Command::Flush);
            cookies.push(request.cookie);
            // What is asked for only after answers gets them.
            if cookies.len() <= answered {
                stream.write_all(&simple(request.cookie, None))?;
            }
        }
        Ok(())
    })
}

fn doubtful(flushed: io::Result<()>) -> Vec<Range<u64>> {
    let error = flushed.expect_err("a flush spoke for what another server had acknowledged");
    let error = error.into_inner().expect("it names what is in doubt");
    let doubtful: &DoubtfulWrites = error.downcast_ref().expect("it names what is in doubt");
    doubtful.ranges.clone()
}

#[test]
fn a_write_of_which_a_lost_server_has_a_part_is_in_doubt() {
    let check = |answered, write: fn(&dyn Storage) -> io::Result<()>, expected: Range<u64>| {
        let server = dies(if answered == 32 { 33 } else { 4 }, answered);
        let remote = server.connect(SOON);
        write(&remote).unwrap();
        assert_eq!(server.connections(), 2);
        assert_eq!(doubtful(remote.flush()), [expected]);
        // It is told once, and what is written again is not in doubt.
        write(&remote).unwrap();
        remote.flush().unwrap();
        assert_eq!(remote.take_doubtful(), []);
    };
    let pieces = |remote: &dyn Storage| remote.write_all_at(&[1; 1 << 20], 4096);
    check(1, pieces, 4096..4096 + (1 << 20));
    check(2, pieces, 4096..4096 + (1 << 20));
    check(2, |remote| remote.zero(0..512 << 20), 0..512 << 20);
    // The first batch of two is whole.
    check(32, |remote| remote.zero(0..8 << 30), 0..8 << 30);
}

#[test]
fn a_write_of_which_a_lost_server_has_acknowledged_nothing_is_in_no_doubt() {
    let server = dies(4, 0);
    let remote = server.connect(SOON);
    remote.write_all_at(&[1; 1 << 20], 0).unwrap();
    assert_eq!(server.connections(), 2);
    remote.flush().unwrap();
}
