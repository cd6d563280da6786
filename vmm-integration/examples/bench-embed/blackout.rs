//! How long a guest of `minivmm` stands still when it moves.

use std::path::PathBuf;

use guest_test::tiny::TinyGuest;
use serde_json::{Value, json};

#[path = "../../tests/minivmm/vmm.rs"]
pub(crate) mod vmm;

use vmm::{Shape, Vmm, migrate};

use crate::listener::Listener;
use crate::millis;

/// Pages that the guest writes all the time: 8 MiB.
const WORKING_SET: u64 = 2048;
/// The longest blackout that is aimed at where all has to be sent before the guest runs on, in milliseconds.
const DOWNTIME: u64 = 20;
/// How often the guest prints a line: each takes it some 2 ms.
const EVERY: u64 = 8;

/// What some migrations took, in milliseconds.
#[derive(Debug, Default)]
pub(crate) struct Blackouts {
    told: Vec<f64>,
    seen: Vec<f64>,
    between: Vec<f64>,
    total: Vec<f64>,
}

impl Blackouts {
    /// Moves a guest with `memory` MiB so many times, each time to a new process. Three quarters of that hold data; it writes pages of
    /// a part as fast as it can, and checks what it has written.
    pub(crate) fn measure(memory: u64, migrations: usize, post_copy: &str) -> Self {
        vmm::PROGRAM.get_or_init(build);
        let size: &'static str = format!("{memory}M").leak();
        let shape = Shape {
            memory: size,
            filled: usize::try_from(memory << 20).unwrap() / 4 * 3,
            ..Shape::default()
        };
        let mut listener = Listener::new();
        let console = listener.path().to_owned();
        let console = ["--console", console.to_str().unwrap()];
        let guest = TinyGuest::stomper(WORKING_SET);
        let mut here = Vmm::boot_in(shape, guest, EVERY, Vmm::command(), &console);
        let mut blackouts = Self::default();
        let plan = json!({"post_copy": post_copy, "downtime": DOWNTIME, "verify": "after"});
        for _ in 0..migrations {
            let there = Vmm::awaiting_in(shape, Vmm::command(), &console);
            blackouts
                .between
                .extend(listener.hear(100).into_iter().map(millis));
            let (sent, _) = migrate(&here, &there, &plan);
            // Of the source, of the destination, and what lies between.
            let mut silences = listener.catch_up();
            silences.extend(listener.hear(10));
            blackouts
                .seen
                .extend(silences.into_iter().max().map(millis));
            blackouts.told.push(seconds(&sent, "blackout") * 1e3);
            blackouts.total.push(seconds(&sent, "total"));
            here = there;
        }
        blackouts
    }

    /// In milliseconds: the blackout that so many percent do not exceed.
    pub(crate) fn percentile(&self, percent: usize) -> f64 {
        at(&self.told, percent)
    }

    /// In milliseconds: the longest silence of the console while the guest moved that so many percent do not exceed. It has a line,
    /// as it is printed, in it, and the first faults.
    pub(crate) fn seen(&self, percent: usize) -> f64 {
        at(&self.seen, percent)
    }

    /// In milliseconds: the median time from line to line of a guest that nobody moves.
    pub(crate) fn between(&self) -> f64 {
        at(&self.between, 50)
    }

    /// In seconds: the median of whole migrations.
    pub(crate) fn total(&self) -> f64 {
        at(&self.total, 50)
    }
}

fn at(figures: &[f64], percent: usize) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len() - 1;
    sorted[(last * percent).div_ceil(100).min(last)]
}

/// The reference VMM as users get it.
fn build() -> PathBuf {
    let arguments = [
        "-p",
        "vmm-integration",
        "--features",
        "minivmm",
        "--bin",
        "minivmm",
    ];
    guest_test::command::build(&arguments).unwrap()
}

fn seconds(report: &Value, field: &str) -> f64 {
    report[field]
        .as_f64()
        .unwrap_or_else(|| panic!("{field}: {report}"))
}
