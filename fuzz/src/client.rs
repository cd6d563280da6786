//! A client that says whatever the input says, to a server of ours.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use memferry::backend::MemoryStorage;
use memferry::frontend::nbd::{Export, Server, ServerOptions};
use memferry::nbd::{
    BlockSizes, BlockStatus, ChunkFlags, ChunkKind, ClientFlags, ClientOption, Command,
    CommandFlags, ErrorChunk, GREETING_LEN, Greeting, Hole, InfoQuery, MetaQuery, OptionReply,
    OptionReplyHeader, ReplyHeader, Request,
};

/// Longer than a server that does not hang may take, on a machine that is busy.
const SOON: Duration = Duration::from_secs(30);
/// The socket takes so many bytes before the server has read any.
const MOST: usize = 16 << 10;
const SIZE: u64 = 1 << 20;

/// The first bytes of a client, up to wherever they lead.
pub fn nbd_handshake(data: &[u8]) {
    let said = converse(&[], &data[..data.len().min(MOST)]);
    let greeting = said.first_chunk().expect("a greeting comes in any case");
    Greeting::decode(greeting).expect("a greeting");
    let mut rest = &said[GREETING_LEN..];
    // Until the first thing that is none, which is the old way into an export, or a reply of the transmission phase.
    while let Some((header, tail)) = rest.split_first_chunk() {
        let Ok(header) = OptionReplyHeader::decode(header) else {
            break;
        };
        let data = tail
            .get(..header.len as usize)
            .expect("a server does not stop in the middle");
        OptionReply::decode(header.kind, data).expect("a server's answers can be read");
        rest = &tail[data.len()..];
    }
}

/// Which replies were agreed on, then the bytes of a client in the transmission phase.
pub fn nbd_transmission(data: &[u8]) {
    let Some((&mode, data)) = data.split_first() else {
        return;
    };
    let data = &data[..data.len().min(MOST)];
    let mode = match mode % 3 {
        0 => Mode::Simple,
        1 => Mode::Structured,
        _ => Mode::Extended,
    };
    let (asked, in_step) = requests(mode, data);
    let said = converse(&opening(mode), data);
    let Some(answers) = answers(mode, &said, &asked) else {
        return;
    };
    for (cookie, answered) in &answers {
        let times = asked.iter().filter(|request| request.cookie == *cookie);
        assert!(
            *answered <= times.count(),
            "{cookie:#x} is answered too often"
        );
    }
    // Where a client goes wrong, the server may leave it without an answer; where it does not, all are answered.
    let answered: usize = answers.values().sum();
    assert!(
        !in_step || answered == asked.len(),
        "{answered} of {}",
        asked.len()
    );
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Simple,
    Structured,
    Extended,
}

/// What leads to the transmission phase.
fn opening(mode: Mode) -> Vec<u8> {
    let mut bytes = ClientFlags::ALL.encode().to_vec();
    let agree = match mode {
        Mode::Simple => None,
        Mode::Structured => Some(ClientOption::StructuredReply),
        Mode::Extended => Some(ClientOption::ExtendedHeaders),
    };
    if let Some(agree) = agree {
        agree.encode(&mut bytes);
        let meta = MetaQuery {
            name: String::new(),
            queries: vec!["base:allocation".to_owned()],
        };
        ClientOption::SetMetaContext(meta).encode(&mut bytes);
    }
    let query = InfoQuery {
        name: String::new(),
        kinds: Vec::new(),
    };
    ClientOption::Go(query).encode(&mut bytes);
    bytes
}

/// The requests in `data` that want an answer, and whether it ends where one does.
fn requests(mode: Mode, data: &[u8]) -> (Vec<Request>, bool) {
    let mut asked = Vec::new();
    let mut rest = data;
    while !rest.is_empty() {
        let (request, tail) = if mode == Mode::Extended {
            let Some((header, tail)) = rest.split_first_chunk() else {
                return (asked, false);
            };
            (Request::decode_extended(header), tail)
        } else {
            let Some((header, tail)) = rest.split_first_chunk() else {
                return (asked, false);
            };
            (Request::decode(header), tail)
        };
        let Ok(request) = request else {
            return (asked, false);
        };
        let carries = request.command == Command::Write
            || (mode == Mode::Extended && request.flags.contains(CommandFlags::PAYLOAD_LEN));
        if request.command == Command::Disconnect {
            return (asked, true);
        }
        let payload = if carries { request.len } else { 0 };
        let Some(tail) = usize::try_from(payload)
            .ok()
            .and_then(|len| tail.get(len..))
        else {
            return (asked, false);
        };
        asked.push(request);
        rest = tail;
    }
    (asked, true)
}

