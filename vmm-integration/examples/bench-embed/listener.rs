//! Who reads the console of a guest, wherever it runs, and notices when it is silent.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use guest_test::tiny::report::Logbook;
use tempfile::TempDir;

use crate::blackout::vmm;

/// Longer than a guest is ever silent.
const LONG: Duration = Duration::from_secs(60);

/// One pipe that all machines print into: the lines of a guest come out of it in order, each when it was printed.
#[derive(Debug)]
pub(crate) struct Listener {
    lines: Receiver<(Instant, String)>,
    book: Logbook,
    heard: Option<Instant>,
    path: PathBuf,
    _place: TempDir,
}

impl Listener {
    pub(crate) fn new() -> Self {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("console");
        let pipe = vmm::pipe_at(&path);
        let (tell, lines) = mpsc::channel();
        // It ends with this program: nobody else can end what waits for a line.
        thread::spawn(move || {
            for line in BufReader::new(pipe).lines() {
                let told = tell.send((Instant::now(), line.unwrap()));
                if told.is_err() {
                    return;
                }
            }
        });
        Self {
            lines,
            book: Logbook::default(),
            heard: None,
            path,
            _place: place,
        }
    }

    /// Where machines print.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Reads on until `count` more lines came; how long it was silent before each.
    pub(crate) fn hear(&mut self, count: usize) -> Vec<Duration> {
        (0..count).filter_map(|_| self.next()).collect()
    }

    /// Reads what has come already; the same.
    pub(crate) fn catch_up(&mut self) -> Vec<Duration> {
        let mut silences = Vec::new();
        while let Ok((at, line)) = self.lines.try_recv() {
            silences.extend(self.note(at, &line));
        }
        silences
    }

    fn next(&mut self) -> Option<Duration> {
        let (at, line) = self.lines.recv_timeout(LONG).expect("the guest runs");
        self.note(at, &line)
    }

    fn note(&mut self, at: Instant, line: &str) -> Option<Duration> {
        self.book.read(format!("{line}\n").as_bytes()).unwrap();
        let before = self.heard.replace(at)?;
        Some(at - before)
    }
}
