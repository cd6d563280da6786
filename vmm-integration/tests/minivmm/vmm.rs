//! A minivmm in a process of its own, and what one can ask it.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use guest_test::tiny::report::Logbook;
use guest_test::tiny::{self, TinyGuest};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Longer than anything here takes, on a busy machine.
pub(crate) const LONG: Duration = Duration::from_secs(60);

/// The program: cargo tells tests where it is, and nobody else.
pub(crate) static PROGRAM: OnceLock<PathBuf> = OnceLock::new();

/// A machine's shape.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) cpus: u64,
    pub(crate) memory: &'static str,
    pub(crate) tracker: &'static str,
    /// Bytes of memory, from 64 MiB on, that hold something from the start.
    pub(crate) filled: usize,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            cpus: 1,
            memory: "32M",
            tracker: "log",
            filled: 0,
        }
    }
}

impl Shape {
    fn arguments(&self) -> Vec<OsString> {
        let cpus = self.cpus.to_string();
        [
            "--cpus",
            &cpus,
            "--memory",
            self.memory,
            "--tracker",
            self.tracker,
        ]
        .map(OsString::from)
        .to_vec()
    }
}

/// A program and, far behind it, so many bytes that are all different pages.
fn filled(mut image: Vec<u8>, bytes: usize) -> Vec<u8> {
    if bytes > 0 {
        image.resize(63 << 20, 0);
        let words = 0x9e37_79b9_7f4a_7c15_u64..;
        let words = words
            .take(bytes / 8)
            .map(|word| word.wrapping_mul(word).to_le_bytes());
        image.extend(words.flatten());
    }
    image
}

/// A running minivmm. Killed on drop.
#[derive(Debug)]
pub(crate) struct Vmm {
    child: Child,
    place: TempDir,
    /// How much of the console has been read.
    read: u64,
}

impl Vmm {
    /// The command, for who runs it otherwise than as a machine.
    pub(crate) fn command() -> Command {
        Command::new(PROGRAM.get_or_init(|| {
            let told = option_env!("CARGO_BIN_EXE_minivmm");
            told.expect("who is no test of this package sets it").into()
        }))
    }

    /// Boots a tiny guest that prints a line every so many ticks.
    pub(crate) fn boot(shape: Shape, guest: TinyGuest, every: u64) -> Self {
        Self::boot_in(shape, guest, every, Self::command(), &[])
    }

    /// The same, where `command` runs it, and with more arguments.
    pub(crate) fn boot_in(
        shape: Shape,
        guest: TinyGuest,
        every: u64,
        mut command: Command,
        more: &[&str],
    ) -> Self {
        let place = tempfile::tempdir().unwrap();
        let image = place.path().join("image");
        std::fs::write(&image, filled(tiny::image().to_vec(), shape.filled)).unwrap();
        let words: Vec<String> = guest.words(every).iter().map(u64::to_string).collect();
        command.arg("boot").args(shape.arguments()).args(more);
        command.arg("--flat").arg(image);
        command.args(["--words", &words.join(",")]);
        Self::start(command, place)
    }

    /// A machine that waits for a guest.
    pub(crate) fn awaiting(shape: Shape) -> Self {
        Self::awaiting_in(shape, Self::command(), &[])
    }

    /// The same, where `command` runs it, and with more arguments.
    pub(crate) fn awaiting_in(shape: Shape, mut command: Command, more: &[&str]) -> Self {
        command.arg("await").args(shape.arguments()).args(more);
        Self::start(command, tempfile::tempdir().unwrap())
    }

    fn start(mut command: Command, place: TempDir) -> Self {
        let socket = place.path().join("control");
        if !command.get_args().any(|argument| argument == "--console") {
            let console = place.path().join("console");
            File::create(&console).unwrap();
            command.arg("--console").arg(console);
        }
        command.arg("--control").arg(&socket);
        let child = command.stdin(Stdio::null()).spawn().unwrap();
        let vmm = Self {
            child,
            place,
            read: 0,
        };
        until("the control socket answers", || {
            UnixStream::connect(&socket).is_ok()
        });
        vmm
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.place.path().join("control")
    }

