//! What requests do, and what they are told.

use std::sync::Arc;

use memferry::chunk::Storage;
use memferry::dirty::Tracked;
use memferry::frontend::nbd::Export;
use memferry::nbd::{
    BlockSizes, BlockStatus, ChunkKind, ClientOption, Command, CommandFlags, Errno, Extent,
    OptionReply, encode_status_payload,
};

use proptest::prelude::*;

use super::client::{Client, SIZE, flagged, memory, request, server, server_of};

#[test]
fn what_was_written_is_read_with_every_kind_of_reply() {
    let server = server();
    let bytes: Vec<u8> = (0..=255).cycle().take(300_000).collect();
    for mut client in [Client::simple(&server), Client::structured(&server)] {
        // Of one request by the thread that reads, and by a worker.
        for len in [1, 5000, bytes.len()] {
            let write = request(Command::Write, 4095, len as u64);
            assert_eq!(client.error(&write, &bytes[..len]), None);
            let answer = client.run(&request(Command::Read, 0, 4095 + len as u64), &[]);
            let data = answer.data(0, 4095 + len);
            assert!(data[..4095].iter().all(|&byte| byte == 0));
            assert!(data[4095..] == bytes[..len]);
        }
        assert_eq!(client.error(&request(Command::Trim, 0, SIZE), &[]), None);
    }
}

#[test]
fn zeros_come_as_holes_unless_the_client_forbids_it() {
    let server = server();
    let mut client = Client::structured(&server);
    for len in [64 << 10, 512 << 10] {
        let all = client.run(&request(Command::Read, 0, len), &[]);
        assert_eq!(all.chunks.len(), 1);
        assert_eq!(all.chunks[0].0, ChunkKind::OffsetHole);
        let whole = client.run(&flagged(Command::Read, 0, len, CommandFlags::DF), &[]);
        assert_eq!(whole.chunks.len(), 1);
        assert_eq!(whole.chunks[0].0, ChunkKind::OffsetData);
        let write = request(Command::Write, 8192, 1);
        assert_eq!(client.error(&write, &[7]), None);
        let mixed = client.run(&request(Command::Read, 4096, len), &[]);
        let kinds: Vec<ChunkKind> = mixed.chunks.iter().map(|(kind, _)| *kind).collect();
        let (hole, data) = (ChunkKind::OffsetHole, ChunkKind::OffsetData);
        assert_eq!(kinds, [hole, data, hole]);
        let bytes = mixed.data(4096, usize::try_from(len).unwrap());
        assert_eq!((bytes[4095], bytes[4096], bytes[4097]), (0, 7, 0));
        let trim = request(Command::Trim, 8192, 1);
        assert_eq!(client.error(&trim, &[]), None);
    }
}

#[test]
fn requests_that_make_no_sense_are_refused_and_harm_nobody() {
    let server = server();
    let big = u64::from(u32::MAX);
    for mut client in [Client::simple(&server), Client::structured(&server)] {
        let mut check = |request, payload: &[u8], expected| {
            assert_eq!(
                client.error(&request, payload),
                Some(expected),
                "{request:?}"
            );
        };
        check(request(Command::Read, SIZE, 1), &[], Errno::Inval);
        check(request(Command::Read, u64::MAX, 2), &[], Errno::Inval);
        check(request(Command::Read, 0, big), &[], Errno::Inval);
        check(request(Command::Write, SIZE - 1, 2), &[0; 2], Errno::NoSpc);
        check(request(Command::WriteZeroes, SIZE, 1), &[], Errno::NoSpc);
        check(request(Command::Trim, SIZE, 1), &[], Errno::Inval);
        check(request(Command::Cache, SIZE, 1), &[], Errno::Inval);
        check(request(Command::BlockStatus, SIZE, 1), &[], Errno::Inval);
        check(request(Command::BlockStatus, 0, 0), &[], Errno::Inval);
        check(request(Command::Flush, 0, 1), &[], Errno::Inval);
        check(request(Command::Unknown(8), 0, 1), &[], Errno::Inval);
        for command in [Command::Read, Command::Trim, Command::Flush] {
            let flags = CommandFlags::NO_HOLE;
            check(flagged(command, 0, 0, flags), &[], Errno::Inval);
        }
        let unknown = CommandFlags(1 << 9);
        check(
            flagged(Command::Write, 0, 3, unknown),
            &[1; 3],
            Errno::Inval,
        );
        let fast = CommandFlags::FAST_ZERO;
        check(
            flagged(Command::WriteZeroes, 0, 512, fast),
            &[],
            Errno::NotSup,
        );
        // After all of this the two are still in step.
        let read = client.run(&request(Command::Read, 0, 4), &[]);
        assert_eq!((read.error, read.data(0, 4)), (None, vec![0; 4]));
    }
}

