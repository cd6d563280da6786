//! A client of QEMU's monitor, no larger than these tests need: it must not share a fault with the one they test.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::command;

/// QEMU answers at once unless it is stuck, but emulation on a busy machine can take its main loop for seconds.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// A connection to a monitor.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    received: Vec<u8>,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Greets and leaves the negotiation of capabilities behind.
    ///
    /// # Errors
    /// If QEMU does not answer in time.
    pub fn new(stream: UnixStream) -> Result<Self> {
        let mut monitor = Self {
            stream,
            received: Vec::new(),
            events: VecDeque::new(),
        };
        let greeting = monitor.message(Instant::now() + ANSWER_LIMIT)?;
        if greeting.get("QMP").is_none() {
            bail!("not a QEMU monitor: it greets with {greeting}");
        }
        monitor.execute("qmp_capabilities", json!({}))?;
        Ok(monitor)
    }

    /// Runs a command and returns what it returns. Blocks for up to 30 seconds.
    ///
    /// # Errors
    /// If QEMU refuses the command or does not answer in time.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "so that `json!` can be written in the call"
    )]
    pub fn execute(&mut self, name: &str, arguments: Value) -> Result<Value> {
        let mut request = json!({ "execute": name, "arguments": arguments }).to_string();
        request.push('\n');
        self.stream
            .write_all(request.as_bytes())
            .with_context(|| format!("cannot send {name} to QEMU"))?;
        let deadline = Instant::now() + ANSWER_LIMIT;
        loop {
            let mut message = self.message(deadline).with_context(|| name.to_owned())?;
            if let Some(error) = message.get("error") {
                bail!("QEMU refuses {name}: {}", error["desc"]);
            }
            if let Some(answer) = message.get_mut("return") {
                return Ok(answer.take());
            }
            self.events.push_back(message);
        }
    }

    /// Waits for an event that `wanted` accepts; events that came before it are forgotten.
    ///
    /// # Errors
    /// If it does not come by the deadline or QEMU ends.
    pub fn wait_event(
        &mut self,
        deadline: Instant,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        loop {
            let event = match self.events.pop_front() {
                Some(event) => event,
                None => self.message(deadline).context("waiting for an event")?,
            };
            if wanted(&event) {
                return Ok(event);
            }
        }
    }

    /// Runs a command again and again until `done` makes something of what it returns.
    ///
    /// # Errors
    /// If the command fails or the deadline passes.
    pub fn poll<T>(
        &mut self,
        name: &str,
        deadline: Instant,
        mut done: impl FnMut(&Value) -> Option<T>,
    ) -> Result<T> {
        let answered = command::poll_until(deadline, || match self.execute(name, json!({})) {
            Ok(answer) => done(&answer).map(Ok),
            Err(error) => Some(Err(error)),
        });
        answered.unwrap_or_else(|| bail!("{name} did not say what was waited for in time"))
    }

    fn message(&mut self, deadline: Instant) -> Result<Value> {
        loop {
            if let Some(end) = self.received.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.received.drain(..=end).collect();
                return serde_json::from_slice(&line).context("QEMU's monitor sent no JSON");
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("QEMU's monitor did not answer in time");
            }
            self.stream.set_read_timeout(Some(left))?;
            let mut buffer = [0; 4096];
            match self.stream.read(&mut buffer) {
                Ok(0) => bail!("QEMU closed its monitor: it has ended"),
                Ok(count) => self.received.extend_from_slice(&buffer[..count]),
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                Err(error) => return Err(error).context("QEMU's monitor failed"),
            }
        }
    }
}
