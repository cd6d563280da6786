//! How a mount goes, for who looks at it.

use std::time::{Duration, Instant};

use bytesize::ByteSize;
use indicatif::ProgressBar;
use memferry::mount::MountProgress;
use serde_json::json;

use super::region::Region;
use crate::output::{Output, rounded};

/// How often a program is told.
const EVERY: Duration = Duration::from_secs(1);

/// How a mount goes: a bar for a terminal, events for programs, a few lines for a log.
pub(super) struct View {
    output: Output,
    bar: ProgressBar,
    next: Instant,
    last: Option<MountProgress>,
    last_error: Option<String>,
    is_complete: bool,
}

impl View {
    pub(super) fn new(output: Output) -> Self {
        Self {
            output,
            bar: output.bar("here [{bar:30}] {bytes}/{total_bytes} {msg}", 5),
            next: Instant::now(),
            last: None,
            last_error: None,
            is_complete: false,
        }
    }

    /// Shows how it goes, if it is time to; nothing of a direct mount, of which nothing is here.
    pub(super) fn show(&mut self, region: &Region) {
        let now = Instant::now();
        if now < self.next {
            return;
        }
        self.next = now + EVERY;
        let Some(progress) = region.progress() else {
            return;
        };
        let error = progress
            .last_push_error
            .as_ref()
            .or(progress.last_pull_error.as_ref());
        if error != self.last_error.as_ref() {
            if let Some(error) = error {
                self.bar
                    .suspend(|| self.output.remark(&format!("memferry: {error}")));
            }
            self.last_error = error.cloned();
        }
        if self.last.as_ref() == Some(&progress) {
            return;
        }
        self.output.event("progress", &event(&progress));
        self.bar.set_length(progress.bytes);
        self.bar.set_position(progress.resident);
        let mut message = String::new();
        if progress.resident < progress.bytes {
            message = format!("{}/s", ByteSize(rounded(progress.pull_rate)));
        }
        if progress.dirty > 0 {
            message += &format!(" {} to be saved", ByteSize(progress.dirty));
        }
        self.bar.set_message(message);
        if progress.resident == progress.bytes && !self.is_complete {
            self.is_complete = true;
            self.output.event("complete", &json!({}));
            self.bar
                .suspend(|| self.output.remark("memferry: all of it is here"));
        }
        self.last = Some(progress);
    }

    pub(super) fn end(&self) {
        self.bar.finish_and_clear();
    }
}

fn event(progress: &MountProgress) -> serde_json::Value {
    json!({
        "bytes": progress.bytes,
        "resident": progress.resident,
        "dirty": progress.dirty,
        "pull_rate": rounded(progress.pull_rate),
        "error": progress.last_push_error.as_ref().or(progress.last_pull_error.as_ref()),
    })
}