#[test]
fn a_request_for_nothing_is_granted() {
    let server = server();
    for mut client in [Client::simple(&server), Client::structured(&server)] {
        for command in [Command::Read, Command::Write, Command::Trim] {
            for offset in [0, SIZE] {
                let answer = client.run(&request(command, offset, 0), &[]);
                assert_eq!(answer.error, None);
            }
        }
    }
}

#[test]
fn nothing_is_written_to_an_export_that_is_read_only() {
    let server = server_of(Export::new("it", memory()).unwrap().read_only());
    let mut client = Client::simple(&server);
    for command in [Command::Write, Command::WriteZeroes, Command::Trim] {
        let payload: &[u8] = if command == Command::Write { &[1] } else { &[] };
        let error = client.error(&request(command, 0, 1), payload);
        assert_eq!(error, Some(Errno::Perm));
    }
    assert_eq!(client.error(&request(Command::Flush, 0, 0), &[]), None);
}

#[test]
fn requests_keep_to_block_sizes() {
    let sizes = BlockSizes {
        minimum: 512,
        preferred: 4096,
        maximum: 64 << 10,
    };
    let export = Export::new("it", memory()).unwrap();
    let server = server_of(export.with_block_sizes(sizes).unwrap());
    let mut client = Client::simple(&server);
    for (offset, len) in [(1, 512), (512, 511), (0, (64 << 10) + 512)] {
        let error = client.error(&request(Command::Read, offset, len), &[]);
        assert_eq!(error, Some(Errno::Inval));
    }
    let read = client.run(&request(Command::Read, 512, 64 << 10), &[]);
    assert_eq!(read.error, None);
    // What carries no bytes may be longer.
    assert_eq!(client.error(&request(Command::Trim, 0, SIZE), &[]), None);
}

#[test]
fn zeros_are_fast_where_the_export_says_so_and_room_need_not_stay() {
    let export = Export::new("it", memory()).unwrap().with_fast_zeroes();
    let storage = Arc::clone(export.storage());
    let server = server_of(export);
    let mut client = Client::simple(&server);
    storage.write_all_at(&[1; 8192], 0).unwrap();
    let fast = CommandFlags::FAST_ZERO;
    let zeroes = |flags| flagged(Command::WriteZeroes, 0, 4096, flags);
    assert_eq!(client.error(&zeroes(fast), &[]), None);
    let both = fast.with(CommandFlags::NO_HOLE);
    assert_eq!(client.error(&zeroes(both), &[]), Some(Errno::NotSup));
    let data = || storage.data_ranges(0..SIZE).unwrap();
    assert_eq!((data().len(), data()[0].start), (1, 4096));
    assert_eq!(client.error(&zeroes(CommandFlags::NO_HOLE), &[]), None);
    assert_eq!((data().len(), data()[0].start), (1, 0));
    let mut bytes = [1; 4097];
    storage.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!((&bytes[..4096], bytes[4096]), (&[0; 4096][..], 1));
}

fn statuses(client: &mut Client, offset: u64, len: u64, flags: CommandFlags) -> Vec<BlockStatus> {
    let answer = client.run(&flagged(Command::BlockStatus, offset, len, flags), &[]);
    assert_eq!(answer.error, None);
    answer
        .chunks
        .iter()
        .map(|(kind, payload)| match kind {
            ChunkKind::BlockStatus => BlockStatus::decode(payload).unwrap(),
            ChunkKind::BlockStatusExtended => BlockStatus::decode_extended(payload).unwrap(),
            other => panic!("{other:?}"),
        })
        .collect()
}

