//! How a restore goes, for who looks at it.

use std::time::{Duration, Instant};

use bytesize::ByteSize;
use indicatif::ProgressBar;
use memferry::mount::RestoreProgress;
use serde_json::{Value, json};

use crate::output::{Output, rounded, seconds};

/// How often a program is told.
const EVERY: Duration = Duration::from_secs(1);
/// A VMM that waits for a page for longer than this is told of.
const LONG: Duration = Duration::from_secs(1);

/// A bar for a terminal, events for programs, a few lines for a log.
pub(super) struct View {
    output: Output,
    bar: ProgressBar,
    next: Instant,
    last: Option<Value>,
    stalled: bool,
}

impl View {
    pub(super) fn new(output: Output) -> Self {
        Self {
            output,
            bar: output.bar("there [{bar:30}] {bytes}/{total_bytes} {msg}", 5),
            next: Instant::now(),
            last: None,
            stalled: false,
        }
    }

    /// Shows how it goes: at once what is wrong, the rest now and then.
    pub(super) fn show(&mut self, progress: &RestoreProgress) {
        self.show_stall(progress);
        let now = Instant::now();
        if now < self.next {
            return;
        }
        self.next = now + EVERY;
        let memory = &progress.memory;
        let event = event(progress);
        if self.last.as_ref() == Some(&event) {
            return;
        }
        self.output.event("progress", &event);
        self.last = Some(event);
        self.bar.set_length(memory.bytes);
        self.bar.set_position(memory.resident + memory.zeros);
        self.bar.set_message(format!(
            "{}/s, {} faults",
            ByteSize(rounded(progress.rate)),
            memory.faults.count
        ));
    }

    fn show_stall(&mut self, progress: &RestoreProgress) {
        let memory = &progress.memory;
        let why = memory.waiting.as_ref().map(|waiting| &*waiting.error);
        let waits = memory.oldest.map(|oldest| oldest.elapsed());
        let stalled = why.is_some() || waits.is_some_and(|waits| waits >= LONG);
        if stalled == self.stalled {
            return;
        }
        self.stalled = stalled;
        if !stalled {
            self.output.event("going-on", &json!({}));
            self.remark("memferry: the VMM goes on");
            return;
        }
        let why = why.unwrap_or("nothing has come yet");
        self.output.event("stalled", &json!({ "error": why }));
        self.remark(&format!("memferry: the VMM waits for memory: {why}"));
    }

    fn remark(&self, remark: &str) {
        self.bar.suspend(|| self.output.remark(remark));
    }

    /// Ends the bar, and tells how it went.
    pub(super) fn end(&self, progress: &RestoreProgress, took: Duration) {
        self.bar.finish_and_clear();
        self.output.event("progress", &event(progress));
        let memory = &progress.memory;
        let faults = memory.faults;
        self.output.line(&format!(
            "{} of {} have come and {} are zeros, in {}; {} faults, median {} µs, 99th percentile {} µs, longest {} µs",
            ByteSize(memory.resident),
            ByteSize(memory.bytes),
            ByteSize(memory.zeros),
            seconds(took.as_secs_f64()),
            faults.count,
            faults.median.as_micros(),
            faults.tail.as_micros(),
            faults.longest.as_micros(),
        ));
    }
}

fn event(progress: &RestoreProgress) -> Value {
    let memory = &progress.memory;
    let faults = memory.faults;
    let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    json!({
        "bytes": memory.bytes,
        "resident": memory.resident,
        "zeros": memory.zeros,
        "rate": rounded(progress.rate),
        "faults": faults.count,
        "fault_micros": [micros(faults.median), micros(faults.tail), micros(faults.longest)],
        "error": memory.waiting.as_ref().map(|waiting| &waiting.error).or(progress.last_error.as_ref()),
    })
}
