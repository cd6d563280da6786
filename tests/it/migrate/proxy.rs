//! A network between two ends that breaks on command: it counts, cuts, stalls and damages byte streams.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

/// The lane number of control, as the preface has it; 0 is urgent, others are bulk.
pub(crate) const CONTROL: u8 = 255;
pub(crate) const URGENT: u8 = 0;

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    ToDestination,
    ToSource,
}

/// What happens to the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Act {
    /// This lane ends, in both directions.
    Cut,
    /// Nothing passes any more on any lane, and nobody is told.
    Stall,
    /// A bit of the byte is turned.
    Flip,
    /// From there on every byte of this direction is this one.
    Garble(u8),
}

/// Does `act` when byte `at` (from 0, the preface counts) passes on `lane`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Trap {
    pub lane: u8,
    pub way: Way,
    pub at: u64,
    pub act: Act,
}

/// Passes connections on to `upstream`.
#[derive(Debug)]
pub(crate) struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    upstream: SocketAddr,
    trap: Option<Trap>,
    sprung: AtomicBool,
    /// Bytes of control, urgent and the first bulk lane, to the destination and back.
    counts: [[AtomicU64; 2]; 3],
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    stalled: bool,
    closing: bool,
    sockets: Vec<TcpStream>,
    pumps: Vec<JoinHandle<()>>,
}

fn index(lane: u8) -> Option<usize> {
    match lane {
        CONTROL => Some(0),
        URGENT => Some(1),
        1 => Some(2),
        _ => None,
    }
}

impl Proxy {
    pub(crate) fn new(upstream: SocketAddr, trap: Option<Trap>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let shared = Arc::new(Shared {
            upstream,
            trap,
            sprung: AtomicBool::new(false),
            counts: Default::default(),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let address = listener.local_addr().unwrap();
        let accepting = {
            let shared = shared.clone();
            std::thread::spawn(move || shared.accept(&listener))
        };
        Self {
            address,
            shared,
            accepting: Some(accepting),
        }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// How many bytes have passed on `lane`.
    pub(crate) fn passed(&self, lane: u8, way: Way) -> u64 {
        self.shared.counts[index(lane).unwrap()][way as usize].load(Ordering::Relaxed)
    }

    /// Whether the trap was sprung.
    pub(crate) fn sprung(&self) -> bool {
        self.shared.sprung.load(Ordering::Relaxed)
    }
}

impl Shared {
    fn accept(self: &Arc<Self>, listener: &TcpListener) {
        for stream in listener.incoming() {
            let mut state = self.state.lock().unwrap();
            if state.closing {
                return;
            }
            let (Ok(down), Ok(up)) = (stream, TcpStream::connect(self.upstream)) else {
                continue;
            };
            // The dialer speaks first, and its fifth byte after the magic names the lane.
            let mut preface = [0; 6];
            if (&down).read_exact(&mut preface).is_err() {
                continue;
            }
            let lane = preface[5];
            for socket in [&down, &up] {
                socket.set_nodelay(true).unwrap();
                state.sockets.push(socket.try_clone().unwrap());
            }
            let (here, there) = (self.clone(), self.clone());
            let pair = (down.try_clone().unwrap(), up.try_clone().unwrap());
            state.pumps.push(std::thread::spawn(move || {
                here.pump(lane, Way::ToDestination, &pair.0, &pair.1, &preface);
            }));
            state.pumps.push(std::thread::spawn(move || {
                there.pump(lane, Way::ToSource, &up, &down, &[]);
            }));
        }
    }

    fn pump(&self, lane: u8, way: Way, mut from: &TcpStream, mut to: &TcpStream, first: &[u8]) {
        let mut buffer = vec![0; 64 << 10];
        buffer[..first.len()].copy_from_slice(first);
        let (mut filled, mut passed) = (first.len(), 0_u64);
        let mut garbage = None;
        loop {
            let mut bytes = filled;
            let trap = self.trap.filter(|trap| {
                let here = trap.lane == lane && trap.way == way;
                here && (passed..passed + filled as u64).contains(&trap.at)
            });
            if let Some(trap) = trap {
                self.sprung.store(true, Ordering::Relaxed);
                let at = usize::try_from(trap.at - passed).unwrap();
                match trap.act {
                    Act::Flip => buffer[at] ^= 0x10,
                    Act::Garble(byte) => {
                        garbage = Some(byte);
                        buffer[at..filled].fill(byte);
                    }
                    Act::Cut | Act::Stall => bytes = at,
                }
            }
            let sent = to.write_all(&buffer[..bytes]);
            if let Some(index) = index(lane) {
                self.counts[index][way as usize].fetch_add(bytes as u64, Ordering::Relaxed);
            }
            passed += bytes as u64;
            match trap.map(|trap| trap.act) {
                Some(Act::Cut) => {
                    let _ = from.shutdown(Shutdown::Both);
                    let _ = to.shutdown(Shutdown::Both);
                    return;
                }
                Some(Act::Stall) => self.state.lock().unwrap().stalled = true,
                _ => {}
            }
            if sent.is_err() {
                let _ = from.shutdown(Shutdown::Both);
                return;
            }
            let read = from.read(&mut buffer);
            let state = self.state.lock().unwrap();
            if state.stalled {
                // The end of a connection does not pass either.
                drop(self.changed.wait_while(state, |state| !state.closing));
                return;
            }
            drop(state);
            match read {
                Ok(0) | Err(_) => {
                    let _ = to.shutdown(Shutdown::Write);
                    return;
                }
                Ok(read) => {
                    filled = read;
                    if let Some(byte) = garbage {
                        buffer[..filled].fill(byte);
                    }
                }
            }
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let pumps = {
            let mut state = self.shared.state.lock().unwrap();
            state.closing = true;
            for socket in &state.sockets {
                let _ = socket.shutdown(Shutdown::Both);
            }
            std::mem::take(&mut state.pumps)
        };
        self.shared.changed.notify_all();
        // Wakes the one that accepts, which then leaves.
        let _ = TcpStream::connect(self.address);
        for thread in self.accepting.take().into_iter().chain(pumps) {
            let _ = thread.join();
        }
    }
}
