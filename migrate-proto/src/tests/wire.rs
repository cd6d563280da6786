//! What is written can be read, and what cannot be read is refused without harm.

use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;

use proptest::prelude::*;

use super::rig::{self, Options};
use crate::bitmap::ChunkBitmap;
use crate::chunk::{ChunkRun, ChunkSize, RegionDescriptor};
use crate::dirty::DirtyPage;
use crate::error::{AbortCode, DecodeError};
use crate::frame::{FrameHeader, HEADER_LEN, encode_frame};
use crate::handover::Token;
use crate::hello::{Hello, Role, Verify};
use crate::limits::{MAX_BODY, MAX_CHUNKS, MAX_CHUNKS_IN_FRAME, MAX_NAME, MAX_PAYLOAD, MAX_STATE};
use crate::message::{Chunks, Content, Message, Run};

fn name() -> impl Strategy<Value = String> {
    prop_oneof!["[a-z0-9/-]{0,20}", "[ä-ü]{0,127}"]
}

fn hello() -> impl Strategy<Value = Hello> {
    let numbers = (any::<u16>(), any::<u16>(), any::<u64>(), any::<u64>());
    let flags = (any::<bool>(), any::<bool>(), any::<bool>(), 0..3_u8);
    let region = (name(), any::<u64>()).prop_map(|(name, len)| RegionDescriptor { name, len });
    let regions = prop::collection::vec(region, 0..12);
    let attributes = prop::collection::vec((name(), name()), 0..12);
    (numbers, flags, 12..23_u32, regions, name(), attributes).prop_map(
        |((oldest, newest, required, optional), flags, size, regions, kind, attributes)| Hello {
            oldest,
            newest,
            required,
            optional,
            role: if flags.0 { Role::Seeder } else { Role::Leecher },
            chunk_size: ChunkSize::new(1 << size).unwrap(),
            regions,
            post_copy: flags.1,
            verify: [Verify::Off, Verify::Before, Verify::After][usize::from(flags.3)],
            dry_run: flags.2,
            kind,
            attributes,
        },
    )
}

fn run() -> impl Strategy<Value = ChunkRun> {
    (0..MAX_CHUNKS, 0..=MAX_CHUNKS).prop_map(|(start, count)| ChunkRun::new(start, count))
}

fn chunks() -> impl Strategy<Value = Chunks> {
    let runs = prop_oneof![
        (0..MAX_CHUNKS, 1..8_u64).prop_map(|(start, count)| Run {
            run: ChunkRun::new(start, count),
            content: Content::Data,
        }),
        run().prop_map(|run| Run {
            run,
            content: Content::Zero,
        }),
    ];
    let runs = prop::collection::vec(runs, 0..100);
    (any::<u64>(), any::<u32>(), runs, any::<u64>()).prop_map(|(sequence, round, runs, digest)| {
        let mut chunks = Chunks {
            sequence,
            round,
            runs,
            digests: Vec::new(),
        };
        chunks.digests = (0..chunks.data_chunks())
            .map(|n| digest.wrapping_mul(n))
            .collect();
        chunks
    })
}

fn dirty() -> impl Strategy<Value = Message> {
    let runs = prop::collection::vec((0..200_000_u64, 1..5_000_u64), 0..40);
    (any::<u32>(), runs).prop_map(|(round, runs)| {
        let mut set = ChunkBitmap::empty(200_000);
        for (start, count) in runs {
            set.insert_run(ChunkRun::new(start, count));
        }
        let pages = DirtyPage::pages_of(&set).collect();
        Message::Dirty { round, pages }
    })
}

