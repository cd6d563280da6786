//! A QMP connection: commands with deadlines, and the events that arrive meanwhile.
//!
//! Single-threaded and blocking. QEMU serves one client per QMP socket at a time and leaves a second one waiting
//! without a word.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType,
};
use serde_json::{Value, json};

use super::qmp_codec::{Decoder, Event, Message, Version, encode};
use super::qmp_error::{QmpError, is_timeout};

/// Events beyond this many are dropped, oldest first: nobody waits for one that old.
const MAX_EVENTS: usize = 4096;

/// A QMP connection past its greeting and negotiation.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    path: PathBuf,
    decoder: Decoder,
    version: Version,
    peer_pid: Option<u32>,
    next_id: u64,
    events: VecDeque<Event>,
    /// A command was cut short or nonsense came: the stream has lost its step and only a new connection helps.
    broken: bool,
}

impl Qmp {
    /// Connects to the socket that QEMU was given with `-qmp unix:PATH,server=on,wait=off`.
    ///
    /// Blocks until QEMU has greeted and accepted the negotiation, at most until `deadline`.
    ///
    /// # Errors
    /// [`QmpError::NoGreeting`] if QEMU stays silent, which is what happens while another client is connected.
    pub fn connect(path: impl AsRef<Path>, deadline: Instant) -> Result<Self, QmpError> {
        let path = path.as_ref();
        let stream = dial(path, deadline).map_err(|source| QmpError::Connect {
            path: path.to_owned(),
            source,
        })?;
        Self::negotiate(stream, path, deadline)
    }

    /// Takes over a stream on which nothing was said yet; `path` is for messages and reconnection.
    fn negotiate(stream: UnixStream, path: &Path, deadline: Instant) -> Result<Self, QmpError> {
        let began = Instant::now();
        let peer = getsockopt(&stream, PeerCredentials).map_err(|source| QmpError::Io {
            during: "asking for the peer's process id".into(),
            source: source.into(),
        })?;
        let mut qmp = Self {
            stream,
            path: path.to_owned(),
            decoder: Decoder::default(),
            version: Version {
                major: 0,
                minor: 0,
                micro: 0,
                package: String::new(),
            },
            // The kernel says 0 for a process that is not in our PID namespace.
            peer_pid: u32::try_from(peer.pid()).ok().filter(|&pid| pid != 0),
            next_id: 1,
            events: VecDeque::new(),
            broken: false,
        };
        loop {
            match qmp.receive("waiting for the greeting", began, deadline) {
                Ok(Message::Greeting(version)) => {
                    qmp.version = version;
                    break;
                }
                // Events may be broadcast to a monitor that has not greeted yet.
                Ok(_) => {}
                Err(QmpError::Timeout { waited, .. }) => {
                    return Err(QmpError::NoGreeting {
                        path: path.to_owned(),
                        waited,
                    });
                }
                Err(error) => return Err(error),
            }
        }
        qmp.execute("qmp_capabilities", &Value::Null, deadline)?;
        Ok(qmp)
    }

