//! Servers that lie, stammer or die: whatever comes, an operation ends in time with the right error, and nobody panics.

use std::io::{self, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::fake::{Fake, Manner, byte_at, bytes_at, chunk, data, handshake, request, simple};
use crate::backend::nbd::{ConnectError, Fault, Misbehaviour, Remote, RemoteOptions};
use crate::chunk::Storage;
use crate::nbd::{
    BlockStatus, ChunkKind, Errno, ErrorChunk, Extent, Hole, Request, TransmissionFlags,
};

const SOON: Duration = Duration::from_secs(10);
const SIZE: u64 = 1 << 30;

/// Reads 4096 bytes from a server that answers each request with what `answer` makes of it.
fn read_from(answer: impl Fn(Request) -> Vec<u8> + Send + Sync + 'static) -> io::Result<Vec<u8>> {
    let server = Fake::new(Manner::new(SIZE), move |_, stream| {
        loop {
            let (request, _) = request(stream)?;
            stream.write_all(&answer(request))?;
        }
    });
    let remote = server.connect(SOON);
    let mut buf = vec![0xEE; 4096];
    let begun = Instant::now();
    let result = remote.read_exact_at(&mut buf, 8192);
    assert!(
        begun.elapsed() < SOON / 2,
        "an answer that is wrong is no reason to wait"
    );
    result.map(|()| buf)
}

fn misbehaviour(result: io::Result<Vec<u8>>) -> Misbehaviour {
    let error = result.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
    let fault: &Fault = error.get_ref().unwrap().downcast_ref().unwrap();
    fault.misbehaviour().unwrap().clone()
}

#[test]
fn bytes_may_come_in_any_pieces_and_order() {
    let read = read_from(|request| {
        let (cookie, offset) = (request.cookie, request.offset);
        let hole = Hole {
            offset: offset + 1000,
            len: 96,
        };
        [
            data(cookie, offset + 1096, &bytes_at(offset + 1096, 3000), false),
            chunk(cookie, ChunkKind::OffsetHole, false, &hole.encode()),
            data(cookie, offset, &bytes_at(offset, 1000), false),
            chunk(cookie, ChunkKind::None, true, &[]),
        ]
        .concat()
    })
    .unwrap();
    let mut expected = bytes_at(8192, 4096);
    expected[1000..1096].fill(0);
    assert!(read == expected);
}

#[test]
fn what_no_server_may_say_is_named_and_the_connection_dropped() {
    use Misbehaviour as M;
    let check = |answer: fn(Request) -> Vec<u8>, expected: fn(&M) -> bool| {
        let found = misbehaviour(read_from(answer));
        assert!(expected(&found), "{found:?}");
    };
    check(
        |_| b"HTTP/1.1 400 Bad Request".to_vec(),
        |m| matches!(m, M::Decode(_)),
    );
    check(
        |r| data(r.cookie + 1, r.offset, &[1; 4096], true),
        |m| matches!(m, M::Cookie(_)),
    );
    check(
        |r| data(r.cookie, r.offset + 1, &[1; 4096], true),
        |m| matches!(m, M::Range { .. }),
    );
    check(
        |r| data(r.cookie, r.offset - 1, &[1; 2], true),
        |m| matches!(m, M::Range { .. }),
    );
    check(
        |r| data(r.cookie, u64::MAX, &[1; 2], true),
        |m| matches!(m, M::Range { .. }),
    );
    check(
        |r| data(r.cookie, r.offset, &[1; 4097], true),
        |m| matches!(m, M::Length { .. }),
    );
    check(
        |r| data(r.cookie, r.offset, &[], true),
        |m| matches!(m, M::Length { .. }),
    );
    check(
        |r| data(r.cookie, r.offset, &[1; 4095], true),
        |m| matches!(m, M::Short { .. }),
    );
    check(
        |r| chunk(r.cookie, ChunkKind::None, true, &[]),
        |m| matches!(m, M::Short { .. }),
    );
    check(
        |r| chunk(r.cookie, ChunkKind::None, true, &[1]),
        |m| matches!(m, M::Length { .. }),
    );
    check(
        |r| chunk(r.cookie, ChunkKind::None, false, &[]),
        |m| matches!(m, M::Length { .. }),
    );
    check(
        |r| chunk(r.cookie, ChunkKind::Unknown(77), true, &[]),
        |m| matches!(m, M::Kind(_)),
    );
    check(
        |r| chunk(r.cookie, ChunkKind::Error, true, &[0; 6]),
        |m| matches!(m, M::Decode(_)),
    );
    check(
        |r| chunk(r.cookie, ChunkKind::Error, true, &[1; 9000]),
        |m| matches!(m, M::Length { .. }),
    );
    check(
        |r| [simple(r.cookie, None), vec![1; 4096]].concat(),
        |m| matches!(m, M::Unstructured),
    );
    check(
        |r| {
            let twice = data(r.cookie, r.offset, &[1; 2048], false);
            [twice.clone(), twice].concat()
        },
        |m| matches!(m, M::Range { .. }),
    );
    check(
        |r| {
            let hole = Hole {
                offset: r.offset,
                len: u32::MAX,
            };
            chunk(r.cookie, ChunkKind::OffsetHole, true, &hole.encode())
        },
        |m| matches!(m, M::Range { .. }),
    );
    check(
        |r| {
            let extents = vec![Extent { len: 1, flags: 0 }];
            let status = BlockStatus {
                context: 7,
                extents,
            };
            chunk(r.cookie, ChunkKind::BlockStatus, true, &status.encode())
        },
        |m| matches!(m, M::Kind(_)),
    );
}

#[test]
fn an_error_of_the_server_fails_its_operation_and_no_other() {
    let server = Fake::new(Manner::new(SIZE), |_, stream| {
        loop {
            let (request, _) = request(stream)?;
            let answer = if request.offset == 0 {
                let error = ErrorChunk {
                    error: Errno::Io,
                    message: "the disk is on fire".into(),
                    offset: Some(0),
                };
                chunk(request.cookie, error.kind(), true, &error.encode())
            } else if request.offset == 4096 {
                simple(request.cookie, Some(Errno::NoMem))
            } else {
                let bytes = bytes_at(request.offset, request.len as usize);
                data(request.cookie, request.offset, &bytes, true)
            };
            stream.write_all(&answer)?;
        }
    });
    let remote = server.connect(SOON);
    let mut buf = [0; 512];
    let error = remote.read_exact_at(&mut buf, 0).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::Other, "{error}");
    let error = remote.read_exact_at(&mut buf, 4096).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::OutOfMemory, "{error}");
    remote.read_exact_at(&mut buf, 8192).unwrap();
    assert_eq!(buf[..], bytes_at(8192, 512));
    assert_eq!(server.connections(), 1);
}

