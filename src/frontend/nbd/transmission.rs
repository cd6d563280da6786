//! The transmission phase of one client: requests come in, and are carried out here or by workers.

use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::answer::Agreed;
use super::budget::{Buffer, Charges};
use super::channel::Channel;
use super::connection::{Connection, Reply, Sender, Traffic};
use super::export::{Export, Refused};
use super::perform::{self, Run};
use super::workers::Workers;
use crate::nbd::{self, Command, CommandFlags, DecodeError, Errno, Request};

/// What is received at once while nothing better is known.
const RECEIVE: usize = 64 << 10;
/// What is received at once after a write with a large payload: another one probably follows, whose payload goes where it belongs without
/// a stop here.
const RECEIVE_LITTLE: usize = 4 << 10;
/// Requests of at most so many bytes are carried out by the thread that reads, where the storage has them at hand: a copy of so much takes
/// as long as it takes to wake a worker.
const INLINE: usize = 128 << 10;
/// So many bytes of replies go out together at most.
const BATCH: usize = 256 << 10;
/// The least that a request is taken to hold: bookkeeping, and answers without bytes.
const LEAST: u64 = 4 << 10;
/// What a question for the status is taken to hold: as many extents as an answer has.
const STATUS: u64 = 512 << 10;
/// How long a storage may take when the client is gone already. Storages have deadlines of their own.
const LAST_ANSWERS: Duration = Duration::from_secs(600);

/// Serves `export` over `socket`, which is in the transmission phase already: without a handshake, with simple replies. For a kernel
/// that is told all about the export by other means.
///
/// Several sockets may be served at once, each by a thread of the caller's. Returns when the other side has disconnected or closed its end, and
/// everything that it asked for is done.
///
/// # Errors
/// If the socket fails, or the peer breaks the protocol or is too slow to take what it asked for.
pub fn serve_transmission(
    socket: impl Into<OwnedFd>,
    export: &Export,
    workers: &Workers,
) -> io::Result<Traffic> {
    let channel = Arc::new(Channel::new(socket.into())?);
    let connection = Connection::new(
        channel,
        export.clone(),
        Agreed::default(),
        workers.clone(),
        Arc::new(AtomicBool::new(false)),
    );
    let end = transmit(&connection, Received::default());
    end.map(|()| connection.traffic())
}

/// Bytes that have come and were not looked at.
#[derive(Debug, Default)]
pub(super) struct Received {
    room: Vec<u8>,
    at: usize,
    end: usize,
}

impl Received {
    pub(super) fn bytes(&self) -> &[u8] {
        &self.room[self.at..self.end]
    }

    pub(super) fn skip(&mut self, len: usize) {
        self.at += len;
    }

    /// The next `N` bytes, if they are there.
    pub(super) fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let array = *self.bytes().first_chunk()?;
        self.at += N;
        Some(array)
    }

    /// Waits for more, at most `most`; whether any came.
    pub(super) fn receive(
        &mut self,
        channel: &Channel,
        most: usize,
        deadline: Option<Instant>,
    ) -> io::Result<bool> {
        // What is left is the beginning of something small, if it is anything.
        self.room.copy_within(self.at..self.end, 0);
        (self.at, self.end) = (0, self.end - self.at);
        if self.room.len() < self.end + most {
            self.room.resize(self.end + most, 0);
        }
        let room = &mut self.room[self.end..self.end + most];
        let received = channel.recv(room, deadline)?;
        self.end += received;
        Ok(received > 0)
    }
}

/// Serves a client until it goes. Everything that it asked for is done, and its answers are sent or given up, when this returns.
pub(super) fn transmit(connection: &Arc<Connection>, received: Received) -> io::Result<()> {
    let mut reader = Reader {
        connection,
        received,
        batch: Vec::new(),
        most: RECEIVE,
    };
    let end = reader.run();
    reader.flush();
    if end.is_err() {
        connection.give_up();
    }
    let done = connection.budget.wait_idle(Instant::now() + LAST_ANSWERS);
    connection.channel.end_sending();
    match end {
        Ok(()) if connection.is_broken() => Err(io::Error::new(
            io::ErrorKind::ConnectionAborted,
            "the client went, or did not take what it asked for",
        )),
        Ok(()) if !done => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "the storage does not answer",
        )),
        end => end,
    }
}

struct Reader<'a> {
    connection: &'a Arc<Connection>,
    received: Received,
    /// Replies that wait for others to go with, at most until this thread waits for the client.
    batch: Vec<u8>,
    /// How much is received at once.
    most: usize,
}