fn tracked() -> (Arc<Tracked>, Export) {
    let size = memferry::chunk::ChunkSize::new(4096).unwrap();
    let tracked = Arc::new(Tracked::new(memory(), size));
    let storage: Arc<dyn Storage> = Arc::clone(&tracked) as _;
    let marks = Arc::clone(&tracked) as _;
    let export = Export::new("it", storage).unwrap().with_marks(marks);
    (tracked, export)
}

const fn extent(len: u64, flags: u64) -> Extent {
    Extent { len, flags }
}

#[test]
fn the_status_tells_holes_and_what_is_dirty() {
    use memferry::dirty::DirtyTracker;
    let (tracked, export) = tracked();
    tracked.write_all_at(&[1; 4096], 0).unwrap();
    tracked.start().unwrap();
    tracked.write_all_at(&[1; 4096], 65536).unwrap();
    let server = server_of(export);
    let mut client = Client::structured(&server);
    let all = statuses(&mut client, 0, 128 << 10, CommandFlags::NONE);
    assert_eq!((all[0].context, all[1].context), (1, 2));
    assert_eq!(
        all[0].extents,
        [
            extent(4096, 0),
            extent(61440, 3),
            extent(4096, 0),
            extent(61440, 3)
        ]
    );
    assert_eq!(
        all[1].extents,
        [extent(65536, 0), extent(4096, 1), extent(61440, 0)]
    );
    let one = statuses(&mut client, 1024, 128 << 10, CommandFlags::REQ_ONE);
    assert_eq!(one[0].extents, [extent(3072, 0)]);
    assert_eq!(one[1].extents, [extent(64512, 0)]);
    // To look does not make clean.
    let again = statuses(&mut client, 0, 128 << 10, CommandFlags::NONE);
    assert_eq!(all, again);
}

#[test]
fn extended_headers_tell_of_more_than_4_gib_at_once() {
    let storage: Arc<dyn Storage> = Arc::new(memferry::backend::MemoryStorage::new(1 << 40));
    let server = server_of(Export::new("it", storage).unwrap());
    let mut client = Client::greet(&server);
    let replies = client.ask(&ClientOption::ExtendedHeaders);
    assert_eq!(replies, [OptionReply::Ack]);
    client.ask(&ClientOption::SetMetaContext(memferry::nbd::MetaQuery {
        name: String::new(),
        queries: vec!["base:allocation".into()],
    }));
    client.go();
    client.extended = true;
    let payload = CommandFlags::PAYLOAD_LEN;
    let write = flagged(Command::Write, 1 << 39, 3, payload);
    assert_eq!(client.error(&write, &[1; 3]), None);
    let bare = request(Command::Write, 1 << 39, 3);
    assert_eq!(client.error(&bare, &[1; 3]), None.or(Some(Errno::Inval)));
    let all = statuses(&mut client, 0, 1 << 40, CommandFlags::NONE);
    assert_eq!(all[0].extents[0], extent(1 << 39, 3));
    let zeroes = request(Command::WriteZeroes, 0, 1 << 40);
    assert_eq!(client.error(&zeroes, &[]), None);
    let all = statuses(&mut client, 0, 1 << 40, CommandFlags::NONE);
    assert_eq!(all[0].extents, [extent(1 << 40, 3)]);
    let read = client.run(&request(Command::Read, 5, 7), &[]);
    assert_eq!(read.data(5, 7), [0; 7]);
    // The contexts of one question.
    let mut check = |len: u64, contexts: &[u32], expected| {
        let question = encode_status_payload(len, contexts);
        let request = flagged(Command::BlockStatus, 0, question.len() as u64, payload);
        assert_eq!(client.error(&request, &question), expected);
    };
    check(1 << 40, &[1], None);
    check(1 << 40, &[2], Some(Errno::Inval));
    check((1 << 40) + 1, &[1], Some(Errno::Inval));
}

