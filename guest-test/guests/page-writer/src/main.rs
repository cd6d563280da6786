//! The guest that gets migrated: the `/init` of a Linux with nothing else in it.
//!
//! It fills memory, goes on writing it at a set rate, verifies it all the time, and says so on the first serial
//! port, one line of `key=value` words each. On the second serial port it counts: a line a millisecond, `t` and a
//! number. A number never appears twice and none is left out, so whoever reads both ends of a migration sees how
//! long the guest stood still, which a guest's own clock does not show.
//!
//! Parameters come from the kernel's command line, sizes in bytes or with `K`, `M`, `G`: `writer.fill` (memory to
//! fill), `writer.set` (how much of it is written again), `writer.rate` (bytes a second, 0 as fast as it goes;
//! `none` not at all), `writer.check` (bytes a second to verify, 0 as fast as it goes).

mod memory;
#[allow(
    unsafe_code,
    reason = "the system calls that the standard library does not have"
)]
mod sys;

use std::fs::{File, OpenOptions, create_dir_all, read_to_string};
use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};

use memory::Memory;

const MILLISECOND: u64 = 1_000_000;
const SECOND: u64 = 1_000_000_000;
/// Often enough for a host that waits on a fact, seldom enough to cost nothing.
const STATUS_EVERY: u64 = 200 * MILLISECOND;
/// A damaged guest has thousands of wrong pages; the first few say what kind of damage it is.
const MISMATCHES_TOLD: u64 = 16;

/// The last tick sent.
static TICK: AtomicU64 = AtomicU64::new(0);
/// The longest time between two ticks by the guest's clock since the last report, in microseconds.
static LONGEST_GAP: AtomicU64 = AtomicU64::new(0);

fn main() {
    // The kernel panics when this returns, and QEMU ends: the host is told why first.
    let Err(reason) = run();
    let _unheard = serial("/dev/ttyS0").and_then(|mut port| {
        writeln!(port, "failed reason={reason}")?;
        sys::drain(&port)
    });
}

fn run() -> io::Result<std::convert::Infallible> {
    for (kind, at) in [
        (c"devtmpfs", c"/dev"),
        (c"proc", c"/proc"),
        (c"sysfs", c"/sys"),
    ] {
        create_dir_all(at.to_string_lossy().as_ref())?;
        sys::mount(kind, at)?;
    }
    let parameters = Parameters::parse(&read_to_string("/proc/cmdline")?)?;
    let mut report = serial("/dev/ttyS0")?;
    let ticks = serial("/dev/ttyS1")?;

    let began = sys::monotonic();
    let memory = Memory::fill(parameters.fill / 4096);
    let took = (sys::monotonic() - began) / MILLISECOND;
    std::thread::Builder::new().spawn(move || {
        if let Err(reason) = tick(ticks) {
            eprintln!("no more ticks: {reason}");
        }
    })?;
    writeln!(
        report,
        "ready boot_id={} fill={} pages={} fill_ms={took} uptime_ms={}",
        boot_id()?,
        parameters.fill,
        memory.pages(),
        sys::monotonic() / MILLISECOND
    )?;
    write_and_verify(memory, &parameters, &mut report)
}

struct Parameters {
    fill: usize,
    set: usize,
    rate: Option<u64>,
    check: u64,
}

impl Parameters {
    fn parse(command_line: &str) -> io::Result<Self> {
        let mut parameters = Self {
            fill: 64 << 20,
            set: 16 << 20,
            rate: Some(10 << 20),
            check: 100 << 20,
        };
        for word in command_line.split_whitespace() {
            let Some((name, value)) = word
                .strip_prefix("writer.")
                .and_then(|word| word.split_once('='))
            else {
                continue;
            };
            match name {
                "fill" => parameters.fill = size(value)? as usize,
                "set" => parameters.set = size(value)? as usize,
                "rate" if value == "none" => parameters.rate = None,
                "rate" => parameters.rate = Some(size(value)?),
                "check" => parameters.check = size(value)?,
                _ => return Err(io::Error::other(format!("unknown parameter {word}"))),
            }
        }
        if parameters.fill < 4096 || parameters.set < 4096 {
            return Err(io::Error::other(
                "writer.fill and writer.set must be 4096 or more",
            ));
        }
        parameters.set = parameters.set.min(parameters.fill);
        Ok(parameters)
    }
}

