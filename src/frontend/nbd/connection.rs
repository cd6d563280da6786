//! One client in the transmission phase: its replies, on their way out.
//!
//! There is no thread that only sends: waking one costs more than most requests. Whoever has a reply sends it, and what
//! others have put into the outbox meanwhile; while somebody does, the others leave theirs there and go.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::answer::Agreed;
use super::budget::{Budget, Buffer, Charges};
use super::channel::{Channel, too_slow};
use super::export::Export;
use super::workers::Workers;

/// How long a worker waits for a client that does not take a reply. Then a thread is started for that: workers are for all
/// clients.
const WORKER_PATIENCE: Duration = Duration::from_millis(20);
/// A client that takes so many bytes has its patience anew.
const PROGRESS: usize = 256 << 10;
/// How many pieces go out with one call; the kernel takes up to 1024.
const PIECES: usize = 64;

/// What went to and fro.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct Traffic {
    /// Requests that were answered, or ended the connection.
    pub requests: u64,
    /// Bytes that the client has read.
    pub read: u64,
    /// Bytes that the client has written.
    pub written: u64,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) requests: AtomicU64,
    pub(super) read: AtomicU64,
    pub(super) written: AtomicU64,
}

/// A reply, or several in a row.
#[derive(Debug, Default)]
pub(super) struct Reply {
    /// Headers and small payloads.
    pub(super) heads: Vec<u8>,
    /// Bytes that were read.
    pub(super) data: Option<Buffer>,
    /// After so many bytes of `heads` come these of `data`; in order.
    pub(super) cuts: Vec<(usize, Range<usize>)>,
    /// What is held for it.
    pub(super) charges: Option<Charges>,
    /// How many bytes of it are gone.
    pub(super) sent: usize,
}

impl Reply {
    fn len(&self) -> usize {
        self.heads.len() + self.cuts.iter().map(|(_, data)| data.len()).sum::<usize>()
    }

    /// Adds the pieces that are not gone, as long as there is room for another.
    fn gather<'a>(&'a self, pieces: &mut Vec<IoSlice<'a>>) {
        let mut skip = self.sent;
        let mut add = |piece: &'a [u8]| {
            let rest = &piece[skip.min(piece.len())..];
            skip -= piece.len() - rest.len();
            if !rest.is_empty() && pieces.len() < PIECES {
                pieces.push(IoSlice::new(rest));
            }
        };
        let mut head = 0;
        for (end, data) in &self.cuts {
            add(&self.heads[head..*end]);
            head = *end;
            if let Some(bytes) = &self.data {
                add(&bytes[data.clone()]);
            }
        }
        add(&self.heads[head..]);
    }
}

#[derive(Debug, Default)]
struct Outbox {
    replies: VecDeque<Reply>,
    /// Somebody sends, and will look here again before he goes.
    sending: bool,
}

/// Who sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sender {
    /// A thread that is there for this connection alone.
    Own,
    /// A thread that others wait for.
    Shared,
}

/// One client.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) channel: Arc<Channel>,
    pub(super) export: Export,
    pub(super) agreed: Agreed,
    pub(super) workers: Workers,
    pub(super) budget: Arc<Budget>,
    pub(super) counters: Counters,
    /// The server goes away; what is asked for from here on is refused.
    pub(super) closing: Arc<AtomicBool>,
    outbox: Mutex<Outbox>,
    broken: AtomicBool,
}

impl Connection {
    pub(super) fn new(
        channel: Arc<Channel>,
        export: Export,
        agreed: Agreed,
        workers: Workers,
        closing: Arc<AtomicBool>,
    ) -> Arc<Self> {
        Arc::new(Self {
            channel,
            export,
            agreed,
            budget: Budget::new(workers.in_flight_each),
            workers,
            counters: Counters::default(),
            closing,
            outbox: Mutex::default(),
            broken: AtomicBool::new(false),
        })
    }

    pub(super) fn traffic(&self) -> Traffic {
        let counters = &self.counters;
        Traffic {
            requests: counters.requests.load(Ordering::Relaxed),
            read: counters.read.load(Ordering::Relaxed),
            written: counters.written.load(Ordering::Relaxed),
        }
    }

    pub(super) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    /// Gives the connection up: nothing is sent any more, and the thread that reads finds the end.
    pub(super) fn give_up(&self) {
        self.broken.store(true, Ordering::Release);
        self.channel.end();
        // Outside of the lock: dropping a reply gives back what was held for it.
        let replies = std::mem::take(&mut self.lock().replies);
        drop(replies);
    }

