//! The lab itself: whatever becomes of a program in it, whoever asked is told, in time.

use std::io::{self, Write};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use guest_test::accel::accel;
use guest_test::lab::{Ended, Job, Lab};

use super::PATIENCE;

fn lab() -> Lab {
    let mut lab = Lab::new("6.12", accel().unwrap()).unwrap();
    lab.memory = 512 << 20;
    lab.processors = 1;
    lab
}

/// What a program has printed.
#[derive(Clone, Default)]
struct Printed(Arc<Mutex<Vec<u8>>>);

impl Write for Printed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Printed {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

/// Runs a script of the shell.
fn run(lab: &Lab, script: &str) -> (anyhow::Result<Ended>, String) {
    let printed = Printed::default();
    let ended = lab.run(&Job::script(script), printed.clone());
    (ended, printed.text())
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn the_lab_passes_on_what_a_program_prints_and_how_it_ends() {
    // More than a serial port holds, and a child that outlives the program and has its output open.
    let script = "sleep 1000 & seq 1 20000; echo complaint >&2; exit 7";
    let (ended, printed) = run(&lab(), script);
    assert_eq!(ended.unwrap(), Ended::Exited(7));
    let lines: Vec<&str> = printed.lines().collect();
    assert_eq!(lines.len(), 20_001);
    assert_eq!((lines[19_999], lines[20_000]), ("20000", "complaint"));
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn the_lab_tells_of_a_program_that_was_killed() {
    let (ended, _) = run(&lab(), "kill -9 $$");
    assert_eq!(ended.unwrap(), Ended::Killed(9));
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_panic_in_the_lab_is_told_with_its_reason_and_the_program_is_not_run_again() {
    // A panic takes what is still on its way, which is less than what follows the first line.
    let (ended, printed) = run(
        &lab(),
        "echo once; seq 30000; echo c > /proc/sysrq-trigger; sleep 1000",
    );
    let reason = format!("{:#}", ended.unwrap_err());
    assert!(reason.contains("Kernel panic"), "{reason}");
    assert_eq!(printed.matches("once\n").count(), 1, "{printed}");
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_program_that_does_not_end_is_ended_at_the_deadline() {
    let mut lab = lab();
    lab.limit = Duration::from_secs(1);
    let began = Instant::now();
    let (ended, _) = run(&lab, "sleep 100000");
    let reason = format!("{:#}", ended.unwrap_err());
    assert!(reason.contains("its time is up"), "{reason}");
    assert!(began.elapsed() < PATIENCE * 5);
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_kernel_that_does_not_boot_is_given_up_after_several_attempts() {
    let mut lab = lab();
    lab.boot_limit = Duration::from_millis(1);
    let (ended, printed) = run(&lab, "echo ran");
    let reason = format!("{:#}", ended.unwrap_err());
    assert!(reason.contains("did not boot"), "{reason}");
    assert_eq!(printed, "");
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn the_lab_has_what_its_tests_build_on() {
    let script = "
        set -e
        # This shell prefers its own tools to those on the path.
        ip=$(which ip) tc=$(which tc)
        for device in nbd0 ublk-control vsock fuse loop-control net/tun; do test -e /dev/$device; done
        $ip link add near type veth peer name far
        $tc qdisc add dev near root netem delay 10ms rate 1gbit
        $tc qdisc show dev near
        grep -q ext4 /proc/filesystems
        mkfs.ext4 -V 2>&1
        nbd-client -V 2>&1 || true
        grep cgroup2 /proc/mounts
    ";
    let (ended, printed) = run(&lab(), script);
    assert_eq!(ended.unwrap(), Ended::Exited(0), "{printed}");
    assert!(printed.contains("delay 10ms"), "{printed}");
}
