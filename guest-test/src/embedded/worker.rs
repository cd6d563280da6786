//! The process that works, and the handle on it: a line of JSON for each request and answer.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use memferry::subject::{Description, Incoming, Outgoing, SubjectError};
use memferry::sys::mapping::Mapping;
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

const PAGE: u64 = 4096;

/// How long an answer may take that needs no work.
const SOON: Duration = Duration::from_secs(10);

/// Pages written, and pages checked, in each tick of a millisecond.
const WRITES: u64 = 16;
const CHECKS: u64 = 64;

#[derive(Debug, Serialize, Deserialize)]
enum Request {
    Fill,
    Run,
    Suspend,
    Save,
    Load(State),
    Status,
}

#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    Done,
    State(State),
    Status(Status),
    Failed(String),
}

/// All of the workload that is not in its memory.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct State {
    /// How often each page was written; its bytes follow from this and its number.
    versions: Vec<u32>,
    ticks: u64,
    checked: u64,
    errors: u64,
    random: u64,
    /// `CLOCK_MONOTONIC` at the last tick.
    last_tick_nanos: u64,
}

/// What the workload says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Whether it works.
    pub running: bool,
    /// How often it has worked, in its whole life.
    pub ticks: u64,
    /// How many pages it has checked.
    pub checked: u64,
    /// How many of them were wrong.
    pub errors: u64,
    /// How many pages it has.
    pub pages: u64,
    /// From the last tick in another process to the first one in this.
    pub blackout_nanos: u64,
}