#[test]
fn a_status_without_extents_or_of_another_context_is_refused_and_one_too_long_is_cut() {
    let server = Fake::new(Manner::new(SIZE), |number, stream| {
        loop {
            let (request, _) = request(stream)?;
            let extents = match number {
                0 => vec![
                    Extent {
                        len: 4096,
                        flags: 3,
                    },
                    Extent {
                        len: 1 << 31,
                        flags: 0,
                    },
                ],
                _ => vec![Extent { len: 1, flags: 3 }],
            };
            let context = if number == 2 { 8 } else { 7 };
            let status = BlockStatus { context, extents };
            let payload = match number {
                1 => status.encode()[..4].to_vec(),
                _ => status.encode(),
            };
            stream.write_all(&chunk(
                request.cookie,
                ChunkKind::BlockStatus,
                true,
                &payload,
            ))?;
        }
    });
    let remote = server.connect(SOON);
    let found = remote.data_ranges(0..100_000).unwrap();
    assert_eq!((found.len(), found[0].clone()), (1, 4096..100_000));
    let new = || {
        server
            .connect(SOON)
            .data_ranges(0..100_000)
            .unwrap_err()
            .kind()
    };
    assert_eq!(new(), io::ErrorKind::InvalidData);
    assert_eq!(new(), io::ErrorKind::InvalidData);
}

#[test]
fn a_server_that_dies_in_the_middle_of_an_answer_is_asked_again() {
    // The first connections end after so many bytes of an answer.
    let server = Fake::new(Manner::new(SIZE), |number, stream| {
        loop {
            let (request, _) = request(stream)?;
            let bytes = bytes_at(request.offset, request.len as usize);
            let answer = data(request.cookie, request.offset, &bytes, true);
            let cut = [0, 1, 19, 20, 27, 28, 29, 4000, answer.len() - 1];
            match cut.get(number) {
                Some(&cut) => {
                    stream.write_all(&answer[..cut])?;
                    return Ok(());
                }
                None => stream.write_all(&answer)?,
            }
        }
    });
    let remote = server.connect(SOON);
    let mut buf = vec![0; 8192];
    remote.read_exact_at(&mut buf, 4096).unwrap();
    assert!(buf == bytes_at(4096, 8192));
    assert_eq!(server.connections(), 10);
}

