//! The command itself, as a child process whose words are read.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::fs::FileExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::qemu::{RAM, Vm, soon};

/// A running `memferry qemu`.
#[derive(Debug)]
pub(crate) struct Ferry {
    child: Child,
    heard: Arc<Heard>,
    listening: Vec<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Heard {
    words: Mutex<Words>,
    more: Condvar,
}

#[derive(Debug, Default)]
struct Words {
    events: Vec<Value>,
    errors: String,
    /// Standard output was closed.
    ended: bool,
}

impl Ferry {
    fn start(arguments: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_memferry"))
            .arg("qemu")
            .args(arguments)
            .args(["--json", "--peer-timeout=3s"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let heard = Arc::<Heard>::default();
        let (out, err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let told = heard.clone();
        let events = std::thread::spawn(move || {
            for line in BufReader::new(out).lines() {
                let event = serde_json::from_str(&line.unwrap()).unwrap();
                told.words.lock().unwrap().events.push(event);
                told.more.notify_all();
            }
            told.words.lock().unwrap().ended = true;
            told.more.notify_all();
        });
        let told = heard.clone();
        let errors = std::thread::spawn(move || {
            let (mut err, mut buffer) = (err, [0; 1000]);
            while let Ok(read @ 1..) = err.read(&mut buffer) {
                let words = String::from_utf8_lossy(&buffer[..read]);
                told.words.lock().unwrap().errors += &words;
                told.more.notify_all();
            }
        });
        Self {
            child,
            heard,
            listening: vec![events, errors],
        }
    }

    /// `memferry qemu receive`, waiting; and its pairing string.
    pub(crate) fn receive(vm: &mut Vm, more: &[&str]) -> (Self, String) {
        // QEMU listens.
        drop(vm.qmp());
        let socket = vm.socket();
        let ferry = Self::start(&[&["receive", "--qmp", socket.to_str().unwrap()], more].concat());
        let event = ferry.event("its pairing string", |event| event["event"] == "pairing");
        let string = event["string"].as_str().unwrap().to_owned();
        (ferry, string)
    }

    /// `memferry qemu receive` that may fail at once.
    pub(crate) fn try_receive(vm: &mut Vm, more: &[&str]) -> Self {
        drop(vm.qmp());
        let socket = vm.socket();
        Self::start(&[&["receive", "--qmp", socket.to_str().unwrap()], more].concat())
    }

    /// `memferry qemu send`.
    pub(crate) fn send(vm: &Vm, pairing: &str, more: &[&str]) -> Self {
        let socket = vm.socket();
        let arguments = ["send", "--qmp", socket.to_str().unwrap(), pairing];
        Self::start(&[&arguments, more].concat())
    }

    /// Waits for an event.
    #[track_caller]
    pub(crate) fn event(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let (words, _) = self
            .heard
            .more
            .wait_timeout_while(
                self.heard.words.lock().unwrap(),
                soon() - Instant::now(),
                |words| !words.ended && !words.events.iter().any(&wanted),
            )
            .unwrap();
        let found = words.events.iter().find(|event| wanted(event));
        found
            .unwrap_or_else(|| panic!("it has not said {what}: {words:?}"))
            .clone()
    }

    /// Waits until it is in `phase`.
    #[track_caller]
    pub(crate) fn phase(&self, phase: &str) {
        self.event(phase, |event| {
            event["event"] == "phase" && event["phase"] == phase
        });
    }

    /// Waits until it has been in `phase` for some tenths of a second.
    #[track_caller]
    pub(crate) fn well_within(&self, phase: &str) {
        self.event(phase, |event| {
            event["event"] == "update" && event["phase"] == phase
        });
    }

    /// Waits until it has said `words` on standard error.
    #[track_caller]
    pub(crate) fn says(&self, words: &str) {
        let (heard, _) = self
            .heard
            .more
            .wait_timeout_while(
                self.heard.words.lock().unwrap(),
                soon() - Instant::now(),
                |heard| !heard.errors.contains(words),
            )
            .unwrap();
        assert!(heard.errors.contains(words), "{words:?} not in {heard:?}");
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(process(self.child.id()), signal).unwrap();
    }

    /// Ends it as a crash would.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits for its end: the exit code, and what it said on standard error. A watchdog that it leaves behind is part of it.
    #[track_caller]
    pub(crate) fn end(&mut self) -> (Option<i32>, String) {
        let (code, _) = self.leaves();
        for thread in self.listening.drain(..) {
            thread.join().unwrap();
        }
        let errors = self.heard.words.lock().unwrap().errors.clone();
        (code, errors)
    }

    /// Waits for its end, but not for that of a watchdog: the exit code, and what it had said on standard error.
    #[track_caller]
    pub(crate) fn leaves(&mut self) -> (Option<i32>, String) {
        let deadline = Instant::now() + Duration::from_secs(30);
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(
                Instant::now() < deadline,
                "it does not end: {:?}",
                self.heard
            );
            std::thread::park_timeout(Duration::from_millis(2));
        };
        let errors = self.heard.words.lock().unwrap().errors.clone();
        (status.code(), errors)
    }

    /// It ends with this exit code, and says all of `words`.
    #[track_caller]
    pub(crate) fn ends(&mut self, code: i32, words: &[&str]) {
        let (ended, said) = self.end();
        assert_eq!(ended, Some(code), "{said}\n{:?}", self.heard);
        for words in words {
            assert!(said.contains(words), "{words:?} not in {said:?}");
        }
    }
}

impl Drop for Ferry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("{:?}", self.heard.words);
        }
    }
}

