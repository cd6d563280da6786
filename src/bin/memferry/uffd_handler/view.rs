//! How a restore goes, for who looks at it.

use std::time::{Duration, Instant};

use bytesize::ByteSize;
use indicatif::ProgressBar;
use memferry::mount::RestoreProgress;
use serde_json::{Value, json};

use crate::output::{Output, rounded, seconds};

/// How often a program is told.
const EVERY: Duration = Duration::from_secs(1);
/// A VMM that waits for a page for longer than this is told of, and one that does not for as long goes on.
const LONG: Duration = Duration::from_secs(1);
/// How often it is told of again.
const AGAIN: Duration = Duration::from_secs(60);
/// What is told where nobody has said why memory does not come.
const NOTHING: &str = "nothing has come yet";

/// A bar for a terminal, events for programs, a few lines for a log.
pub(super) struct View {
    output: Output,
    bar: ProgressBar,
    next: Instant,
    last: Option<Value>,
    stalls: Stalls,
}

/// What is told of a VMM that waits.
#[derive(Debug, Default)]
struct Stalls(Option<Stall>);

#[derive(Debug)]
struct Stall {
    /// How much was there when it began.
    there: u64,
    told: Instant,
    /// Since when nobody waits for long.
    over: Option<Instant>,
}

#[derive(Debug, PartialEq, Eq)]
enum News {
    /// Somebody has waited for so long.
    Waits(Duration),
    GoesOn,
}

impl View {
    pub(super) fn new(output: Output) -> Self {
        Self {
            output,
            bar: output.bar("there [{bar:30}] {bytes}/{total_bytes} {msg}", 5),
            next: Instant::now(),
            last: None,
            stalls: Stalls::default(),
        }
    }

    /// Shows how it goes: at once what is wrong, the rest now and then.
    pub(super) fn show(&mut self, progress: &RestoreProgress, why: Option<&str>) {
        self.show_stall(progress, why);
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

    fn show_stall(&mut self, progress: &RestoreProgress, why: Option<&str>) {
        let memory = &progress.memory;
        let in_vain = memory.waiting.is_some();
        let there = memory.resident + memory.zeros;
        match self
            .stalls
            .look(Instant::now(), memory.oldest, in_vain, there)
        {
            None => {}
            Some(News::Waits(waits)) => {
                let why = why.unwrap_or(NOTHING);
                let fields = json!({ "error": why, "seconds": waits.as_secs() });
                self.output.event("stalled", &fields);
                self.remark(&if waits < AGAIN {
                    format!("memferry: the VMM waits for memory: {why}")
                } else {
                    format!(
                        "memferry: the VMM has waited for memory for {} min: {why}",
                        waits.as_secs() / 60
                    )
                });
            }
            Some(News::GoesOn) => {
                self.output.event("going-on", &json!({}));
                self.remark("memferry: the VMM goes on");
            }
        }
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

impl Stalls {
    /// `oldest` is since when somebody waits, and `in_vain` whether an attempt to get what he waits for has failed.
    fn look(
        &mut self,
        now: Instant,
        oldest: Option<Instant>,
        in_vain: bool,
        there: u64,
    ) -> Option<News> {
        let waits = oldest.map_or(Duration::ZERO, |oldest| {
            now.saturating_duration_since(oldest)
        });
        let Some(stall) = &mut self.0 else {
            if !in_vain && waits < LONG {
                return None;
            }
            self.0 = Some(Stall {
                there,
                told: now,
                over: None,
            });
            return Some(News::Waits(waits));
        };
        if in_vain || waits >= LONG {
            stall.over = None;
            if now - stall.told < AGAIN {
                return None;
            }
            stall.told = now;
            return Some(News::Waits(waits));
        }
        let over = *stall.over.get_or_insert(now);
        // Between two attempts nobody waits for a moment, and nothing has come.
        if now - over < LONG || there == stall.there {
            return None;
        }
        self.0 = None;
        Some(News::GoesOn)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vmm_that_waits_is_told_of_once_a_minute_and_once_when_it_goes_on() {
        let begun = Instant::now();
        let mut stalls = Stalls::default();
        let mut news = Vec::new();
        // Each half second: somebody waits from the tenth second on, and what he waits for comes in the 190th.
        for half in 0..500 {
            let since = Duration::from_secs(10);
            let time = Duration::from_millis(half * 500);
            let waits = (20..380).contains(&half);
            // For a moment, nobody has taken the fault.
            let oldest = (waits && half != 70).then_some(begun + since);
            let there = if half < 380 { 4096 } else { 8192 };
            let in_vain = waits && half > 60 && half != 70;
            if let Some(one) = stalls.look(begun + time, oldest, in_vain, there) {
                news.push((time.as_secs(), one));
            }
        }
        let waits = |seconds| News::Waits(Duration::from_secs(seconds));
        let expected = [
            (11, waits(1)),
            (71, waits(61)),
            (131, waits(121)),
            (191, News::GoesOn),
        ];
        assert_eq!(news, expected);
    }

    #[test]
    fn who_waits_for_short_times_is_not_told_of() {
        let begun = Instant::now();
        let mut stalls = Stalls::default();
        for millis in (0..60_000).step_by(50) {
            let now = begun + Duration::from_millis(millis);
            let oldest = Some(now - Duration::from_millis(millis % 900));
            assert_eq!(stalls.look(now, oldest, false, millis), None);
        }
    }
}
