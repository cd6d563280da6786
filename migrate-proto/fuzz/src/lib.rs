//! What is fuzzed: plain functions of bytes, which panic if an invariant does not hold.
//!
//! `cargo +nightly fuzz run <target>` feeds them; the tests of `migrate-proto` run them on stable over the corpus.

mod bytes;
mod leecher;
mod seeder;

pub use leecher::leecher_ops;
pub use seeder::seeder_ops;

use migrate_proto::limits::{MAX_BODY, MAX_PAYLOAD};
use migrate_proto::{
    ChunkBitmap, ChunkSize, FrameHeader, HEADER_LEN, Hello, Message, RegionDescriptor, Role,
    VERSIONS, Verify, capability, encode_frame,
};

/// A target and its name.
pub type Target = (&'static str, fn(&[u8]));

/// Every target.
pub const TARGETS: [Target; 6] = [
    ("frame", frame),
    ("message", message),
    ("dirty_page", dirty_page),
    ("hello", hello),
    ("seeder_ops", seeder_ops),
    ("leecher_ops", leecher_ops),
];

/// How many chunks the sessions of the targets have.
pub const CHUNKS: u64 = 70;

/// A frame off a socket.
pub fn frame(data: &[u8]) {
    let Some((header, rest)) = data.split_first_chunk::<HEADER_LEN>() else {
        return;
    };
    let Ok(header) = FrameHeader::decode(header) else {
        return;
    };
    assert!(header.body_len() <= MAX_BODY as usize);
    assert!(header.payload_len() <= MAX_PAYLOAD as usize);
    let Some(body) = rest.get(..header.body_len()) else {
        return;
    };
    if let Ok(message) = header.message(body) {
        let mut again = Vec::new();
        encode_frame(&message, header.payload_len(), &mut again);
        assert!(again.len() <= HEADER_LEN + MAX_BODY as usize);
    }
}

/// The body of any message: its tag, then its fields.
pub fn message(data: &[u8]) {
    if let Some((&tag, body)) = data.split_first()
        && body.len() <= MAX_BODY as usize
    {
        round_trip(tag, body);
    }
}

/// What decodes is written in a way that decodes to the same.
fn round_trip(tag: u8, body: &[u8]) -> Option<Message> {
    let message = Message::decode(tag, body).ok()?;
    assert_eq!(message.tag(), tag);
    let mut again = Vec::new();
    message.encode(&mut again);
    assert!(again.len() <= body.len(), "an encoding grows");
    assert_eq!(Message::decode(tag, &again).as_ref(), Ok(&message));
    Some(message)
}

/// Pages of a dirty set: the size of the space, then the fields of Dirty.
pub fn dirty_page(data: &[u8]) {
    let Some((size, body)) = data.split_first_chunk::<2>() else {
        return;
    };
    let chunks = u64::from(u16::from_le_bytes(*size)) * 3;
    let Some(Message::Dirty { pages, .. }) = round_trip(5, body) else {
        return;
    };
    let mut set = ChunkBitmap::empty(chunks);
    for page in pages {
        if page.add_to(&mut set).is_err() {
            return;
        }
    }
    assert!(set.runs().all(|run| run.end() <= chunks));
    let mut back = ChunkBitmap::empty(chunks);
    for message in Message::dirty(1, migrate_proto::DirtyPage::pages_of(&set)) {
        let Message::Dirty { pages, .. } = message else {
            panic!("a dirty set travels as Dirty");
        };
        for page in pages {
            page.add_to(&mut back).expect("this side wrote it");
        }
    }
    assert_eq!(set, back);
}

/// The fields of Hello, and what comes of it.
pub fn hello(data: &[u8]) {
    let Some(Message::Hello(theirs)) = round_trip(1, data) else {
        return;
    };
    for role in [Role::Seeder, Role::Leecher] {
        let ours = our_hello(role, 0);
        let agreed = ours.agree(&theirs);
        if let Ok(agreement) = &agreed {
            assert_eq!(
                agreement.layout.chunks(),
                theirs.layout().expect("agreed").chunks()
            );
        }
        if theirs.required == 0 {
            assert_eq!(agreed.is_ok(), theirs.agree(&ours).is_ok());
        }
        // One of the same geometry gets further.
        let twin = Hello {
            role,
            oldest: VERSIONS.0,
            newest: VERSIONS.1,
            required: 0,
            ..theirs.clone()
        };
        let _ = twin.agree(&theirs);
    }
}

/// The hello of the sessions of the targets; `flags` decide what is open.
pub(crate) fn our_hello(role: Role, flags: u8) -> Hello {
    Hello {
        oldest: VERSIONS.0,
        newest: VERSIONS.1,
        required: if flags & 64 != 0 {
            capability::CUT_OVER
        } else {
            0
        },
        optional: u64::from(flags >> 4 & 3),
        role,
        chunk_size: ChunkSize::PAGE,
        regions: vec![
            RegionDescriptor {
                name: "a".into(),
                len: 4096 * 40 + 1,
            },
            RegionDescriptor {
                name: "b".into(),
                len: 4096 * (CHUNKS - 41),
            },
        ],
        post_copy: flags & 1 == 0,
        verify: [Verify::Off, Verify::Before, Verify::After, Verify::Off]
            [usize::from(flags >> 1 & 3)],
        dry_run: flags & 8 != 0,
        kind: "fuzz".into(),
        attributes: Vec::new(),
    }
}
