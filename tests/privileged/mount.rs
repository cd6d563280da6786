//! `memferry mount`, as users run it: what is saved, and what happens when somebody dies.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use serde_json::Value;
use tempfile::TempDir;

use crate::victim::{PATIENCE, wait_until};

const LEN: usize = (8 << 20) + 4096;

/// How long a server that is away is waited for, as a test says it to `mount`.
const DEADLINE: Duration = Duration::from_secs(2);

fn memferry() -> Command {
    Command::new(env!("CARGO_BIN_EXE_memferry"))
}

fn signal(child: &Child, signal: Signal) {
    rustix::process::kill_process(Pid::from_child(child), signal).unwrap();
}

/// Waits until a process has ended, and returns its code.
fn code(child: &mut Child) -> Option<i32> {
    let mut status = None;
    wait_until("the process has ended", || {
        status = child.try_wait().unwrap();
        status.is_some()
    });
    status.unwrap().code()
}

/// Does what the kernel could let hang, and fails if it does.
fn in_time<T: Send + 'static>(what: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || sender.send(what()));
    receiver.recv_timeout(PATIENCE).expect("it hangs")
}

fn pattern() -> Vec<u8> {
    (0..LEN)
        .map(|at| (at ^ (at >> 8) ^ (at >> 16)).to_le_bytes()[0])
        .collect()
}

/// A file that is served, in a folder of its own.
struct Served {
    folder: TempDir,
    server: Option<Child>,
}

