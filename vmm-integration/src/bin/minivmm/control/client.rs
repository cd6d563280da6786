//! The other end of the control socket.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, bail};

use super::words::{Answer, Request};
use crate::args::ControlCommand;

/// Asks, and prints every line of the answer. Whether it was done.
pub(crate) fn ask(socket: &Path, command: ControlCommand) -> Result<bool> {
    let request = match command {
        ControlCommand::Status => Request::Status,
        ControlCommand::Pause { deadline } => Request::Pause { deadline },
        ControlCommand::Resume => Request::Resume,
        ControlCommand::Receive {
            listen,
            without_post_copy,
        } => Request::Receive {
            listen,
            without_post_copy,
        },
        ControlCommand::Migrate { pairing, plan } => Request::Migrate { pairing, plan },
        ControlCommand::Cancel => Request::Cancel,
        ControlCommand::Type { text } => Request::Type { text },
        ControlCommand::Quit => Request::Quit,
    };
    let mut stream = UnixStream::connect(socket)
        .with_context(|| format!("nothing answers at {}", socket.display()))?;
    writeln!(stream, "{}", serde_json::to_string(&request)?)?;
    let mut output = std::io::stdout().lock();
    for line in BufReader::new(stream).lines() {
        let line = line.context("the machine broke off")?;
        writeln!(output, "{line}")?;
        output.flush()?;
        match serde_json::from_str(&line).context("this is no answer of a minivmm")? {
            Answer::News(_) => {}
            Answer::Done(_) => return Ok(true),
            Answer::Failed(_) => return Ok(false),
        }
    }
    bail!("the machine ended without an answer")
}
