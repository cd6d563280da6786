//! Servers of others.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use memferry::backend::nbd::NbdUrl;
use rustix::event::{Timespec, poll};
use rustix::process::{Pid, Signal};

/// How long a server may take until it listens.
const START: Duration = Duration::from_secs(20);

/// A server that listens at a Unix socket in a folder of its own, and is ended with it.
#[derive(Debug)]
pub(crate) struct Foreign {
    folder: tempfile::TempDir,
    arguments: Vec<String>,
    child: Option<Child>,
}

impl Foreign {
    /// nbdkit, with these filters, a plugin and its parameters.
    pub(crate) fn nbdkit(arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("socket");
        let fixed = ["nbdkit", "-f", "-U"];
        let arguments = fixed
            .into_iter()
            .chain([socket.to_str().unwrap()])
            .chain(arguments.iter().copied())
            .map(str::to_owned)
            .collect();
        Self::start(folder, arguments)
    }

    /// qemu-nbd, of a file of so many bytes.
    pub(crate) fn qemu_nbd(len: u64, arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image");
        File::create(&image).unwrap().set_len(len).unwrap();
        let socket = folder.path().join("socket");
        let fixed = ["qemu-nbd", "-f", "raw", "-t", "-k"];
        let arguments = fixed
            .into_iter()
            .chain([socket.to_str().unwrap()])
            .chain(arguments.iter().copied())
            .chain([image.to_str().unwrap()])
            .map(str::to_owned)
            .collect();
        Self::start(folder, arguments)
    }

    fn start(folder: tempfile::TempDir, arguments: Vec<String>) -> Self {
        let mut server = Self {
            folder,
            arguments,
            child: None,
        };
        server.start_again();
        server
    }

    /// Starts it, after it was killed.
    pub(crate) fn start_again(&mut self) {
        let socket = self.socket();
        let _ = std::fs::remove_file(&socket);
        let child = Command::new(&self.arguments[0])
            .args(&self.arguments[1..])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            // It complains of clients that are cut off, which is what tests do.
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", self.arguments[0]));
        self.child = Some(child);
        let deadline = Instant::now() + START;
        while std::os::unix::net::UnixStream::connect(&socket).is_err() {
            let ended = self.child.as_mut().unwrap().try_wait().unwrap();
            assert!(ended.is_none(), "{:?} has ended: {ended:?}", self.arguments);
            assert!(
                Instant::now() < deadline,
                "{:?} does not listen",
                self.arguments
            );
            pause();
        }
    }

    /// As its host dies.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            child.wait().unwrap();
        }
    }

    /// Stops it as if its host stood still; returns when all of its threads stand.
    pub(crate) fn stop(&self) {
        self.signal(Signal::STOP);
        let child = self.child.as_ref().unwrap();
        let tasks = format!("/proc/{}/task", child.id());
        let stands = |task: std::fs::DirEntry| {
            // The state is behind the name, which is in parentheses.
            let stat = std::fs::read_to_string(task.path().join("stat")).unwrap();
            stat.rsplit_once(") ").unwrap().1.starts_with('T')
        };
        let deadline = Instant::now() + START;
        while !std::fs::read_dir(&tasks)
            .unwrap()
            .all(|task| stands(task.unwrap()))
        {
            assert!(Instant::now() < deadline, "it does not stop");
            pause();
        }
    }

    /// Lets it go on after [`stop`](Self::stop).
    pub(crate) fn go_on(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(self.child.as_ref().unwrap());
        rustix::process::kill_process(pid, signal).unwrap();
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    pub(crate) fn url(&self) -> NbdUrl {
        NbdUrl::unix(self.socket(), "").unwrap()
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Waits a moment: a server that begins to listen tells nobody.
fn pause() {
    let moment = Timespec {
        tv_sec: 0,
        tv_nsec: 5_000_000,
    };
    let _ = poll(&mut [], Some(&moment));
}
