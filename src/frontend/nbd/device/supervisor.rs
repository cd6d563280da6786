//! The thread that owns a device: connects it, replaces connections that die, and disconnects it.
//!
//! The kernel notes this thread as the device's owner, so it lives as long as the device.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::error::AttachError;
use super::kernel::{Kernel, Wanted};
use super::wait;
use crate::frontend::nbd::{Export, Workers, serve_transmission};
use crate::sys::reclaim::become_io_flusher;

/// What the supervisor is told.
#[derive(Debug)]
pub(super) enum Event {
    /// A connection has died, or its device was disconnected.
    ConnectionEnded,
    /// We have the device open.
    Opened(Sender<io::Result<()>>),
    /// Disconnect it, by then.
    Disconnect(Instant, Sender<io::Result<()>>),
}

/// What a device is served with.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) wanted: Wanted,
    pub(super) export: Export,
    pub(super) workers: Workers,
    /// Sockets get higher descriptors than this: when a process is killed its descriptors are let go from the highest down, and a device that is
    /// closed while its server's sockets are open would wait for an answer that nobody gives.
    pub(super) above: RawFd,
}

/// A running supervisor. When this is dropped it disconnects the device and ends.
#[derive(Debug)]
pub(super) struct Supervisor {
    events: Sender<Event>,
    connections: Arc<AtomicUsize>,
    pub(super) index: u32,
    pub(super) safe_when_memory_is_short: bool,
    /// Descriptors of the device that are open for running it.
    pub(super) descriptors: Vec<RawFd>,
}

struct Started {
    index: u32,
    safe_when_memory_is_short: bool,
    descriptors: Vec<RawFd>,
}

impl Supervisor {
    /// Connects the device, in a thread of its own.
    ///
    /// If that takes too long the thread is left behind; it disconnects the device as soon as it can.
    pub(super) fn start(plan: Plan, limit: Duration) -> Result<Self, AttachError> {
        let (events, inbox) = mpsc::channel();
        // Without room, so that what nobody waits for any more is not sent.
        let (tell, told) = mpsc::sync_channel(0);
        let connections = Arc::new(AtomicUsize::new(0));
        let own = Own {
            plan,
            // It holds a sender of its own, so it ends by being told, not by silence.
            events: events.clone(),
            connections: Arc::clone(&connections),
        };
        let deadline = wait::within(limit);
        thread::Builder::new()
            .name("nbd-device".into())
            .spawn(move || own.run(&inbox, &tell, deadline))
            .map_err(AttachError::Resources)?;
        // The thread looks at the deadline itself where it can.
        match told.recv_timeout(limit + Duration::from_secs(1)) {
            Ok(Ok(started)) => Ok(Self {
                events,
                connections,
                index: started.index,
                safe_when_memory_is_short: started.safe_when_memory_is_short,
                descriptors: started.descriptors,
            }),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(AttachError::TimedOut {
                what: "connecting the device",
                limit,
            }),
        }
    }

    /// How many connections are alive.
    pub(super) fn connections(&self) -> usize {
        self.connections.load(Ordering::Acquire)
    }

    /// The device is open: it goes when this process does.
    pub(super) fn opened(&self, deadline: Instant) -> io::Result<()> {
        self.ask(Event::Opened, deadline)
    }

    /// Disconnects the device. The supervisor ends if that works.
    pub(super) fn disconnect(&self, deadline: Instant) -> io::Result<()> {
        self.ask(|reply| Event::Disconnect(deadline, reply), deadline)
    }

    fn ask(
        &self,
        event: impl FnOnce(Sender<io::Result<()>>) -> Event,
        deadline: Instant,
    ) -> io::Result<()> {
        let (reply, answer) = mpsc::channel();
        // If it has ended the event comes back, and with it the other end of the answer, which has to go.
        drop(self.events.send(event(reply)));
        let left = deadline.saturating_duration_since(Instant::now());
        // A little longer than it has itself, so that what it found out arrives.
        match answer.recv_timeout(left + Duration::from_millis(500)) {
            Ok(done) => done,
            Err(RecvTimeoutError::Timeout) => Err(io::ErrorKind::TimedOut.into()),
            Err(RecvTimeoutError::Disconnected) => Err(io::ErrorKind::NotConnected.into()),
        }
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        // If it was disconnected the supervisor has ended and this returns at once.
        let _disconnected = self.disconnect(wait::within(LAST));
    }
}

/// How long is tried to disconnect a device that nobody waits for.
const LAST: Duration = Duration::from_secs(10);

/// A connection that counts as alive until this is dropped.
struct Alive(Arc<AtomicUsize>);

impl Alive {
    fn new(connections: &Arc<AtomicUsize>) -> Self {
        connections.fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(connections))
    }
}

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// What the thread owns.
struct Own {
    plan: Plan,
    events: Sender<Event>,
    connections: Arc<AtomicUsize>,
}

impl Own {
    fn run(
        self,
        inbox: &Receiver<Event>,
        tell: &mpsc::SyncSender<Result<Started, AttachError>>,
        deadline: Instant,
    ) {
        // Before any other thread is started: they inherit it.
        let safe_when_memory_is_short = become_io_flusher().is_ok();
        let mut kernel = match self.connect(deadline) {
            Ok(kernel) => kernel,
            Err(error) => {
                let _told = tell.send(Err(error));
                return;
            }
        };
        let started = Started {
            index: kernel.index(),
            safe_when_memory_is_short,
            descriptors: kernel.descriptors(),
        };
        // If nobody waits any more, dropping the device disconnects it.
        if tell.send(Ok(started)).is_ok() {
            self.supervise(&mut kernel, inbox);
        }
    }

