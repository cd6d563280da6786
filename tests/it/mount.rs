//! `memferry mount`, as far as nothing is mounted.

use std::process::{Command, Output};

fn mount(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_memferry"))
        .arg("mount")
        .args(arguments)
        .output()
        .unwrap()
}

fn check(arguments: &[&str], code: i32, says: &str) {
    let output = mount(arguments);
    let words = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {words}");
    assert!(words.contains(says), "{arguments:?}: {words}");
}

#[test]
fn arguments_that_contradict_each_other_are_refused() {
    check(&["nbd://h/"], 2, "PATH");
    check(&["http://h/", "x"], 2, "nbd://");
    check(&["nbd://h/", "x", "--nbd"], 2, "--nbd");
    check(&["nbd://h/", "x", "--direct", "--no-pull"], 2, "--direct");
    check(
        &["nbd://h/", "x", "--chunk-size", "5000"],
        2,
        "power of two",
    );
    check(&["nbd://h/", "x", "--tls-cert", "c"], 2, "--tls-key");
}

#[test]
fn a_server_that_is_not_there_is_said_to_be_away() {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("nbd+unix:///?socket={}/socket", folder.path().display());
    let path = folder.path().join("region");
    check(
        &[&url, path.to_str().unwrap()],
        1,
        "is a server listening there",
    );
    assert!(!path.exists());
}