    /// Connects anew to the same socket if this connection is of no use any more; else does nothing.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub fn reconnect_if_broken(&mut self, deadline: Instant) -> Result<(), QmpError> {
        if !self.broken {
            return Ok(());
        }
        // QEMU serves one client: it has to see the end of the old connection first.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
        let fresh = Self::connect(&self.path, deadline).map_err(|error| match error {
            // It was there before: nobody listens any more because QEMU has ended.
            QmpError::Connect { .. } => QmpError::Closed {
                during: "connecting again".to_owned(),
            },
            error => error,
        })?;
        let peer_pid = self.peer_pid;
        *self = Self { peer_pid, ..fresh };
        Ok(())
    }

    /// The QEMU that answers.
    #[must_use]
    pub fn version(&self) -> &Version {
        &self.version
    }

    /// The process that opened the listening socket: QEMU, unless a manager such as libvirt opened it for QEMU. `None` if
    /// that process is in a PID namespace that this one does not see.
    #[must_use]
    pub fn peer_pid(&self) -> Option<u32> {
        self.peer_pid
    }

    /// Says which process QEMU really is, where [`peer_pid`](Self::peer_pid) does not tell.
    #[must_use]
    pub fn with_peer_pid(mut self, pid: u32) -> Self {
        self.peer_pid = Some(pid);
        self
    }

    /// Where this is connected to.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs `command` with `arguments` (null for none) and returns what QEMU returned.
    ///
    /// Events that arrive meanwhile are kept for [`wait_event`](Self::wait_event).
    ///
    /// # Errors
    /// [`QmpError::Refused`] if QEMU answers with an error; the connection is fine then.
    pub fn execute(
        &mut self,
        command: &str,
        arguments: &Value,
        deadline: Instant,
    ) -> Result<Value, QmpError> {
        self.converse(command, arguments, None, deadline)
    }

    /// Gives QEMU a copy of `fd` under `name`, to be used as `fd:NAME`.
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    pub fn pass_fd(
        &mut self,
        name: &str,
        fd: BorrowedFd<'_>,
        deadline: Instant,
    ) -> Result<(), QmpError> {
        self.converse("getfd", &json!({"fdname": name}), Some(fd), deadline)?;
        Ok(())
    }

    /// The next event, already arrived or yet to come, or `None` at `deadline`.
    ///
    /// # Errors
    /// If the connection fails.
    pub fn next_event(&mut self, deadline: Instant) -> Result<Option<Event>, QmpError> {
        let began = Instant::now();
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(Some(event));
            }
            match self.receive("waiting for an event", began, deadline) {
                Ok(Message::Event(event)) => return Ok(Some(event)),
                // A late reply to a command that timed out.
                Ok(_) => {}
                Err(QmpError::Timeout { .. }) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    /// The first event that is `wanted`, already arrived or yet to come; what came before it is dropped.
    ///
    /// # Errors
    /// [`QmpError::Timeout`] at `deadline`, naming `what` was waited for.
    pub fn wait_event(
        &mut self,
        what: &str,
        mut wanted: impl FnMut(&Event) -> bool,
        deadline: Instant,
    ) -> Result<Event, QmpError> {
        let began = Instant::now();
        loop {
            match self.next_event(deadline)? {
                Some(event) if wanted(&event) => return Ok(event),
                Some(_) => {}
                None => {
                    return Err(QmpError::Timeout {
                        during: what.to_owned(),
                        waited: began.elapsed(),
                    });
                }
            }
        }
    }

    /// The events that arrived and that nobody waited for.
    pub fn drain_events(&mut self) -> Vec<Event> {
        self.events.drain(..).collect()
    }

    fn converse(
        &mut self,
        command: &str,
        arguments: &Value,
        fd: Option<BorrowedFd<'_>>,
        deadline: Instant,
    ) -> Result<Value, QmpError> {
        let began = Instant::now();
        let id = self.next_id;
        self.next_id += 1;
        self.send(command, &encode(id, command, arguments), fd, deadline)?;
        loop {
            match self.receive(command, began, deadline)? {
                Message::Return { id: of, value } if of == Some(id) => return Ok(value),
                // An error without an id is about a line QEMU could not read, and only ours is under way.
                Message::Failure {
                    id: of,
                    class,
                    desc,
                } if of.is_none_or(|of| of == id) => {
                    return Err(QmpError::Refused {
                        command: command.to_owned(),
                        class,
                        desc,
                    });
                }
                Message::Event(event) => {
                    if self.events.len() == MAX_EVENTS {
                        self.events.pop_front();
                    }
                    self.events.push_back(event);
                }
                // A late reply to a command that timed out.
                _ => {}
            }
        }
    }

    fn send(
        &mut self,
        command: &str,
        line: &[u8],
        mut fd: Option<BorrowedFd<'_>>,
        deadline: Instant,
    ) -> Result<(), QmpError> {
        self.check_usable(command)?;
        let began = Instant::now();
        let mut rest = line;
        while !rest.is_empty() {
            let sent = remaining(deadline).and_then(|left| {
                self.stream.set_write_timeout(Some(left))?;
                send_once(self.stream.as_fd(), rest, fd)
            });
            match sent {
                Ok(sent) => {
                    rest = &rest[sent..];
                    fd = None;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    // Half a command may be out; one that was not begun breaks nothing.
                    self.broken = rest.len() < line.len() || !is_timeout(&error);
                    return Err(QmpError::from_io(command, began, error));
                }
            }
        }
        Ok(())
    }

    /// Reads until a whole message is there.
    fn receive(
        &mut self,
        during: &str,
        began: Instant,
        deadline: Instant,
    ) -> Result<Message, QmpError> {
        self.check_usable(during)?;
        let mut buffer = [0; 16 << 10];
        loop {
            match self.decoder.next_message() {
                Ok(Some(message)) => return Ok(message),
                Ok(None) => {}
                Err(source) => {
                    self.broken = true;
                    return Err(QmpError::Malformed {
                        during: during.to_owned(),
                        source,
                    });
                }
            }
            let read = remaining(deadline).and_then(|left| {
                self.stream.set_read_timeout(Some(left))?;
                (&self.stream).read(&mut buffer)
            });
            match read {
                Ok(0) => {
                    self.broken = true;
                    return Err(QmpError::Closed {
                        during: during.to_owned(),
                    });
                }
                Ok(count) => self.decoder.push(&buffer[..count]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    self.broken = !is_timeout(&error);
                    return Err(QmpError::from_io(during, began, error));
                }
            }
        }
    }

    fn check_usable(&self, during: &str) -> Result<(), QmpError> {
        if self.broken {
            return Err(QmpError::Closed {
                during: during.to_owned(),
            });
        }
        Ok(())
    }
}