impl Reader<'_> {
    fn run(&mut self) -> io::Result<()> {
        while let Some(request) = self.next()? {
            let counters = &self.connection.counters;
            counters.requests.fetch_add(1, Ordering::Relaxed);
            if request.command == Command::Disconnect {
                return Ok(());
            }
            self.serve(request)?;
            if self.batch.len() > BATCH {
                self.flush();
            }
        }
        Ok(())
    }

    fn flush(&mut self) {
        self.connection.send_batch(&mut self.batch);
    }

    /// The next request; `None` at the end.
    fn next(&mut self) -> io::Result<Option<Request>> {
        let agreed = &self.connection.agreed;
        while self.received.bytes().len() < agreed.request_len() {
            self.flush();
            // Between two requests a client may take as long as it likes.
            let deadline = match self.received.bytes() {
                [] => None,
                _ => Some(self.deadline()),
            };
            let most = std::mem::replace(&mut self.most, RECEIVE);
            if !self
                .received
                .receive(&self.connection.channel, most, deadline)?
            {
                return match self.received.bytes() {
                    [] => Ok(None),
                    _ => Err(io::ErrorKind::UnexpectedEof.into()),
                };
            }
        }
        let request = if agreed.extended {
            self.received
                .take()
                .map(|bytes| Request::decode_extended(&bytes))
        } else {
            self.received.take().map(|bytes| Request::decode(&bytes))
        };
        request.transpose().map_err(invalid)
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.connection.workers.patience
    }

    fn serve(&mut self, request: Request) -> io::Result<()> {
        let connection = self.connection;
        let closing = connection.closing.load(Ordering::Relaxed);
        let checked = if closing {
            Err(Refused::new(Errno::Shutdown, "the server is going away"))
        } else {
            perform::check(&connection.export, &connection.agreed, &request)
        };
        if let Err(refused) = checked {
            self.skip_payload(request.payload_len(&connection.agreed))?;
            connection
                .agreed
                .refused(&request, &refused, &mut self.batch);
            return Ok(());
        }
        match request.command {
            Command::Read => self.read(request),
            Command::Write => self.write(request),
            Command::BlockStatus => self.status(request),
            _ => self.act(request),
        }
    }

    fn read(&mut self, request: Request) -> io::Result<()> {
        let len = len_of(&request)?;
        let connection = self.connection;
        if len <= INLINE && connection.export.storage().is_at_hand(request.range()) {
            self.read_here(&request, len);
            return Ok(());
        }
        let Some(charges) = self.charge(request.len) else {
            return Err(io::ErrorKind::ConnectionAborted.into());
        };
        let buffer = connection.workers.buffers.take(len);
        self.hand_over(charges, request, move |connection| {
            read(connection, &request, buffer)
        });
        Ok(())
    }

    fn read_here(&mut self, request: &Request, len: usize) {
        let Connection {
            agreed,
            export,
            counters,
            ..
        } = &**self.connection;
        let before = self.batch.len();
        agreed.data(request, request.offset, len, true, &mut self.batch);
        let head = self.batch.len();
        self.batch.resize(head + len, 0);
        let bytes = &mut self.batch[head..];
        if let Err(error) = export.storage().read_exact_at(bytes, request.offset) {
            self.batch.truncate(before);
            agreed.refused(request, &error.into(), &mut self.batch);
            return;
        }
        counters.read.fetch_add(request.len, Ordering::Relaxed);
        if splits(agreed, request) && perform::has_zeros(bytes, request.offset) {
            let bytes = bytes.to_vec();
            self.batch.truncate(before);
            let runs = perform::runs(&bytes, request.offset);
            for (at, run) in runs.iter().enumerate() {
                let last = at + 1 == runs.len();
                match run {
                    Run::Zero(hole) => agreed.hole(request, *hole, last, &mut self.batch),
                    Run::Data(range) => {
                        let offset = request.offset + range.start as u64;
                        agreed.data(request, offset, range.len(), last, &mut self.batch);
                        self.batch.extend_from_slice(&bytes[range.clone()]);
                    }
                }
            }
        } else if len == 0 && agreed.structured {
            // A chunk of data is never empty.
            self.batch.truncate(before);
            agreed.statuses(request, &[], &mut self.batch);
        }
    }

    fn write(&mut self, request: Request) -> io::Result<()> {
        let connection = self.connection;
        let len = len_of(&request)?;
        let here = len <= INLINE
            && !request.flags.contains(CommandFlags::FUA)
            && connection.export.storage().is_at_hand(request.range())
            && !self.is_forbidden(&request);
        if here && self.received.bytes().len() >= len {
            let bytes = &self.received.bytes()[..len];
            let written = perform::write(&connection.export, &request, bytes);
            self.received.skip(len);
            self.wrote(&request, written);
            return Ok(());
        }
        let Some(charges) = self.charge(request.len) else {
            return Err(io::ErrorKind::ConnectionAborted.into());
        };
        let buffer = self.payload(len)?;
        if here {
            let written = perform::write(&connection.export, &request, &buffer);
            self.wrote(&request, written);
            return Ok(());
        }
        self.hand_over(charges, request, move |connection| {
            let written = perform::write(&connection.export, &request, &buffer);
            Some(yes_or_no(connection, &request, written))
        });
        Ok(())
    }

    /// Then a worker refuses it.
    fn is_forbidden(&self, request: &Request) -> bool {
        let Connection {
            workers, export, ..
        } = &**self.connection;
        let watch = workers.watch.as_ref();
        watch.is_some_and(|watch| watch.forbids(export, request).is_some())
    }

    fn wrote(&mut self, request: &Request, written: Result<(), Refused>) {
        let reply = yes_or_no(self.connection, request, written);
        self.batch.extend_from_slice(&reply.heads);
    }

    fn status(&mut self, request: Request) -> io::Result<()> {
        let Some(charges) = self.charge(STATUS) else {
            return Err(io::ErrorKind::ConnectionAborted.into());
        };
        let mut question = request;
        let mut only = None;
        if request.flags.contains(CommandFlags::PAYLOAD_LEN) {
            let payload = self.payload(len_of(&request)?)?;
            let Ok((len, contexts)) = nbd::decode_status_payload(&payload) else {
                let refused = Refused::new(Errno::Inval, "the payload cannot be read");
                let agreed = &self.connection.agreed;
                agreed.refused(&request, &refused, &mut self.batch);
                return Ok(());
            };
            question.len = len;
            only = Some(contexts);
        }
        self.hand_over(charges, request, move |connection| {
            let Connection { export, agreed, .. } = connection;
            let mut heads = Vec::new();
            match perform::statuses(export, agreed, &question, only.as_deref()) {
                Ok(statuses) => agreed.statuses(&request, &statuses, &mut heads),
                Err(refused) => agreed.refused(&request, &refused, &mut heads),
            }
            Some(Reply {
                heads,
                ..Reply::default()
            })
        });
        Ok(())
    }

    fn act(&mut self, request: Request) -> io::Result<()> {
        let Some(charges) = self.charge(LEAST) else {
            return Err(io::ErrorKind::ConnectionAborted.into());
        };
        self.hand_over(charges, request, move |connection| {
            let done = perform::act(&connection.export, &request);
            Some(yes_or_no(connection, &request, done))
        });
        Ok(())
    }

    /// Room for `bytes`. What was answered goes out first if it has to be waited for.
    fn charge(&mut self, bytes: u64) -> Option<Charges> {
        let connection = self.connection;
        let (own, all) = (&connection.budget, &connection.workers.budget);
        let bytes = bytes.max(LEAST);
        Charges::try_take(own, all, bytes).or_else(|| {
            self.flush();
            connection.charge(bytes)
        })
    }

    /// Has a worker do `work` and send what it returns. If the storage panics, the client is told of an error: nobody else has to suffer. If it returns
    /// nothing, the connection ends.
    fn hand_over(
        &mut self,
        charges: Charges,
        request: Request,
        work: impl FnOnce(&Connection) -> Option<Reply> + Send + 'static,
    ) {
        let connection = Arc::clone(self.connection);
        let watch = connection.workers.watch.clone();
        let ticket = watch
            .as_ref()
            .map(|watch| watch.begin(&connection, request));
        self.connection.workers.run(Box::new(move || {
            if ticket.as_ref().is_some_and(|ticket| !ticket.start()) {
                return;
            }
            let guard = GiveUp(&connection);
            let forbidden = watch.and_then(|watch| watch.forbids(&connection.export, &request));
            let reply = match forbidden {
                Some(refused) => Some(yes_or_no(&connection, &request, Err(refused))),
                None => catch_unwind(AssertUnwindSafe(|| work(&connection))).unwrap_or_else(|_| {
                    let refused = Refused::new(Errno::Io, "the storage panicked");
                    Some(yes_or_no(&connection, &request, Err(refused)))
                }),
            };
            if let Some(mut reply) = reply {
                std::mem::forget(guard);
                if ticket.is_none_or(|ticket| ticket.done()) {
                    reply.charges = Some(charges);
                    connection.send(reply, Sender::Shared);
                }
            }
        }));
    }

    /// The payload of a request, in a buffer of its own.
    fn payload(&mut self, len: usize) -> io::Result<Buffer> {
        let mut buffer = self.connection.workers.buffers.take(len);
        let here = self.received.bytes().len().min(len);
        buffer[..here].copy_from_slice(&self.received.bytes()[..here]);
        self.received.skip(here);
        if here < len {
            // The client may wait for an answer before it sends more.
            self.flush();
            let deadline = self.deadline();
            self.connection
                .channel
                .recv_exact(&mut buffer[here..], deadline)?;
        }
        if len > RECEIVE_LITTLE * 4 {
            self.most = RECEIVE_LITTLE;
        }
        Ok(buffer)
    }

    fn skip_payload(&mut self, mut len: u64) -> io::Result<()> {
        // Nothing that a client could mean is longer, without extended headers nothing can be.
        if len > u64::from(u32::MAX) {
            return Err(invalid(DecodeError::TooLong {
                what: "a payload",
                len,
                limit: u64::from(u32::MAX),
            }));
        }
        let mut deadline = None;
        while len > 0 {
            let here = self.received.bytes().len();
            let part = usize::try_from(len).map_or(here, |len| len.min(here));
            self.received.skip(part);
            len -= part as u64;
            if len > 0 {
                self.flush();
                let deadline = *deadline.get_or_insert_with(|| self.deadline());
                let channel = &self.connection.channel;
                if !self.received.receive(channel, RECEIVE, Some(deadline))? {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
        }
        Ok(())
    }
}

/// Ends the connection unless it is forgotten: a request without an answer would leave the client waiting.
struct GiveUp<'a>(&'a Connection);