#[test]
fn a_server_that_says_nothing_costs_the_deadline_once() {
    let deadline = Duration::from_millis(300);
    let options = RemoteOptions {
        deadline,
        ..RemoteOptions::default()
    };
    let silent = |stream: &mut TcpStream| {
        // Until the client goes.
        io::copy(stream, &mut io::sink()).map(|_| ())
    };
    let mute = Fake::raw(move |_, stream| silent(stream));
    let begun = Instant::now();
    let error = Remote::connect(&mute.url(), &options).unwrap_err();
    assert!(matches!(error, ConnectError::Lost(_)), "{error:?}");
    let deaf = Fake::new(Manner::new(SIZE), move |_, stream| silent(stream));
    let remote = deaf.connect(deadline);
    let error = remote.read_exact_at(&mut [0], 0).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
    let error = remote.write_all_at(&[0], 0).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
    let took = begun.elapsed();
    assert!(took < deadline * 3 + Duration::from_secs(3), "{took:?}");
}

#[test]
fn a_server_that_sends_a_byte_now_and_then_costs_the_deadline_once() {
    let server = Fake::new(Manner::new(SIZE), |_, stream| {
        let (request, _) = request(stream)?;
        let bytes = bytes_at(request.offset, request.len as usize);
        stream.set_read_timeout(Some(Duration::from_millis(20)))?;
        for byte in data(request.cookie, request.offset, &bytes, true) {
            stream.write_all(&[byte])?;
            // The client says nothing more, so this waits.
            let _ = stream.peek(&mut [0]);
        }
        Ok(())
    });
    let deadline = Duration::from_millis(700);
    // Bytes that are copied, and bytes that go where they belong at once.
    for len in [4096, 200 << 10] {
        let remote = server.connect(deadline);
        let begun = Instant::now();
        let error = remote.read_exact_at(&mut vec![0; len], 0).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
        let took = begun.elapsed();
        assert!(took < deadline + Duration::from_secs(3), "{took:?}");
    }
}

#[test]
fn a_server_that_says_without_end_that_it_failed_costs_the_deadline_once() {
    let server = Fake::new(Manner::new(SIZE), |_, stream| {
        let (request, _) = request(stream)?;
        let error = ErrorChunk {
            error: Errno::Io,
            message: String::new(),
            offset: None,
        };
        let (kind, payload) = (error.kind(), error.encode());
        stream.set_read_timeout(Some(Duration::from_millis(20)))?;
        loop {
            stream.write_all(&chunk(request.cookie, kind, false, &payload))?;
            // The client says nothing more, so this waits.
            let _ = stream.peek(&mut [0]);
        }
    });
    let deadline = Duration::from_millis(700);
    let remote = server.connect(deadline);
    let begun = Instant::now();
    let error = remote.read_exact_at(&mut [0; 4096], 0).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
    let took = begun.elapsed();
    assert!(took < deadline * 2 + Duration::from_secs(3), "{took:?}");
}

#[test]
fn an_export_larger_than_any_file_is_refused() {
    let sizes = [1 << 63, u64::MAX];
    for size in sizes {
        let server = Fake::new(Manner::new(size), |_, _| Ok(()));
        let error = Remote::connect(&server.url(), &RemoteOptions::default()).unwrap_err();
        let ConnectError::Lost(fault) = error else {
            panic!("{error}")
        };
        assert_eq!(fault.misbehaviour(), Some(&Misbehaviour::Size(size)));
    }
    let server = Fake::new(Manner::new((1 << 63) - 1), |_, _| Ok(()));
    let remote = server.connect(SOON);
    assert_eq!(remote.len(), (1 << 63) - 1);
}

#[test]
fn a_flush_that_is_refused_names_what_was_to_be_durable() {
    let server = Fake::new(Manner::new(SIZE), |_, stream| {
        let mut flushes = 0;
        loop {
            let (request, _) = request(stream)?;
            let fails = request.command == crate::nbd::Command::Flush && flushes == 0;
            flushes += u32::from(fails);
            stream.write_all(&simple(request.cookie, fails.then_some(Errno::NoSpc)))?;
        }
    });
    let remote = server.connect(SOON);
    remote.write_all_at(&[1; 10], 5).unwrap();
    let error = remote.flush().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    // Nothing made these bytes durable since, but nothing new is in doubt.
    remote.write_all_at(&[1; 10], 100).unwrap();
    remote.flush().unwrap();
    let doubtful = remote.take_doubtful();
    assert_eq!((doubtful.len(), doubtful[0].clone()), (1, 5..15));
}

