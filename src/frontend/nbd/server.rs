//! A server for any number of exports and clients.

use std::fmt;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::channel::Channel;
use super::connection::{Connection, Traffic};
use super::export::Export;
use super::handshake::{Tls, shake_hands};
use super::transmission::transmit;
use super::workers::{WorkerOptions, Workers};

/// What a server allows.
#[derive(Clone)]
pub struct ServerOptions {
    /// Threads and memory.
    pub workers: WorkerOptions,
    /// The most clients at once. Others find the connection closed.
    pub connections: usize,
    /// How long a client may take for its whole handshake.
    pub handshake: Duration,
    /// Whether TLS is spoken.
    pub tls: Tls,
    /// Told what happens, by the thread to which it happens; it should not take long.
    pub on_event: Option<OnEvent>,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            workers: WorkerOptions::default(),
            // Four for each of some tens of clients.
            connections: 128,
            // Four round trips to anywhere and a certificate.
            handshake: Duration::from_secs(10),
            tls: Tls::Off,
            on_event: None,
        }
    }
}

impl fmt::Debug for ServerOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerOptions")
            .field("workers", &self.workers)
            .field("connections", &self.connections)
            .field("handshake", &self.handshake)
            .field("tls", &self.tls)
            .finish_non_exhaustive()
    }
}

/// What is told of events.
pub type OnEvent = Arc<dyn Fn(&Event) + Send + Sync>;

/// Something that happened to a client.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// It uses an export from now on.
    Opened {
        /// The number of the client, counted from 1.
        client: u64,
        /// Where it is, as far as is known.
        peer: String,
        /// The export's name.
        export: String,
        /// Whether TLS is spoken.
        encrypted: bool,
    },
    /// It is gone.
    Closed {
        /// The number of the client.
        client: u64,
        /// Where it was.
        peer: String,
        /// What went to and fro.
        traffic: Traffic,
        /// What went wrong, if something did.
        error: Option<String>,
    },
    /// It never came to use an export.
    TurnedAway {
        /// Where it was.
        peer: String,
        /// Why.
        reason: String,
    },
}

/// Where clients are waited for.
#[derive(Debug)]
#[non_exhaustive]
pub enum Listener {
    /// At a TCP port.
    Tcp(TcpListener),
    /// At a path.
    Unix(UnixListener),
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(listener) => listener.as_fd(),
            Self::Unix(listener) => listener.as_fd(),
        }
    }
}

impl Listener {
    fn accept(&self) -> io::Result<(OwnedFd, String)> {
        Ok(match self {
            Self::Tcp(listener) => {
                let (stream, peer) = listener.accept()?;
                (stream.into(), peer.to_string())
            }
            Self::Unix(listener) => {
                let (stream, _) = listener.accept()?;
                (stream.into(), "a local process".to_owned())
            }
        })
    }

    fn set_nonblocking(&self) -> io::Result<()> {
        match self {
            Self::Tcp(listener) => listener.set_nonblocking(true),
            Self::Unix(listener) => listener.set_nonblocking(true),
        }
    }
}

/// Why something could not be added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AddError {
    /// Another export has the name.
    #[error("there is an export of this name already")]
    Taken,
    /// The server does not go on.
    #[error("the server was shut down")]
    ShutDown,
}

/// Clients were still being served when there was no time left; they are cut off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{left} clients had requests under way when time was up, and were cut off")]
pub struct CutOff {
    /// How many.
    pub left: usize,
}

/// Serves exports to clients. Dropping it is [`shutdown`](Self::shutdown) without time.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    acceptors: Mutex<Vec<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    options: ServerOptions,
    workers: Workers,
    closing: Arc<AtomicBool>,
    state: Mutex<State>,
    /// A client has gone.
    gone: Condvar,
}

#[derive(Debug, Default)]
struct State {
    exports: Vec<Export>,
    clients: Vec<Client>,
    next: u64,
}

#[derive(Debug)]
struct Client {
    id: u64,
    /// Unknown during the handshake.
    connection: Option<(Arc<Connection>, Arc<AtomicBool>)>,
    /// For the time of the handshake.
    socket: Option<OwnedFd>,
}

/// How often what waits for a client looks whether it still should.
const LOOK: Duration = Duration::from_millis(100);

impl Server {
    /// A server without exports and clients.
    #[must_use]
    pub fn new(options: ServerOptions) -> Self {
        Self {
            shared: Arc::new(Shared {
                workers: Workers::new(&options.workers),
                options,
                closing: Arc::new(AtomicBool::new(false)),
                state: Mutex::default(),
                gone: Condvar::new(),
            }),
            acceptors: Mutex::default(),
        }
    }

