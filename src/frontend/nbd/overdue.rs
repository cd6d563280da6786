//! Requests that the storage takes too long for: they are answered with an error, and what comes of them later is told to nobody.
//!
//! A write that was given up may still happen. Until it has, or has failed, others to the same bytes are refused: it would undo them.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use super::connection::{Connection, Reply, Sender};
use super::export::{Export, Refused};
use crate::nbd::{Command, Errno, Request};

/// Who looks after requests that are under way.
#[derive(Debug)]
pub(super) struct Watch {
    limit: Duration,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// Nobody is to watch any more.
    ended: Condvar,
    /// How many writes were given up and are not over: so many are mostly none that nobody has to look for them.
    doubtful: AtomicUsize,
}

#[derive(Default)]
struct State {
    next: u64,
    /// By when they came, which is the order in which they are due.
    pending: BTreeMap<u64, Pending>,
    /// Writes that were given up and are not over.
    doubtful: Vec<Doubtful>,
    watched: bool,
    over: bool,
}

struct Pending {
    due: Instant,
    connection: Weak<Connection>,
    request: Request,
    begun: bool,
}

struct Doubtful {
    id: u64,
    storage: usize,
    bytes: Range<u64>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.lock();
        f.debug_struct("Shared")
            .field("pending", &state.pending.len())
            .field("doubtful", &state.doubtful.len())
            .finish_non_exhaustive()
    }
}

/// A request under way. If it is not [done](Self::done), it was not answered.
#[derive(Debug)]
pub(super) struct Ticket {
    id: u64,
    shared: Arc<Shared>,
}

impl Watch {
    pub(super) fn new(limit: Duration) -> Self {
        Self {
            limit,
            shared: Arc::default(),
        }
    }

    /// Watches a request from now on. Without a thread to do so it is not watched.
    pub(super) fn begin(&self, connection: &Arc<Connection>, request: Request) -> Ticket {
        let mut state = self.shared.lock();
        let id = state.next;
        state.next += 1;
        let pending = Pending {
            due: Instant::now() + self.limit,
            connection: Arc::downgrade(connection),
            request,
            begun: false,
        };
        state.pending.insert(id, pending);
        if !state.watched {
            let shared = Arc::clone(&self.shared);
            let tick = (self.limit / 8).max(SHORTEST);
            let watcher = thread::Builder::new()
                .name("nbd-watch".into())
                .spawn(move || shared.watch(tick));
            state.watched = watcher.is_ok();
        }
        drop(state);
        Ticket {
            id,
            shared: Arc::clone(&self.shared),
        }
    }

    /// Why a request must not be carried out now, if so.
    pub(super) fn forbids(&self, export: &Export, request: &Request) -> Option<Refused> {
        let shared = &self.shared;
        if shared.doubtful.load(Ordering::Acquire) == 0 || !changes(request) {
            return None;
        }
        let (storage, bytes) = (identity(export), request.range());
        let overlaps = shared.lock().doubtful.iter().any(|doubtful| {
            doubtful.storage == storage
                && doubtful.bytes.start < bytes.end
                && bytes.start < doubtful.bytes.end
        });
        overlaps.then(|| {
            Refused::new(
                Errno::Io,
                "an earlier write to these bytes was given up and may still happen",
            )
        })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.shared.lock().over = true;
        self.shared.ended.notify_all();
    }
}

impl Ticket {
    /// The storage is asked from here on. False if the request was given up already: it must not be carried out then.
    pub(super) fn start(&self) -> bool {
        match self.shared.lock().pending.get_mut(&self.id) {
            Some(pending) => {
                pending.begun = true;
                true
            }
            None => false,
        }
    }

