//! Figures by place, and how they are shown.

use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::time::Duration;

use super::faults::{Faults, Processors};
use super::link::Shape;
use super::measure::Sample;
use super::options::{FrontEnd, Way};
use super::serial::Attaching;
use crate::bench::figure::Spread;

/// How far away the server is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Distance {
    /// On this machine, without a link.
    NextDoor,
    /// At the end of a link with a round trip of so many milliseconds.
    RoundTrip(u64),
}

/// What one sample is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Cell {
    pub(super) way: Way,
    pub(super) front_end: FrontEnd,
    pub(super) distance: Distance,
}

/// All samples.
#[derive(Debug, Default)]
pub(super) struct Results {
    samples: BTreeMap<Cell, Vec<Sample>>,
    /// Of plain TCP, in MB a second.
    plain: BTreeMap<Distance, Vec<f64>>,
    faults: BTreeMap<Processors, Faults>,
    attaching: Option<Attaching>,
    /// In bits a chunk.
    residency: Option<f64>,
}

/// A line of the table: its title, decimals, and values.
type Figure = (&'static str, usize, fn(&[Sample]) -> Vec<f64>);

const FIGURES: [Figure; 5] = [
    ("open, ms", 1, |samples| each(samples, |sample| sample.open)),
    ("first access p50, ms", 2, |samples| touches(samples, 50.0)),
    ("first access p99, ms", 2, |samples| touches(samples, 99.0)),
    ("read, MB/s", 0, |samples| {
        each(samples, |sample| sample.read)
    }),
    ("write, MB/s", 0, |samples| {
        each(samples, |sample| sample.write)
    }),
];

const TITLE_WIDTH: usize = 24;
const COLUMN_WIDTH: usize = 20;

impl Distance {
    pub(super) fn shape(self, rate: f64) -> Option<Shape> {
        let round_trip = Duration::from_millis(self.round_trip()?);
        Some(Shape { round_trip, rate })
    }

    /// For programs.
    pub(super) fn name(self) -> String {
        match self {
            Self::NextDoor => "next_door".to_owned(),
            Self::RoundTrip(milliseconds) => format!("{milliseconds}ms"),
        }
    }

    pub(super) fn round_trip(self) -> Option<u64> {
        match self {
            Self::NextDoor => None,
            Self::RoundTrip(milliseconds) => Some(milliseconds),
        }
    }
}

impl fmt::Display for Distance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NextDoor => f.write_str("next door"),
            Self::RoundTrip(milliseconds) => write!(f, "{milliseconds} ms"),
        }
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            way,
            front_end,
            distance,
        } = self;
        write!(f, "{way} {front_end}, {distance}")
    }
}

impl Results {
    pub(super) fn add(&mut self, cell: Cell, sample: Sample) {
        self.samples.entry(cell).or_default().push(sample);
    }

    pub(super) fn add_plain(&mut self, distance: Distance, rate: f64) {
        self.plain.entry(distance).or_default().push(rate);
    }

    pub(super) fn add_faults(&mut self, processors: Processors, faults: Faults) {
        self.faults.insert(processors, faults);
    }

    pub(super) fn add_attaching(&mut self, attaching: Attaching) {
        self.attaching = Some(attaching);
    }

    pub(super) fn add_residency(&mut self, bits: f64) {
        self.residency = Some(bits);
    }

    pub(super) fn residency(&self) -> Option<f64> {
        self.residency
    }

    /// How long attaching a device takes, in milliseconds: ours, and the least.
    pub(super) fn attaching(&self) -> Option<(f64, f64)> {
        let attaching = self.attaching.as_ref()?;
        let median = |values| percentile(values, 50.0);
        Some((median(&attaching.ours)?, median(&attaching.least)?))
    }

    /// What a fault costs through a slice, in units of what it costs a bare loop.
    pub(super) fn fault_ratio(&self, processors: Processors, percent: f64) -> Option<f64> {
        let faults = self.faults.get(&processors)?;
        Some(percentile(&faults.slice, percent)? / percentile(&faults.bare, percent)?)
    }

