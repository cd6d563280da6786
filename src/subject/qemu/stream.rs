//! The device state between QEMU and us: caught as QEMU sends it, fed as QEMU loads it.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::fs::MemfdFlags;
use rustix::net::SendFlags;

use super::qmp::remaining;
use super::qmp_error::is_timeout;

/// A device state is 0.3 MB, 20 MB with a graphics card. More than this is RAM that was not meant to come.
const MAX_STATE: u64 = 1 << 30;

/// How every QEMU migration stream begins.
const MAGIC: &[u8; 4] = b"QEVM";

const BLOCK: usize = 256 << 10;

/// Why the device state did not pass.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// No socket pair, memory file or thread to be had.
    #[error("cannot set up the passage for the device state")]
    SetUp(#[source] io::Error),
    /// What QEMU sends does not arrive.
    #[error("cannot receive the device state from QEMU")]
    Receive(#[source] io::Error),
    /// Too much.
    #[error(
        "the device state is larger than {MAX_STATE} bytes: does a device have memory of its own that is not a shared file?"
    )]
    TooLarge,
    /// QEMU stopped to send.
    #[error("QEMU did not send the whole device state within {waited:?}: {received} bytes came")]
    Late {
        /// How long was waited.
        waited: Duration,
        /// Bytes so far.
        received: u64,
    },
    /// The engine's side failed.
    #[error("cannot pass the device state on")]
    Sink(#[source] io::Error),
    /// The engine's side failed.
    #[error("cannot get the device state; the destination QEMU is untouched")]
    Source(#[source] io::Error),
    /// Not what QEMU sends.
    #[error("what came ({len} bytes) is no QEMU device state; the destination QEMU is untouched")]
    Foreign {
        /// Bytes that came.
        len: u64,
    },
    /// QEMU does not take it.
    #[error("cannot give the device state to QEMU")]
    Feed(#[source] io::Error),
}

/// What QEMU sends, received by a thread of its own from the first byte on so that QEMU never waits for us.
///
/// It is kept in a memory file, from which it can be read while it still grows.
#[derive(Debug)]
pub(super) struct Capture {
    ours: UnixStream,
    kept: Arc<Kept>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Kept {
    file: File,
    progress: Mutex<Progress>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Progress {
    len: u64,
    ended: bool,
    failure: Option<StreamError>,
}

impl Capture {
    /// Begins to receive; the returned end is for QEMU.
    pub(super) fn begin() -> Result<(Self, OwnedFd), StreamError> {
        let (ours, theirs) = UnixStream::pair().map_err(StreamError::SetUp)?;
        let kept = Arc::new(Kept {
            file: memory_file().map_err(StreamError::SetUp)?,
            progress: Mutex::default(),
            changed: Condvar::new(),
        });
        let thread = std::thread::Builder::new()
            .name("qemu-state".into())
            .spawn({
                let kept = Arc::clone(&kept);
                let ours = ours.try_clone().map_err(StreamError::SetUp)?;
                move || kept.receive(ours)
            })
            .map_err(StreamError::SetUp)?;
        let capture = Self {
            ours,
            kept,
            thread: Some(thread),
        };
        Ok((capture, theirs.into()))
    }

    /// Writes everything to `sink`, from the first byte to the end, as it comes; tells how much it was.
    pub(super) fn copy_to(
        &self,
        sink: &mut dyn Write,
        deadline: Instant,
    ) -> Result<u64, StreamError> {
        let began = Instant::now();
        let mut block = vec![0; BLOCK];
        let mut sent = 0;
        loop {
            let len = {
                let mut progress = self.kept.lock();
                loop {
                    if let Some(failure) = progress.failure.take() {
                        return Err(failure);
                    }
                    if progress.len > sent {
                        break progress.len;
                    }
                    if progress.ended {
                        return Ok(sent);
                    }
                    let Ok(left) = remaining(deadline) else {
                        return Err(StreamError::Late {
                            waited: began.elapsed(),
                            received: progress.len,
                        });
                    };
                    let waited = self.kept.changed.wait_timeout(progress, left);
                    progress = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
            };
            while sent < len {
                let count = usize::try_from(len - sent).map_or(BLOCK, |left| left.min(BLOCK));
                self.kept
                    .file
                    .read_exact_at(&mut block[..count], sent)
                    .map_err(StreamError::Receive)?;
                sink.write_all(&block[..count]).map_err(StreamError::Sink)?;
                sent += count as u64;
            }
        }
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        let _ = self.ours.shutdown(Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Kept {
    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn receive(&self, mut from: UnixStream) {
        let mut block = vec![0; BLOCK];
        let mut len = 0;
        let end = loop {
            match from.read(&mut block) {
                Ok(0) => break None,
                Ok(count) => {
                    if len + count as u64 > MAX_STATE {
                        break Some(StreamError::TooLarge);
                    }
                    if let Err(error) = self.file.write_all_at(&block[..count], len) {
                        break Some(StreamError::Receive(error));
                    }
                    len += count as u64;
                    self.lock().len = len;
                    self.changed.notify_all();
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => break Some(StreamError::Receive(error)),
            }
        };
        // QEMU must learn that nobody reads on.
        let _ = from.shutdown(Shutdown::Both);
        let mut progress = self.lock();
        progress.ended = true;
        progress.failure = end;
        drop(progress);
        self.changed.notify_all();
    }
}

/// A device state that is here as a whole, ready to be loaded.
///
/// QEMU 7.2 exits when a stream breaks off. So nothing is given to it before everything has come: a connection that is lost
/// on the way costs nothing then.
#[derive(Debug)]
pub(super) struct Spooled {
    file: File,
    len: u64,
}

impl Spooled {
    pub(super) fn read(state: &mut dyn Read) -> Result<Self, StreamError> {
        let mut file = memory_file().map_err(StreamError::SetUp)?;
        let mut limited = state.take(MAX_STATE + 1);
        let mut block = vec![0; BLOCK];
        let mut len = 0;
        loop {
            let count = match limited.read(&mut block) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(StreamError::Source(error)),
            };
            file.write_all(&block[..count])
                .map_err(StreamError::SetUp)?;
            len += count as u64;
        }
        if len > MAX_STATE {
            return Err(StreamError::TooLarge);
        }
        let mut head = [0; MAGIC.len()];
        if file.read_exact_at(&mut head, 0).is_err() || &head != MAGIC {
            return Err(StreamError::Foreign { len });
        }
        Ok(Self { file, len })
    }

    /// Bytes of state.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Writes everything to `to` and ends it. QEMU reads as fast as its page faults are served.
    pub(super) fn feed(&self, to: &UnixStream, deadline: Instant) -> Result<(), StreamError> {
        let mut block = vec![0; BLOCK];
        let mut position = 0;
        while position < self.len {
            let left = self.len - position;
            let count = usize::try_from(left).map_or(BLOCK, |left| left.min(BLOCK));
            self.file
                .read_exact_at(&mut block[..count], position)
                .map_err(StreamError::Feed)?;
            let mut rest = &block[..count];
            while !rest.is_empty() {
                let sent = remaining(deadline).and_then(|left| {
                    to.set_write_timeout(Some(left))?;
                    Ok(rustix::net::send(to, rest, SendFlags::NOSIGNAL)?)
                });
                match sent {
                    Ok(sent) => rest = &rest[sent..],
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(error) if is_timeout(&error) => {
                        return Err(StreamError::Feed(ErrorKind::TimedOut.into()));
                    }
                    Err(error) => return Err(StreamError::Feed(error)),
                }
            }
            position += count as u64;
        }
        to.shutdown(Shutdown::Write).map_err(StreamError::Feed)
    }
}

/// Memory that no name leads to and that the kernel may swap out.
fn memory_file() -> io::Result<File> {
    let fd = rustix::fs::memfd_create("qemu-state", MemfdFlags::CLOEXEC)?;
    Ok(File::from(fd))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(5)
    }

    #[test]
    fn what_was_sent_before_anybody_asked_is_not_lost() {
        let (capture, theirs) = Capture::begin().unwrap();
        let mut theirs = UnixStream::from(theirs);
        theirs.write_all(b"QEVM and ").unwrap();
        theirs.write_all(b"the rest").unwrap();
        drop(theirs);
        let mut sink = Vec::new();
        assert_eq!(capture.copy_to(&mut sink, soon()).unwrap(), 17);
        assert_eq!(sink, b"QEVM and the rest");
    }

    #[test]
    fn a_sender_that_stops_is_told_at_the_deadline() {
        let (capture, theirs) = Capture::begin().unwrap();
        let deadline = Instant::now() + Duration::from_millis(20);
        let error = capture.copy_to(&mut io::sink(), deadline).unwrap_err();
        assert!(matches!(error, StreamError::Late { received: 0, .. }));
        drop(theirs);
    }

    #[test]
    fn a_capture_that_is_dropped_ends_the_sender() {
        let (capture, theirs) = Capture::begin().unwrap();
        drop(capture);
        let mut theirs = UnixStream::from(theirs);
        assert_eq!(
            theirs.write(b"x").unwrap_err().kind(),
            ErrorKind::BrokenPipe
        );
    }

    #[test]
    fn a_state_of_something_else_is_refused_before_qemu_sees_it() {
        let error = Spooled::read(&mut &b"LIBV"[..]).unwrap_err();
        assert!(matches!(error, StreamError::Foreign { len: 4 }));
    }

    #[test]
    fn a_source_that_fails_is_told() {
        struct Broken;
        impl Read for Broken {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(ErrorKind::ConnectionReset.into())
            }
        }
        let error = Spooled::read(&mut Broken).unwrap_err();
        assert!(matches!(error, StreamError::Source(_)));
    }
}