    /// Serves `export`, too. The first one is what clients get that ask for none by name.
    ///
    /// # Errors
    /// [`AddError::Taken`].
    pub fn add(&self, export: Export) -> Result<(), AddError> {
        let mut state = self.shared.lock();
        if state.exports.iter().any(|has| has.name() == export.name()) {
            return Err(AddError::Taken);
        }
        state.exports.push(export);
        Ok(())
    }

    /// Takes an export away; whether there was one. Who uses it has until `deadline` to get answers to what it has asked for.
    ///
    /// # Errors
    /// [`CutOff`] if somebody had not.
    pub fn remove(&self, name: &str, deadline: Instant) -> Result<bool, CutOff> {
        let mut state = self.shared.lock();
        let before = state.exports.len();
        state.exports.retain(|export| export.name() != name);
        let removed = state.exports.len() < before;
        drop(state);
        let of_export = |client: &Client| {
            let connection = client.connection.as_ref();
            connection.is_some_and(|(connection, _)| connection.export.name() == name)
        };
        self.shared.drain(deadline, of_export)?;
        Ok(removed)
    }

    /// How many clients there are, those in their handshakes included.
    #[must_use]
    pub fn clients(&self) -> usize {
        self.shared.lock().clients.len()
    }

    /// Serves who connects to `listener`, until the server is shut down.
    ///
    /// # Errors
    /// If no thread can be started; [`AddError::ShutDown`].
    pub fn listen(&self, listener: Listener) -> io::Result<()> {
        if self.shared.is_closing() {
            return Err(io::Error::other(AddError::ShutDown));
        }
        listener.set_nonblocking()?;
        let shared = Arc::clone(&self.shared);
        let acceptor = thread::Builder::new()
            .name("nbd-accept".into())
            .spawn(move || shared.accept(&listener))?;
        self.lock_acceptors().push(acceptor);
        Ok(())
    }

    /// Serves a client on a connected socket, in a thread of its own.
    ///
    /// # Errors
    /// If no thread can be started, or there are as many clients as there may be.
    pub fn serve(&self, socket: impl Into<OwnedFd>) -> io::Result<()> {
        self.shared
            .welcome(socket.into(), "a connected socket".to_owned())
    }

    /// Lets nobody in any more, answers what was asked for, and ends all connections. Storages are not flushed.
    ///
    /// # Errors
    /// [`CutOff`] if that took longer than until `deadline`. Either way nothing is served when this returns, unless a storage does not
    /// return from a call.
    pub fn shutdown(&self, deadline: Instant) -> Result<(), CutOff> {
        self.shared.closing.store(true, Ordering::Relaxed);
        let acceptors = std::mem::take(&mut *self.lock_acceptors());
        for acceptor in acceptors {
            // A thread that panicked serves nobody either.
            let _ = acceptor.join();
        }
        self.shared.drain(deadline, |_| true)
    }