#[test]
fn a_flush_and_fua_reach_the_storage_on_whichever_connection() {
    use std::sync::atomic::{AtomicUsize, Ordering};
    #[derive(Debug)]
    struct Flushes(Arc<dyn Storage>, Arc<AtomicUsize>);
    impl Storage for Flushes {
        fn len(&self) -> u64 {
            self.0.len()
        }
        fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
            self.0.read_exact_at(buf, offset)
        }
        fn write_all_at(&self, buf: &[u8], offset: u64) -> std::io::Result<()> {
            self.0.write_all_at(buf, offset)
        }
        fn flush(&self) -> std::io::Result<()> {
            match self.1.fetch_add(1, Ordering::Relaxed) {
                3 => Err(std::io::ErrorKind::StorageFull.into()),
                _ => Ok(()),
            }
        }
        fn data_ranges(
            &self,
            within: std::ops::Range<u64>,
        ) -> std::io::Result<Vec<std::ops::Range<u64>>> {
            self.0.data_ranges(within)
        }
    }
    let flushes = Arc::new(AtomicUsize::new(0));
    let storage = Arc::new(Flushes(memory(), Arc::clone(&flushes)));
    let server = server_of(Export::new("it", storage).unwrap());
    let (mut one, mut other) = (Client::simple(&server), Client::simple(&server));
    assert_eq!(one.error(&request(Command::Write, 0, 1), &[1]), None);
    assert_eq!(flushes.load(Ordering::Relaxed), 0);
    assert_eq!(other.error(&request(Command::Flush, 0, 0), &[]), None);
    assert_eq!(flushes.load(Ordering::Relaxed), 1);
    let fua = |command| flagged(command, 0, 1, CommandFlags::FUA);
    assert_eq!(one.error(&fua(Command::Write), &[1]), None);
    assert_eq!(one.error(&fua(Command::WriteZeroes), &[]), None);
    assert_eq!(flushes.load(Ordering::Relaxed), 3);
    // Bytes that are not durable never pass for it.
    assert_eq!(one.error(&fua(Command::Write), &[1]), Some(Errno::NoSpc));
}

/// What one step of [`the_device_is_an_array_of_bytes`] does.
#[derive(Debug, Clone)]
enum Step {
    Write(u64, u64, u8),
    Zero(u64, u64, bool),
    Read(u64, u64),
}

fn step() -> impl Strategy<Value = Step> {
    // Of both sides of what is done by the thread that reads, and often over the same bytes.
    let place = (0..SIZE, prop_oneof![0..600_u64, 0..300_000_u64])
        .prop_map(|(offset, len)| (offset % (SIZE / 2), len.min(SIZE / 2)));
    (place, any::<u8>(), 0..4_u8).prop_map(|((offset, len), byte, which)| match which {
        0 => Step::Zero(offset, len, byte % 2 == 0),
        1 => Step::Write(offset, len, byte),
        _ => Step::Read(offset, len),
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_device_is_an_array_of_bytes(
        steps in proptest::collection::vec(step(), 1..24),
        structured in any::<bool>(),
    ) {
        let server = server();
        let mut client = if structured { Client::structured(&server) } else { Client::simple(&server) };
        let mut bytes = vec![0; usize::try_from(SIZE).unwrap()];
        for step in steps {
            let at = |offset: u64, len: u64| usize::try_from(offset).unwrap()..usize::try_from(offset + len).unwrap();
            match step {
                Step::Write(offset, len, byte) => {
                    bytes[at(offset, len)].fill(byte);
                    let payload = &bytes[at(offset, len)];
                    prop_assert_eq!(client.error(&request(Command::Write, offset, len), payload), None);
                }
                Step::Zero(offset, len, trim) => {
                    bytes[at(offset, len)].fill(0);
                    let command = if trim { Command::Trim } else { Command::WriteZeroes };
                    prop_assert_eq!(client.error(&request(command, offset, len), &[]), None);
                }
                Step::Read(offset, len) => {
                    let answer = client.run(&request(Command::Read, offset, len), &[]);
                    prop_assert_eq!(answer.error, None);
                    if len > 0 {
                        let read = answer.data(offset, usize::try_from(len).unwrap());
                        prop_assert!(read == bytes[at(offset, len)]);
                    }
                }
            }
        }
    }
}
