//! Time as the state machines count it.

use std::time::{Duration, Instant};

use migrate_proto::Micros;

/// Microseconds since the session began.
#[derive(Debug, Clone, Copy)]
pub(super) struct Clock {
    start: Instant,
}

impl Clock {
    pub(super) fn start() -> Self {
        Self {
            start: Instant::now(),
        }
    }

    pub(super) fn now(&self) -> Micros {
        micros(self.start.elapsed())
    }

    pub(super) fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    /// How long it is until `moment`, at most `longest`.
    pub(super) fn until(&self, moment: Option<Micros>, longest: Duration) -> Duration {
        moment.map_or(longest, |moment| {
            Duration::from_micros(moment.since(self.now()).0).min(longest)
        })
    }
}

pub(super) fn micros(span: Duration) -> Micros {
    Micros(u64::try_from(span.as_micros()).unwrap_or(u64::MAX))
}

pub(super) fn duration(span: Micros) -> Duration {
    Duration::from_micros(span.0)
}
