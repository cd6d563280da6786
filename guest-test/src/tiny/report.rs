//! What tiny guests print, and whether it can be true.

use std::collections::BTreeMap;

/// What a processor of a guest says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Which guest: the first word of the line.
    pub guest: String,
    /// Which processor.
    pub cpu: u64,
    /// What it has done, in its whole life.
    pub ticks: u64,
    /// What it has found to be wrong.
    pub errors: u64,
    /// The time stamp counter as it printed this.
    pub tsc: u64,
    /// What only some guests tell: `sweeps`, `clock`, `touched`.
    pub more: BTreeMap<String, u64>,
}

/// Why what a guest printed cannot be that of a guest that was moved as it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Wrong {
    /// A line is torn, or nothing that a guest prints.
    #[error("this is no report: {0:?}")]
    NoReport(String),
    /// It has found something itself.
    #[error("the guest found errors: {0}")]
    Errors(String),
    /// Something went back that only goes on.
    #[error("{what} of processor {cpu} went back from {before:#x} to {after:#x}")]
    WentBack {
        /// What.
        what: String,
        /// Whose.
        cpu: u64,
        /// As it was.
        before: u64,
        /// As it was then.
        after: u64,
    },
}

impl Report {
    /// Reads a line.
    ///
    /// # Errors
    /// If it is none.
    pub fn parse(line: &str) -> Result<Self, Wrong> {
        let torn = || Wrong::NoReport(line.to_owned());
        let mut words = line.split(' ');
        let guest = words.next().filter(|name| !name.is_empty());
        let guest = guest.ok_or_else(torn)?.to_owned();
        let mut more = BTreeMap::new();
        for word in words {
            let (name, value) = word.split_once('=').ok_or_else(torn)?;
            let value = u64::from_str_radix(value, 16).map_err(|_| torn())?;
            if more.insert(name.to_owned(), value).is_some() {
                return Err(torn());
            }
        }
        let mut known = |name| more.remove(name).ok_or_else(torn);
        Ok(Self {
            guest,
            cpu: known("cpu")?,
            ticks: known("ticks")?,
            errors: known("errors")?,
            tsc: known("tsc")?,
            more,
        })
    }

    /// What only goes on, by name.
    fn counts(&self) -> impl Iterator<Item = (&str, u64)> {
        let more = self
            .more
            .iter()
            .map(|(name, count)| (name.as_str(), *count));
        [("ticks", self.ticks), ("tsc", self.tsc)]
            .into_iter()
            .chain(more)
    }
}

/// What a guest has printed so far, wherever it ran: checked line by line.
#[derive(Debug, Default)]
pub struct Logbook {
    /// What has come of the next line.
    begun: Vec<u8>,
    last: BTreeMap<u64, Report>,
    lines: u64,
}

impl Logbook {
    /// The guest has printed this, next.
    ///
    /// # Errors
    /// If it cannot be.
    pub fn read(&mut self, bytes: &[u8]) -> Result<(), Wrong> {
        for &byte in bytes {
            if byte != b'\n' {
                self.begun.push(byte);
                continue;
            }
            let line = String::from_utf8_lossy(&self.begun).into_owned();
            self.begun.clear();
            self.line(&line)?;
        }
        Ok(())
    }

    fn line(&mut self, line: &str) -> Result<(), Wrong> {
        let report = Report::parse(line)?;
        if report.errors > 0 || report.guest == "wrong" {
            return Err(Wrong::Errors(line.to_owned()));
        }
        if let Some(last) = self.last.get(&report.cpu) {
            let before: BTreeMap<&str, u64> = last.counts().collect();
            for (what, after) in report.counts() {
                let before = before.get(what).copied().unwrap_or(0);
                if after < before {
                    return Err(Wrong::WentBack {
                        what: what.to_owned(),
                        cpu: report.cpu,
                        before,
                        after,
                    });
                }
            }
        }
        self.lines += 1;
        self.last.insert(report.cpu, report);
        Ok(())
    }