impl Drop for GiveUp<'_> {
    fn drop(&mut self) {
        self.0.give_up();
    }
}

/// Whether the bytes of a read may come in several chunks.
fn splits(agreed: &Agreed, request: &Request) -> bool {
    agreed.structured && !request.flags.contains(CommandFlags::DF)
}

fn read(connection: &Connection, request: &Request, mut buffer: Buffer) -> Option<Reply> {
    let Connection {
        agreed,
        export,
        counters,
        ..
    } = connection;
    let mut reply = Reply::default();
    if let Err(error) = export.storage().read_exact_at(&mut buffer, request.offset) {
        agreed.refused(request, &error.into(), &mut reply.heads);
        return Some(reply);
    }
    counters.read.fetch_add(request.len, Ordering::Relaxed);
    if buffer.is_empty() && agreed.structured {
        agreed.statuses(request, &[], &mut reply.heads);
        return Some(reply);
    }
    let runs = if splits(agreed, request) && perform::has_zeros(&buffer, request.offset) {
        perform::runs(&buffer, request.offset)
    } else {
        vec![Run::Data(0..buffer.len())]
    };
    for (at, run) in runs.iter().enumerate() {
        let last = at + 1 == runs.len();
        match run {
            Run::Zero(hole) => agreed.hole(request, *hole, last, &mut reply.heads),
            Run::Data(range) => {
                let offset = request.offset + range.start as u64;
                agreed.data(request, offset, range.len(), last, &mut reply.heads);
                reply.cuts.push((reply.heads.len(), range.clone()));
            }
        }
    }
    if !reply.cuts.is_empty() {
        reply.data = Some(buffer);
    }
    Some(reply)
}

fn yes_or_no(connection: &Connection, request: &Request, done: Result<(), Refused>) -> Reply {
    let mut reply = Reply::default();
    let agreed = &connection.agreed;
    match done {
        Ok(()) => {
            if request.command == Command::Write {
                let counters = &connection.counters;
                counters.written.fetch_add(request.len, Ordering::Relaxed);
            }
            agreed.done(request, &mut reply.heads);
        }
        Err(refused) => agreed.refused(request, &refused, &mut reply.heads),
    }
    reply
}

fn len_of(request: &Request) -> io::Result<usize> {
    usize::try_from(request.len).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn invalid(error: DecodeError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