/// Works on the memory that `memory` names, as standard input says, until that ends. Does not return.
///
/// # Errors
/// If the memory cannot be mapped or the other end breaks off.
pub fn serve(memory: &str) -> Result<()> {
    let (path, len) = memory.rsplit_once(':').context("no length")?;
    let file = File::options().read(true).write(true).open(path)?;
    let mut workload = Workload {
        memory: Mapping::new(file, len.parse()?)?,
        state: State::default(),
        running: false,
        blackout_nanos: 0,
        next_check: 0,
    };
    let (sender, requests) = mpsc::channel();
    thread::spawn(move || {
        for line in io::stdin().lock().lines() {
            let Ok(line) = line else { return };
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    let tick = Duration::from_millis(1);
    loop {
        let request = if workload.running {
            requests.recv_timeout(tick)
        } else {
            requests.recv().map_err(|_| RecvTimeoutError::Disconnected)
        };
        match request {
            Ok(line) => {
                let answer = serde_json::from_str(&line)
                    .map_err(anyhow::Error::from)
                    .and_then(|request| workload.answer(request))
                    .unwrap_or_else(|error| Answer::Failed(format!("{error:#}")));
                let mut output = io::stdout().lock();
                writeln!(output, "{}", serde_json::to_string(&answer)?)?;
                output.flush()?;
            }
            Err(RecvTimeoutError::Timeout) => workload.tick()?,
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        }
    }
}

#[derive(Debug)]
struct Workload {
    memory: Mapping,
    state: State,
    running: bool,
    blackout_nanos: u64,
    next_check: u64,
}

impl Workload {
    fn answer(&mut self, request: Request) -> Result<Answer> {
        Ok(match request {
            Request::Fill => {
                let pages = self.memory.len() / PAGE;
                self.state.versions = vec![1; usize::try_from(pages)?];
                for page in 0..pages {
                    self.memory.write(page * PAGE, &content(page, 1))?;
                }
                self.state.random = 1;
                Answer::Done
            }
            Request::Run => {
                let now = now()?;
                if self.state.last_tick_nanos > 0 {
                    self.blackout_nanos = now - self.state.last_tick_nanos;
                }
                self.running = true;
                self.tick()?;
                Answer::Done
            }
            Request::Suspend => {
                self.running = false;
                Answer::Done
            }
            Request::Save => Answer::State(self.state.clone()),
            Request::Load(state) => {
                self.state = state;
                Answer::Done
            }
            Request::Status => Answer::Status(Status {
                running: self.running,
                ticks: self.state.ticks,
                checked: self.state.checked,
                errors: self.state.errors,
                pages: self.state.versions.len() as u64,
                blackout_nanos: self.blackout_nanos,
            }),
        })
    }

    /// Checks some pages in a row, and writes some at random, in one eighth of the memory.
    fn tick(&mut self) -> Result<()> {
        let pages = self.state.versions.len() as u64;
        if pages == 0 {
            bail!("nothing was filled or loaded");
        }
        for _ in 0..CHECKS {
            self.check(self.next_check)?;
            self.next_check = (self.next_check + 1) % pages;
        }
        for _ in 0..WRITES {
            // Knuth's constants; the high bits are the random ones.
            self.state.random = self
                .state
                .random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let page = (self.state.random >> 33) % (pages / 8).max(1);
            // Loads it, as most programs that write a page do, so that it is here before it is written.
            self.check(page)?;
            let version = &mut self.state.versions[usize::try_from(page)?];
            *version += 1;
            let bytes = content(page, *version);
            self.memory.write(page * PAGE, &bytes)?;
        }
        self.state.ticks += 1;
        self.state.last_tick_nanos = now()?;
        Ok(())
    }

    fn check(&mut self, page: u64) -> Result<()> {
        let version = self.state.versions[usize::try_from(page)?];
        let expected = digest(&content(page, version))?;
        let found = self.memory.digest(page * PAGE..(page + 1) * PAGE)?;
        self.state.checked += 1;
        self.state.errors += u64::from(found != expected);
        Ok(())
    }
}

/// The digest that a mapping gives for a page with these bytes: through a mapping, so that both are of one kind.
fn digest(bytes: &[u8]) -> Result<u64> {
    thread_local! {
        static SCRATCH: Mapping = Mapping::anonymous(PAGE).expect("a page of memory");
    }
    SCRATCH.with(|scratch| {
        scratch.write(0, bytes)?;
        Ok(scratch.digest(0..PAGE)?)
    })
}

/// The bytes of a page in a version.
fn content(page: u64, version: u32) -> Vec<u8> {
    let mut word = page << 32 | u64::from(version);
    (0..PAGE / 8)
        .flat_map(|_| {
            word = word
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(page | 1);
            word.to_le_bytes()
        })
        .collect()
}

fn now() -> Result<u64> {
    let now = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec)?;
    Ok(seconds * 1_000_000_000 + u64::try_from(now.tv_nsec)?)
}

/// A process that works; ended when dropped.
#[derive(Debug)]
pub struct Worker {
    process: Child,
    input: ChildStdin,
    answers: Receiver<String>,
    suspended: bool,
}

impl Worker {
    /// Starts `program`, which has to call [`serve`].
    ///
    /// # Errors
    /// If it does not start.
    pub fn start(program: &mut Command) -> Result<Self> {
        let mut process = program
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start the workload")?;
        let input = process.stdin.take().context("a pipe was asked for")?;
        let output = process.stdout.take().context("a pipe was asked for")?;
        let (sender, answers) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let mut worker = Self {
            process,
            input,
            answers,
            suspended: false,
        };
        // It answers when it has mapped its memory.
        worker.status()?;
        Ok(worker)
    }

    /// Its pid.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Fills its memory with data that does not compress.
    ///
    /// # Errors
    /// If it has not by `deadline`.
    pub fn fill(&mut self, deadline: Instant) -> Result<()> {
        self.ask(&Request::Fill, deadline).map(drop)
    }

    /// Lets it work.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn run(&mut self) -> Result<()> {
        self.ask(&Request::Run, Instant::now() + SOON).map(drop)
    }

    /// Asks how it is.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn status(&mut self) -> Result<Status> {
        match self.ask(&Request::Status, Instant::now() + SOON)? {
            Answer::Status(status) => Ok(status),
            other => bail!("no status: {other:?}"),
        }
    }

    /// Waits until it has checked each of its pages again.
    ///
    /// # Errors
    /// If it has not by `deadline`.
    pub fn await_clean_pass(&mut self, deadline: Instant) -> Result<Status> {
        let first = self.status()?;
        loop {
            let status = self.status()?;
            // Each tick checks more pages than it writes, in a row.
            let rows = (status.checked - first.checked) * CHECKS / (CHECKS + WRITES);
            if rows > status.pages {
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!("the workload did not check its memory in time: {status:?}");
            }
            thread::park_timeout(Duration::from_millis(20));
        }
    }

    fn ask(&mut self, request: &Request, deadline: Instant) -> Result<Answer> {
        writeln!(self.input, "{}", serde_json::to_string(request)?)?;
        self.input.flush()?;
        let left = deadline.saturating_duration_since(Instant::now());
        let line = self
            .answers
            .recv_timeout(left)
            .map_err(|_| anyhow!("the workload does not answer"))?;
        match serde_json::from_str(&line)? {
            Answer::Failed(reason) => bail!("the workload failed: {reason}"),
            answer => Ok(answer),
        }
    }

    fn order(&mut self, request: &Request, deadline: Instant) -> Result<Answer, SubjectError> {
        self.ask(request, deadline)
            .map_err(|error| SubjectError::because("the workload does not obey", error))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

const KIND: &str = "embedded";

impl Outgoing for Worker {
    fn describe(&self) -> Description {
        Description {
            kind: KIND.into(),
            attributes: Vec::new(),
        }
    }

    fn suspend(&mut self, deadline: Instant) -> Result<(), SubjectError> {
        self.suspended = true;
        self.order(&Request::Suspend, deadline).map(drop)
    }

    fn save(&mut self, sink: &mut dyn Write, deadline: Instant) -> Result<(), SubjectError> {
        let answer = self.order(&Request::Save, deadline)?;
        let Answer::State(state) = answer else {
            return Err(SubjectError::new("the workload did not tell its state"));
        };
        serde_json::to_writer(sink, &state)
            .map_err(|error| SubjectError::because("the workload's state cannot be sent", error))
    }

    fn resume(&mut self, deadline: Instant) -> Result<(), SubjectError> {
        if std::mem::take(&mut self.suspended) {
            self.order(&Request::Run, deadline)?;
        }
        Ok(())
    }

    fn release(&mut self) {
        self.suspended = false;
    }
}

impl Incoming for Worker {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn accept(&self, _: &Description) -> Result<(), SubjectError> {
        Ok(())
    }

    fn load(
        &mut self,
        state: &mut (dyn Read + Send),
        deadline: Instant,
    ) -> Result<(), SubjectError> {
        let state = serde_json::from_reader(state)
            .map_err(|error| SubjectError::because("the workload's state is damaged", error))?;
        self.order(&Request::Load(state), deadline).map(drop)
    }

    fn resume(&mut self, deadline: Instant) -> Result<(), SubjectError> {
        self.order(&Request::Run, deadline).map(drop)
    }
}