    /// The median of a figure.
    pub(super) fn median(&self, cell: Cell, of: fn(&Sample) -> f64) -> Option<f64> {
        let samples = self.samples.get(&cell)?;
        Some(Spread::of(samples.iter().map(of))?.median)
    }

    /// A block a figure: a line a way and front end, a column a distance.
    pub(super) fn render(&self) -> String {
        let mut distances: Vec<Distance> = self.samples.keys().map(|cell| cell.distance).collect();
        distances.sort_unstable();
        distances.dedup();
        let mut rows: Vec<(Way, FrontEnd)> = self
            .samples
            .keys()
            .map(|cell| (cell.way, cell.front_end))
            .collect();
        rows.dedup();
        let mut table = String::new();
        for (title, decimals, of) in FIGURES {
            line(&mut table, title, distances.iter().map(Distance::to_string));
            for &(way, front_end) in &rows {
                let cells = distances.iter().map(|&distance| {
                    let samples = self.samples.get(&Cell {
                        way,
                        front_end,
                        distance,
                    });
                    shown(&of(samples.map_or(&[], Vec::as_slice)), decimals)
                });
                line(&mut table, &format!("  {way} {front_end}"), cells);
            }
            if title.starts_with("read") {
                let none = Vec::new();
                let cells = distances
                    .iter()
                    .map(|distance| shown(self.plain.get(distance).unwrap_or(&none), decimals));
                line(&mut table, "  plain TCP", cells);
            }
        }
        table
    }
}

fn line(table: &mut String, title: &str, cells: impl Iterator<Item = String>) {
    let cells: String = cells.map(|cell| format!("{cell:<COLUMN_WIDTH$}")).collect();
    let line = format!("{title:<TITLE_WIDTH$}{cells}");
    writeln!(table, "{}", line.trim_end()).expect("text grows");
}

fn shown(values: &[f64], decimals: usize) -> String {
    match Spread::of(values.iter().copied()) {
        None => "-".to_owned(),
        Some(Spread {
            median,
            least,
            most,
        }) if least < most => {
            format!("{median:.decimals$} ({least:.decimals$}–{most:.decimals$})")
        }
        Some(Spread { median, .. }) => format!("{median:.decimals$}"),
    }
}

fn each(samples: &[Sample], of: fn(&Sample) -> f64) -> Vec<f64> {
    samples.iter().map(of).collect()
}

/// One percentile of the first accesses of each run.
fn touches(samples: &[Sample], percent: f64) -> Vec<f64> {
    let of_run = samples
        .iter()
        .filter_map(|sample| percentile(&sample.touches, percent));
    of_run.collect()
}

/// The value that so many percent of the values do not exceed.
pub(super) fn percentile(values: &[f64], percent: f64) -> Option<f64> {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a count of measurements, and a part of it"
    )]
    let rank = (values.len() as f64 * percent / 100.0).ceil() as usize;
    values.get(rank.max(1) - 1).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_a_value_that_was_measured() {
        let values: Vec<f64> = (1..=200).rev().map(f64::from).collect();
        assert_eq!(percentile(&values, 50.0), Some(100.0));
        assert_eq!(percentile(&values, 99.0), Some(198.0));
        assert_eq!(percentile(&[7.0], 99.0), Some(7.0));
        assert_eq!(percentile(&[], 50.0), None);
    }

    #[test]
    fn a_row_holds_the_figures_of_its_own_place() {
        let mut results = Results::default();
        for (milliseconds, read) in [(0, 100.0), (30, 90.0), (30, 92.0), (30, 110.0)] {
            let cell = Cell {
                way: Way::Direct,
                front_end: FrontEnd::Fuse,
                distance: Distance::RoundTrip(milliseconds),
            };
            results.add(
                cell,
                Sample {
                    read,
                    ..Sample::default()
                },
            );
        }
        let table = results.render();
        let row = table
            .lines()
            .skip_while(|line| !line.starts_with("read"))
            .nth(1);
        let words: Vec<_> = row.unwrap().split_whitespace().collect();
        assert_eq!(words, ["direct", "fuse", "100", "92", "(90–110)"]);
    }
}
