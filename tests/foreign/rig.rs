//! A server, and commands that are its clients.

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use memferry::backend::{FileStorage, MemoryStorage};
use memferry::chunk::{ChunkSize, Storage};
use memferry::dirty::{DirtyTracker, Tracked};
use memferry::frontend::nbd::{Event, Export, Listener, Server, ServerOptions, Tls};
use tempfile::TempDir;

/// No client takes longer.
const SOON: Duration = Duration::from_secs(60);

pub(crate) struct Rig {
    pub(crate) server: Server,
    pub(crate) storage: Arc<Tracked>,
    pub(crate) folder: TempDir,
}

impl Rig {
    /// Serves `len` bytes of memory as `disk`, with TLS as is said, at a socket of its own. Tracking has begun.
    pub(crate) fn new(len: u64, tls: Tls) -> Self {
        Self::over(Arc::new(MemoryStorage::new(len)), tls)
    }

    /// Serves `len` bytes of an ordinary file, which workers read and write.
    pub(crate) fn with_file(len: u64) -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len).unwrap();
        Self::over(Arc::new(FileStorage::new(file).unwrap()), Tls::Off)
    }

    fn over(storage: Arc<dyn Storage>, tls: Tls) -> Self {
        let storage = Arc::new(Tracked::new(storage, ChunkSize::new(4096).unwrap()));
        storage.start().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let server = Server::new(ServerOptions {
            tls,
            on_event: Some(Arc::new(|event| match event {
                Event::Closed { error: Some(_), .. } | Event::TurnedAway { .. } => {
                    println!("{event:?}");
                }
                _ => {}
            })),
            ..ServerOptions::default()
        });
        let (bytes, marks) = (Arc::clone(&storage) as _, Arc::clone(&storage) as _);
        let export = Export::new("disk", bytes).unwrap().with_marks(marks);
        let export = export.with_description("a disk of memory").unwrap();
        server.add(export).unwrap();
        let rig = Self {
            server,
            storage,
            folder,
        };
        let listener = UnixListener::bind(rig.socket()).unwrap();
        rig.server.listen(Listener::Unix(listener)).unwrap();
        rig
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    pub(crate) fn url(&self) -> String {
        self.url_of("disk")
    }

    pub(crate) fn url_of(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket().display())
    }

    /// A file that goes away with the rig.
    pub(crate) fn file(&self, name: &str, bytes: &[u8]) -> String {
        let path = self.folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.display().to_string()
    }

    /// All bytes of the storage.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(self.storage.len()).unwrap()];
        self.storage.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    /// Waits for all clients to be gone, as they are when their programs have ended.
    pub(crate) fn is_left(&self) {
        let end = Instant::now() + SOON;
        while self.server.clients() > 0 {
            assert!(Instant::now() < end, "a client is still there");
            std::thread::yield_now();
        }
    }
}

/// What a program said, and whether it was content.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) success: bool,
    pub(crate) out: String,
    pub(crate) err: String,
}

/// Runs a program to its end, which is near.
pub(crate) fn run(program: &str, arguments: &[&str]) -> Said {
    let folder = tempfile::tempdir().unwrap();
    let [out, err] = ["out", "err"].map(|name| folder.path().join(name));
    let file = |path: &Path| Stdio::from(std::fs::File::create(path).unwrap());
    let mut child = Command::new(program)
        .args(arguments)
        .current_dir(folder.path())
        .stdin(Stdio::null())
        .stdout(file(&out))
        .stderr(file(&err))
        .spawn()
        .unwrap_or_else(|error| panic!("{program}: {error}; main.rs names the package"));
    let end = Instant::now() + SOON;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break Some(status);
        }
        if Instant::now() > end {
            child.kill().unwrap();
            child.wait().unwrap();
            break None;
        }
        std::thread::park_timeout(Duration::from_millis(2));
    };
    let read = |path: &Path| String::from_utf8_lossy(&std::fs::read(path).unwrap()).into_owned();
    let said = Said {
        success: status.is_some_and(|status| status.success()),
        out: read(&out),
        err: read(&err),
    };
    assert!(status.is_some(), "{program} hangs: {said:?}");
    said
}

/// Runs a program that is content.
pub(crate) fn good(program: &str, arguments: &[&str]) -> String {
    let said = run(program, arguments);
    assert!(
        said.success,
        "{program} {arguments:?}: {}{}",
        said.out, said.err
    );
    said.out
}

/// Bytes that no compression and no pattern makes small; the same each time.
pub(crate) fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}
