//! What version 1 looks like on the wire: these bytes decode for ever, whatever the code becomes.

use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use crate::bitmap::ChunkBitmap;
use crate::chunk::{ChunkRun, ChunkSize, RegionDescriptor};
use crate::dirty::DirtyPage;
use crate::error::AbortCode;
use crate::frame::{FrameHeader, HEADER_LEN, encode_frame};
use crate::handover::Token;
use crate::hello::{Hello, Role, Verify};
use crate::message::{Chunks, Content, Message, Run};

/// Every message once, Dirty in its three forms, in the order of the tags.
pub(super) fn samples() -> Vec<Message> {
    let pages = |runs: &[(u64, u64)]| {
        let mut set = ChunkBitmap::empty(100_000);
        for &(start, count) in runs {
            set.insert_run(ChunkRun::new(start, count));
        }
        DirtyPage::pages_of(&set).collect()
    };
    let scattered: Vec<_> = (0..32).map(|n| (n * 2, 1)).collect();
    vec![
        Message::Hello(Hello {
            oldest: 1,
            newest: 1,
            required: 0,
            optional: 0x0102,
            role: Role::Seeder,
            chunk_size: ChunkSize::new(65_536).unwrap(),
            regions: vec![RegionDescriptor {
                name: "pc.ram".into(),
                len: 0x1_0000_1000,
            }],
            post_copy: true,
            verify: Verify::After,
            dry_run: false,
            kind: "qemu".into(),
            attributes: vec![("machine".into(), "q35".into())],
        }),
        Message::Accept {
            window: 0x0100_0000,
        },
        Message::Abort {
            code: AbortCode::Cancelled,
            reason: "enough".into(),
        },
        Message::Credit {
            lane: 2,
            sequence: 0x0304,
        },
        Message::Dirty {
            round: 3,
            pages: pages(&[(0, 32_768), (32_770, 5), (40_000, 1)]),
        },
        Message::Dirty {
            round: 4,
            pages: pages(&scattered),
        },
        Message::Round {
            round: 3,
            chunks: 32_774,
        },
        Message::Chunks(Chunks {
            sequence: 9,
            round: 2,
            runs: vec![
                Run {
                    run: ChunkRun::new(5, 2),
                    content: Content::Data,
                },
                Run {
                    run: ChunkRun::new(7, 100),
                    content: Content::Zero,
                },
            ],
            digests: vec![0x1111, 0x2222],
        }),
        Message::Fetch {
            run: ChunkRun::new(77, 1),
        },
        Message::Finalize,
        Message::State { offset: 4096 },
        Message::StateEnd {
            len: 5000,
            digest: 0xABCD,
        },
        Message::Ready,
        Message::Release {
            token: Token([0xA5; 16]),
        },
        Message::Running,
        Message::Complete,
        Message::Digests { first: 64 },
        Message::DigestsEnd,
        Message::Verdict {
            compared: 300,
            different: 1,
        },
        Message::Farewell,
        Message::Ping,
        Message::Pong,
        Message::Probe,
    ]
}

/// What came with capabilities: every message once, then the kind of chunks that is kept.
pub(super) fn samples_of_capabilities() -> Vec<Message> {
    vec![
        Message::Keep { key: [0x5A; 32] },
        Message::Offer { first: 128 },
        Message::OfferEnd,
        Message::CutOver,
        Message::Chunks(Chunks {
            sequence: 10,
            round: 0,
            runs: vec![Run {
                run: ChunkRun::new(128, 4),
                content: Content::Kept,
            }],
            digests: Vec::new(),
        }),
    ]
}

/// Recorded when version 1 was written. A line is never changed; a later version appends its own.
const RECORDED: &[&str] = &[
    "0100000044000000000000004f061a31010001000000000000000000020100000000000000000001000102000100060070632e72616d0010000001000000040071656d75010007006d616368696e650300713335",
    "0200000008000000000000006295ffc80000000100000000",
    "030000000a000000000000009d3eaeee01000600656e6f756768",
    "0400000009000000000000004422fe69020403000000000000",
    "050000001a000000000000001a21b71703000000020000000000000100000002020002000400401c0000",
    "050000001500000000000000aabc70ea040000000100000000000101005555555555555555",
    "060000000c00000000000000f8e06a42030000000680000000000000",
    "070000004000000000000000e0fed65c09000000000000000200000002000500000000000000020000000000000000070000000000000064000000000000000111110000000000002222000000000000",
    "080000001000000000000000d8452a7b4d000000000000000100000000000000",
    "090000000000000000000000b7c2326b",
    "0a00000008000000000000003c0b14280010000000000000",
    "0b000000100000000000000048645adb8813000000000000cdab000000000000",
    "0c000000000000000000000094e2092c",
    "0d0000001000000000000000b65d7558a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5",
    "0e0000000000000000000000fd625deb",
    "0f0000000000000000000000cfceb350",
    "1000000008000000000000003492a07c4000000000000000",
    "11000000000000000000000076e192dd",
    "1200000010000000000000005901f9c12c010000000000000100000000000000",
    "130000000000000000000000c5b3c5fa",
    "140000000000000000000000d62073b0",
    "150000000000000000000000bbc331e1",
    "1600000000000000000000007a7db36a",
];

/// Recorded when the capabilities came.
const RECORDED_OF_CAPABILITIES: &[&str] = &[
    "1700000020000000000000006a74a5285a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a",
    "180000000800000000000000fd1d8f438000000000000000",
    "1900000000000000000000005a621a57",
    "1a00000000000000000000006034266c",
    "070000001f000000000000005096f24a0a000000000000000000000001008000000000000000040000000000000002",
];

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len() / 2)
        .map(|n| u8::from_str_radix(&text[n * 2..n * 2 + 2], 16).unwrap())
        .collect()
}

fn still_mean(recorded: &[&str], samples: Vec<Message>) {
    assert_eq!(recorded.len(), samples.len());
    for (recorded, message) in recorded.iter().zip(samples) {
        let bytes = unhex(recorded);
        let (header, body) = bytes.split_first_chunk::<HEADER_LEN>().unwrap();
        let header = FrameHeader::decode(header).unwrap();
        assert_eq!(header.message(body), Ok(message));
    }
}

fn are_still_written(recorded: &[&str], samples: Vec<Message>) {
    for (recorded, message) in recorded.iter().zip(samples) {
        let mut frame = Vec::new();
        encode_frame(&message, 0, &mut frame);
        assert_eq!(hex(&frame), *recorded, "{}", message.name());
    }
}

#[test]
fn recorded_bytes_of_version_1_still_mean_what_they_meant() {
    still_mean(RECORDED, samples());
}

#[test]
fn version_1_still_writes_the_bytes_that_were_recorded() {
    are_still_written(RECORDED, samples());
}

#[test]
fn recorded_bytes_of_capabilities_still_mean_what_they_meant() {
    still_mean(RECORDED_OF_CAPABILITIES, samples_of_capabilities());
    are_still_written(RECORDED_OF_CAPABILITIES, samples_of_capabilities());
}

#[test]
fn every_message_is_recorded() {
    let tags: Vec<_> = samples().iter().map(Message::tag).collect();
    let mut expected: Vec<u8> = (1..=22).collect();
    expected.insert(5, 5);
    assert_eq!(tags, expected);
    let tags: Vec<_> = samples_of_capabilities().iter().map(Message::tag).collect();
    assert_eq!(tags, [23, 24, 25, 26, 7]);
}
