//! How many bytes are under way at once: what the link carries in a round trip, and hardly more.
//!
//! Less leaves the link idle; more waits in the network, and what is urgent waits behind it. Neither the rate nor the round trip
//! is known, so both are measured: the rate as the most that was delivered while a request was under way, the round trip
//! as the shortest that a request took. At first the window doubles for as long as the rate grows.

use std::time::{Duration, Instant};

/// What is fetched by one request at least: less costs more for the request than for its bytes.
const SMALLEST_BATCH: u64 = 64 << 10;
/// The most, on links so far that 32 workers could not fill them with less.
const LARGEST_BATCH: u64 = 4 << 20;
/// What the link should be busy with for one request: a request that is urgent waits for one that has just begun.
const BATCH_TIME: Duration = Duration::from_millis(2);
/// The window of the beginning. TCP begins with a twentieth of it.
const FIRST: u64 = 2 << 20;
/// The window never grows beyond this: memory that one mount may take.
const LARGEST: u64 = WORKERS * LARGEST_BATCH;
/// The most requests at once.
pub(super) const WORKERS: u64 = 32;
/// So long a measured round trip is believed.
const BELIEVED: Duration = Duration::from_secs(10);
/// Rounds without growth after which the link is taken for full.
const PATIENCE: u32 = 3;

/// How many bytes may be under way, and how many one request fetches.
#[derive(Debug)]
pub(super) struct Window {
    fixed: bool,
    bytes: u64,
    delivered: u64,
    /// Bytes a second: the most of this round and of the two before.
    rates: [f64; 3],
    /// What is sent when so much was delivered belongs to the next round.
    round_ends: u64,
    /// While the window doubles: the rate that was to be outdone, and for how many rounds it was not.
    growing: Option<(f64, u32)>,
    shortest: Option<(Duration, Instant)>,
    /// A measurement of the round trip with a window that leaves no queue.
    probe: Option<Probe>,
}

#[derive(Debug)]
struct Probe {
    since: Instant,
    shortest: Duration,
    left: u32,
}

/// A request that is under way.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sent {
    delivered: u64,
    at: Instant,
}

impl Window {
    /// Of so many bytes for ever, or of as many as it takes.
    pub(super) fn new(fixed: Option<u64>) -> Self {
        Self {
            fixed: fixed.is_some(),
            bytes: fixed.unwrap_or(FIRST).max(1),
            delivered: 0,
            rates: [0.0; 3],
            round_ends: 0,
            growing: Some((0.0, 0)),
            shortest: None,
            probe: None,
        }
    }

    /// How many bytes may be under way.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How many one request should fetch.
    pub(super) fn batch(&self) -> u64 {
        let timely = scaled(self.rate(), BATCH_TIME);
        // Few enough requests for the workers; enough of them to be spread over connections.
        let few = self.bytes / (WORKERS - WORKERS / 4);
        let most = if self.bytes > 32 << 20 {
            LARGEST_BATCH
        } else {
            1 << 20
        };
        timely
            .min(self.bytes / 2)
            .max(few)
            .clamp(SMALLEST_BATCH, most)
            .min(self.bytes)
    }

    /// Bytes a second that were delivered at best of late.
    pub(super) fn rate(&self) -> f64 {
        self.rates.iter().copied().fold(0.0, f64::max)
    }

    /// A request is sent.
    pub(super) fn sent(&self, now: Instant) -> Sent {
        Sent {
            delivered: self.delivered,
            at: now,
        }
    }

