//! Running other programs with a deadline.

use std::io::Read;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use crate::image;
use crate::interrupt::Leash;

/// How often a wait looks whether something happened that cannot be waited on.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Runs a program to its end and returns what it printed; its standard input is empty.
///
/// # Errors
/// If it cannot be started, does not end within `limit` (it is then killed) or fails; holds what it said.
pub fn output(command: &mut Command, limit: Duration) -> Result<String> {
    let shown = format!("{command:?}");
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {shown}"))?;
    let printed = collect(child.stdout.take());
    let complaints = collect(child.stderr.take());
    let status = wait(&mut child, limit).with_context(|| shown.clone())?;
    let text = |reader: std::thread::JoinHandle<Vec<u8>>| {
        String::from_utf8_lossy(&reader.join().unwrap_or_default()).into_owned()
    };
    let (printed, complaints) = (text(printed), text(complaints));
    if status.success() {
        Ok(printed)
    } else {
        bail!("{shown} failed ({status}):\n{complaints}{printed}")
    }
}

/// Compiling one program of the workspace, on two busy processors.
const BUILD_LIMIT: Duration = Duration::from_secs(1200);

/// Compiles a program of the workspace as users get it, and yields where it is; `which` are cargo's words for it.
///
/// # Errors
/// If it does not compile.
pub fn build(which: &[&str]) -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = Command::new(cargo);
    build
        .args(["build", "--release"])
        .args(which)
        .args(["--message-format", "json-render-diagnostics"])
        .current_dir(image::workspace());
    let messages = output(&mut build, BUILD_LIMIT)?;
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter_map(|message| message["executable"].as_str().map(PathBuf::from))
        .next_back()
        .context("cargo built a program but did not say where it is")
}

/// Runs a program to its end; it shares this program's output.
///
/// # Errors
/// If it cannot be started or does not end within `limit`; it is then killed.
pub fn status(command: &mut Command, limit: Duration) -> Result<ExitStatus> {
    let shown = format!("{command:?}");
    let mut child = command
        .stdin(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot start {shown}"))?;
    wait(&mut child, limit).context(shown)
}

/// Waits until a child ends.
///
/// # Errors
/// If it does not end within `limit`; it is then killed.
pub fn wait(child: &mut Child, limit: Duration) -> Result<ExitStatus> {
    let _leash = Leash::hold(child);
    let deadline = Instant::now() + limit;
    let ended = poll_until(deadline, || child.try_wait().transpose());
    match ended {
        Some(status) => Ok(status?),
        None => {
            child.kill()?;
            child.wait()?;
            Err(anyhow!("did not end within {limit:?} and was killed"))
        }
    }
}

/// Looks again and again until `look` finds something or the deadline passes. For what no event tells of.
pub fn poll_until<T>(deadline: Instant, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    loop {
        if let Some(found) = look() {
            return Some(found);
        }
        if Instant::now() >= deadline {
            return None;
        }
        std::thread::park_timeout(LOOK_EVERY);
    }
}

/// Where a program is, as the shell would find it.
#[must_use]
pub fn find(program: &str) -> Option<PathBuf> {
    // Tools of the administrator are not on everybody's path.
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/local/sbin:/usr/sbin:/sbin";
    path.split(':')
        .map(|directory| PathBuf::from(directory).join(program))
        .find(|candidate| candidate.is_file())
}

fn collect(pipe: Option<impl Read + Send + 'static>) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            // What was read before an error is still what the program said.
            let _partial = pipe.read_to_end(&mut bytes);
        }
        bytes
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_fails_is_an_error_that_holds_its_words() {
        let error = output(
            Command::new("sh").args(["-c", "echo no such luck >&2; exit 3"]),
            Duration::from_secs(10),
        )
        .unwrap_err();
        assert!(error.to_string().contains("no such luck"), "{error:#}");
    }

    #[test]
    fn a_program_that_does_not_end_is_killed_at_the_deadline() {
        let began = Instant::now();
        let result = output(Command::new("sleep").arg("60"), Duration::from_millis(50));
        assert!(result.is_err() && began.elapsed() < Duration::from_secs(30));
    }
}