fn size(text: &str) -> io::Result<u64> {
    let (digits, unit) = match text.as_bytes().last() {
        Some(b'K') => (&text[..text.len() - 1], 1 << 10),
        Some(b'M') => (&text[..text.len() - 1], 1 << 20),
        Some(b'G') => (&text[..text.len() - 1], 1 << 30),
        _ => (text, 1),
    };
    digits
        .parse::<u64>()
        .map(|number| number * unit)
        .map_err(|_| io::Error::other(format!("not a size: {text}")))
}

/// Counts on the second serial port for ever.
fn tick(mut port: File) -> io::Result<()> {
    sys::run_first()?;
    let mut last = sys::monotonic();
    let mut deadline = last;
    for number in 1u64.. {
        // The `t` tells a whole line from the rest of one that began before the guest moved.
        port.write_all(format!("t{number}\n").as_bytes())?;
        TICK.store(number, Ordering::Relaxed);
        // A tick that is late is not made up for: a burst after a pause would hide the pause.
        deadline = (deadline + MILLISECOND).max(sys::monotonic());
        sys::sleep_until(deadline);
        let now = sys::monotonic();
        LONGEST_GAP.fetch_max((now - last) / 1000, Ordering::Relaxed);
        last = now;
    }
    Ok(())
}

/// How many pages may be touched now to keep to a rate.
struct Pace {
    bytes_a_second: u64,
    last: u64,
    credit: u64,
}

impl Pace {
    fn new(bytes_a_second: u64) -> Self {
        Self {
            bytes_a_second,
            last: sys::monotonic(),
            credit: 0,
        }
    }

    /// Pages due since the last call; a batch of 64 where there is no limit.
    fn due(&mut self, now: u64) -> u64 {
        if self.bytes_a_second == 0 {
            return 64;
        }
        // What was missed in a long pause is not made up for: the rate is a rate, before and after.
        let passed = (now - self.last).min(20 * MILLISECOND);
        self.last = now;
        self.credit += self.bytes_a_second * passed / (SECOND / 1024); // in 1/1024 bytes, to lose none
        let pages = self.credit / (4096 * 1024);
        self.credit %= 4096 * 1024;
        pages
    }
}

/// The guest's work, in one thread: writing and verifying never race, and both stand still when the guest does.
fn write_and_verify(
    mut memory: Memory,
    parameters: &Parameters,
    report: &mut File,
) -> io::Result<std::convert::Infallible> {
    let set = parameters.set / 4096;
    let mut writer = parameters.rate.map(Pace::new);
    let mut checker = Pace::new(parameters.check);
    let (mut writes, mut checked, mut errors, mut cursor) = (0u64, 0u64, 0u64, 0);
    let mut random = 1;
    let (mut reported, mut writes_then) = (sys::monotonic(), 0);
    loop {
        let now = sys::monotonic();
        let to_write = writer.as_mut().map_or(0, |pace| pace.due(now));
        for _ in 0..to_write {
            random = memory::next(random);
            memory.rewrite((random >> 33) as usize % set);
        }
        writes += to_write;

        let to_check = checker.due(now);
        for _ in 0..to_check {
            if let Err(mismatch) = memory.verify(cursor) {
                errors += 1;
                if errors <= MISMATCHES_TOLD {
                    let memory::Mismatch {
                        word,
                        expected,
                        found,
                    } = mismatch;
                    writeln!(
                        report,
                        "mismatch page={cursor} word={word} expected={expected:#x} found={found:#x}"
                    )?;
                }
            }
            cursor = (cursor + 1) % memory.pages();
        }
        checked += to_check;

        let now = sys::monotonic();
        if now - reported >= STATUS_EVERY {
            writeln!(
                report,
                "status boot_id={} tick={} writes={writes} rate={} checked={checked} passes={} errors={errors} checksum={:#018x} gap_us={}",
                boot_id()?,
                TICK.load(Ordering::Relaxed),
                u128::from(writes - writes_then) * 4096 * u128::from(SECOND)
                    / u128::from(now - reported),
                checked / memory.pages() as u64,
                memory.checksum(),
                LONGEST_GAP.swap(0, Ordering::Relaxed),
            )?;
            (reported, writes_then) = (now, writes);
        }
        let unlimited = parameters.rate == Some(0) || parameters.check == 0;
        if !unlimited {
            sys::sleep_until(now + MILLISECOND);
        }
    }
}

/// Asks the kernel every time: what this program remembers would not show that it is the same kernel.
fn boot_id() -> io::Result<String> {
    Ok(read_to_string("/proc/sys/kernel/random/boot_id")?
        .trim()
        .to_owned())
}

fn serial(path: &str) -> io::Result<File> {
    let port = OpenOptions::new().read(true).write(true).open(path)?;
    sys::make_raw(&port)?;
    Ok(port)
}