    /// How many lines there were.
    #[must_use]
    pub fn lines(&self) -> u64 {
        self.lines
    }

    /// What each processor said last.
    pub fn last(&self) -> impl Iterator<Item = &Report> {
        self.last.values()
    }

    /// The least of what `cpus` processors said last of `what`; 0 if one of them has not said anything yet.
    #[must_use]
    pub fn least(&self, cpus: u64, what: &str) -> u64 {
        let of = |cpu| {
            let report = self.last.get(&cpu)?;
            report
                .counts()
                .find_map(|(name, count)| (name == what).then_some(count))
        };
        (0..cpus).map(|cpu| of(cpu).unwrap_or(0)).min().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = "stomper cpu=1 ticks=1f errors=0 tsc=abc sweeps=2";

    #[test]
    fn a_line_becomes_a_report() {
        let report = Report::parse(LINE).unwrap();
        assert_eq!(report.guest, "stomper");
        assert_eq!(
            (report.cpu, report.ticks, report.errors, report.tsc),
            (1, 31, 0, 0xabc)
        );
        assert_eq!(report.more["sweeps"], 2);
    }

    #[test]
    fn torn_lines_are_refused() {
        for line in [
            "",
            "stomper",
            "stomper cpu=1 ticks=1f errors=0",
            "stomper cpu=1 ticks=1f errors=0 tsc=",
            "stomper cpu=1 ticks=1f errors=0 tsc=5 cpu=1",
            "stomper cpu=1 tistomper cpu=0 ticks=1f errors=0 tsc=5",
        ] {
            assert!(
                matches!(Report::parse(line), Err(Wrong::NoReport(_))),
                "{line}"
            );
        }
    }

    fn read(lines: &[&str]) -> Result<Logbook, Wrong> {
        let mut book = Logbook::default();
        for line in lines {
            book.read(line.as_bytes())?;
            book.read(b"\n")?;
        }
        Ok(book)
    }

    #[test]
    fn a_line_that_is_cut_by_a_migration_is_one_line() {
        let mut book = Logbook::default();
        book.read(&LINE.as_bytes()[..20]).unwrap();
        assert_eq!(book.lines(), 0);
        book.read(&LINE.as_bytes()[20..]).unwrap();
        book.read(b"\n").unwrap();
        assert_eq!(book.least(2, "ticks"), 0);
        assert_eq!(book.last().count(), 1);
        assert_eq!((book.lines(), book.last[&1].ticks), (1, 31));
    }

    #[test]
    fn what_goes_back_is_told() {
        let before = "timer cpu=0 ticks=5 errors=0 tsc=7 clock=9";
        for (after, what) in [
            ("timer cpu=0 ticks=4 errors=0 tsc=7 clock=9", "ticks"),
            ("timer cpu=0 ticks=5 errors=0 tsc=6 clock=9", "tsc"),
            ("timer cpu=0 ticks=5 errors=0 tsc=7 clock=8", "clock"),
        ] {
            let wrong = read(&[before, after]).unwrap_err();
            let Wrong::WentBack { what: told, .. } = wrong else {
                panic!("{wrong}");
            };
            assert_eq!(told, what);
        }
    }

    #[test]
    fn processors_are_looked_at_one_by_one() {
        let book = read(&[
            "timer cpu=0 ticks=50 errors=0 tsc=7",
            "timer cpu=1 ticks=4 errors=0 tsc=6",
        ]);
        assert_eq!(book.unwrap().least(2, "ticks"), 4);
    }

    #[test]
    fn what_the_guest_found_is_told() {
        let wrong =
            read(&["wrong cpu=0 ticks=5 errors=1 tsc=7 found=1 expected=2 version=3 page=4"]);
        assert!(matches!(wrong, Err(Wrong::Errors(_))));
    }
}
