//! A connection that is ready for requests.

use std::io::{self, IoSlice};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::call::{Call, News, Wants};
use super::desk::{Caller, Desk, Expected, Next, Route};
use super::fault::{Fault, Misbehaviour};
use super::hello::Agreed;
use super::inbox::Inbox;
use super::wire::{Also, Wire, left};
use crate::nbd::{
    BlockStatus, ChunkFlags, ChunkHeader, ChunkKind, Command, CommandFlags, ErrorChunk, HOLE_LEN,
    Hole, REQUEST_LEN, ReplyHeader, Request, SimpleReply, limits,
};

/// From which size on bytes are read by whom they are for, in place of being read by another thread and copied: to wake that thread
/// costs as much as to copy some 100 KiB, but it would have to be woken anyway.
const LARGE: u32 = 32 << 10;

/// How long a thread that can neither send nor receive waits before it looks again whether it may receive by now.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// A connection that is ready for requests. Any number of threads may make them at the same time.
#[derive(Debug)]
pub(super) struct Connection {
    wire: Wire,
    /// Locked by who has the reading role, and by nobody else.
    inbox: Mutex<Inbox>,
    /// Held while a request is sent, so that two do not mix.
    sending: Mutex<()>,
    desk: Desk<Wants, Rest, Mail, Fault>,
    agreed: Agreed,
    /// The place of this connection in the order in which connections were made and writes were acknowledged.
    pub(super) born: u64,
}

/// Bytes of a read that are still on the wire.
#[derive(Debug)]
struct Rest {
    index: usize,
    offset: u64,
    len: u32,
    last: bool,
}

/// A part of an answer that another thread has read.
#[derive(Debug)]
struct Mail {
    index: usize,
    news: News,
    last: bool,
}

/// The requests of one caller, while they are under way.
struct Batch<'c, 'a> {
    calls: &'c mut [Call<'a>],
    /// How many were sent.
    sent: usize,
    /// How many were sent and not yet answered.
    open: usize,
    /// Their bytes.
    weight: usize,
    patience: Duration,
    /// Patience from the last answer on.
    deadline: Instant,
}

impl Batch<'_, '_> {
    fn note(&mut self, index: usize, news: News, last: bool) -> Result<(), Fault> {
        let call = &mut self.calls[index];
        // A server may say of many offsets that they failed, but not put the deadline off by it.
        let again = matches!(news, News::Error(_)) && call.has_failed();
        call.note(news)?;
        if again && !last {
            return Ok(());
        }
        self.progressed(index, last)
    }

    fn progressed(&mut self, index: usize, last: bool) -> Result<(), Fault> {
        self.deadline = Instant::now() + self.patience;
        if last {
            self.calls[index].finish()?;
            self.open -= 1;
            self.weight -= self.calls[index].weight();
        }
        Ok(())
    }
}

/// Ends the connection if a panic leaves it out of step.
struct OnPanic<'a>(&'a Connection);

impl Drop for OnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let error = io::Error::other("a thread that used the connection has panicked");
            self.0.fail(error.into());
        }
    }
}

impl Connection {
    pub(super) fn new(wire: Wire, inbox: Inbox, agreed: Agreed, born: u64) -> Self {
        Self {
            wire,
            inbox: Mutex::new(inbox),
            sending: Mutex::new(()),
            desk: Desk::new(),
            agreed,
            born,
        }
    }

    pub(super) fn is_broken(&self) -> bool {
        self.desk.broken().is_some()
    }