    /// The storage has answered. False if the request was given up: nobody wants the answer then.
    pub(super) fn done(&self) -> bool {
        self.shared.end(self.id)
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        // After a panic in the storage.
        self.shared.end(self.id);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that could panic runs under the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether nobody has answered the request yet.
    fn end(&self, id: u64) -> bool {
        let mut state = self.lock();
        let was_pending = state.pending.remove(&id).is_some();
        if !was_pending && !state.doubtful.is_empty() {
            state.doubtful.retain(|doubtful| doubtful.id != id);
            self.doubtful.store(state.doubtful.len(), Ordering::Release);
        }
        was_pending
    }

    /// Looks once a `tick`, so that nobody has to wake this thread for a request: that would cost more than many a request.
    fn watch(&self, tick: Duration) {
        let mut state = self.lock();
        while !state.over {
            let now = Instant::now();
            let wait = match state.pending.first_key_value() {
                None => tick,
                Some((_, first)) => first.due.saturating_duration_since(now).min(tick),
            };
            if wait.is_zero() {
                let (id, pending) = state.pending.pop_first().expect("one is due");
                let connection = pending.connection.upgrade();
                if let Some(connection) = &connection
                    && pending.begun
                    && changes(&pending.request)
                {
                    state.doubtful.push(Doubtful {
                        id,
                        storage: identity(&connection.export),
                        bytes: pending.request.range(),
                    });
                    self.doubtful.store(state.doubtful.len(), Ordering::Release);
                }
                drop(state);
                if let Some(connection) = connection {
                    give_up(&connection, &pending.request);
                }
                state = self.lock();
                continue;
            }
            state = self
                .ended
                .wait_timeout(state, wait)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

/// Between two looks, however short the limit is.
const SHORTEST: Duration = Duration::from_millis(10);

fn give_up(connection: &Arc<Connection>, request: &Request) {
    let refused = Refused::new(Errno::Io, "the storage does not answer");
    let mut reply = Reply::default();
    connection
        .agreed
        .refused(request, &refused, &mut reply.heads);
    connection.send(reply, Sender::Shared);
}

/// Whether carrying it out late would undo what came after it.
fn changes(request: &Request) -> bool {
    matches!(
        request.command,
        Command::Write | Command::WriteZeroes | Command::Trim
    )
}

/// Which storage: exports of the same one count as one.
fn identity(export: &Export) -> usize {
    Arc::as_ptr(export.storage()).cast::<()>().addr()
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::super::{WorkerOptions, Workers, serve_transmission};
    use super::*;
    use crate::backend::MemoryStorage;
    use crate::chunk::{Fault, Faulty, Operation, Storage};
    use crate::nbd::CommandFlags;

    const LIMIT: Duration = Duration::from_millis(100);
    const SOON: Duration = Duration::from_secs(20);

    fn ask(client: &mut UnixStream, command: Command, cookie: u64, offset: u64, payload: &[u8]) {
        let request = Request {
            flags: CommandFlags::NONE,
            command,
            cookie,
            offset,
            len: 4096,
        };
        client.write_all(&request.encode()).unwrap();
        client.write_all(payload).unwrap();
    }

    /// The cookie and the error of the next answer, which has no payload.
    fn answer(client: &mut UnixStream) -> (u64, u32) {
        let mut reply = [0; 16];
        client.read_exact(&mut reply).unwrap();
        let error = u32::from_be_bytes(*reply[4..].first_chunk().unwrap());
        (
            u64::from_be_bytes(*reply[8..].first_chunk().unwrap()),
            error,
        )
    }

    #[test]
    fn a_storage_that_stalls_is_an_error_in_time_and_a_late_write_undoes_nothing() {
        let memory = Arc::new(MemoryStorage::new(1 << 20));
        let faulty = Arc::new(Faulty::new(Arc::clone(&memory) as Arc<dyn Storage>));
        let faults = faulty.faults();
        let export = Export::new("", faulty as Arc<dyn Storage>).unwrap();
        let workers = Workers::new(&WorkerOptions {
            limit: Some(LIMIT),
            ..WorkerOptions::default()
        });
        let (mut client, server) = UnixStream::pair().unwrap();
        client.set_read_timeout(Some(SOON)).unwrap();
        let server = thread::spawn(move || serve_transmission(server, &export, &workers));
        faults.add(Fault::stall(SOON).on(Operation::Write).times(1));
        let start = Instant::now();
        ask(&mut client, Command::Write, 1, 0, &[1; 4096]);
        assert_eq!(answer(&mut client), (1, 5));
        assert!(start.elapsed() >= LIMIT);
        // What was given up may still happen: until then nobody writes there, but elsewhere.
        ask(&mut client, Command::Write, 2, 0, &[2; 4096]);
        assert_eq!(answer(&mut client), (2, 5));
        ask(&mut client, Command::Write, 3, 4096, &[3; 4096]);
        assert_eq!(answer(&mut client), (3, 0));
        faults.release();
        let end = Instant::now() + SOON;
        let mut cookie = 4;
        loop {
            ask(&mut client, Command::Write, cookie, 0, &[4; 4096]);
            if answer(&mut client) == (cookie, 0) {
                break;
            }
            assert!(Instant::now() < end);
            cookie += 1;
        }
        let mut bytes = [0; 4096];
        memory.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes, [4; 4096]);
        drop(client);
        server.join().unwrap().unwrap();
    }
}
