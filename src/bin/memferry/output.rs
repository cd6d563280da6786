//! What the user sees while it goes on: a progress bar, lines, or JSON.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::sync::mpsc::{self, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

use bytesize::ByteSize;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use memferry::migrate::{Phase, Progress};
use serde::Serialize;

/// Where a command's words go.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    json: bool,
}

impl Output {
    pub(crate) fn new(json: bool) -> Self {
        Self { json }
    }

    /// Whether a person sees it change.
    fn is_for_a_terminal(self) -> bool {
        io::stderr().is_terminal() && !self.json
    }

    /// A bar that is drawn so many times a second, where a person sees it.
    pub(crate) fn bar(self, template: &str, hz: u8) -> ProgressBar {
        let target = if self.is_for_a_terminal() {
            ProgressDrawTarget::stderr_with_hz(hz)
        } else {
            ProgressDrawTarget::hidden()
        };
        let style = ProgressStyle::with_template(template)
            .unwrap_or_else(|_| ProgressStyle::default_bar())
            .progress_chars("=> ");
        ProgressBar::with_draw_target(Some(0), target).with_style(style)
    }

    /// A result, for programs; `event` names it.
    pub(crate) fn event(self, event: &str, fields: &impl Serialize) {
        if !self.json {
            return;
        }
        let mut value = serde_json::to_value(fields).unwrap_or_default();
        if let Some(map) = value.as_object_mut() {
            map.insert("event".into(), event.into());
        }
        say(&value);
    }

    /// A line of the final report, for people.
    pub(crate) fn line(self, line: &str) {
        if !self.json {
            say(&line);
        }
    }

    /// A remark while it goes on, for people; also where a program reads the events: somebody reads its log.
    pub(crate) fn remark(self, remark: &str) {
        warn(&remark);
    }

    /// Starts to show progress; ends when the sender is dropped.
    pub(crate) fn progress(self) -> (Sender<Progress>, JoinHandle<()>) {
        let (sender, receiver) = mpsc::channel::<Progress>();
        let thread = std::thread::spawn(move || {
            let mut view = View::new(self);
            for progress in receiver {
                view.show(&progress);
            }
            view.bar.finish_and_clear();
        });
        (sender, thread)
    }
}

/// A rate in bytes a second, for a text or a program.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a rate is far from the ends of its type, and is shown in round numbers"
)]
pub(crate) fn rounded(rate: f64) -> u64 {
    rate.max(0.0) as u64
}

/// A line on standard output. Nobody may read it any more, as behind `head -1`: that must not end what goes on.
pub(crate) fn say(line: &impl Display) {
    let _ = writeln!(io::stdout().lock(), "{line}");
}

/// A line on standard error. It may be a terminal that is gone: that must not end what goes on.
pub(crate) fn warn(line: &impl Display) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}

#[derive(Debug)]
struct View {
    output: Output,
    bar: ProgressBar,
    terminal: bool,
}

impl View {
    fn new(output: Output) -> Self {
        Self {
            output,
            bar: output.bar("{prefix:10} [{bar:30}] {bytes}/{total_bytes} {msg}", 10),
            terminal: output.is_for_a_terminal(),
        }
    }

    fn show(&mut self, progress: &Progress) {
        if self.output.json {
            if let Ok(line) = serde_json::to_string(progress) {
                say(&line);
            }
            return;
        }
        match progress {
            Progress::Phase { phase, at } => {
                self.bar.set_prefix(name(*phase));
                if !self.terminal {
                    self.output.remark(&format!("{at:8.3} s  {}", name(*phase)));
                }
            }
            Progress::Update {
                total,
                remaining,
                rate,
                dirty_rate,
                predicted_blackout,
                faults,
                fault_micros,
                round,
                ..
            } => {
                self.bar.set_length(*total);
                self.bar.set_position(total.saturating_sub(*remaining));
                let mut message = format!("round {round}, {}/s", ByteSize(*rate));
                if let Some(dirty) = dirty_rate {
                    message += &format!(", dirtied {}/s", ByteSize(*dirty));
                }
                if let Some(blackout) = predicted_blackout {
                    message += &format!(", blackout {}", milliseconds(*blackout));
                }
                if *faults > 0 {
                    message += &format!(", {faults} faults");
                }
                if let Some([median, tail, _]) = fault_micros {
                    message += &format!(" (median {median} µs, 99th percentile {tail} µs)");
                }
                self.bar.set_message(message);
            }
            Progress::Round {
                round,
                at,
                dirty,
                predicted_blackout,
                ..
            } if !self.terminal => self.output.remark(&format!(
                "{at:8.3} s  round {round} left {} dirty; a standstill now would take {}",
                ByteSize(*dirty),
                milliseconds(*predicted_blackout)
            )),
            Progress::HandedOver { at, .. } if !self.terminal => self
                .output
                .remark(&format!("{at:8.3} s  the guest runs at the destination")),
            _ => {}
        }
    }
}

fn name(phase: Phase) -> &'static str {
    match phase {
        Phase::Greeting => "greeting",
        Phase::PreCopy => "pre-copy",
        Phase::CutOver => "cut-over",
        Phase::PostCopy => "post-copy",
        Phase::Verifying => "verifying",
        Phase::Done => "done",
    }
}

/// Seconds as a person reads them.
pub(crate) fn seconds(seconds: f64) -> String {
    if seconds < 1.0 {
        milliseconds(seconds)
    } else {
        format!("{seconds:.2} s")
    }
}

fn milliseconds(seconds: f64) -> String {
    let span = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
    if span > Duration::from_secs(100) {
        return "more than 100 s".into();
    }
    format!("{:.1} ms", seconds * 1000.0)
}
