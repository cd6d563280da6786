//! What it costs a guest to be tracked, what a harvest costs, and how long it stands still when it moves.
//!
//! ```sh
//! cargo run --release -p vmm-integration --example bench-embed -- --quick
//! ```
//!
//! Guests of a few instructions on KVM; those that move are `minivmm`'s, in processes of their own, and check themselves all
//! the time. Measured side by side in one run; a table for people on standard error, lines of JSON (`--json`) for programs, one a
//! goal at the end. A KVM that emulates its guests' instructions slows them down, and not what is measured here of us.
#![allow(clippy::unwrap_used, reason = "what cannot be measured is no result")]
#![allow(dead_code, reason = "the machines are those of the tests")]

mod blackout;
mod listener;
#[path = "../../tests/trackers/machine.rs"]
mod machine;
#[path = "../../tests/trackers/measure.rs"]
mod measure;
mod memory;

use clap::Parser;
use guest_test::bench::Goal;
use machine::Mode;
use measure::{Costs, How};
use serde_json::json;

use blackout::Blackouts;

/// The most that a tracker may keep, in parts of the guest's memory.
const BOOKKEEPING: f64 = 0.0002;
/// The longest blackout on loopback, in milliseconds: with post-copy, and without where the dirty set fits the budget.
const POST_COPY_MS: f64 = 10.0;
const PRE_COPY_MS: f64 = 30.0;

/// What tracking costs a guest, what a harvest costs, and how long a guest stands still when it moves
#[derive(Debug, Parser)]
struct Arguments {
    /// Fewer migrations: a smoke test of about a minute
    #[arg(long)]
    quick: bool,
    /// One JSON line a measurement on standard output
    #[arg(long)]
    json: bool,
    /// End with exit code 1 if a goal is not met
    #[arg(long)]
    require_goals: bool,
    /// How often a guest moves, of each kind
    #[arg(long, value_name = "N")]
    migrations: Option<usize>,
    /// The memory of guests that move, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    memory: u64,
}

fn main() -> std::process::ExitCode {
    let arguments = Arguments::parse();
    let mut goals = Vec::new();
    let say = |line: serde_json::Value| {
        if arguments.json {
            println!("{line}");
        }
    };

    // All that a guest of these machines has in a region.
    let len = 256 << 20;
    for (name, how) in [
        ("log", How::Log),
        ("log_cleared_with_read", How::LogClearedWithRead),
        ("rings", How::Rings),
    ] {
        // A program, not a system: a KVM that emulates the latter runs this on the processor.
        let costs = measure::measure(how, Mode::User, len, 1 << 12);
        show(name, &costs);
        say(json!({
            "tracker": name, "memory": len, "dirty_pages": costs.dirty_pages,
            "start_ms_per_gib": millis(costs.per_gib(costs.start)),
            "clean_take_ms_per_gib": millis(costs.per_gib(costs.clean)),
            "take_ns_per_dirty_page": costs.per_page().as_nanos(),
            "first_write_ns": costs.first_write.as_nanos(),
            "guest_slowdown": costs.slowdown(),
        }));
    }

    let vcpus = 4;
    for (name, rings) in [("log", false), ("rings", true)] {
        let share = memory::of_tracking(8 << 30, vcpus, rings);
        eprintln!("{name}: keeps {:.4} % of 8 GiB", share * 100.0);
        let name = format!("embed_bookkeeping_{name}");
        goals.push(Goal::at_most(name, Some(share), BOOKKEEPING));
    }

    let migrations = arguments
        .migrations
        .unwrap_or(if arguments.quick { 5 } else { 20 });
    for (name, post_copy, limit) in [
        ("post_copy", "after-one-pass", POST_COPY_MS),
        ("pre_copy", "never", PRE_COPY_MS),
    ] {
        let blackouts = Blackouts::measure(arguments.memory, migrations, post_copy);
        let (p50, p99) = (blackouts.percentile(50), blackouts.percentile(99));
        eprintln!(
            "{name}: {migrations} migrations of {} MiB, blackout p50 {p50:.1} ms, p99 {p99:.1} ms; {:.2} s each; \
             console silent for p50 {:.1} ms, p99 {:.1} ms, otherwise {:.1} ms",
            arguments.memory,
            blackouts.total(),
            blackouts.seen(50),
            blackouts.seen(99),
            blackouts.between()
        );
        say(json!({
            "migrations": name, "count": migrations, "memory_mib": arguments.memory,
            "blackout_ms": {"p50": p50, "p99": p99},
            "console_silent_ms": {"p50": blackouts.seen(50), "p99": blackouts.seen(99), "otherwise": blackouts.between()},
            "total_s": blackouts.total(), "verified": true,
        }));
        let name = format!("embed_blackout_p50_ms_{name}");
        goals.push(Goal::at_most(name, Some(p50), limit));
    }

    for goal in &goals {
        println!("{}", goal.line());
    }
    let missed = !goals.iter().all(Goal::is_met);
    u8::from(arguments.require_goals && missed).into()
}

fn show(name: &str, costs: &Costs) {
    eprintln!(
        "{name}: start {:.2} ms/GiB, clean take {:.2} ms/GiB, {} ns a dirty page, first write {} ns more, guest slowed down {:.2} times",
        millis(costs.per_gib(costs.start)),
        millis(costs.per_gib(costs.clean)),
        costs.per_page().as_nanos(),
        costs.first_write.as_nanos(),
        costs.slowdown()
    );
}

fn millis(time: std::time::Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