    fn connect(&self, deadline: Instant) -> Result<Kernel, AttachError> {
        let mut sockets = Vec::new();
        for _ in 0..self.plan.wanted.options.connections {
            let (ours, kernels) = pair(self.plan.above).map_err(AttachError::Resources)?;
            // It ends when the kernel's end goes, which is closed here if the device is not connected.
            self.serve(ours).map_err(AttachError::Resources)?;
            sockets.push(kernels);
        }
        Kernel::connect(&self.plan.wanted, &sockets, deadline)
    }

    /// Starts to serve a connection.
    fn serve(&self, socket: OwnedFd) -> io::Result<()> {
        let events = self.events.clone();
        let alive = Alive::new(&self.connections);
        let Plan {
            export, workers, ..
        } = self.plan.clone();
        let server = move || {
            // Why it ended does not matter: it is replaced, unless the device is disconnected.
            let _ended = serve_transmission(socket, &export, &workers);
            drop(alive);
            let _told = events.send(Event::ConnectionEnded);
        };
        thread::Builder::new()
            .name("nbd-serve".into())
            .spawn(server)?;
        Ok(())
    }

    fn supervise(&self, kernel: &mut Kernel, inbox: &Receiver<Event>) {
        let mut dead = Dead::default();
        loop {
            match inbox.recv_timeout(dead.patience()) {
                Ok(Event::ConnectionEnded) if kernel.replaces() => dead.one_more(),
                Ok(Event::ConnectionEnded) => {}
                Ok(Event::Opened(reply)) => {
                    let _told = reply.send(kernel.tie_to_us());
                }
                Ok(Event::Disconnect(deadline, reply)) => {
                    let disconnected = kernel.disconnect(deadline);
                    let over = disconnected.is_ok();
                    // Who has stopped waiting wanted it to end all the same; dropping the device tries once more.
                    if reply.send(disconnected).is_err() || over {
                        return;
                    }
                }
                Err(RecvTimeoutError::Timeout) => self.replace(kernel, &mut dead),
                // We hold a sender ourselves.
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn replace(&self, kernel: &mut Kernel, dead: &mut Dead) {
        while dead.count > 0 {
            // The kernel first: a server whose socket it does not want would end at once, and count as another one that has died.
            let replaced = pair(self.plan.above).and_then(|(ours, kernels)| {
                kernel.replace(kernels.as_fd())?;
                self.serve(ours)
            });
            match replaced {
                Ok(()) => dead.one_less(),
                // There is no device any more that could have connections.
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => dead.none(),
                // The kernel has not noticed yet that it has died, or we have no descriptor: try again later.
                Err(_) => {
                    dead.later();
                    return;
                }
            }
        }
    }
}

/// Connections that have to be replaced, and when to try.
#[derive(Debug)]
struct Dead {
    count: usize,
    next: Instant,
    pause: Duration,
}

/// The first pause; the kernel notices within this that its other end was closed.
const SHORTEST: Duration = Duration::from_millis(1);
/// Connections that die as soon as they are made are made once in so long.
const LONGEST: Duration = Duration::from_secs(1);
/// If nothing is to be done.
const IDLE: Duration = Duration::from_secs(3600);

impl Default for Dead {
    fn default() -> Self {
        Self {
            count: 0,
            next: Instant::now(),
            pause: SHORTEST,
        }
    }
}

impl Dead {
    fn one_more(&mut self) {
        let now = Instant::now();
        if now.saturating_duration_since(self.next) > LONGEST * 10 {
            self.pause = SHORTEST;
        }
        self.count += 1;
        self.later();
    }

    fn one_less(&mut self) {
        self.count -= 1;
    }

    fn none(&mut self) {
        self.count = 0;
    }

    fn later(&mut self) {
        self.next = Instant::now() + self.pause;
        self.pause = (self.pause * 2).min(LONGEST);
    }

    fn patience(&self) -> Duration {
        if self.count == 0 {
            return IDLE;
        }
        self.next.saturating_duration_since(Instant::now())
    }
}

/// Two ends of a connection, ours and the kernel's, ours with a descriptor above `above`.
fn pair(above: RawFd) -> io::Result<(OwnedFd, OwnedFd)> {
    let (ours, kernels) = socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    let ours = if ours.as_raw_fd() > above {
        ours
    } else {
        rustix::io::fcntl_dupfd_cloexec(&ours, above + 1)?
    };
    Ok((ours, kernels))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_end_of_a_connection_has_the_higher_descriptor() {
        let (low, _) = pair(0).unwrap();
        let above = low.as_raw_fd() + 20;
        let (ours, _kernels) = pair(above).unwrap();
        assert!(ours.as_raw_fd() > above);
    }

    #[test]
    fn connections_that_die_at_once_are_made_ever_more_seldom() {
        let mut dead = Dead::default();
        assert_eq!(dead.patience(), IDLE);
        for _ in 0..20 {
            dead.one_more();
            assert!(dead.patience() <= LONGEST);
            dead.one_less();
        }
        dead.one_more();
        assert!(dead.patience() > LONGEST / 2);
        dead.none();
        assert_eq!(dead.patience(), IDLE);
    }
}
