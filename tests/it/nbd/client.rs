//! A client that does what it is told, right or wrong.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use memferry::backend::MemoryStorage;
use memferry::chunk::Storage;
use memferry::frontend::nbd::{Export, Server, ServerOptions};
use memferry::nbd::{
    ChunkFlags, ChunkKind, ClientFlags, ClientOption, Command, CommandFlags, Errno, ErrorChunk,
    GREETING_LEN, Greeting, Hole, InfoQuery, MetaQuery, OptionReply, OptionReplyHeader,
    ReplyHeader, Request,
};

/// No test waits longer for anything.
pub(super) const SOON: Duration = Duration::from_secs(20);
pub(super) const SIZE: u64 = 1 << 20;

pub(super) struct Client {
    pub(super) socket: UnixStream,
    pub(super) extended: bool,
}

/// All that came for one request.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) cookie: u64,
    pub(super) chunks: Vec<(ChunkKind, Vec<u8>)>,
    pub(super) error: Option<Errno>,
}

impl Client {
    /// Connects and says nothing but that it knows the handshake.
    pub(super) fn greet(server: &Server) -> Self {
        let (socket, other) = UnixStream::pair().unwrap();
        socket.set_read_timeout(Some(SOON)).unwrap();
        socket.set_write_timeout(Some(SOON)).unwrap();
        server.serve(other).unwrap();
        let mut client = Self {
            socket,
            extended: false,
        };
        let mut greeting = [0; GREETING_LEN];
        client.socket.read_exact(&mut greeting).unwrap();
        Greeting::decode(&greeting).unwrap();
        client.write(&ClientFlags::ALL.encode());
        client
    }

    /// Uses the export without a name, with simple replies.
    pub(super) fn simple(server: &Server) -> Self {
        let mut client = Self::greet(server);
        client.go();
        client
    }

    /// Uses the export without a name, with structured replies and all contexts that it has.
    pub(super) fn structured(server: &Server) -> Self {
        let mut client = Self::greet(server);
        client.ask(&ClientOption::StructuredReply);
        let queries = ["base:allocation", "memferry:dirty"].map(str::to_owned);
        client.ask(&ClientOption::SetMetaContext(MetaQuery {
            name: String::new(),
            queries: queries.to_vec(),
        }));
        client.go();
        client
    }

    pub(super) fn go(&mut self) {
        let replies = self.ask(&ClientOption::Go(InfoQuery {
            name: String::new(),
            kinds: Vec::new(),
        }));
        assert_eq!(replies.last(), Some(&OptionReply::Ack), "{replies:?}");
    }

