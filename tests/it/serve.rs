//! `memferry serve` and `memferry list`, as users run them.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::time::{Duration, Instant};

use memferry::backend::nbd::{NbdUrl, Remote, RemoteOptions};
use memferry::chunk::Storage;
use serde_json::Value;
use tempfile::TempDir;

/// No test waits longer for anything.
const SOON: Duration = Duration::from_secs(20);

fn memferry(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_memferry"));
    command.args(arguments);
    command
}

/// Runs a command that ends by itself.
fn output(arguments: &[&str]) -> Output {
    memferry(arguments).output().unwrap()
}

/// A server that is ended with the test.
struct Serving {
    process: Child,
    events: BufReader<ChildStdout>,
    url: NbdUrl,
    _folder: TempDir,
}

impl Serving {
    /// Serves `what`, in a folder of its own, at a socket there.
    fn start(what: impl Fn(&Path) -> String, more: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self::start_in(folder, what, more)
    }

    fn start_in(folder: TempDir, what: impl Fn(&Path) -> String, more: &[&str]) -> Self {
        let socket = format!("unix:{}", folder.path().join("socket").display());
        let what = what(folder.path());
        let arguments = ["serve", &what, "--listen", &socket, "--json"];
        let mut process = memferry(&[&arguments, more].concat())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let events = BufReader::new(process.stdout.take().unwrap());
        let mut serving = Self {
            process,
            events,
            url: "nbd://nowhere".parse().unwrap(),
            _folder: folder,
        };
        let event = serving.event();
        assert_eq!(event["event"], "serving", "{event}");
        serving.url = event["url"].as_str().unwrap().parse().unwrap();
        serving
    }

    fn event(&mut self) -> Value {
        let mut line = String::new();
        self.events.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    fn remote(&self) -> Remote {
        Remote::connect(&self.url, &RemoteOptions::default()).unwrap()
    }

    /// Ends it by a signal; its last words, and its exit code.
    fn end(mut self) -> (String, Option<i32>) {
        let pid = i32::try_from(self.process.id()).unwrap();
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let mut rest = String::new();
        self.events.read_to_string(&mut rest).unwrap();
        let end = Instant::now() + SOON;
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                return (rest, status.code());
            }
            assert!(Instant::now() < end, "it does not end");
            std::thread::yield_now();
        }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn path_in(folder: &Path, name: &str) -> PathBuf {
    folder.join(name)
}

#[test]
fn what_clients_wrote_is_there_when_it_is_served_again() {
    let kept = tempfile::tempdir().unwrap();
    let (file, folder) = (path_in(kept.path(), "file"), path_in(kept.path(), "folder"));
    let served = [
        file.display().to_string(),
        format!("dir:{}", folder.display()),
    ];
    for what in served {
        let start = || Serving::start(|_| what.clone(), &["--size", "1MiB"]);
        let serving = start();
        let remote = serving.remote();
        assert_eq!(remote.len(), 1 << 20);
        remote.write_all_at(b"to stay", 100_000).unwrap();
        drop(remote);
        let (said, code) = serving.end();
        assert_eq!(code, Some(0), "{said}");
        assert!(said.contains("client-closed"), "{said}");
        assert!(said.trim_end().ends_with(r#"{"event":"ended"}"#), "{said}");
        let serving = start();
        let mut bytes = [0; 9];
        let remote = serving.remote();
        remote.read_exact_at(&mut bytes, 99_999).unwrap();
        assert_eq!(&bytes, b"\0to stay\0", "{what}");
        drop(remote);
        assert_eq!(serving.end().1, Some(0));
    }
}

#[test]
fn what_is_read_only_is_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = path_in(folder.path(), "file");
    std::fs::write(&path, [7; 10_000]).unwrap();
    let what = path.display().to_string();
    let serving = Serving::start(|_| what.clone(), &["--read-only", "--name", "it"]);
    assert_eq!(serving.url.export(), "it");
    let remote = serving.remote();
    let mut bytes = [0; 10_000];
    remote.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, [7; 10_000]);
    assert!(remote.write_all_at(&[1], 0).is_err());
    drop(remote);
    assert_eq!(serving.end().1, Some(0));
    assert_eq!(std::fs::read(&path).unwrap(), [7; 10_000]);
}

#[test]
fn a_server_is_listed() {
    let more = ["--name", "a b", "--description", "for a test"];
    let serving = Serving::start(|_| "memory:4MiB".into(), &more);
    let url = serving.url.to_string();
    let listed = output(&["list", &url, "--json"]);
    assert!(listed.status.success());
    let event: Value = serde_json::from_slice(&listed.stdout).unwrap();
    assert_eq!(event["name"], "a b");
    assert_eq!(event["url"], url);
    assert_eq!(event["size"], 4 << 20);
    assert_eq!(event["description"], "for a test");
    assert_eq!(event["contexts"][0], "base:allocation");
    let listed = output(&["list", &url]);
    let text = String::from_utf8(listed.stdout).unwrap();
    assert!(text.contains("4194304 bytes"), "{text}");
    assert_eq!(serving.end().1, Some(0));
    let listed = output(&["list", &url]);
    assert_eq!(listed.status.code(), Some(1));
}

#[test]
fn a_socket_that_a_killed_server_left_is_taken_and_one_that_is_used_is_not() {
    let mut killed = Serving::start(|_| "memory:1MiB".into(), &[]);
    killed.process.kill().unwrap();
    killed.process.wait().unwrap();
    let place = killed.url.place().socket().unwrap().to_owned();
    let socket = format!("unix:{}", place.display());
    assert!(place.exists());
    let mut again = memferry(&["serve", "memory:1MiB", "--listen", &socket, "--json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(again.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    assert!(line.contains("serving"), "{line}");
    let third = output(&["serve", "memory:1MiB", "--listen", &socket]);
    assert_eq!(third.status.code(), Some(1));
    again.kill().unwrap();
    again.wait().unwrap();
}

#[test]
fn what_cannot_be_served_is_refused_with_a_reason() {
    let folder = tempfile::tempdir().unwrap();
    let file = path_in(folder.path(), "file");
    std::fs::write(&file, [0; 512]).unwrap();
    let (file, missing) = (
        file.display().to_string(),
        path_in(folder.path(), "missing").display().to_string(),
    );
    let folder = format!("dir:{}", folder.path().display());
    let check = |arguments: &[&str], code, reason: &str| {
        let output = output(&[&["serve"], arguments].concat());
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{said}");
        assert!(said.contains(reason), "{said}");
    };
    check(&[&missing], 1, "--size");
    check(&[&file, "--size", "1KiB"], 1, "is there already");
    check(&[&folder], 1, "--size");
    check(&["memory:1MiB", "--listen", "0.0.0.0:0"], 1, "--insecure");
    check(&["memory:1MiB", "--listen", "nowhere"], 2, "unix:PATH");
    check(&["memory:1MiB", "--tls-cert", "x"], 2, "--tls-key");
    check(
        &["memory:1MiB", "--tls-cert", "x", "--tls-key", "y"],
        1,
        "PEM",
    );
    check(&["memory:lots"], 2, "memory:lots");
}