#[test]
fn an_unknown_way_to_be_durable_is_not_taken_for_durable() {
    let serve = |flags: TransmissionFlags, assume_durable| {
        let manner = Manner {
            flags: TransmissionFlags::HAS_FLAGS.with(flags),
            ..Manner::new(SIZE)
        };
        let server = Fake::new(manner, move |_, stream| {
            loop {
                let (request, _) = request(stream)?;
                let fua = request.flags.contains(crate::nbd::CommandFlags::FUA);
                let wants = flags.contains(TransmissionFlags::SEND_FUA);
                assert_eq!(fua, wants && request.command == crate::nbd::Command::Write);
                stream.write_all(&simple(request.cookie, None))?;
            }
        });
        let options = RemoteOptions {
            deadline: SOON,
            assume_durable,
            ..RemoteOptions::default()
        };
        let remote = Remote::connect(&server.url(), &options).unwrap();
        remote.flush()?;
        remote.write_all_at(&[1], 0)?;
        remote.flush()
    };
    let error = serve(TransmissionFlags::NONE, false).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::Unsupported);
    serve(TransmissionFlags::NONE, true).unwrap();
    serve(TransmissionFlags::SEND_FUA, false).unwrap();
}

#[test]
fn another_export_at_the_same_place_is_refused() {
    let server = Fake::raw(|number, stream| {
        let size = if number == 1 { SIZE + 1 } else { SIZE };
        handshake(Manner::new(size), stream)?;
        if number == 0 {
            return Ok(());
        }
        loop {
            let (request, _) = request(stream)?;
            let bytes = bytes_at(request.offset, request.len as usize);
            stream.write_all(&data(request.cookie, request.offset, &bytes, true))?;
        }
    });
    let remote = server.connect(SOON);
    let mut buf = [0; 1];
    let error = remote.read_exact_at(&mut buf, 3).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
    remote.read_exact_at(&mut buf, 3).unwrap();
    assert_eq!(buf[0], byte_at(3));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// No word of a server is taken on trust: neither in the handshake nor after it.
    #[test]
    fn any_bytes_in_the_place_of_answers_are_survived(
        greets in any::<bool>(),
        agrees in any::<bool>(),
        noise in proptest::collection::vec(any::<u8>(), 0..200),
        magic in prop::sample::select(vec![&b""[..], &[0x67, 0x44, 0x66, 0x98], &[0x66, 0x8e, 0x33, 0xef], &[0, 3, 0xe8, 0x89, 4, 0x55, 0x65, 0xa9]]),
    ) {
        let server = Fake::raw(move |_, stream| {
            if agrees {
                handshake(Manner::new(SIZE), stream)?;
            } else if greets {
                stream.write_all(b"NBDMAGICIHAVEOPT\0\x03")?;
            }
            stream.write_all(magic)?;
            stream.write_all(&noise)
        });
        let options = RemoteOptions { deadline: Duration::from_millis(200), ..RemoteOptions::default() };
        if let Ok(remote) = Remote::connect(&server.url(), &options) {
            remote.read_exact_at(&mut [0; 4096], 0).unwrap_err();
            remote.data_ranges(0..4096).unwrap_err();
        }
    }

    /// Answers of which one bit is wrong.
    #[test]
    fn a_bit_that_is_wrong_is_an_error_or_wrong_data_and_never_more(bit in 0_usize..8 * 156, structured: bool) {
        let manner = Manner { structured, ..Manner::new(SIZE) };
        let server = Fake::new(manner, move |_, stream| {
            loop {
                let (request, _) = request(stream)?;
                let bytes = bytes_at(request.offset, request.len as usize);
                let mut answer = if structured {
                    data(request.cookie, request.offset, &bytes, true)
                } else {
                    [simple(request.cookie, None), bytes].concat()
                };
                if let Some(byte) = answer.get_mut(bit / 8) {
                    *byte ^= 1 << (bit % 8);
                }
                stream.write_all(&answer)?;
            }
        });
        // Enough to connect on a machine that is busy; few bits make the client wait for it.
        let remote = server.connect(Duration::from_millis(500));
        let mut buf = [0; 128];
        let header = if structured { 28 } else { 16 };
        match remote.read_exact_at(&mut buf, 77) {
            Ok(()) => {
                let wrong = buf.iter().zip(bytes_at(77, 128)).filter(|(a, b)| **a != *b).count();
                // The protocol has no checksums; a header that is wrong is found out, but for flags without a meaning.
                prop_assert!(wrong <= 1 && (bit / 8 >= header || bit / 8 == 4 || bit / 8 == 5), "{}", wrong);
            }
            Err(error) => prop_assert!(bit / 8 < header, "{}", error),
        }
    }
}