    pub(super) fn write(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).unwrap();
    }

    pub(super) fn ask(&mut self, option: &ClientOption) -> Vec<OptionReply> {
        let mut bytes = Vec::new();
        option.encode(&mut bytes);
        self.write(&bytes);
        let mut replies = Vec::new();
        loop {
            let mut header = [0; 20];
            self.socket.read_exact(&mut header).unwrap();
            let header = OptionReplyHeader::decode(&header).unwrap();
            assert_eq!(header.code, option.code());
            let mut data = vec![0; header.len as usize];
            self.socket.read_exact(&mut data).unwrap();
            let reply = OptionReply::decode(header.kind, &data).unwrap();
            let last = reply.is_last();
            replies.push(reply);
            if last {
                return replies;
            }
        }
    }

    pub(super) fn request(&mut self, request: &Request, payload: &[u8]) {
        let mut bytes = if self.extended {
            request.encode_extended().to_vec()
        } else {
            request.encode().to_vec()
        };
        bytes.extend_from_slice(payload);
        self.write(&bytes);
    }

    /// The next whole answer, if those to different requests do not come in turns; `read` says how many bytes follow a
    /// simple reply to which cookie.
    pub(super) fn answer(&mut self, read: impl Fn(u64) -> usize) -> Answer {
        let mut answer: Option<Answer> = None;
        loop {
            let mut header = [0; 32];
            self.socket.read_exact(&mut header[..4]).unwrap();
            let len = ReplyHeader::len_of(*header.first_chunk().unwrap()).unwrap();
            self.socket.read_exact(&mut header[4..len]).unwrap();
            let (flags, kind, cookie, len) = match ReplyHeader::decode(&header[..len]).unwrap() {
                ReplyHeader::Simple(reply) => {
                    let len = if reply.error.is_none() {
                        read(reply.cookie)
                    } else {
                        0
                    };
                    return Answer {
                        cookie: reply.cookie,
                        chunks: vec![(ChunkKind::OffsetData, self.bytes(len))],
                        error: reply.error,
                    };
                }
                ReplyHeader::Chunk(chunk) => {
                    (chunk.flags, chunk.kind, chunk.cookie, u64::from(chunk.len))
                }
                ReplyHeader::Extended(chunk) => (chunk.flags, chunk.kind, chunk.cookie, chunk.len),
            };
            let payload = self.bytes(usize::try_from(len).unwrap());
            let answer = answer.get_or_insert(Answer {
                cookie,
                chunks: Vec::new(),
                error: None,
            });
            assert_eq!(answer.cookie, cookie);
            if kind.is_error() {
                answer.error = Some(ErrorChunk::decode(kind, &payload).unwrap().error);
            }
            answer.chunks.push((kind, payload));
            if flags.contains(ChunkFlags::DONE) {
                return std::mem::replace(
                    answer,
                    Answer {
                        cookie,
                        chunks: Vec::new(),
                        error: None,
                    },
                );
            }
        }
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.socket.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// Asks, and waits for the answer.
    pub(super) fn run(&mut self, request: &Request, payload: &[u8]) -> Answer {
        self.request(request, payload);
        let len = match request.command {
            Command::Read => usize::try_from(request.len).unwrap(),
            _ => 0,
        };
        let answer = self.answer(|_| len);
        assert_eq!(answer.cookie, request.cookie);
        answer
    }

    pub(super) fn error(&mut self, request: &Request, payload: &[u8]) -> Option<Errno> {
        self.run(request, payload).error
    }

    /// Whether the server has ended the connection. Waits for that.
    pub(super) fn is_closed(&mut self) -> bool {
        matches!(self.socket.read(&mut [0; 1]), Ok(0) | Err(_))
    }
}

impl Answer {
    /// The bytes that were read from `offset` on, `len` of them, each told once.
    pub(super) fn data(&self, offset: u64, len: usize) -> Vec<u8> {
        if let [(ChunkKind::OffsetData, data)] = self.chunks.as_slice()
            && data.len() == len
        {
            return data.clone();
        }
        let mut data = vec![None; len];
        for (kind, payload) in &self.chunks {
            let (at, bytes) = match kind {
                ChunkKind::OffsetData => {
                    let (at, bytes) = payload.split_first_chunk().unwrap();
                    (u64::from_be_bytes(*at), bytes.to_vec())
                }
                ChunkKind::OffsetHole => {
                    let hole = Hole::decode(payload.as_slice().try_into().unwrap()).unwrap();
                    (hole.offset, vec![0; hole.len as usize])
                }
                other => panic!("{other:?}"),
            };
            let at = usize::try_from(at - offset).unwrap();
            for (byte, told) in data[at..].iter_mut().zip(bytes) {
                assert!(byte.replace(told).is_none(), "told twice");
            }
        }
        data.into_iter().map(Option::unwrap).collect()
    }
}

pub(super) fn request(command: Command, offset: u64, len: u64) -> Request {
    Request {
        flags: CommandFlags::NONE,
        command,
        cookie: offset ^ 0xabcd,
        offset,
        len,
    }
}

pub(super) fn flagged(command: Command, offset: u64, len: u64, flags: CommandFlags) -> Request {
    Request {
        flags,
        ..request(command, offset, len)
    }
}

pub(super) fn memory() -> Arc<dyn Storage> {
    Arc::new(MemoryStorage::new(SIZE))
}

pub(super) fn server_of(export: Export) -> Server {
    let server = Server::new(ServerOptions::default());
    server.add(export).unwrap();
    server
}

pub(super) fn server() -> Server {
    server_of(Export::new("memory", memory()).unwrap())
}

/// Waits for what nothing tells.
pub(super) fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + SOON;
    while !is_so() {
        assert!(Instant::now() < end, "{what}");
        std::thread::yield_now();
    }
}