    /// Asks, and waits for the end of the answer.
    pub(crate) fn ask(&self, request: &Value) -> Result<Value, String> {
        Question::new(&self.socket(), request).end(|_| {})
    }

    pub(crate) fn status(&self) -> Value {
        self.ask(&json!({"do": "status"})).unwrap()
    }

    pub(crate) fn stage(&self) -> String {
        self.status()["stage"].as_str().unwrap().to_owned()
    }

    /// Has it wait for a guest; what the source needs, and the answer that is still to end.
    pub(crate) fn receive(&self, listen: &str) -> (String, Question) {
        self.receive_as(&json!({"do": "receive", "listen": listen}))
    }

    /// The same, with more in the request.
    pub(crate) fn receive_as(&self, request: &Value) -> (String, Question) {
        let mut question = Question::new(&self.socket(), request);
        let news = question.next();
        let pairing = news["news"]["pairing"].as_str();
        let pairing = pairing.unwrap_or_else(|| panic!("{news}")).to_owned();
        (pairing, question)
    }

    /// Has it send its guest.
    pub(crate) fn migrate(&self, pairing: &str, plan: &Value) -> Question {
        let request = json!({"do": "migrate", "pairing": pairing, "plan": plan});
        Question::new(&self.socket(), &request)
    }

    /// Reads what its guest has printed since it was last read, into `book`.
    pub(crate) fn read_console(&mut self, book: &mut Logbook) {
        let mut file = File::open(self.place.path().join("console")).unwrap();
        file.seek(SeekFrom::Start(self.read)).unwrap();
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        self.read += bytes.len() as u64;
        if let Err(wrong) = book.read(&bytes) {
            panic!("{wrong}\n{}", String::from_utf8_lossy(&bytes));
        }
    }

    /// Reads on until `enough`.
    pub(crate) fn read_until(
        &mut self,
        book: &mut Logbook,
        what: &str,
        enough: impl Fn(&Logbook) -> bool,
    ) {
        until(what, || {
            self.read_console(book);
            enough(book)
        });
    }

    /// Kills it, as though its host had failed.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits for its end.
    pub(crate) fn wait(mut self) -> ExitStatus {
        let mut status = None;
        until("it ends", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A request whose answer is not over.
#[derive(Debug)]
pub(crate) struct Question(BufReader<UnixStream>);

impl Question {
    pub(crate) fn new(socket: &Path, request: &Value) -> Self {
        let mut stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        writeln!(stream, "{request}").unwrap();
        Self(BufReader::new(stream))
    }

    /// The next line of the answer.
    pub(crate) fn next(&mut self) -> Value {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"))
    }

    /// Reads the answer to its end, and tells `news` of what comes before.
    pub(crate) fn end(mut self, mut news: impl FnMut(&Value)) -> Result<Value, String> {
        loop {
            let line = self.next();
            if let Some(done) = line.get("done") {
                return Ok(done.clone());
            }
            if let Some(failed) = line.get("failed") {
                return Err(failed.as_str().unwrap().to_owned());
            }
            news(&line["news"]);
        }
    }
}

/// A pipe that a machine may print into. Both ends are opened, so that neither opening it waits for somebody, nor does it end while nobody prints.
pub(crate) fn pipe_at(path: &Path) -> File {
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    let kind = rustix::fs::FileType::Fifo;
    rustix::fs::mknodat(rustix::fs::CWD, path, kind, mode, 0).unwrap();
    File::options().read(true).write(true).open(path).unwrap()
}

/// Waits for `done`, looking again and again.
pub(crate) fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + LONG;
    while !done() {
        assert!(Instant::now() < deadline, "in vain: {what}");
        thread::park_timeout(Duration::from_millis(2));
    }
}

/// Moves the guest; what both ends report.
pub(crate) fn migrate(source: &Vmm, destination: &Vmm, plan: &Value) -> (Value, Value) {
    let (pairing, receiving) = destination.receive("127.0.0.1:0");
    let sent = source.migrate(&pairing, plan).end(|_| {});
    let received = receiving.end(|_| {});
    match (sent, received) {
        (Ok(sent), Ok(received)) => (sent, received),
        (sent, received) => panic!("source: {sent:?}\ndestination: {received:?}"),
    }
}
