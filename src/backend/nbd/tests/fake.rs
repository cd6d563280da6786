//! A server that does what a test tells it to.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::backend::nbd::{NbdUrl, Remote, RemoteOptions};
use crate::nbd::{
    ChunkFlags, ChunkHeader, ChunkKind, ClientOption, Command, Errno, Export, Greeting,
    HandshakeFlags, Info, OPTION_HEADER_LEN, OptionCode, OptionError, OptionHeader, OptionReply,
    REQUEST_LEN, Request, SimpleReply, TransmissionFlags,
};

/// How long the fake waits for a client that says nothing.
const SILENCE: Duration = Duration::from_secs(20);

/// What a fake is like.
#[derive(Debug, Clone, Copy)]
pub(super) struct Manner {
    pub(super) size: u64,
    pub(super) flags: TransmissionFlags,
    pub(super) structured: bool,
}

impl Manner {
    pub(super) fn new(size: u64) -> Self {
        Self {
            size,
            flags: TransmissionFlags::HAS_FLAGS.with(TransmissionFlags::SEND_FLUSH),
            structured: true,
        }
    }
}

/// A server on a port of this machine, whose connections are each served by a function of a test.
#[derive(Debug)]
pub(super) struct Fake {
    address: std::net::SocketAddr,
    ends: Arc<AtomicBool>,
    connections: Arc<AtomicUsize>,
    listener: Option<JoinHandle<()>>,
}

impl Fake {
    /// Serves connections, from their first byte on; `serve` is told which one it is. An error ends the connection.
    pub(super) fn raw(
        serve: impl Fn(usize, &mut TcpStream) -> io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let ends = Arc::new(AtomicBool::new(false));
        let connections = Arc::new(AtomicUsize::new(0));
        let serve = Arc::new(serve);
        let (ended, counted) = (Arc::clone(&ends), Arc::clone(&connections));
        let listener = std::thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                if ended.load(Ordering::SeqCst) {
                    return;
                }
                let number = counted.fetch_add(1, Ordering::SeqCst);
                let serve = Arc::clone(&serve);
                std::thread::spawn(move || {
                    stream.set_nodelay(true).unwrap();
                    stream.set_read_timeout(Some(SILENCE)).unwrap();
                    stream.set_write_timeout(Some(SILENCE)).unwrap();
                    let _ = serve(number, &mut stream);
                });
            }
        });
        Self {
            address,
            ends,
            connections,
            listener: Some(listener),
        }
    }

    /// Serves connections after the handshake.
    pub(super) fn new(
        manner: Manner,
        serve: impl Fn(usize, &mut TcpStream) -> io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        Self::raw(move |number, stream| {
            handshake(manner, stream)?;
            serve(number, stream)
        })
    }

    pub(super) fn url(&self) -> NbdUrl {
        NbdUrl::tcp("127.0.0.1", self.address.port(), "").unwrap()
    }

    pub(super) fn connect(&self, deadline: Duration) -> Remote {
        let options = RemoteOptions {
            deadline,
            ..RemoteOptions::default()
        };
        Remote::connect(&self.url(), &options).unwrap()
    }

    /// How many connections there have been.
    pub(super) fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::SeqCst);
        // Wakes the listener; threads of connections end with their clients.
        let _ = TcpStream::connect(self.address);
        if let Some(listener) = self.listener.take() {
            let _ = listener.join();
        }
    }
}

/// Agrees to everything.
pub(super) fn handshake(manner: Manner, stream: &mut TcpStream) -> io::Result<()> {
    let greeting = Greeting {
        flags: HandshakeFlags::ALL,
    };
    stream.write_all(&greeting.encode())?;
    stream.read_exact(&mut [0; 4])?;
    loop {
        let mut header = [0; OPTION_HEADER_LEN];
        stream.read_exact(&mut header)?;
        let header = OptionHeader::decode(&header).unwrap();
        let mut data = vec![0; header.len as usize];
        stream.read_exact(&mut data)?;
        let code = header.code;
        let replies = match ClientOption::decode(code, &data).unwrap() {
            ClientOption::Go(_) => vec![
                OptionReply::Info(Info::Export(Export {
                    size: manner.size,
                    flags: manner.flags,
                })),
                OptionReply::Ack,
            ],
            ClientOption::StructuredReply if manner.structured => vec![OptionReply::Ack],
            ClientOption::SetMetaContext(_) if manner.structured => vec![
                OptionReply::MetaContext {
                    id: 7,
                    name: "base:allocation".into(),
                },
                OptionReply::Ack,
            ],
            _ => vec![OptionReply::error(OptionError::Unsupported, "")],
        };
        let mut bytes = Vec::new();
        for reply in replies {
            reply.encode(code, &mut bytes);
        }
        stream.write_all(&bytes)?;
        if code == OptionCode::Go {
            return Ok(());
        }
    }
}

/// The next request, with the bytes of a write.
pub(super) fn request(stream: &mut TcpStream) -> io::Result<(Request, Vec<u8>)> {
    let mut bytes = [0; REQUEST_LEN];
    stream.read_exact(&mut bytes)?;
    let request = Request::decode(&bytes).unwrap();
    let len = match request.command {
        Command::Write => request.len as usize,
        Command::Disconnect => return Err(io::ErrorKind::UnexpectedEof.into()),
        _ => 0,
    };
    let mut payload = vec![0; len];
    stream.read_exact(&mut payload)?;
    Ok((request, payload))
}

/// A chunk of a structured reply.
pub(super) fn chunk(cookie: u64, kind: ChunkKind, last: bool, payload: &[u8]) -> Vec<u8> {
    let header = ChunkHeader {
        flags: ChunkFlags::NONE.with_if(last, ChunkFlags::DONE),
        kind,
        cookie,
        len: payload.len() as u32,
    };
    [&header.encode(), payload].concat()
}

/// Bytes of a read.
pub(super) fn data(cookie: u64, offset: u64, bytes: &[u8], last: bool) -> Vec<u8> {
    let payload = [&offset.to_be_bytes(), bytes].concat();
    chunk(cookie, ChunkKind::OffsetData, last, &payload)
}

/// Success without anything else, or failure.
pub(super) fn simple(cookie: u64, error: Option<Errno>) -> Vec<u8> {
    SimpleReply { error, cookie }.encode().to_vec()
}

/// What is at an offset of an export that nobody has written to.
pub(super) fn byte_at(offset: u64) -> u8 {
    (offset ^ (offset >> 8) ^ (offset >> 16)) as u8
}

pub(super) fn bytes_at(offset: u64, len: usize) -> Vec<u8> {
    (offset..).take(len).map(byte_at).collect()
}
