//! What is measured of a migration, and how many measurements become one line.

/// One migration, in the units of the figures below.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Sample {
    pub(super) total: f64,
    pub(super) session: Option<f64>,
    pub(super) wall: f64,
    pub(super) blackout: f64,
    pub(super) stall: f64,
    pub(super) before: f64,
    pub(super) wire: f64,
    pub(super) written: f64,
    pub(super) cpu: f64,
    pub(super) cpu_outside: f64,
    pub(super) cpu_send: Option<f64>,
    pub(super) cpu_receive: Option<f64>,
    pub(super) resident_send: Option<f64>,
    pub(super) resident_receive: Option<f64>,
}

/// How a figure is shown.
#[derive(Debug, Clone, Copy)]
pub(super) struct Figure {
    /// Its name for programs.
    pub(super) key: &'static str,
    /// Its name for people, with the unit.
    pub(super) title: &'static str,
    /// Digits after the point.
    pub(super) decimals: usize,
    /// Its value; modes without one have none.
    pub(super) of: fn(&Sample) -> Option<f64>,
}

/// All of them, in the order of the table.
pub(super) const ALL: [Figure; 14] = [
    figure("total_ms", "total, ms", 0, |sample| Some(sample.total)),
    figure("session_ms", "  by the sender's report, ms", 0, |sample| {
        sample.session
    }),
    figure("wall_ms", "  until the commands ended, ms", 0, |sample| {
        Some(sample.wall)
    }),
    figure("blackout_ms", "blackout, ms", 1, |sample| {
        Some(sample.blackout)
    }),
    figure(
        "stall_after_ms",
        "longest stall, 2 s after, ms",
        1,
        |sample| Some(sample.stall),
    ),
    figure(
        "stall_before_ms",
        "longest stall, 1 s before, ms",
        1,
        |sample| Some(sample.before),
    ),
    figure(
        "guest_writes_mb_s",
        "guest really writes, MB/s",
        0,
        |sample| Some(sample.written),
    ),
    figure("wire_mib", "on the wire, MiB", 1, |sample| {
        Some(sample.wire)
    }),
    figure("cpu_s", "processor time, s", 2, |sample| Some(sample.cpu)),
    figure(
        "cpu_outside_guest_s",
        "  outside the guest, s",
        2,
        |sample| Some(sample.cpu_outside),
    ),
    figure("cpu_send_s", "  memferry send, s", 2, |sample| {
        sample.cpu_send
    }),
    figure("cpu_receive_s", "  memferry receive, s", 2, |sample| {
        sample.cpu_receive
    }),
    figure("resident_send_mib", "resident, send, MiB", 1, |sample| {
        sample.resident_send
    }),
    figure(
        "resident_receive_mib",
        "resident, receive, MiB",
        1,
        |sample| sample.resident_receive,
    ),
];

const fn figure(
    key: &'static str,
    title: &'static str,
    decimals: usize,
    of: fn(&Sample) -> Option<f64>,
) -> Figure {
    Figure {
        key,
        title,
        decimals,
        of,
    }
}

/// Several values of one figure.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) least: f64,
    pub(super) most: f64,
}

impl Spread {
    /// Nothing of nothing.
    pub(super) fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let (&least, &most) = (values.first()?, values.last()?);
        let middle = values.len() / 2;
        let median = if values.len().is_multiple_of(2) {
            f64::midpoint(values[middle - 1], values[middle])
        } else {
            values[middle]
        };
        Some(Self {
            median,
            least,
            most,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_whatever_the_order() {
        let spread = Spread::of([9.0, 1.0, 2.0]).unwrap();
        let expected = Spread {
            median: 2.0,
            least: 1.0,
            most: 9.0,
        };
        assert_eq!(spread, expected);
    }

    #[test]
    fn of_an_even_number_the_median_is_between_the_two_in_the_middle() {
        assert_eq!(Spread::of([4.0, 1.0, 2.0, 9.0]).unwrap().median, 3.0);
    }

    #[test]
    fn nothing_has_no_median() {
        assert_eq!(Spread::of([]), None);
    }
}
