//! The process that serves a device is killed.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Child, Stdio};

use super::*;
use memferry::frontend::nbd::DeviceState;

const CHILD: &str = "MEMFERRY_NBD_CHILD";

/// This test binary again, which runs only the test `name`, which does not test then but serves a device until it is killed.
struct Server {
    child: Child,
    path: PathBuf,
}

impl Server {
    fn start(name: &str, dirty: bool) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--include-ignored", "--nocapture"])
            .env(CHILD, if dirty { "dirty" } else { "clean" })
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let path = lines.find_map(|line| {
            let line = line.unwrap();
            line.split_once("serving ")
                .map(|(_, path)| PathBuf::from(path))
        });
        Self {
            child,
            path: path.unwrap(),
        }
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn be_the_server_if_asked_to() {
    let Ok(what) = std::env::var(CHILD) else {
        return;
    };
    let options = DeviceOptions {
        // Nothing is to depend on it.
        timeout: Duration::from_secs(300),
        ..DeviceOptions::default()
    };
    let device = Device::attach(memory(64 << 20), &options).unwrap();
    if what == "dirty" {
        device.file().write_all_at(&vec![1; 32 << 20], 0).unwrap();
    }
    println!("serving {}", device.path().display());
    loop {
        std::thread::park();
    }
}

fn index_of(path: &std::path::Path) -> u32 {
    path.to_str()
        .unwrap()
        .trim_start_matches("/dev/nbd")
        .parse()
        .unwrap()
}

#[test]
#[ignore = "kernel: needs nbd"]
fn a_device_is_free_when_its_process_was_killed() {
    be_the_server_if_asked_to();
    for _ in 0..3 {
        let mut server = Server::start(
            "nbd_device::killed::a_device_is_free_when_its_process_was_killed",
            false,
        );
        assert_eq!(in_use(), [index_of(&server.path)]);
        server.kill();
        until("the device is free", || in_use().is_empty().then_some(()));
    }
}

#[test]
#[ignore = "kernel: needs nbd"]
fn a_process_that_is_killed_with_unsaved_pages_does_not_hang() {
    be_the_server_if_asked_to();
    // Its descriptor of the device was closed before those of the sockets: the kernel wrote the pages to a server that did not run any more, and
    // waited for it.
    let mut server = Server::start(
        "nbd_device::killed::a_process_that_is_killed_with_unsaved_pages_does_not_hang",
        true,
    );
    server.kill();
    until("the device is free", || in_use().is_empty().then_some(()));
}

#[test]
#[ignore = "kernel: needs nbd"]
fn who_has_a_device_open_gets_errors_when_its_process_was_killed_and_it_is_free_when_he_closes_it()
{
    be_the_server_if_asked_to();
    let mut server = Server::start(
        "nbd_device::killed::who_has_a_device_open_gets_errors_when_its_process_was_killed_and_it_is_free_when_he_closes_it",
        false,
    );
    let file = std::fs::File::open(&server.path).unwrap();
    file.read_exact_at(&mut [0; 4096], 0).unwrap();
    server.kill();
    let start = Instant::now();
    let error = file.read_exact_at(&mut [0; 4096], 32 << 20).unwrap_err();
    assert!(is_io_error(&error), "{error}");
    assert!(start.elapsed() < LIMIT);
    let listed = devices().unwrap();
    let listed = listed
        .iter()
        .find(|listed| listed.path == server.path)
        .unwrap();
    assert!(
        matches!(listed.state, DeviceState::Abandoned { .. }),
        "{listed:?}"
    );
    drop(file);
    until("the device is free", || in_use().is_empty().then_some(()));
}
