//! How long a guest of `minivmm` stands still when it moves.

use std::path::PathBuf;

use guest_test::tiny::TinyGuest;
use guest_test::tiny::report::Logbook;
use serde_json::{Value, json};

#[path = "../../tests/minivmm/vmm.rs"]
mod vmm;

use vmm::{Shape, Vmm, migrate};

/// Pages that the guest writes all the time: 8 MiB.
const WORKING_SET: u64 = 2048;
/// The longest blackout that is aimed at where all has to be sent before the guest runs on, in milliseconds.
const DOWNTIME: u64 = 20;

/// What some migrations took, in milliseconds.
#[derive(Debug, Default)]
pub(crate) struct Blackouts {
    told: Vec<f64>,
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
        let mut here = Vmm::boot(shape, TinyGuest::stomper(WORKING_SET), 64);
        let mut book = Logbook::default();
        let mut blackouts = Self::default();
        let plan = json!({"post_copy": post_copy, "downtime": DOWNTIME, "verify": "after"});
        here.read_until(&mut book, "the guest runs", |book| book.lines() > 1);
        for _ in 0..migrations {
            let mut there = Vmm::awaiting(shape);
            let (sent, _) = migrate(&here, &there, &plan);
            here.read_console(&mut book);
            let before = book.lines();
            there.read_until(&mut book, "the guest runs there", |book| {
                book.lines() > before
            });
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