fn message() -> impl Strategy<Value = Message> {
    prop_oneof![
        hello().prop_map(Message::Hello),
        any::<u64>().prop_map(|window| Message::Accept { window }),
        (any::<u16>(), "[ -ü]{0,60}").prop_map(|(code, reason)| Message::Abort {
            code: AbortCode::from_wire(code),
            reason,
        }),
        (any::<u8>(), any::<u64>()).prop_map(|(lane, sequence)| Message::Credit { lane, sequence }),
        dirty(),
        (any::<u32>(), any::<u64>()).prop_map(|(round, chunks)| Message::Round { round, chunks }),
        chunks().prop_map(Message::Chunks),
        run().prop_map(|run| Message::Fetch { run }),
        any::<u64>().prop_map(|offset| Message::State { offset }),
        (0..=MAX_STATE, any::<u64>()).prop_map(|(len, digest)| Message::StateEnd { len, digest }),
        any::<[u8; 16]>().prop_map(|token| Message::Release {
            token: Token(token)
        }),
        any::<u64>().prop_map(|first| Message::Digests { first }),
        (any::<u64>(), any::<u64>()).prop_map(|(compared, different)| Message::Verdict {
            compared,
            different
        }),
        prop::sample::select(vec![
            Message::Finalize,
            Message::Ready,
            Message::Running,
            Message::Complete,
            Message::DigestsEnd,
            Message::Farewell,
            Message::Ping,
            Message::Pong,
            Message::Probe,
        ]),
    ]
}

fn read(frame: &[u8]) -> Result<(Message, usize), DecodeError> {
    let (header, body) = frame.split_first_chunk::<HEADER_LEN>().unwrap();
    let header = FrameHeader::decode(header)?;
    assert!(header.body_len() <= MAX_BODY as usize);
    assert!(header.payload_len() <= MAX_PAYLOAD as usize);
    let body = body
        .get(..header.body_len())
        .ok_or(DecodeError::UnexpectedEnd)?;
    Ok((header.message(body)?, header.payload_len()))
}

proptest! {
    #[test]
    fn every_message_arrives_as_it_was_sent(message in message(), payload in 0..=MAX_PAYLOAD) {
        let payload = if Message::carries_payload(message.tag()) { payload as usize } else { 0 };
        let mut frame = Vec::new();
        encode_frame(&message, payload, &mut frame);
        prop_assert_eq!(read(&frame), Ok((message, payload)));
    }

    #[test]
    fn a_damaged_frame_is_refused(
        message in message(),
        at in any::<prop::sample::Index>(),
        bit in 0..8_u8,
    ) {
        let mut frame = Vec::new();
        encode_frame(&message, 0, &mut frame);
        let at = at.index(frame.len());
        frame[at] ^= 1 << bit;
        prop_assert!(read(&frame).is_err());
    }

    #[test]
    fn any_bytes_are_read_or_refused(tag in 0..30_u8, body in prop::collection::vec(any::<u8>(), 0..300)) {
        if let Ok(message) = Message::decode(tag, &body) {
            let mut again = Vec::new();
            message.encode(&mut again);
            prop_assert_eq!(Message::decode(tag, &again), Ok(message));
        }
    }

    #[test]
    fn a_dirty_set_of_any_shape_fits_its_messages(
        seed in any::<u64>(),
        one_in in 1..40_u64,
        chunks in 1..900_000_u64,
    ) {
        let mut chance = super::chance::Chance::new(seed);
        let mut set = ChunkBitmap::empty(chunks);
        for chunk in 0..chunks {
            if chance.one_in(one_in) {
                set.insert(chunk);
            }
        }
        let mut back = ChunkBitmap::empty(chunks);
        for message in Message::dirty(3, DirtyPage::pages_of(&set)) {
            let mut body = Vec::new();
            message.encode(&mut body);
            prop_assert!(body.len() <= MAX_BODY as usize);
            let Ok(Message::Dirty { round: 3, pages }) = Message::decode(message.tag(), &body) else {
                panic!("a dirty set decodes");
            };
            for page in pages {
                page.add_to(&mut back).unwrap();
            }
        }
        prop_assert_eq!(back, set);
    }
}

#[test]
fn the_fullest_frames_fit() {
    // As many runs as there are chunks in a frame, each with a digest.
    let runs = (0..MAX_CHUNKS_IN_FRAME).map(|chunk| Run {
        run: ChunkRun::new(chunk * 2, 1),
        content: Content::Data,
    });
    let chunks = Chunks {
        runs: runs.collect(),
        digests: vec![7; usize::try_from(MAX_CHUNKS_IN_FRAME).unwrap()],
        ..Chunks::default()
    };
    let message = Message::Chunks(chunks);
    let mut frame = Vec::new();
    encode_frame(&message, MAX_PAYLOAD as usize, &mut frame);
    assert_eq!(read(&frame), Ok((message, MAX_PAYLOAD as usize)));
}

