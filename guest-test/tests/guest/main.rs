//! The guests themselves: that they boot, that what they say can be relied on, and that they are cleared away.
#![allow(clippy::unwrap_used, reason = "a test may panic, helpers too")]

mod lab;

use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use guest_test::accel::accel;
use guest_test::image::Image;
use guest_test::native::{self, Mode, Wish};
use guest_test::qemu::{Backing, Guest, GuestConfig};
use guest_test::{command, packages, ticks};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process, test_kill_process_group};

/// For an emulated guest on a machine that does other things.
const PATIENCE: Duration = Duration::from_secs(60);

fn small() -> GuestConfig {
    packages::ensure(&[packages::QEMU]).unwrap();
    let mut config = GuestConfig::new(Image::prepare().unwrap(), accel().unwrap());
    config.memory = 256 << 20;
    config
}

fn soon() -> Instant {
    Instant::now() + PATIENCE
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_guest_ticks_in_order_and_finds_its_memory_right() {
    let guest = Guest::boot(&small()).unwrap();
    let status = guest.await_clean_pass(soon()).unwrap();
    assert_eq!(status.boot_id, guest.ready().unwrap().boot_id);
    let all = guest.ticks().all();
    ticks::check_continuity(&all[..1], &all[1..]).unwrap();
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_guest_whose_memory_is_changed_from_outside_notices() {
    let config = small();
    let guest = Guest::boot(&config).unwrap();
    guest.await_clean_pass(soon()).unwrap();
    let memory = std::fs::File::options()
        .read(true)
        .write(true)
        .open(guest.memory_file())
        .unwrap();
    // The pages of the writer are those that begin with a number below their count; one bit in the middle of one.
    let pages = config.writer.fill / 4096;
    let untouched = pages - 1; // outside of what is written again
    let mut page = [0; 4096];
    let offset = (0..config.memory)
        .step_by(4096)
        .find(|&offset| {
            memory.read_exact_at(&mut page, offset).unwrap();
            page[..8] == untouched.to_le_bytes()
                && page[8..16] == 1u64.to_le_bytes()
                && page[16..24] != [0; 8]
        })
        .unwrap();
    memory.read_exact_at(&mut page, offset).unwrap();
    memory
        .write_all_at(&[page[2048] ^ 1], offset + 2048)
        .unwrap();
    let reason = guest.await_clean_pass(soon()).unwrap_err();
    assert!(reason.to_string().contains("wrong pages"), "{reason:#}");
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_migration_by_qemu_has_a_blackout_and_goes_on() {
    let mut config = small();
    config.backing = Backing::PrivateUneven;
    let source = Guest::boot(&config).unwrap();
    let destination = Guest::incoming(&config, false).unwrap();
    let wish = Wish {
        mode: Mode::Precopy,
        downtime: Duration::from_millis(300),
        limit: PATIENCE,
    };
    let report = native::migrate(&source, &destination, wish).unwrap();
    destination.await_clean_pass(soon()).unwrap();
    assert!(report.blackout > Duration::ZERO && report.wire > config.writer.fill);
    assert!(!source.is_running().unwrap());
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_guest_that_cannot_start_says_why() {
    let mut config = small();
    config.image.kernel = "/nonexistent/kernel".into();
    let reason = Guest::boot(&config).unwrap_err();
    assert!(
        format!("{reason:#}").contains("/nonexistent/kernel"),
        "{reason:#}"
    );
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_dropped_guest_leaves_no_process_and_no_file() {
    let guest = Guest::incoming(&small(), true).unwrap();
    let (process, memory) = (format!("/proc/{}", guest.pid()), guest.memory_file());
    assert!(memory.exists());
    drop(guest);
    assert!(!memory.exists());
    assert!(!std::path::Path::new(&process).exists());
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn an_interrupted_benchmark_ends_at_once_and_leaves_no_process() {
    packages::ensure(&[packages::QEMU]).unwrap();
    let mut bench = Command::new(env!("CARGO_BIN_EXE_memferry-bench"))
        .args(["--memferry", "/bin/true"]) // not reached
        .args(["qemu", "--quick", "--modes", "precopy"])
        .process_group(0)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let group = Pid::from_child(&bench);
    let said = BufReader::new(bench.stderr.take().unwrap()).lines();
    let mut said = said.map_while(Result::ok);
    assert!(said.any(|line| line.starts_with("[1/1]")));
    let qemu = || processes_named("(qemu-", group);
    command::poll_until(soon(), || (qemu() > 0).then_some(())).unwrap();
    // To the program alone, not to its group, as a terminal does: the guests end only because it ends them.
    kill_process(group, Signal::INT).unwrap();
    let status = command::wait(&mut bench, PATIENCE).unwrap();
    assert_eq!(status.code(), Some(130), "{:?}", said.collect::<Vec<_>>());
    assert_eq!(test_kill_process_group(group), Err(Errno::SRCH));
}

/// How many processes of a group have a name that begins so.
fn processes_named(name: &str, group: Pid) -> usize {
    let is_one = |stat: &str| {
        let mut words = stat.split(' ').skip(1); // number, name, state, parent, group
        words.next().is_some_and(|word| word.starts_with(name))
            && words.nth(2) == Some(&group.to_string())
    };
    std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| std::fs::read_to_string(entry.ok()?.path().join("stat")).ok())
        .filter(|stat| is_one(stat))
        .count()
}