impl Served {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("disk"), pattern()).unwrap();
        let mut served = Self {
            folder,
            server: None,
        };
        served.start();
        served
    }

    fn start(&mut self) {
        let mut server = memferry()
            .arg("serve")
            .arg(self.path("disk"))
            .arg("--listen")
            .arg(format!("unix:{}", self.path("socket").display()))
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // It says where, once it listens.
        let mut url = String::new();
        BufReader::new(server.stdout.take().unwrap())
            .read_line(&mut url)
            .unwrap();
        assert!(url.starts_with("nbd+unix:"), "{url}");
        self.server = Some(server);
    }

    fn kill(&mut self) {
        if let Some(mut server) = self.server.take() {
            let _ = server.kill();
            server.wait().unwrap();
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn url(&self) -> String {
        format!("nbd+unix:///?socket={}", self.path("socket").display())
    }

    fn disk(&self) -> Vec<u8> {
        fs::read(self.path("disk")).unwrap()
    }

    fn mount(&self, more: &[&str]) -> Mounted {
        let at = self.path("region");
        Mounted::start(&self.url(), &at, more)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A mount that is ended with the test.
struct Mounted {
    process: Child,
    at: PathBuf,
}

impl Mounted {
    fn start(url: &str, at: &Path, more: &[&str]) -> Self {
        let mut process = memferry()
            .args(["mount", url])
            .arg(at)
            .args(["--json", "--deadline", "2s"])
            .args(more)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut events = BufReader::new(process.stdout.take().unwrap());
        let mut line = String::new();
        events.read_line(&mut line).unwrap();
        let event: Value = serde_json::from_str(&line).unwrap_or_else(|_| {
            let mut why = String::new();
            let _ = process.stderr.take().unwrap().read_to_string(&mut why);
            panic!("not mounted: {why}")
        });
        assert_eq!(event["event"], "mounted", "{event}");
        // Its words must not fill the pipe.
        std::thread::spawn(move || io::copy(&mut events, &mut io::sink()));
        let mut words = process.stderr.take().unwrap();
        std::thread::spawn(move || io::copy(&mut words, &mut io::sink()));
        Self {
            process,
            at: at.to_owned(),
        }
    }

    fn open(&self) -> File {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(&self.at)
            .unwrap()
    }

    /// Ends it by a signal.
    fn end(mut self) -> Option<i32> {
        signal(&self.process, Signal::TERM);
        code(&mut self.process)
    }

    fn is_mounted(&self) -> bool {
        is_mounted(&self.at)
    }
}

fn is_mounted(at: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    mounts.contains(&format!(" {} ", at.display()))
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = Command::new("umount")
            .arg("-l")
            .arg(&self.at)
            .stderr(Stdio::null())
            .status();
    }
}

const WAYS: [&[&str]; 3] = [&["--direct"], &[], &["--no-pull", "--push-interval", "0s"]];

#[test]
#[ignore = "privileged: needs root and /dev/fuse"]
fn what_was_written_is_there_after_the_mount_has_ended() {
    for way in WAYS {
        let served = Served::new();
        let mounted = served.mount(way);
        let file = mounted.open();
        let mut expected = pattern();
        for (offset, len) in [(0, 1), (5000, 100_000), (LEN - 5000, 5000), (4096, 4096)] {
            file.write_all_at(&vec![0xA5; len], offset as u64).unwrap();
            expected[offset..offset + len].fill(0xA5);
        }
        let mut read = vec![0; LEN];
        file.read_exact_at(&mut read, 0).unwrap();
        assert!(read == expected, "{way:?}");
        drop(file);
        let at = mounted.at.clone();
        assert_eq!(mounted.end(), Some(0), "{way:?}");
        assert!(!is_mounted(&at) && !at.exists(), "what was made is removed");
        assert!(served.disk() == expected, "{way:?}");
        // And through another mount.
        let again = served.mount(way);
        assert!(fs::read(&again.at).unwrap() == expected, "{way:?}");
    }
}

#[test]
#[ignore = "privileged: needs root and /dev/fuse"]
fn what_was_synced_is_there_after_the_mount_was_killed() {
    for way in WAYS {
        let served = Served::new();
        let mounted = served.mount(way);
        let file = mounted.open();
        file.write_all_at(&[0xA5; 10_000], 100).unwrap();
        file.sync_all().unwrap();
        drop(mounted);
        assert!(
            served.disk()[100..10_100].iter().all(|&byte| byte == 0xA5),
            "{way:?}"
        );
    }
}

#[test]
#[ignore = "privileged: needs root and /dev/fuse"]
fn a_server_that_was_killed_costs_readers_the_deadline_and_is_found_again() {
    for way in [WAYS[0], &["--no-pull"]] {
        let mut served = Served::new();
        let mounted = served.mount(way);
        let file = mounted.open();
        let mut buf = [0; 4096];
        file.read_exact_at(&mut buf, 0).unwrap();
        served.kill();
        let begun = Instant::now();
        let (file, error) = in_time(move || {
            let error = file.read_exact_at(&mut [0; 4096], 6 << 20).unwrap_err();
            (file, error)
        });
        let took = begun.elapsed();
        assert_eq!(error.raw_os_error(), Some(5), "{way:?}: {error}");
        assert!(took < DEADLINE * 3, "{way:?}: {took:?}");
        served.start();
        file.read_exact_at(&mut buf, 6 << 20).unwrap();
        assert!(buf[..] == pattern()[6 << 20..(6 << 20) + 4096], "{way:?}");
        file.write_all_at(&[1; 4096], 0).unwrap();
        file.sync_all().unwrap();
        drop(file);
        assert_eq!(mounted.end(), Some(0), "{way:?}");
        assert_eq!(served.disk()[..4096], [1; 4096]);
    }
}

#[test]
#[ignore = "privileged: needs root and /dev/fuse"]
fn a_direct_mount_tells_once_that_a_server_that_was_killed_may_have_lost_writes() {
    // Its flush failed for ever, because nobody wrote the doubtful bytes again.
    let mut served = Served::new();
    let mounted = served.mount(&["--direct"]);
    let file = mounted.open();
    file.write_all_at(&[7; 4096], 0).unwrap();
    // Written back, so that the server has it, and not flushed: that comes with the next sync.
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    served.kill();
    served.start();
    let first = file.sync_all();
    file.write_all_at(&[8; 4096], 0).unwrap();
    let second = file.sync_all();
    // What had not been written back when the server died was written to the new one: no loss then.
    if let Err(error) = first {
        assert_eq!(error.raw_os_error(), Some(5), "{error}");
    }
    second.unwrap();
    drop(file);
    assert_eq!(mounted.end(), Some(0));
    assert_eq!(served.disk()[..4096], [8; 4096]);
}

#[test]
#[ignore = "privileged: needs root and /dev/fuse"]
fn a_direct_mount_that_ends_after_a_loss_tells_it_by_3() {
    // The sync at its end was told of the loss, and tried again until it heard nothing of it.
    let mut served = Served::new();
    let mounted = served.mount(&["--direct"]);
    let file = mounted.open();
    file.write_all_at(&[7; 4096], 0).unwrap();
    // Not `sync_all`, which would have the server flush.
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    wait_until("the server has it", || served.disk()[..4096] == [7; 4096]);
    served.kill();
    served.start();
    drop(file);
    assert_eq!(mounted.end(), Some(3));
}

#[test]
#[ignore = "privileged: needs root and /dev/fuse"]
fn what_was_written_is_saved_though_nobody_reads_what_is_said() {
    // The first event that nobody read ended the mount, and with it what was written.
    let served = Served::new();
    let at = served.path("region");
    let mut process = memferry()
        .args(["mount", &served.url()])
        .arg(&at)
        .args(["--json", "--push-interval", "0s"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(process.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    assert!(line.contains("mounted"), "{line}");
    drop(process.stderr.take());
    let mounted = Mounted { process, at };
    let file = mounted.open();
    file.write_all_at(&[9; 100], 4096).unwrap();
    drop(file);
    assert_eq!(mounted.end(), Some(0));
    assert_eq!(served.disk()[4096..4196], [9; 100]);
}

#[test]
#[ignore = "privileged: needs root and /dev/fuse"]
fn what_the_kernel_could_not_write_back_is_told_by_3_however_it_is_mounted() {
    let partly: &[&str] = &["--no-pull", "--chunk-size", "64KiB"];
    for way in [&["--direct"], partly] {
        let mut served = Served::new();
        let mounted = served.mount(way);
        let file = mounted.open();
        served.kill();
        // Of a chunk that is not here, so that its rest is missing.
        file.write_all_at(&[7; 4096], 1 << 20).unwrap();
        // Closing writes back, and nobody looks at what that says.
        in_time(move || drop(file));
        served.start();
        assert_eq!(mounted.end(), Some(3), "{way:?}");
    }
}

#[test]
#[ignore = "privileged: needs root and /dev/fuse"]
fn saving_is_given_up_by_a_further_signal_though_nothing_is_mounted_any_more() {
    // Nobody looked at signals then, for ten minutes.
    let mut served = Served::new();
    let mut mounted = served.mount(&["--push-interval", "0s"]);
    wait_until("all is here", || {
        fs::read(&mounted.at).is_ok_and(|bytes| bytes == pattern())
    });
    let file = mounted.open();
    served.kill();
    file.write_all_at(&[9; 100], 4096).unwrap();
    in_time(move || drop(file));
    let status = Command::new("umount").arg(&mounted.at).status().unwrap();
    assert!(status.success());
    wait_until("it has ended", || {
        let ended = mounted.process.try_wait().unwrap().is_some();
        if !ended {
            let _ = rustix::process::kill_process(Pid::from_child(&mounted.process), Signal::INT);
        }
        ended
    });
    assert_eq!(code(&mut mounted.process), Some(3));
}

#[test]
#[ignore = "privileged: needs root and /dev/fuse"]
fn a_mount_that_was_killed_leaves_nobody_hanging_and_can_be_mounted_again() {
    let served = Served::new();
    let mut mounted = served.mount(&["--direct"]);
    let file = mounted.open();
    let mut buf = [0; 16];
    file.read_exact_at(&mut buf, 0).unwrap();
    mounted.process.kill().unwrap();
    mounted.process.wait().unwrap();
    let at = mounted.at.clone();
    in_time(move || {
        file.read_exact_at(&mut [0; 4096], 5 << 20).unwrap_err();
        // Gone, or of somebody who is not there.
        let after = File::open(&at).and_then(|file| file.read_exact_at(&mut [0; 16], 0));
        after.unwrap_err();
    });
    let again = served.mount(&[]);
    assert!(fs::read(&again.at).unwrap() == pattern());
    assert_eq!(again.end(), Some(0));
}

#[test]
#[ignore = "privileged: needs root and /dev/fuse"]
fn a_mount_that_was_killed_while_it_waited_for_itself_leaves_nobody_hanging() {
    let served = Served::new();
    let mut mounted = served.mount(&["--direct"]);
    let file = mounted.open();
    file.write_all_at(&[9; 100], 0).unwrap();
    let server = served.server.as_ref().unwrap();
    signal(server, Signal::STOP);
    signal(&mounted.process, Signal::INT);
    let tasks = format!("/proc/{}/task", mounted.process.id());
    wait_until("it waits for what it has written back itself", || {
        fs::read_dir(&tasks).unwrap().flatten().any(|task| {
            fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.trim() == "apart")
        })
    });
    mounted.process.kill().unwrap();
    assert_eq!(code(&mut mounted.process), None);
    in_time(move || file.read_exact_at(&mut [0; 100], 7 << 20).unwrap_err());
    signal(server, Signal::CONT);
}

#[test]
#[ignore = "privileged: needs root and /dev/fuse"]
fn a_mount_in_use_waits_for_its_user_and_a_second_signal_does_not() {
    let served = Served::new();
    let mut mounted = served.mount(&[]);
    let file = mounted.open();
    file.write_all_at(&[9; 100], 0).unwrap();
    signal(&mounted.process, Signal::INT);
    // What was written is saved though the file is open.
    wait_until("it is saved", || served.disk()[..100] == [9; 100]);
    assert!(mounted.process.try_wait().unwrap().is_none() && mounted.is_mounted());
    drop(file);
    assert_eq!(code(&mut mounted.process), Some(0));
    assert!(!mounted.is_mounted());

    let mut mounted = served.mount(&[]);
    let file = mounted.open();
    signal(&mounted.process, Signal::INT);
    signal(&mounted.process, Signal::INT);
    // Two at once may have become one.
    wait_until("it has ended", || {
        let ended = mounted.process.try_wait().unwrap().is_some();
        if !ended {
            let _ = rustix::process::kill_process(Pid::from_child(&mounted.process), Signal::INT);
        }
        ended
    });
    assert!(!mounted.is_mounted());
    in_time(move || file.read_exact_at(&mut [0; 4096], 7 << 20).unwrap_err());
}

#[test]
#[ignore = "privileged: needs root and /dev/fuse"]
fn who_is_forced_to_leave_something_unsaved_is_told_by_3() {
    let mut served = Served::new();
    let cache = served.path("cache");
    let more = ["--push-interval", "0s", "--cache", cache.to_str().unwrap()];
    let mut mounted = served.mount(&more);
    wait_until("all is here", || {
        fs::read(&mounted.at).is_ok_and(|bytes| bytes == pattern())
    });
    served.kill();
    let file = mounted.open();
    file.write_all_at(&[9; 100], 4096).unwrap();
    let (file, _) = in_time(move || {
        let error = file.sync_all().unwrap_err();
        (file, error)
    });
    drop(file);
    wait_until("it has ended", || {
        let ended = mounted.process.try_wait().unwrap().is_some();
        if !ended {
            let _ = rustix::process::kill_process(Pid::from_child(&mounted.process), Signal::INT);
        }
        ended
    });
    assert_eq!(code(&mut mounted.process), Some(3));
    // What is nowhere else is kept.
    assert_eq!(fs::read(cache).unwrap()[4096..4196], [9; 100]);
}

#[test]
#[ignore = "privileged: needs root and /dev/fuse"]
fn a_program_is_run_with_the_mount_and_its_code_passed_on() {
    let served = Served::new();
    let run = |words: &[&str]| {
        let output = memferry()
            .args(["mount", &served.url(), "--exec"])
            .args(words)
            .output()
            .unwrap();
        (output.status.code(), output.stdout)
    };
    let (status, bytes) = run(&["cat", "{}"]);
    assert_eq!(status, Some(0));
    assert!(bytes == pattern());
    let (status, path) = run(&[
        "sh",
        "-c",
        "printf abc | dd of={} conv=notrunc status=none; echo $MEMFERRY_PATH; exit 9",
    ]);
    assert_eq!(status, Some(9));
    assert_eq!(served.disk()[..3], *b"abc");
    let path = PathBuf::from(String::from_utf8(path).unwrap().trim());
    assert!(!path.exists() && !path.parent().unwrap().exists());
    assert_eq!(run(&["/nonexistent/program"]).0, Some(1));
    assert_eq!(run(&["sh", "-c", "kill -TERM $$"]).0, Some(128 + 15));
}

#[test]
#[ignore = "privileged: needs root and /dev/fuse"]
fn who_unmounts_by_hand_ends_it() {
    let served = Served::new();
    let mut mounted = served.mount(&[]);
    mounted.open().write_all_at(&[3; 10], 0).unwrap();
    let status = Command::new("umount").arg(&mounted.at).status().unwrap();
    assert!(status.success());
    assert_eq!(code(&mut mounted.process), Some(0));
    assert_eq!(served.disk()[..10], [3; 10]);
}

#[test]
#[ignore = "privileged: needs root and /dev/fuse"]
fn who_unmounts_by_hand_what_cannot_be_saved_is_told_by_3() {
    let mut served = Served::new();
    let mut mounted = served.mount(&["--direct"]);
    let file = mounted.open();
    served.kill();
    file.write_all_at(&[3; 4096], 0).unwrap();
    // The kernel writes back, in vain, what is closed and what is unmounted.
    in_time(move || drop(file));
    let at = mounted.at.clone();
    in_time(move || Command::new("umount").arg(at).status().unwrap());
    wait_until("it is unmounted", || !mounted.is_mounted());
    assert_eq!(code(&mut mounted.process), Some(3));
}

#[test]
#[ignore = "privileged: needs root and /dev/fuse"]
fn a_read_only_mount_is_not_written_to() {
    let served = Served::new();
    let mounted = served.mount(&["--read-only"]);
    let error = OpenOptions::new()
        .write(true)
        .open(&mounted.at)
        .unwrap_err();
    assert_eq!(error.raw_os_error(), Some(30), "{error}");
    assert!(fs::read(&mounted.at).unwrap() == pattern());
    assert_eq!(mounted.end(), Some(0));
}