#[test]
fn a_later_hello_with_more_fields_still_decodes() {
    let hello = rig::hello(Role::Seeder, Options::default());
    let mut body = Vec::new();
    Message::Hello(hello.clone()).encode(&mut body);
    body.extend_from_slice(b"fields of a later version");
    assert_eq!(Message::decode(1, &body), Ok(Message::Hello(hello)));
}

#[test]
fn no_other_message_may_be_longer_than_its_fields() {
    for tag in 2..=22 {
        let long = vec![0; 4096];
        assert!(Message::decode(tag, &long).is_err(), "tag {tag}");
    }
}

#[test]
fn a_length_above_its_limit_is_refused_before_anything_is_allocated() {
    let mut frame = Vec::new();
    encode_frame(&Message::Probe, 0, &mut frame);
    frame[4..8].copy_from_slice(&(MAX_BODY + 1).to_le_bytes());
    assert!(matches!(read(&frame), Err(DecodeError::TooLong { .. })));
    frame[4..8].copy_from_slice(&0_u32.to_le_bytes());
    frame[8..12].copy_from_slice(&(MAX_PAYLOAD + 1).to_le_bytes());
    assert!(matches!(read(&frame), Err(DecodeError::TooLong { .. })));
    let mut frame = Vec::new();
    encode_frame(&Message::Ready, 0, &mut frame);
    frame[8..12].copy_from_slice(&1_u32.to_le_bytes());
    assert!(matches!(read(&frame), Err(DecodeError::TooLong { .. })));
}

#[test]
fn a_reason_that_is_too_long_is_cut_at_a_character() {
    let message = Message::Abort {
        code: AbortCode::Failed,
        reason: "ü".repeat(5000),
    };
    let mut body = Vec::new();
    message.encode(&mut body);
    let Ok(Message::Abort { reason, .. }) = Message::decode(3, &body) else {
        panic!("it decodes");
    };
    assert_eq!(reason, "ü".repeat(512));
}

#[test]
fn a_longest_name_is_sent_whole() {
    let mut hello = rig::hello(Role::Seeder, Options::default());
    hello.kind = "k".repeat(MAX_NAME);
    hello.check().unwrap();
    let mut body = Vec::new();
    hello.encode(&mut body);
    assert_eq!(Message::decode(1, &body), Ok(Message::Hello(hello)));
}

/// The crate is `no_std`; a machine that has only its own target cannot notice that otherwise.
#[test]
fn nothing_outside_of_tests_needs_the_standard_library() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut folders = vec![folder];
    let mut read = 0;
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.ends_with("tests") {
                continue;
            }
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap();
            let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
            let uses = code.matches("std::").count();
            assert_eq!(uses, 0, "{} uses std", path.display());
            read += 1;
        }
    }
    assert!(read > 10);
}

#[test]
fn the_message_table_of_the_protocol_page_is_the_code() {
    let page = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/protocol.md");
    let page = std::fs::read_to_string(page).unwrap();
    let mut tags = Vec::new();
    let table = page.split("\n## Messages\n").nth(1).unwrap();
    let table = table.split("\n#").next().unwrap();
    for row in table.lines().filter(|line| line.starts_with("| ")) {
        let mut cells = row.split('|').map(str::trim).skip(1);
        let (Some(tag), Some(name)) = (cells.next(), cells.next()) else {
            continue;
        };
        let Ok(tag) = tag.parse::<u8>() else {
            continue;
        };
        let name = name.trim_matches('`').to_string();
        let payload = row.contains("payload:");
        tags.push((tag, name, payload));
    }
    let mut code: Vec<_> = super::recorded::samples()
        .iter()
        .map(|message| {
            let payload = Message::carries_payload(message.tag());
            (message.tag(), message.name().to_string(), payload)
        })
        .collect();
    code.dedup();
    for message in super::recorded::samples_of_capabilities() {
        if message.tag() > 22 {
            let payload = Message::carries_payload(message.tag());
            code.push((message.tag(), message.name().to_string(), payload));
        }
    }
    assert_eq!(tags, code);
}