fn process(pid: u32) -> Pid {
    Pid::from_raw(i32::try_from(pid).unwrap()).unwrap()
}

/// Migrates at full speed.
#[track_caller]
pub(crate) fn migrate(vm: &Vm, to: &mut Vm) {
    let (mut receive, pairing) = Ferry::receive(to, &[]);
    let mut send = Ferry::send(vm, &pairing, &[]);
    send.ends(0, &[]);
    receive.ends(0, &[]);
    to.wait_until_it_counts();
    let counted = vm.count();
    to.wait_until_it_counts();
    assert_eq!(vm.count(), counted, "the source does not run any more");
}

/// How many userfaultfds a process has.
pub(crate) fn userfaultfds(vm: &Vm) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", vm.pid()))
        .unwrap()
        .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
        .filter(|link| link.as_os_str() == "anon_inode:[userfaultfd]")
        .count()
}

/// QEMU is neither traced nor stopped.
#[track_caller]
pub(crate) fn assert_free(vm: &Vm) {
    let status = std::fs::read_to_string(format!("/proc/{}/status", vm.pid())).unwrap();
    assert!(status.contains("TracerPid:\t0\n"), "{status}");
    let stopped = status.contains("State:\tT") || status.contains("State:\tt");
    assert!(!stopped, "{status}");
}

/// The guest counts on, nothing was left in QEMU, and it can be migrated to a new destination.
#[track_caller]
pub(crate) fn assert_unharmed(vm: &mut Vm) {
    vm.wait_until_it_counts();
    assert_free(vm);
    assert_eq!(userfaultfds(vm), 0);
    migrate(vm, &mut Vm::destination());
}

/// Writes pages of the guest's RAM as a device of QEMU would: through QEMU's own mapping.
pub(crate) fn write_pages(vm: &Vm, bytes: u64, value: u8) {
    let address = ram_address(vm);
    let memory = File::options()
        .write(true)
        .open(format!("/proc/{}/mem", vm.pid()))
        .unwrap();
    let block = vec![value; 1 << 20];
    for offset in (0..bytes).step_by(block.len()) {
        memory
            .write_all_at(&block, address + RAM / 2 + offset)
            .unwrap();
    }
}

/// The address in QEMU of the guest's RAM.
pub(crate) fn ram_address(vm: &Vm) -> u64 {
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", vm.pid())).unwrap();
    let path = vm.ram_path();
    let line = maps
        .lines()
        .find(|line| line.ends_with(path.to_str().unwrap()))
        .unwrap();
    u64::from_str_radix(line.split('-').next().unwrap(), 16).unwrap()
}
