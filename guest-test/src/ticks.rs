//! What a migration did to a guest, seen from the outside by its ticks.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::serial::{Log, Tick};

/// What a guest's user noticed of its move.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub struct Passage {
    /// How long it stood still.
    pub blackout: Duration,
    /// The two seconds after it.
    pub brownout: Steadiness,
    /// The second before the migration, to compare with.
    pub before: Steadiness,
}

/// How long to watch a guest after it has moved.
const AFTER: Duration = Duration::from_secs(2);
const ARRIVAL_LIMIT: Duration = Duration::from_secs(30);

/// Watches a guest at the destination until it has run there for two seconds, and sums up a migration that `began`
/// then.
///
/// # Errors
/// If it does not tick there within half a minute, stops again, or its ticks do not continue those of the source.
pub fn passage(source: &Log<Tick>, destination: &Log<Tick>, began: Instant) -> Result<Passage> {
    let first = destination
        .wait(Instant::now() + ARRIVAL_LIMIT, |ticks| {
            ticks.first().copied()
        })
        .context("the guest does not tick at the destination")?;
    let until = first.at + AFTER;
    destination
        .wait(until + ARRIVAL_LIMIT, |ticks| {
            ticks.last().filter(|last| last.at >= until).map(|_| ())
        })
        .context("the guest stopped ticking at the destination")?;
    let (before, after) = (source.all(), destination.all());
    check_continuity(&before, &after)?;
    let second = Duration::from_secs(1);
    Ok(Passage {
        blackout: blackout(&before, &after)?,
        brownout: steadiness(&after, first.at, AFTER),
        before: steadiness(&before, began - second, second),
    })
}

/// How evenly ticks came during a while.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub struct Steadiness {
    /// The longest time between two ticks.
    pub longest_gap: Duration,
    /// Ticks that came.
    pub ticks: usize,
    /// How long was looked at.
    pub window: Duration,
}

/// How long the guest stood still: from its last tick at the source to its first at the destination.
///
/// # Errors
/// If either has no tick.
pub fn blackout(source: &[Tick], destination: &[Tick]) -> Result<Duration> {
    let (Some(last), Some(first)) = (source.last(), destination.first()) else {
        bail!("no blackout without ticks on both sides");
    };
    Ok(first.at.saturating_duration_since(last.at))
}

/// How evenly ticks came in the `window` after `from`.
#[must_use]
pub fn steadiness(ticks: &[Tick], from: Instant, window: Duration) -> Steadiness {
    let inside: Vec<Instant> = ticks
        .iter()
        .map(|tick| tick.at)
        .filter(|&at| at >= from && at <= from + window)
        .collect();
    // A guest that stops for good has a gap up to the end of the window.
    let until = ticks.last().map_or(from, |last| last.at.min(from + window));
    let edges = std::iter::once(from)
        .chain(inside.iter().copied())
        .chain([until]);
    let moments: Vec<Instant> = edges.collect();
    Steadiness {
        longest_gap: moments
            .windows(2)
            .map(|pair| pair[1].saturating_duration_since(pair[0]))
            .max()
            .unwrap_or_default(),
        ticks: inside.len(),
        window,
    }
}

/// Checks that the destination's ticks continue the source's: one sequence without a number twice or left out.
/// The one tick that was being sent when the guest moved may be torn, half on either side, and then counts for
/// neither.
///
/// # Errors
/// Names the two numbers that do not follow each other.
pub fn check_continuity(source: &[Tick], destination: &[Tick]) -> Result<()> {
    for (side, ticks) in [("source", source), ("destination", destination)] {
        ensure!(!ticks.is_empty(), "the {side} sent no tick");
        for pair in ticks.windows(2) {
            let (before, after) = (pair[0].number, pair[1].number);
            ensure!(
                after == before + 1,
                "at the {side}, tick {after} came after {before}"
            );
        }
    }
    if let (Some(last), Some(first)) = (source.last(), destination.first()) {
        let step = first.number.checked_sub(last.number);
        ensure!(
            matches!(step, Some(1 | 2)),
            "the source's last tick is {}, the destination's first is {}",
            last.number,
            first.number
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ticks(start: Instant, numbers: &[(u64, u64)]) -> Vec<Tick> {
        numbers
            .iter()
            .map(|&(number, millisecond)| Tick {
                number,
                at: start + Duration::from_millis(millisecond),
            })
            .collect()
    }

    #[test]
    fn the_blackout_is_from_the_last_tick_here_to_the_first_there() {
        let start = Instant::now();
        let source = ticks(start, &[(1, 0), (2, 1)]);
        let destination = ticks(start, &[(3, 41), (4, 42)]);
        assert_eq!(
            blackout(&source, &destination).unwrap(),
            Duration::from_millis(40)
        );
    }

    #[test]
    fn a_guest_that_goes_back_in_time_is_found_out() {
        let start = Instant::now();
        let source = ticks(start, &[(1, 0), (2, 1), (3, 2)]);
        let destination = ticks(start, &[(3, 41), (4, 42)]);
        assert!(check_continuity(&source, &destination).is_err());
    }

    #[test]
    fn a_tick_torn_by_the_move_is_forgiven_and_two_are_not() {
        let start = Instant::now();
        let source = ticks(start, &[(1, 0), (2, 1)]);
        assert!(check_continuity(&source, &ticks(start, &[(4, 9)])).is_ok());
        assert!(check_continuity(&source, &ticks(start, &[(5, 9)])).is_err());
    }

    #[test]
    fn a_gap_at_the_edge_of_the_window_counts() {
        let start = Instant::now();
        let ticks = ticks(start, &[(1, 30), (2, 31), (3, 100)]);
        let steadiness = steadiness(&ticks, start, Duration::from_millis(60));
        assert_eq!(steadiness.longest_gap, Duration::from_millis(30));
        assert_eq!(steadiness.ticks, 2);
    }
}
