//! The dry run: measure the link and the dirty rate, and play the policy with them.

use std::io;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use migrate_proto::{Budget, Decision, Layout, Message, Micros, Observation, decide};

use super::{SourceRegion, present_chunks, take_dirty};
use crate::migrate::options::SeedOptions;
use crate::migrate::progress::{Forecast, per_second};
use crate::transport::LaneWriter;

/// How long the guest is watched: long enough for a steady writer, short enough to wait for.
const WATCH: Duration = Duration::from_secs(1);

/// How much is sent to measure the link, and for how long at most.
const PROBE_BYTES: u64 = 64 << 20;
const PROBE_TIME: Duration = Duration::from_millis(500);

/// Watches the guest for a second and the link for half of one; nothing is changed, and tracking is stopped again.
pub(super) fn measure(
    regions: &[SourceRegion],
    layout: &Layout,
    options: &SeedOptions,
    post_copy: bool,
    fixed: Micros,
    writer: &Mutex<LaneWriter>,
) -> io::Result<Forecast> {
    let bandwidth = probe(writer)?.min(options.bandwidth.unwrap_or(u64::MAX));
    let watched = watch(regions, layout);
    for region in regions {
        for tracker in region.trackers() {
            tracker.stop()?;
        }
    }
    let dirty = watched?;
    let present = present_chunks(regions, layout)?;
    let data_bytes = present.runs().map(|run| layout.bytes_in(run)).sum();
    let seen = Seen {
        dirty_in_a_second: dirty,
        data_bytes,
        bandwidth,
        fixed,
        post_copy,
    };
    Ok(seen.play(&options.budget, layout.bytes()))
}

/// Bytes that the guest dirtied in [`WATCH`].
fn watch(regions: &[SourceRegion], layout: &Layout) -> io::Result<u64> {
    for region in regions {
        for tracker in region.trackers() {
            tracker.start()?;
        }
    }
    // Nobody sends: the time-out is the watch.
    let (_keep, never) = mpsc::channel::<()>();
    let watched = never.recv_timeout(WATCH);
    debug_assert_eq!(watched, Err(RecvTimeoutError::Timeout));
    let dirty = take_dirty(regions, layout, SourceRegion::trackers)?;
    Ok(dirty.runs().map(|run| layout.bytes_in(run)).sum())
}

/// Bytes a second that one connection takes.
fn probe(writer: &Mutex<LaneWriter>) -> io::Result<u64> {
    let payload = vec![0; 1 << 20];
    let mut writer = writer.lock().unwrap_or_else(PoisonError::into_inner);
    let began = Instant::now();
    let mut sent = 0;
    while sent < PROBE_BYTES && began.elapsed() < PROBE_TIME {
        sent += writer.send(&Message::Probe, &[&payload])?;
    }
    Ok(per_second(sent, began.elapsed()))
}

/// What was measured.
#[derive(Debug, Clone, Copy)]
struct Seen {
    dirty_in_a_second: u64,
    data_bytes: u64,
    bandwidth: u64,
    fixed: Micros,
    post_copy: bool,
}

impl Seen {
    /// Plays rounds until the policy decides. A guest is taken to dirty in proportion to time, up to what it dirtied in
    /// a second, which is taken for its working set.
    fn play(&self, budget: &Budget, bytes: u64) -> Forecast {
        let mut time = 0_u64;
        let mut sent = self.data_bytes;
        let mut stalled = 0;
        let mut round = 0;
        loop {
            let took = u128::from(sent) * 1_000_000 / u128::from(self.bandwidth.max(1));
            let took = u64::try_from(took).unwrap_or(u64::MAX);
            time = time.saturating_add(took);
            let dirty = u128::from(self.dirty_in_a_second) * u128::from(took.min(1_000_000));
            let dirty = u64::try_from(dirty / 1_000_000).unwrap_or(u64::MAX);
            stalled = if u128::from(dirty) * 10 <= u128::from(sent) * 9 {
                0
            } else {
                stalled + 1
            };
            let observation = Observation {
                round,
                dirty,
                sent,
                took: Micros(took),
                bandwidth: self.bandwidth,
                fixed: self.fixed,
                stalled,
                post_copy: self.post_copy,
            };
            let decision = decide(budget, &observation);
            if decision == Decision::Continue {
                round += 1;
                sent = dirty;
                continue;
            }
            let blackout = match decision {
                Decision::PostCopy => self.fixed,
                _ => observation.predicted_blackout(),
            };
            let seconds = |micros: u64| Duration::from_micros(micros).as_secs_f64();
            return Forecast {
                bytes,
                data_bytes: self.data_bytes,
                dirty_rate: self.dirty_in_a_second,
                bandwidth: self.bandwidth,
                rounds: round + 1,
                time: seconds(time) + seconds(blackout.0),
                blackout: seconds(blackout.0),
                post_copy: decision == Decision::PostCopy,
                gives_up: decision == Decision::GiveUp,
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use migrate_proto::PostCopy;

    fn play(dirty: u64, post_copy: PostCopy) -> Forecast {
        let seen = Seen {
            dirty_in_a_second: dirty << 20,
            data_bytes: 800 << 20,
            bandwidth: 1000 << 20,
            fixed: Micros::from_millis(20),
            post_copy: true,
        };
        let budget = Budget {
            post_copy,
            ..Budget::default()
        };
        seen.play(&budget, 1 << 30)
    }

    #[test]
    fn an_idle_guest_is_expected_to_move_in_one_pass() {
        let forecast = play(0, PostCopy::Auto);
        assert_eq!((forecast.rounds, forecast.post_copy), (1, false));
        assert!((0.8..0.85).contains(&forecast.time), "{forecast:?}");
    }

    #[test]
    fn a_guest_faster_than_the_link_is_expected_to_need_post_copy_or_to_be_given_up() {
        assert!(play(3000, PostCopy::Auto).post_copy);
        assert!(play(3000, PostCopy::Never).gives_up);
    }
}