    fn lock(&self) -> MutexGuard<'_, Outbox> {
        // Whoever panics while it sends has not put anything into disorder here.
        self.outbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends `reply`, or leaves it to somebody who sends already. A thread of its own waits for a client that is slow, one that is shared
    /// does not.
    pub(super) fn send(self: &Arc<Self>, reply: Reply, sender: Sender) {
        let mut outbox = self.lock();
        // Asked under the lock: who gives up empties the outbox under it, afterwards.
        if self.is_broken() {
            drop(outbox);
            return;
        }
        if outbox.sending {
            outbox.replies.push_back(reply);
            return;
        }
        outbox.sending = true;
        drop(outbox);
        self.drain(VecDeque::from([reply]), sender);
    }

    /// As [`send`](Self::send) of bytes, by the thread that reads. What is left in the outbox is held by the client's budget, too, so that who does not
    /// take its replies is not read any more. The bytes are gone afterwards; often their room is left.
    pub(super) fn send_batch(self: &Arc<Self>, batch: &mut Vec<u8>) {
        if batch.is_empty() {
            return;
        }
        let mut outbox = self.lock();
        if !outbox.sending && !self.is_broken() {
            outbox.sending = true;
            drop(outbox);
            // The usual case: nobody else sends, and the socket takes all.
            let sent = match self.channel.send(&[IoSlice::new(batch)]) {
                Ok(sent) => sent,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                Err(_) => {
                    self.give_up();
                    0
                }
            };
            let mut replies = VecDeque::new();
            if sent < batch.len() {
                replies.push_back(Reply {
                    heads: std::mem::take(batch),
                    sent,
                    ..Reply::default()
                });
            }
            batch.clear();
            self.drain(replies, Sender::Own);
            return;
        }
        drop(outbox);
        let heads = std::mem::take(batch);
        let charges = self.charge(heads.len() as u64);
        if charges.is_some() {
            let reply = Reply {
                heads,
                charges,
                ..Reply::default()
            };
            self.send(reply, Sender::Own);
        }
    }

    /// What is held for `bytes`, once others have given back what they held; `None` if the connection is given up.
    pub(super) fn charge(&self, bytes: u64) -> Option<Charges> {
        Charges::take(&self.budget, &self.workers.budget, bytes, || {
            !self.is_broken()
        })
    }

    /// Sends until nothing is left. The caller has set `sending`.
    fn drain(self: &Arc<Self>, mut replies: VecDeque<Reply>, sender: Sender) {
        let patience = match sender {
            Sender::Own => self.workers.patience,
            Sender::Shared => WORKER_PATIENCE,
        };
        loop {
            match self.send_all(&mut replies, patience) {
                Ok(()) => {}
                Err(error)
                    if error.kind() == io::ErrorKind::TimedOut && sender == Sender::Shared =>
                {
                    let this = Arc::clone(self);
                    let started = thread::Builder::new()
                        .name("nbd-sender".into())
                        .spawn(move || this.drain(replies, Sender::Own));
                    if started.is_err() {
                        // Without a thread for it, it is given up: nobody else can wait.
                        self.give_up();
                        self.lock().sending = false;
                    }
                    return;
                }
                Err(_) => {
                    self.give_up();
                    replies.clear();
                }
            }
            let mut outbox = self.lock();
            if self.is_broken() {
                let left = std::mem::take(&mut outbox.replies);
                outbox.sending = false;
                drop(outbox);
                drop(left);
                return;
            }
            if outbox.replies.is_empty() {
                outbox.sending = false;
                return;
            }
            std::mem::swap(&mut replies, &mut outbox.replies);
        }
    }

    fn send_all(&self, replies: &mut VecDeque<Reply>, patience: Duration) -> io::Result<()> {
        let mut deadline = None;
        let mut progress = 0;
        loop {
            let mut pieces = Vec::with_capacity(PIECES);
            for reply in replies.iter() {
                reply.gather(&mut pieces);
                if pieces.len() == PIECES {
                    break;
                }
            }
            let sent = if pieces.is_empty() {
                self.channel.push().map(|()| 0)
            } else {
                self.channel.send(&pieces)
            };
            match sent {
                Ok(0) if pieces.is_empty() => return Ok(()),
                Ok(sent) => {
                    progress += sent;
                    if progress >= PROGRESS {
                        (deadline, progress) = (None, 0);
                    }
                    drop(pieces);
                    advance(replies, sent);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let deadline = *deadline.get_or_insert_with(|| Instant::now() + patience);
                    if !self.channel.wait_writable(deadline)? {
                        return Err(too_slow());
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }
}

fn advance(replies: &mut VecDeque<Reply>, mut sent: usize) {
    while let Some(reply) = replies.front_mut() {
        let left = reply.len() - reply.sent;
        if sent < left {
            reply.sent += sent;
            return;
        }
        sent -= left;
        replies.pop_front();
    }
}
