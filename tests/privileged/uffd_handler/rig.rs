//! `memferry uffd-handler`, a peer that has the memory, and a link between them.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use serde_json::Value;
use tempfile::TempDir;

use super::stand_in::write_memory;
use crate::victim::{PATIENCE, wait_until};

/// A program of ours with events. Killed on drop.
pub(super) struct Program {
    child: Child,
    events: Receiver<Value>,
}

impl Program {
    fn start(arguments: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_memferry"))
            .args(arguments)
            .arg("--json")
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let (sender, events) = mpsc::channel();
        thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if sender.send(serde_json::from_str(&line).unwrap()).is_err() {
                    return;
                }
            }
        });
        Self { child, events }
    }

    /// The next event of that name.
    pub(super) fn event(&self, name: &str) -> Value {
        let until = Instant::now() + PATIENCE;
        let mut others = Vec::new();
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match self.events.recv_timeout(left) {
                Ok(event) if event["event"] == name => return event,
                Ok(event) => others.push(event),
                Err(_) => panic!("no {name} in time, but {others:?}"),
            }
        }
    }

    pub(super) fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Its exit code, once it has ended.
    pub(super) fn end(&mut self) -> Option<i32> {
        let mut ended = None;
        wait_until("the program ends", || {
            ended = self.child.try_wait().unwrap();
            ended.is_some()
        });
        ended.unwrap().code()
    }

    /// Panics unless it ends with that code; what it says of it.
    pub(super) fn ends_with(&mut self, code: i32) -> String {
        let words = match code {
            0 => String::new(),
            _ => self.event("error")["message"].as_str().unwrap().to_owned(),
        };
        assert_eq!(self.end(), Some(code), "{words}");
        words
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A folder with the memory of a snapshot.
pub(super) struct Rig {
    folder: TempDir,
}

impl Rig {
    pub(super) fn new(pages: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        write_memory(&folder.path().join("vm.mem"), pages);
        Self { folder }
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(super) fn memory(&self) -> String {
        self.path("vm.mem").display().to_string()
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.path("uffd.sock")
    }

    /// A handler that waits for its VMM.
    pub(super) fn handler(&self, from: &str, more: &[&str]) -> Program {
        let socket = self.socket().display().to_string();
        let arguments = ["uffd-handler", "--socket", &socket, from];
        let handler = Program::start(&[&arguments, more].concat());
        handler.event("listening");
        handler
    }

    /// A peer that has the memory, and its address.
    pub(super) fn peer(&self, listen: &str) -> (Program, SocketAddr) {
        let peer = Program::start(&["serve", "--read-only", "--listen", listen, &self.memory()]);
        let serving = peer.event("serving");
        let url = serving["url"].as_str().unwrap();
        let address = url.trim_start_matches("nbd://").trim_end_matches('/');
        let address = address.parse().unwrap();
        (peer, address)
    }
}

/// A network that takes its time.
pub(super) struct Link {
    pub(super) address: SocketAddr,
    sockets: Arc<Mutex<Vec<TcpStream>>>,
    stalled: Arc<AtomicBool>,
}

impl Link {
    /// To `peer`, with so much delay each way.
    pub(super) fn to(peer: SocketAddr, delay: Duration) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let sockets: Arc<Mutex<Vec<TcpStream>>> = Arc::default();
        let all = Arc::clone(&sockets);
        let stalled = Arc::new(AtomicBool::new(false));
        let stops = Arc::clone(&stalled);
        thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                let Ok(far) = TcpStream::connect(peer) else {
                    continue;
                };
                for socket in [&near, &far] {
                    socket.set_nodelay(true).unwrap();
                    all.lock().unwrap().push(socket.try_clone().unwrap());
                }
                let (back, forth) = (near.try_clone().unwrap(), far.try_clone().unwrap());
                carry(back, forth, delay, Arc::clone(&stops));
                carry(far, near, delay, Arc::clone(&stops));
            }
        });
        Self {
            address,
            sockets,
            stalled,
        }
    }

    /// Nothing passes any more, and nobody is told.
    pub(super) fn stall(&self) {
        self.stalled.store(true, Ordering::Release);
    }

    pub(super) fn url(&self) -> String {
        format!("nbd://{}", self.address)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        for socket in self.sockets.lock().unwrap().drain(..) {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

/// Passes bytes on, each as long after it came.
fn carry(mut from: TcpStream, mut to: TcpStream, delay: Duration, stalled: Arc<AtomicBool>) {
    let (sender, waiting) = mpsc::channel::<(Instant, Vec<u8>)>();
    thread::spawn(move || {
        let mut buffer = vec![0; 256 << 10];
        while let Ok(len @ 1..) = from.read(&mut buffer) {
            let due = Instant::now() + delay;
            if sender.send((due, buffer[..len].to_vec())).is_err() {
                return;
            }
        }
    });
    thread::spawn(move || {
        for (due, bytes) in waiting {
            let left = due.saturating_duration_since(Instant::now());
            let left = rustix::event::Timespec::try_from(left).unwrap();
            let _ = rustix::event::poll(&mut [], Some(&left));
            if stalled.load(Ordering::Acquire) {
                continue;
            }
            if to.write_all(&bytes).is_err() {
                return;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    });
}

/// Whether something is at `path`.
pub(super) fn is_there(path: &Path) -> bool {
    match std::fs::symlink_metadata(path) {
        Ok(_) => true,
        Err(error) => {
            assert_eq!(error.kind(), io::ErrorKind::NotFound);
            false
        }
    }
}