    /// Its `bytes` have come.
    pub(super) fn landed(&mut self, sent: Sent, bytes: u64, now: Instant) {
        self.delivered += bytes;
        let took = now
            .saturating_duration_since(sent.at)
            .max(Duration::from_micros(1));
        if sent.delivered >= self.round_ends {
            self.round_ends = self.delivered;
            self.round_has_ended();
        }
        #[expect(
            clippy::cast_precision_loss,
            reason = "a rate of a few digits is meant"
        )]
        let rate = (self.delivered - sent.delivered) as f64 / took.as_secs_f64();
        self.rates[0] = self.rates[0].max(rate);
        self.measure(sent, took, now);
        if !self.fixed {
            // No burst: what is sent in one go waits for itself on the link.
            let more = if self.growing.is_some() {
                bytes
            } else {
                bytes / 4
            };
            self.bytes = self.target().min(self.bytes + more);
        }
    }

    fn round_has_ended(&mut self) {
        let rate = self.rate();
        if let Some((outdo, rounds)) = &mut self.growing {
            if rate > *outdo * 1.25 {
                (*outdo, *rounds) = (rate, 0);
            } else {
                *rounds += 1;
            }
            if *rounds >= PATIENCE {
                self.growing = None;
            }
        }
        self.rates.rotate_right(1);
        // Not forgotten at once: a round may have been short of things to fetch.
        self.rates[0] = self.rates[1] * 0.9;
    }

    fn measure(&mut self, sent: Sent, took: Duration, now: Instant) {
        match &mut self.shortest {
            Some((shortest, when)) if took <= *shortest => (*shortest, *when) = (took, now),
            Some((_, when))
                if self.probe.is_none() && now.saturating_duration_since(*when) > BELIEVED =>
            {
                self.probe = Some(Probe {
                    since: now,
                    shortest: Duration::MAX,
                    left: 8,
                });
            }
            Some(_) => {}
            None => self.shortest = Some((took, now)),
        }
        if let Some(probe) = self.probe.as_mut().filter(|probe| sent.at >= probe.since) {
            probe.shortest = probe.shortest.min(took);
            probe.left -= 1;
            if probe.left == 0 {
                self.shortest = Some((probe.shortest, now));
                self.probe = None;
            }
        }
    }

    fn target(&self) -> u64 {
        let Some((shortest, _)) = self.shortest else {
            return self.bytes;
        };
        let carried = scaled(self.rate(), shortest);
        let target = if self.probe.is_some() {
            carried / 2
        } else if self.growing.is_some() {
            (carried * 2).max(self.bytes)
        } else {
            carried + carried / 10 + self.batch()
        };
        target.clamp(2 * SMALLEST_BATCH, LARGEST)
    }
}

/// What comes at `rate` in `time`.
fn scaled(rate: f64, time: Duration) -> u64 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "neither negative nor near the limits; casts of floats saturate"
    )]
    let bytes = (rate * time.as_secs_f64()) as u64;
    bytes
}

#[cfg(not(loom))]
#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;

    /// A link in virtual time: what is requested comes in order, at `rate`, no sooner than a round trip later.
    fn run(rate: f64, trip: Duration, seconds: u64) -> (f64, Duration, Window) {
        let beginning = Instant::now();
        let mut window = Window::new(None);
        let mut now = beginning;
        let mut free = beginning;
        let mut under_way: VecDeque<(Sent, u64, Instant)> = VecDeque::new();
        let (mut in_flight, mut delivered) = (0, 0);
        let end = beginning + Duration::from_secs(seconds);
        let mut queued = Duration::ZERO;
        while now < end {
            while in_flight + window.batch() <= window.bytes() && under_way.len() < 32 {
                let bytes = window.batch();
                free = free.max(now + trip) + Duration::from_secs_f64(bytes as f64 / rate);
                under_way.push_back((window.sent(now), bytes, free));
                in_flight += bytes;
            }
            let (sent, bytes, comes) = under_way.pop_front().expect("something is under way");
            now = now.max(comes);
            in_flight -= bytes;
            delivered += bytes;
            window.landed(sent, bytes, now);
            if now > beginning + Duration::from_secs(2) && window.probe.is_none() {
                queued = queued.max((now - sent.at).saturating_sub(trip));
            }
        }
        let share = delivered as f64 / rate / seconds as f64;
        (share, queued, window)
    }

    #[test]
    fn it_fills_a_link_and_leaves_no_queue() {
        for (mbits, millis) in [(1000, 30), (1000, 100), (1000, 1), (100, 30), (10_000, 10)] {
            let trip = Duration::from_millis(millis);
            let (share, queued, window) = run(f64::from(mbits) * 125_000.0, trip, 25);
            assert!(
                share > 0.92,
                "{mbits} Mbit/s at {millis} ms: {share} {window:?}"
            );
            let most = trip / 4
                + 4 * BATCH_TIME
                + Duration::from_secs_f64(
                    3.0 * SMALLEST_BATCH as f64 / (f64::from(mbits) * 125_000.0),
                );
            assert!(
                queued < most,
                "{mbits} Mbit/s at {millis} ms: {queued:?} in the queue"
            );
        }
    }

    #[test]
    fn a_window_that_is_given_stays() {
        let mut window = Window::new(Some(300_000));
        let now = Instant::now();
        for _ in 0..100 {
            let sent = window.sent(now);
            window.landed(sent, 64 << 10, now + Duration::from_millis(5));
        }
        assert_eq!(window.bytes(), 300_000);
        assert!(window.batch() <= 300_000);
        assert_eq!(Window::new(Some(5000)).batch(), 5000);
    }
}
