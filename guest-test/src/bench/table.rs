//! The measurements of a suite, and the table that people read.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::Mode;
use super::figure::{self, Sample, Spread};

/// Samples by rate and mode.
#[derive(Debug, Default)]
pub(super) struct Results(BTreeMap<(u64, Mode), Cell>);

#[derive(Debug, Default)]
struct Cell {
    samples: Vec<Sample>,
    failures: usize,
}

impl Results {
    /// Notes a run; none is one that failed.
    pub(super) fn add(&mut self, rate: u64, mode: Mode, sample: Option<Sample>) {
        let cell = self.0.entry((rate, mode)).or_default();
        cell.failures += usize::from(sample.is_none());
        cell.samples.extend(sample);
    }

    pub(super) fn samples(&self, rate: u64, mode: Mode) -> &[Sample] {
        self.0.get(&(rate, mode)).map_or(&[], |cell| &cell.samples)
    }

    pub(super) fn failures_of(&self, mode: Mode) -> usize {
        let cells = self.0.iter().filter(|((_, of), _)| *of == mode);
        cells.map(|(_, cell)| cell.failures).sum()
    }

    fn failures(&self, rate: u64, mode: Mode) -> usize {
        self.0.get(&(rate, mode)).map_or(0, |cell| cell.failures)
    }
}

const TITLE_WIDTH: usize = 32;
const COLUMN_WIDTH: usize = 24;

/// A table a rate: a line a figure, a column a mode; median and spread.
pub(super) fn render(results: &Results, rates: &[u64], modes: &[Mode]) -> String {
    let mut table = String::new();
    for &rate in rates {
        let mut line = |title: &str, cells: &mut dyn Iterator<Item = String>| {
            let cells: String = cells.map(|cell| format!("{cell:<COLUMN_WIDTH$}")).collect();
            let line = format!("{title:<TITLE_WIDTH$}{cells}");
            writeln!(table, "{}", line.trim_end()).expect("text grows");
        };
        line("", &mut std::iter::empty());
        let title = format!("guest writes {rate} MB/s");
        line(&title, &mut modes.iter().map(|mode| mode.name().to_owned()));
        for figure in figure::ALL {
            let mut cells = modes.iter().map(|&mode| {
                let samples = results.samples(rate, mode);
                cell(
                    Spread::of(samples.iter().filter_map(figure.of)),
                    figure.decimals,
                )
            });
            line(figure.title, &mut cells);
        }
        let mut cells = modes.iter().map(|&mode| {
            let (whole, failed) = (
                results.samples(rate, mode).len(),
                results.failures(rate, mode),
            );
            format!("{whole}, {failed} failed")
        });
        line("runs", &mut cells);
    }
    table.push('\n');
    table
}

fn cell(spread: Option<Spread>, decimals: usize) -> String {
    match spread {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn total(total: f64) -> Option<Sample> {
        Some(Sample {
            total,
            ..Sample::default()
        })
    }

    #[test]
    fn a_column_holds_median_and_spread_of_its_own_mode_and_rate() {
        let mut results = Results::default();
        for milliseconds in [900.0, 1000.0, 1300.0] {
            results.add(10, Mode::Memferry, total(milliseconds));
        }
        results.add(10, Mode::Precopy, total(2000.0));
        results.add(100, Mode::Memferry, total(7.0));
        let table = render(&results, &[10], &[Mode::Memferry, Mode::Precopy]);
        let line = table
            .lines()
            .find(|line| line.starts_with("total"))
            .unwrap();
        let words: Vec<_> = line.split_whitespace().skip(2).collect();
        assert_eq!(words, ["1000", "(900–1300)", "2000"]);
    }

    #[test]
    fn failed_runs_are_counted_and_have_no_figures() {
        let mut results = Results::default();
        results.add(10, Mode::Multifd, None);
        results.add(10, Mode::Multifd, None);
        let table = render(&results, &[10], &[Mode::Multifd]);
        let line = table.lines().find(|line| line.starts_with("runs")).unwrap();
        assert!(line.ends_with("0, 2 failed"), "{line}");
        assert_eq!(results.failures_of(Mode::Multifd), 2);
    }
}
