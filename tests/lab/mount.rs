//! `memferry mount --nbd` and `memferry device`, as users run them.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{Timespec, poll};
use rustix::process::{Pid, Signal};

const LEN: usize = 64 << 20;
const SOON: Duration = Duration::from_secs(30);

/// A process that is ended with the test, and the first line that it printed.
struct Running {
    process: Child,
    said: String,
}

impl Running {
    fn start(arguments: &[&str]) -> Self {
        let mut process = Command::new(env!("CARGO_BIN_EXE_memferry"))
            .args(arguments)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = String::new();
        BufReader::new(process.stdout.take().unwrap())
            .read_line(&mut said)
            .unwrap();
        let said = said.trim().to_owned();
        assert!(!said.is_empty(), "{arguments:?} said nothing");
        Self { process, said }
    }

    fn signal(&self, signal: Signal) {
        rustix::process::kill_process(Pid::from_child(&self.process), signal).unwrap();
    }

    fn code(&mut self) -> Option<i32> {
        let mut status = None;
        until("it has ended", || {
            status = self.process.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap().code()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < SOON, "gave up waiting until {what}");
        let moment = Timespec {
            tv_sec: 0,
            tv_nsec: 10_000_000,
        };
        let _ = poll(&mut [], Some(&moment));
    }
}

fn run(program: &str, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).status().unwrap();
    assert!(status.success(), "{program} {arguments:?}: {status}");
}

fn listed() -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_memferry"))
        .args(["device", "list"])
        .output()
        .unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap()
}

/// A served file, its folder, and a device of it.
fn served() -> (tempfile::TempDir, PathBuf, Running) {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    File::create(&disk).unwrap().set_len(LEN as u64).unwrap();
    let socket = format!("unix:{}", folder.path().join("socket").display());
    let server = Running::start(&["serve", disk.to_str().unwrap(), "--listen", &socket]);
    (folder, disk, server)
}

#[test]
#[ignore = "kernel: needs nbd"]
fn a_file_system_on_a_mounted_device_is_all_there_after_a_signal() {
    for way in [&["--direct"][..], &[]] {
        let (folder, disk, server) = served();
        let mut mount = Running::start(&[&["mount", &server.said, "--nbd"], way].concat());
        let device = mount.said.clone();
        assert!(device.starts_with("/dev/nbd"), "{device}");
        assert!(listed().contains(&format!("{device} ")), "{}", listed());
        run("mkfs.ext4", &["-q", &device]);
        let at = folder.path().join("at");
        fs::create_dir(&at).unwrap();
        let at = at.to_str().unwrap();
        run("mount", &[&device, at]);
        let bytes: Vec<u8> = (0..3_000_000_u32).flat_map(u32::to_le_bytes).collect();
        fs::write(format!("{at}/file"), &bytes).unwrap();
        // In use, it waits.
        mount.signal(Signal::TERM);
        assert!(mount.process.try_wait().unwrap().is_none());
        run("umount", &[at]);
        assert_eq!(mount.code(), Some(0), "{way:?}");
        assert!(!listed().contains(&format!("{device} ")), "{}", listed());
        // And through another one.
        let mut mount = Running::start(&["mount", &server.said, "--nbd", "--read-only"]);
        run("mount", &["-o", "ro", &mount.said, at]);
        assert!(fs::read(format!("{at}/file")).unwrap() == bytes, "{way:?}");
        run("umount", &[at]);
        mount.signal(Signal::TERM);
        assert_eq!(mount.code(), Some(0));
        assert_eq!(
            File::open(&disk).unwrap().metadata().unwrap().len(),
            LEN as u64
        );
    }
}

#[test]
#[ignore = "kernel: needs nbd"]
fn a_device_whose_mount_was_killed_fails_and_is_free_again() {
    let (_folder, disk, server) = served();
    let mut mount = Running::start(&["mount", &server.said, "--nbd", "--direct"]);
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&mount.said)
        .unwrap();
    device.write_all_at(&[7; 4096], 0).unwrap();
    device.sync_all().unwrap();
    assert_eq!(fs::read(&disk).unwrap()[..4096], [7; 4096]);
    mount.process.kill().unwrap();
    mount.process.wait().unwrap();
    let begun = Instant::now();
    device.read_exact_at(&mut [0; 4096], 32 << 20).unwrap_err();
    assert!(begun.elapsed() < SOON);
    drop(device);
    let path = mount.said.clone();
    let free = || {
        Command::new(env!("CARGO_BIN_EXE_memferry"))
            .args(["device", "free", "--abandoned"])
            .status()
            .unwrap()
    };
    until("it is free", || {
        free().success() && !listed().contains(&format!("{path} "))
    });
    // And can be used again.
    let mut mount = Running::start(&["mount", &server.said, "--nbd"]);
    let mut page = [0; 4096];
    File::open(Path::new(&mount.said))
        .unwrap()
        .read_exact_at(&mut page, 0)
        .unwrap();
    assert_eq!(page, [7; 4096]);
    mount.signal(Signal::TERM);
    assert_eq!(mount.code(), Some(0));
}