    fn lock_acceptors(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        // Only pushed to and taken from.
        self.acceptors
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Whoever wants to know calls it himself.
        let _ = self.shutdown(Instant::now());
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Lists that are pushed to and removed from; whatever panicked under the lock left them whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Relaxed)
    }

    fn tell(&self, event: &Event) {
        if let Some(on_event) = &self.options.on_event {
            on_event(event);
        }
    }

    fn accept(self: &Arc<Self>, listener: &Listener) {
        while !self.is_closing() {
            let mut fds = [PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN)];
            let look = Timespec {
                tv_sec: 0,
                tv_nsec: LOOK.subsec_nanos().into(),
            };
            if !matches!(poll(&mut fds, Some(&look)), Ok(1..)) {
                continue;
            }
            match listener.accept() {
                Ok((socket, peer)) => {
                    if let Err(error) = self.welcome(socket, peer.clone()) {
                        let reason = error.to_string();
                        self.tell(&Event::TurnedAway { peer, reason });
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => {
                    // Without a descriptor left, say. Others give theirs back; until then this would come again at once.
                    let state = self.lock();
                    drop(self.gone.wait_timeout(state, LOOK));
                }
            }
        }
    }

    fn welcome(self: &Arc<Self>, socket: OwnedFd, peer: String) -> io::Result<()> {
        let copy = socket.try_clone()?;
        let id = {
            let mut state = self.lock();
            // Asked under the lock: who shuts the server down raises the flag, and then looks who is here.
            if self.is_closing() {
                return Err(io::Error::other(AddError::ShutDown));
            }
            if state.clients.len() >= self.options.connections {
                return Err(io::Error::other(format!(
                    "there are {} clients already",
                    self.options.connections
                )));
            }
            state.next += 1;
            let id = state.next;
            state.clients.push(Client {
                id,
                connection: None,
                socket: Some(copy),
            });
            id
        };
        let shared = Arc::clone(self);
        let leaves = Leaves(shared, id);
        thread::Builder::new()
            .name("nbd-client".into())
            .spawn(move || {
                let Leaves(shared, id) = &leaves;
                shared.attend(*id, socket, peer);
            })
            .map(|_| ())
    }

    /// From the greeting to the end.
    fn attend(&self, id: u64, socket: OwnedFd, peer: String) {
        let deadline = Instant::now() + self.options.handshake;
        let exports = || self.lock().exports.clone();
        let chosen = Channel::new(socket)
            .map_err(Into::into)
            .and_then(|channel| shake_hands(channel, &self.options.tls, exports, deadline));
        let chosen = match chosen {
            Ok(Some(chosen)) => chosen,
            // It only asked.
            Ok(None) => return,
            Err(error) => {
                let reason = reason(&error);
                self.tell(&Event::TurnedAway { peer, reason });
                return;
            }
        };
        let (channel, closing) = (Arc::new(chosen.channel), Arc::new(AtomicBool::new(false)));
        let connection = Connection::new(
            channel,
            chosen.export,
            chosen.agreed,
            self.workers.clone(),
            Arc::clone(&closing),
        );
        {
            let mut state = self.lock();
            let State {
                exports, clients, ..
            } = &mut *state;
            let is_chosen = |export: &Export| export.is_same(&connection.export);
            // Asked under the lock, as in `welcome`. What was chosen may have been removed, and its name given to another.
            if self.is_closing() || !exports.iter().any(is_chosen) {
                return;
            }
            if let Some(client) = clients.iter_mut().find(|client| client.id == id) {
                client.connection = Some((Arc::clone(&connection), closing));
                client.socket = None;
            }
        }
        self.tell(&Event::Opened {
            client: id,
            peer: peer.clone(),
            export: connection.export.name().to_owned(),
            encrypted: chosen.encrypted,
        });
        let end = transmit(&connection, chosen.received);
        self.tell(&Event::Closed {
            client: id,
            peer,
            traffic: connection.traffic(),
            error: end.err().map(|error| reason(&error)),
        });
    }

    /// Asks clients to go, waits until `deadline`, and cuts off who is left then.
    fn drain(&self, deadline: Instant, of: impl Fn(&Client) -> bool) -> Result<(), CutOff> {
        let mut state = self.lock();
        for client in state.clients.iter().filter(|client| of(client)) {
            match &client.connection {
                Some((connection, closing)) => {
                    closing.store(true, Ordering::Relaxed);
                    connection.channel.end_reading();
                }
                None => client.cut_off(),
            }
        }
        let mut cut_off = None;
        loop {
            let left = state.clients.iter().filter(|client| of(client)).count();
            if left == 0 {
                break;
            }
            let time = deadline.saturating_duration_since(Instant::now());
            if time.is_zero() && cut_off.is_none() {
                cut_off = Some((left, Instant::now() + LOOK * 10));
                for client in state.clients.iter().filter(|client| of(client)) {
                    client.cut_off();
                }
            }
            // Threads of clients that are cut off end soon, unless a storage does not return.
            let until = cut_off.map_or(deadline, |(_, until)| until);
            let time = until.saturating_duration_since(Instant::now());
            if time.is_zero() {
                break;
            }
            state = self
                .gone
                .wait_timeout(state, time)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        cut_off.map_or(Ok(()), |(left, _)| Err(CutOff { left }))
    }
}

impl Client {
    fn cut_off(&self) {
        if let Some((connection, _)) = &self.connection {
            connection.give_up();
        }
        if let Some(socket) = &self.socket {
            // It may have ended already, which is as good.
            let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Both);
        }
    }
}

/// A client's place, free again when this is dropped.
struct Leaves(Arc<Shared>, u64);

impl Drop for Leaves {
    fn drop(&mut self) {
        let Self(shared, id) = self;
        let client = {
            let mut state = shared.lock();
            let at = state.clients.iter().position(|client| client.id == *id);
            at.map(|at| state.clients.swap_remove(at))
        };
        drop(client);
        shared.gone.notify_all();
    }
}

/// An error and its causes, each once.
fn reason(error: &dyn std::error::Error) -> String {
    let mut reason = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !reason.contains(&text) {
            reason = format!("{reason}: {text}");
        }
        cause = error.source();
    }
    reason
}
