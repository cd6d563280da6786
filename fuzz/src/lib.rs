//! What is fuzzed: plain functions of bytes, which panic if an invariant does not hold.
//!
//! `cargo +nightly fuzz run <target>` feeds them; a test of `memferry` runs them on stable over the corpus.

mod client;
mod snapshot;

use memferry::nbd::{
    BlockStatus, ChunkKind, ClientOption, ErrorChunk, Greeting, Hole, OldExport, OptionCode,
    OptionHeader, OptionReply, OptionReplyHeader, ReplyHeader, Request, decode_status_payload,
    encode_status_payload, limits,
};

pub use client::{nbd_handshake, nbd_transmission};
pub use snapshot::snapshot_mappings;

/// A target and its name.
pub type Target = (&'static str, fn(&[u8]));

/// Every target.
pub const TARGETS: [Target; 4] = [
    ("nbd_words", nbd_words),
    ("nbd_handshake", nbd_handshake),
    ("nbd_transmission", nbd_transmission),
    ("snapshot_mappings", snapshot_mappings),
];

/// Every word of the protocol: which, then its bytes. What decodes is written in a way that decodes to the same.
pub fn nbd_words(data: &[u8]) {
    let Some((&which, data)) = data.split_first() else {
        return;
    };
    match which % 10 {
        0 => same(data, Greeting::decode, |word| word.encode()),
        1 => same(data, OptionHeader::decode, |word| word.encode()),
        2 => same(data, OptionReplyHeader::decode, |word| word.encode()),
        3 => same(data, Request::decode, |word| word.encode()),
        4 => same(data, Request::decode_extended, |word| {
            word.encode_extended()
        }),
        5 => same(data, OldExport::decode, |word| word.encode()),
        6 => option(data),
        7 => option_reply(data),
        8 => reply(data),
        _ => payloads(data),
    }
}

fn same<const N: usize, T: PartialEq + std::fmt::Debug, E>(
    data: &[u8],
    decode: impl Fn(&[u8; N]) -> Result<T, E>,
    encode: impl Fn(&T) -> [u8; N],
) {
    let Some(word) = data.first_chunk().and_then(|bytes| decode(bytes).ok()) else {
        return;
    };
    let again = decode(&encode(&word)).ok();
    assert_eq!(again, Some(word));
}

fn option(data: &[u8]) {
    let Some((&code, data)) = data.split_first() else {
        return;
    };
    let code = OptionCode::from_wire(u32::from(code));
    let Ok(option) = ClientOption::decode(code, data) else {
        return;
    };
    let mut again = Vec::new();
    option.encode(&mut again);
    let again = &again[memferry::nbd::OPTION_HEADER_LEN..];
    assert!(again.len() <= data.len(), "an encoding grows");
    assert_eq!(ClientOption::decode(code, again), Ok(option));
}

fn option_reply(data: &[u8]) {
    let Some((kind, data)) = data.split_first_chunk() else {
        return;
    };
    let kind = u32::from_be_bytes(*kind);
    let Ok(reply) = OptionReply::decode(kind, data) else {
        return;
    };
    let mut again = Vec::new();
    reply.encode(OptionCode::Go, &mut again);
    let (header, again) = again.split_first_chunk().expect("every reply has a header");
    let header = OptionReplyHeader::decode(header).expect("it was just written");
    assert_eq!(OptionReply::decode(header.kind, again), Ok(reply));
}

fn reply(data: &[u8]) {
    let Some(magic) = data.first_chunk() else {
        return;
    };
    let Ok(len) = ReplyHeader::len_of(*magic) else {
        return;
    };
    if let Some(bytes) = data.get(..len) {
        let header = ReplyHeader::decode(bytes).expect("a header has no impossible fields");
        let again = match header {
            ReplyHeader::Simple(reply) => reply.encode().to_vec(),
            ReplyHeader::Chunk(chunk) => chunk.encode().to_vec(),
            ReplyHeader::Extended(chunk) => chunk.encode().to_vec(),
        };
        assert_eq!(ReplyHeader::decode(&again), Ok(header));
    }
}

fn payloads(data: &[u8]) {
    if let Some(hole) = data.first_chunk().and_then(|hole| Hole::decode(hole).ok()) {
        assert_eq!(Hole::decode(&hole.encode()), Ok(hole));
    }
    for kind in [ChunkKind::Error, ChunkKind::ErrorOffset] {
        if let Ok(error) = ErrorChunk::decode(kind, data) {
            assert_eq!(ErrorChunk::decode(kind, &error.encode()), Ok(error));
        }
    }
    if let Ok(status) = BlockStatus::decode(data) {
        assert!(status.extents.len() <= limits::EXTENTS);
        assert_eq!(BlockStatus::decode(&status.encode()), Ok(status));
    }
    if let Ok(status) = BlockStatus::decode_extended(data) {
        assert!(status.extents.len() <= limits::EXTENTS);
        let again = status.encode_extended();
        assert_eq!(BlockStatus::decode_extended(&again), Ok(status));
    }
    if let Ok((len, contexts)) = decode_status_payload(data) {
        assert_eq!(encode_status_payload(len, &contexts), data);
    }
}
