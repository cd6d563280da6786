//! `memferry bench`: the suites boot guests, so they are a program of their own, which is run from here.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Context;

/// Becomes `memferry-bench`, which lies beside this program or on the path.
pub(crate) fn run(arguments: &[OsString]) -> anyhow::Result<()> {
    // What is measured is the program that was asked to.
    let memferry = std::env::current_exe().context("cannot tell where this program is")?;
    let beside = Some(memferry.with_file_name("memferry-bench")).filter(|path| path.exists());
    let program = beside.unwrap_or_else(|| PathBuf::from("memferry-bench"));
    let mut command = Command::new(&program);
    command.arg("--memferry").arg(memferry).args(arguments);
    let error = command.exec();
    Err(error).with_context(|| {
        format!(
            "cannot run {}: build it with `cargo build --release -p guest-test --bin memferry-bench`",
            program.display()
        )
    })
}