/// How often each cookie was answered, if what was said can be read.
fn answers(mode: Mode, said: &[u8], asked: &[Request]) -> Option<BTreeMap<u64, usize>> {
    let mut answers = BTreeMap::new();
    let mut rest = &said[GREETING_LEN..];
    while let Some((header, tail)) = rest.split_first_chunk() {
        let Ok(header) = OptionReplyHeader::decode(header) else {
            break;
        };
        rest = &tail[header.len as usize..];
    }
    while let Some(magic) = rest.first_chunk() {
        let len = ReplyHeader::len_of(*magic).expect("a reply");
        let Some((header, tail)) = rest.split_at_checked(len) else {
            // A client that went wrong is cut off.
            break;
        };
        let (cookie, last, len) = match ReplyHeader::decode(header).expect("a reply") {
            ReplyHeader::Simple(reply) => {
                let mut same = asked
                    .iter()
                    .filter(|request| request.cookie == reply.cookie);
                let Some(request) = same.next() else {
                    panic!("nobody asked for {:#x}", reply.cookie);
                };
                if mode == Mode::Simple && same.next().is_some() {
                    // Nobody could tell how long this is.
                    return None;
                }
                let read = request.command == Command::Read && reply.error.is_none();
                let len = if read { request.len } else { 0 };
                (reply.cookie, true, len)
            }
            ReplyHeader::Chunk(chunk) => {
                assert_eq!(mode, Mode::Structured);
                check_chunk(chunk.kind, tail, u64::from(chunk.len));
                (
                    chunk.cookie,
                    chunk.flags.contains(ChunkFlags::DONE),
                    u64::from(chunk.len),
                )
            }
            ReplyHeader::Extended(chunk) => {
                assert_eq!(mode, Mode::Extended);
                check_chunk(chunk.kind, tail, chunk.len);
                (
                    chunk.cookie,
                    chunk.flags.contains(ChunkFlags::DONE),
                    chunk.len,
                )
            }
        };
        let Some(tail) = usize::try_from(len).ok().and_then(|len| tail.get(len..)) else {
            break;
        };
        *answers.entry(cookie).or_insert(0) += usize::from(last);
        rest = tail;
    }
    Some(answers)
}

fn check_chunk(kind: ChunkKind, tail: &[u8], len: u64) {
    let Some(payload) = usize::try_from(len).ok().and_then(|len| tail.get(..len)) else {
        return;
    };
    match kind {
        ChunkKind::None => assert!(payload.is_empty()),
        ChunkKind::OffsetData => assert!(payload.len() > 8),
        ChunkKind::OffsetHole => {
            Hole::decode(payload.try_into().expect("12 bytes")).expect("a hole");
        }
        ChunkKind::BlockStatus => {
            BlockStatus::decode(payload).expect("a status");
        }
        ChunkKind::BlockStatusExtended => {
            BlockStatus::decode_extended(payload).expect("a status");
        }
        ChunkKind::Error | ChunkKind::ErrorOffset => {
            ErrorChunk::decode(kind, payload).expect("an error");
        }
        ChunkKind::Unknown(kind) => panic!("a chunk of the kind {kind}"),
    }
}

/// All that a server says to who says this, and then nothing more. It ends, and nothing in it panics.
fn converse(opening: &[u8], data: &[u8]) -> Vec<u8> {
    static SERVER: OnceLock<Server> = OnceLock::new();
    static PANICS: AtomicUsize = AtomicUsize::new(0);
    let server = SERVER.get_or_init(|| {
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICS.fetch_add(1, Ordering::Relaxed);
            hook(info);
        }));
        server()
    });
    let (mut client, other) = UnixStream::pair().expect("a pair of sockets");
    client.set_read_timeout(Some(SOON)).expect("a time-out");
    server.serve(other).expect("a place for a client");
    // A server that has heard enough is gone before all is said.
    let _ = client
        .write_all(opening)
        .and_then(|()| client.write_all(data));
    let _ = client.shutdown(std::net::Shutdown::Write);
    let mut said = Vec::new();
    let mut buffer = vec![0; 64 << 10];
    loop {
        match client.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => said.extend_from_slice(&buffer[..read]),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => break,
            Err(error) => panic!("the server hangs: {error}"),
        }
    }
    assert_eq!(PANICS.load(Ordering::Relaxed), 0, "something panicked");
    said
}

/// Its requests are small, so that no input makes it say much.
fn server() -> Server {
    let server = Server::new(ServerOptions::default());
    let sizes = BlockSizes {
        minimum: 1,
        preferred: 4096,
        maximum: 16 << 10,
    };
    for name in ["a", "b"] {
        let storage = Arc::new(MemoryStorage::new(SIZE));
        let export = Export::new(name, storage).and_then(|export| export.with_block_sizes(sizes));
        server
            .add(export.expect("a good export"))
            .expect("a name of its own");
    }
    server
}