/// The time until `deadline`, never zero, since a zero time-out means none to a socket.
pub(super) fn remaining(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(ErrorKind::TimedOut.into());
    }
    Ok(left.max(Duration::from_micros(1)))
}

fn dial(path: &Path, deadline: Instant) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    // connect() waits as long as the send time-out says while the listener's backlog is full.
    set_socket_timeout(&socket, Timeout::Send, Some(remaining(deadline)?))?;
    rustix::net::connect(&socket, &address)?;
    Ok(UnixStream::from(socket))
}

fn send_once(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    fd: Option<BorrowedFd<'_>>,
) -> io::Result<usize> {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = fd.map(|fd| [fd]);
    if let Some(fds) = &fds {
        let fits = control.push(SendAncillaryMessage::ScmRights(fds));
        debug_assert!(fits, "the space is for one descriptor");
    }
    let sent = rustix::net::sendmsg(
        socket,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    Ok(sent)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};

    use super::super::qmp_codec::CodecError;
    use super::*;

    const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}}"#;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(5)
    }

    fn shortly() -> Instant {
        Instant::now() + Duration::from_millis(20)
    }

    /// Connects to a peer that says `greeting` and then, for every line that it reads, the next of `lines`.
    fn connect(
        greeting: &'static str,
        lines: &'static [&'static str],
        deadline: Instant,
    ) -> Result<Qmp, QmpError> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        std::thread::spawn(move || {
            let mut commands = BufReader::new(theirs.try_clone().unwrap()).lines();
            theirs.write_all(greeting.as_bytes()).unwrap();
            theirs.write_all(b"\r\n").unwrap();
            for line in lines {
                if commands.next().is_none() {
                    return;
                }
                theirs.write_all(line.as_bytes()).unwrap();
                theirs.write_all(b"\r\n").unwrap();
            }
        });
        Qmp::negotiate(ours, Path::new("/test"), deadline)
    }

    #[test]
    fn silence_is_explained_by_another_client() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let error = Qmp::negotiate(ours, Path::new("/test"), shortly()).unwrap_err();
        assert!(matches!(error, QmpError::NoGreeting { .. }));
        assert!(
            error
                .to_string()
                .contains("another one is probably connected")
        );
    }

    #[test]
    fn a_peer_of_another_protocol_is_told() {
        let error = connect("SSH-2.0-OpenSSH_9.2", &[], soon()).unwrap_err();
        let QmpError::Malformed { source, .. } = error else {
            panic!("{error}");
        };
        assert!(matches!(source, CodecError::NotJson { .. }));
    }

    #[test]
    fn a_peer_that_leaves_is_told() {
        let mut qmp = connect(GREETING, &[r#"{"return": {}, "id": 1}"#], soon()).unwrap();
        let error = qmp.execute("stop", &Value::Null, soon()).unwrap_err();
        assert!(error.is_closed(), "{error}");
    }

    #[test]
    fn a_reply_that_comes_late_is_not_taken_for_the_next_one() {
        // The peer answers `slow` only when it reads `quick`.
        let lines = &[
            r#"{"return": {}, "id": 1}"#,
            "",
            "{\"return\": \"slow\", \"id\": 2}\r\n{\"return\": \"quick\", \"id\": 3}",
        ];
        let mut qmp = connect(GREETING, lines, soon()).unwrap();
        let error = qmp.execute("slow", &Value::Null, shortly()).unwrap_err();
        assert!(matches!(error, QmpError::Timeout { .. }), "{error}");
        assert_eq!(qmp.execute("quick", &Value::Null, soon()).unwrap(), "quick");
    }

    #[test]
    fn an_event_that_came_during_a_command_is_waited_for_afterwards() {
        let lines = &[
            r#"{"return": {}, "id": 1}"#,
            "{\"event\": \"STOP\", \"timestamp\": {}}\r\n{\"return\": {}, \"id\": 2}",
        ];
        let mut qmp = connect(GREETING, lines, soon()).unwrap();
        qmp.execute("stop", &Value::Null, soon()).unwrap();
        let event = qmp.wait_event("the stop", |event| event.name == "STOP", soon());
        assert_eq!(event.unwrap().name, "STOP");
    }
}