    /// Makes requests, and returns when all have been answered. At most `window` bytes are under way at a time, but always a request;
    /// no more than `patience` passes without an answer.
    ///
    /// # Errors
    /// Why the connection has ended. The calls without an outcome may or may not have been carried out then.
    pub(super) fn run(
        &self,
        calls: &mut [Call<'_>],
        window: usize,
        patience: Duration,
    ) -> Result<(), Fault> {
        let me = self.desk.sit()?;
        // Dropped before `me`: who is woken by that finds out that it has ended.
        let _on_panic = OnPanic(self);
        let mut batch = Batch {
            calls,
            sent: 0,
            open: 0,
            weight: 0,
            patience,
            deadline: Instant::now() + patience,
        };
        self.complete(&me, &mut batch, window)
            .map_err(|fault| self.fail(fault))
    }

    /// Ends the connection for all who use it. The first reason is the one that is told.
    fn fail(&self, fault: Fault) -> Fault {
        let fault = self.desk.break_off(fault);
        self.wire.shut_down();
        fault
    }

    /// Ends the connection in the proper way, if nothing is under way.
    pub(super) fn hang_up(&self) {
        if !self.is_broken() {
            let goodbye = Request {
                flags: CommandFlags::NONE,
                command: Command::Disconnect,
                cookie: 0,
                offset: 0,
                len: 0,
            };
            let goodbye = goodbye.encode();
            // It is a courtesy: who does not take it at once need not have it.
            let _ = self.wire.send(&mut [IoSlice::new(&goodbye)], |_, _| {
                Err(io::ErrorKind::WouldBlock.into())
            });
        }
        self.fail(io::Error::from(io::ErrorKind::NotConnected).into());
    }

    fn complete(&self, me: &Me<'_>, batch: &mut Batch<'_, '_>, window: usize) -> Result<(), Fault> {
        loop {
            self.send_what_fits(me, batch, window)?;
            if batch.open == 0 {
                return Ok(());
            }
            match me.next(batch.deadline)? {
                Next::Mail(mail, rest) => {
                    for Mail { index, news, last } in mail {
                        batch.note(index, news, last)?;
                    }
                    // To send may be to pass the role on, with these bytes on the wire.
                    if let Some(rest) = rest {
                        self.read_rest(&mut self.inbox(), batch, &rest)?;
                    }
                }
                Next::Rest(rest) => self.read_rest(&mut self.inbox(), batch, &rest)?,
                Next::Read => self.read_one(me, batch)?,
                Next::TimedOut => {
                    left(batch.deadline)?;
                }
            }
        }
    }

    fn send_what_fits(
        &self,
        me: &Me<'_>,
        batch: &mut Batch<'_, '_>,
        window: usize,
    ) -> Result<(), Fault> {
        let first = batch.sent;
        while let Some(call) = batch.calls.get(batch.sent) {
            let weight = call.weight();
            if batch.open > 0 && batch.weight + weight > window {
                break;
            }
            batch.weight += weight;
            batch.open += 1;
            batch.sent += 1;
        }
        let calls = &batch.calls[first..batch.sent];
        if calls.is_empty() {
            return Ok(());
        }
        let room = calls.iter().map(|call| call.wants().room()).sum();
        let cookie = me.expect(first, calls.iter().map(Call::wants), room)?;
        // The common case, which allocates nothing.
        if let [call] = calls {
            let header = header(call, cookie);
            let parts = &mut [IoSlice::new(&header), IoSlice::new(call.payload())];
            let parts = if call.payload().is_empty() {
                &mut parts[..1]
            } else {
                parts
            };
            return self.send(me, batch, parts);
        }
        let headers: Vec<[u8; REQUEST_LEN]> = calls
            .iter()
            .zip(cookie..)
            .map(|(call, cookie)| header(call, cookie))
            .collect();
        let mut parts: Vec<IoSlice<'_>> = headers
            .iter()
            .zip(calls)
            .flat_map(|(header, call)| [header, call.payload()])
            .filter(|part| !part.is_empty())
            .map(IoSlice::new)
            .collect();
        self.send(me, batch, &mut parts)
    }

    /// Sends, and reads replies while the server takes nothing: it may have stopped to receive until somebody reads what it sends.
    fn send(
        &self,
        me: &Me<'_>,
        batch: &mut Batch<'_, '_>,
        parts: &mut [IoSlice<'_>],
    ) -> Result<(), Fault> {
        let _sending = match self.sending.try_lock() {
            Ok(sending) => sending,
            Err(_) => {
                // Who is sending may be stuck until somebody reads.
                me.pass_role();
                self.sending.lock().unwrap_or_else(PoisonError::into_inner)
            }
        };
        if let Some(fault) = self.desk.broken() {
            return Err(fault);
        }
        let mut fault = None;
        let mut before = 0;
        let sent = self.wire.send(parts, |wire, sent| {
            if sent > before {
                before = sent;
                batch.deadline = Instant::now() + batch.patience;
            }
            let may_read = me.take_role();
            if may_read && (!self.inbox().is_empty() || wire.has_something()) {
                return self.read_one(me, batch).map_err(|error| {
                    fault = Some(error);
                    io::ErrorKind::Other.into()
                });
            }
            if may_read {
                wire.wait_to_send(Also::Receive, batch.deadline)
            } else {
                let soon = Instant::now() + LOOK_AGAIN;
                left(batch.deadline)?;
                match wire.wait_to_send(Also::Nothing, soon) {
                    Err(error) if error.kind() != io::ErrorKind::TimedOut => Err(error),
                    _ => Ok(()),
                }
            }
        });
        match (fault, sent) {
            (Some(fault), _) => Err(fault),
            (None, sent) => Ok(sent?),
        }
    }

    fn inbox(&self) -> std::sync::MutexGuard<'_, Inbox> {
        // Who panics while reading ends the connection.
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads one reply, or one chunk of one, whosever it is.
    fn read_one(&self, me: &Me<'_>, batch: &mut Batch<'_, '_>) -> Result<(), Fault> {
        let inbox = &mut *self.inbox();
        let deadline = batch.deadline;
        // Answers to others do not put it off.
        left(deadline)?;
        let magic: [u8; 4] = inbox.take(&self.wire, deadline)?;
        let len = ReplyHeader::len_of(magic)?;
        let mut bytes = [0; 64];
        bytes[..4].copy_from_slice(&magic);
        let bytes = &mut bytes[..len];
        inbox.read_exact(&self.wire, &mut bytes[4..], deadline)?;
        match ReplyHeader::decode(bytes)? {
            ReplyHeader::Simple(reply) => self.simple(me, batch, inbox, reply),
            ReplyHeader::Chunk(chunk) => self.chunk(me, batch, inbox, chunk),
            // Extended headers are never asked for.
            ReplyHeader::Extended(chunk) => Err(Misbehaviour::Kind(chunk.kind).into()),
        }
    }

    fn simple(
        &self,
        me: &Me<'_>,
        batch: &mut Batch<'_, '_>,
        inbox: &mut Inbox,
        reply: SimpleReply,
    ) -> Result<(), Fault> {
        let owner = look_up(me, reply.cookie, true)?;
        match (reply.error, owner.about) {
            (Some(errno), _) => Self::tell(me, batch, &owner, News::Error(errno), true),
            (None, Wants::Nothing) => Self::tell(me, batch, &owner, News::Nothing, true),
            (None, Wants::Extents) => Err(Misbehaviour::Kind(ChunkKind::None).into()),
            (None, Wants::Bytes(..)) if self.agreed.structured => {
                Err(Misbehaviour::Unstructured.into())
            }
            (None, Wants::Bytes(offset, len)) => {
                let rest = Rest {
                    index: owner.index,
                    offset,
                    len,
                    last: true,
                };
                self.bytes(me, batch, inbox, &owner, rest)
            }
        }
    }

    fn chunk(
        &self,
        me: &Me<'_>,
        batch: &mut Batch<'_, '_>,
        inbox: &mut Inbox,
        chunk: ChunkHeader,
    ) -> Result<(), Fault> {
        let ChunkHeader { kind, len, .. } = chunk;
        let deadline = batch.deadline;
        let last = chunk.flags.contains(ChunkFlags::DONE);
        let owner = look_up(me, chunk.cookie, last)?;
        if !self.agreed.structured {
            return Err(Misbehaviour::Kind(kind).into());
        }
        let wrong_len = || Fault::from(Misbehaviour::Length { kind, len });
        let news = match (kind, owner.about) {
            (ChunkKind::OffsetData, Wants::Bytes(_, wanted)) => {
                let len = len
                    .checked_sub(8)
                    .filter(|len| (1..=wanted).contains(len))
                    .ok_or_else(wrong_len)?;
                let offset = u64::from_be_bytes(inbox.take(&self.wire, deadline)?);
                let index = owner.index;
                let rest = Rest {
                    index,
                    offset,
                    len,
                    last,
                };
                return self.bytes(me, batch, inbox, &owner, rest);
            }
            (ChunkKind::OffsetHole, Wants::Bytes(..)) if len as usize == HOLE_LEN => {
                let hole = Hole::decode(&inbox.take(&self.wire, deadline)?)?;
                News::Zeros(hole.offset, hole.len)
            }
            (ChunkKind::BlockStatus, Wants::Extents) => {
                let most = 4 + 8 * limits::EXTENTS;
                let payload = self.payload(inbox, len, most, wrong_len, deadline)?;
                News::Status(BlockStatus::decode(&payload)?)
            }
            (kind, _) if kind.is_error() => {
                let most = limits::ERROR_CHUNK as usize;
                let payload = self.payload(inbox, len, most, wrong_len, deadline)?;
                News::Error(ErrorChunk::decode(kind, &payload)?.error)
            }
            (ChunkKind::None, _) if len == 0 && last => News::Nothing,
            (ChunkKind::None | ChunkKind::OffsetHole, _) => return Err(wrong_len()),
            (kind, _) => return Err(Misbehaviour::Kind(kind).into()),
        };
        Self::tell(me, batch, &owner, news, last)
    }

    fn payload(
        &self,
        inbox: &mut Inbox,
        len: u32,
        most: usize,
        wrong: impl Fn() -> Fault,
        deadline: Instant,
    ) -> Result<Vec<u8>, Fault> {
        let len = len as usize;
        if len > most {
            return Err(wrong());
        }
        let mut payload = vec![0; len];
        inbox.read_exact(&self.wire, &mut payload, deadline)?;
        Ok(payload)
    }

    /// Has the bytes of a read gone where they belong.
    fn bytes(
        &self,
        me: &Me<'_>,
        batch: &mut Batch<'_, '_>,
        inbox: &mut Inbox,
        owner: &Expected<Wants>,
        rest: Rest,
    ) -> Result<(), Fault> {
        if me.owns(owner) {
            return self.read_rest(inbox, batch, &rest);
        }
        let mut kept = Some(rest);
        if let Some(rest) = kept.take_if(|rest| rest.len >= LARGE) {
            // The inbox stays locked until this returns: whoever has the role then, waits for it as long.
            let (route, back) = me.hand_over(owner, rest);
            if route == Route::HandedOver {
                return Ok(());
            }
            kept = back;
        }
        let Some(rest) = kept else {
            return Ok(());
        };
        let mut bytes = vec![0; rest.len as usize];
        inbox.read_exact(&self.wire, &mut bytes, batch.deadline)?;
        let news = News::Bytes(rest.offset, bytes);
        Self::tell(me, batch, owner, news, rest.last)
    }

    /// Reads bytes that are this caller's where they belong.
    fn read_rest(
        &self,
        inbox: &mut Inbox,
        batch: &mut Batch<'_, '_>,
        rest: &Rest,
    ) -> Result<(), Fault> {
        let deadline = batch.deadline;
        let call = &mut batch.calls[rest.index];
        let place = call.place(rest.offset, rest.len)?;
        inbox.read_exact(&self.wire, place, deadline)?;
        batch.progressed(rest.index, rest.last)
    }

    /// Takes note of a part of an answer that was read whole, or gives it to whom it belongs.
    fn tell(
        me: &Me<'_>,
        batch: &mut Batch<'_, '_>,
        owner: &Expected<Wants>,
        news: News,
        last: bool,
    ) -> Result<(), Fault> {
        let index = owner.index;
        if me.owns(owner) {
            return batch.note(index, news, last);
        }
        let weight = news.weight();
        if !me.deliver(owner, Mail { index, news, last }, weight) {
            return Err(Misbehaviour::TooMuch.into());
        }
        Ok(())
    }
}

type Me<'d> = Caller<'d, Wants, Rest, Mail, Fault>;

fn look_up(me: &Me<'_>, cookie: u64, last: bool) -> Result<Expected<Wants>, Fault> {
    me.look_up(cookie, last)
        .ok_or_else(|| Misbehaviour::Cookie(cookie).into())
}

fn header(call: &Call<'_>, cookie: u64) -> [u8; REQUEST_LEN] {
    let request = Request {
        flags: call.flags,
        command: call.command,
        cookie,
        offset: call.offset,
        len: u64::from(call.len),
    };
    request.encode()
}
