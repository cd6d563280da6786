//! Attaching to running processes, and dying while doing so.

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use memferry::attach::{AttachError, Keep, Step, Target};

use crate::victim::{NOBODY, Victim, this_binary, wait_until};

/// Every step after which an injector can be killed, in order.
const STEPS: [Step; 24] = [
    Step::Seized,
    Step::Interrupted,
    Step::Stopped,
    Step::Inspected,
    Step::FrameWritten,
    Step::Armed,
    Step::SignalsBlocked,
    Step::RunningToEntry,
    Step::AtEntry,
    Step::Redirected,
    Step::RunningToExit,
    Step::AtExit,
    Step::Stolen,
    Step::CloseArmed,
    Step::CloseRunningToEntry,
    Step::CloseAtEntry,
    Step::CloseRunningToExit,
    Step::CloseAtExit,
    Step::InterruptedAgain,
    Step::RunningToTrap,
    Step::Trapped,
    Step::SignalsRestored,
    Step::RegistersRestored,
    Step::Detached,
];

/// Set for a process that is to be an injector: at which step it kills itself, `forever`, `denied`, or `hold`.
pub(crate) const DIE_AT: &str = "MEMFERRY_INJECT_DIE_AT";
const PID: &str = "MEMFERRY_INJECT_PID";

/// An injector that kills itself at a step, by name; goes on `forever` until it is killed; must be `denied`; or `hold`s its target at the first stop until its standard
/// input ends.
pub(crate) fn inject_and_die(at: &str) -> ! {
    let pid = std::env::var(PID).unwrap().parse().unwrap();
    if at == "denied" {
        let denied = matches!(Target::open(pid), Err(AttachError::Permission { .. }));
        // SAFETY: as below.
        unsafe { libc::_exit(if denied { 0 } else { 9 }) }
    }
    let mut target = Target::open(pid).unwrap();
    target.overrule_seccomp(true);
    if at == "forever" {
        loop {
            target.userfaultfd(Keep::Close).unwrap();
        }
    }
    let mut seen = false;
    target
        .inject_with_steps(Keep::Close, &mut |step| {
            if format!("{step:?}") == at {
                // SAFETY: raises a signal in this process, which ends it.
                unsafe { libc::raise(libc::SIGKILL) };
            }
            if at == "hold" && step == Step::Stopped {
                seen = true;
                let mut out = std::io::stdout();
                out.write_all(b"held").unwrap();
                out.flush().unwrap();
                std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
            }
        })
        .unwrap();
    // SAFETY: ends this process, in which nothing has begun that would have to be finished.
    unsafe { libc::_exit(if seen { 0 } else { 9 }) }
}

fn injector(victim: &Victim, at: &str) -> Command {
    let mut command = this_binary();
    command.env(DIE_AT, at).env(PID, victim.pid().to_string());
    command
}

fn inject_healthily(victim: &mut Victim, when: &str) {
    let mut target = Target::open(victim.pid()).unwrap();
    target.overrule_seccomp(true);
    target.userfaultfd(Keep::Close).unwrap();
    victim.must_be_well(when);
}

fn injecting_leaves_no_trace_in(kind: &str) {
    let mut victim = Victim::start(kind);
    let fds = victim.fds();
    for _ in 0..20 {
        inject_healthily(&mut victim, "after an injection");
    }
    assert_eq!(victim.fds(), fds);
    assert_eq!(victim.interruptions(), 0, "a call returned EINTR");
}

macro_rules! no_trace {
    ($($name:ident $kind:literal),* $(,)?) => {$(
        #[test]
        #[ignore = "privileged: needs root (ptrace)"]
        fn $name() {
            injecting_leaves_no_trace_in($kind);
        }
    )*};
}

no_trace! {
    injecting_does_not_interrupt_a_nanosleep "nanosleep",
    injecting_does_not_interrupt_a_poll "poll",
    injecting_does_not_interrupt_a_poll_with_a_timeout "poll-timeout",
    injecting_does_not_interrupt_a_ppoll_with_a_signal_mask "ppoll",
    injecting_does_not_interrupt_an_epoll_wait "epoll",
    injecting_does_not_interrupt_a_read "read",
    injecting_does_not_interrupt_a_futex_wait "futex",
    injecting_leaves_the_registers_of_a_computation "compute",
    injecting_works_in_a_program_of_many_threads "threads",
    injecting_overrules_a_filter_that_kills "seccomp-kill",
    injecting_passes_a_filter_that_refuses "seccomp-errno",
}

fn killing_the_injector_of(kind: &str, steps: impl IntoIterator<Item = Step>) -> Victim {
    let mut victim = Victim::start(kind);
    let fds = victim.fds();
    for step in steps {
        let when = format!("after the injector died at {step:?}");
        let status = injector(&victim, &format!("{step:?}")).status().unwrap();
        assert_eq!(
            status.signal(),
            Some(libc::SIGKILL),
            "the injector did not get to {step:?}: {status}"
        );
        victim.must_be_well(&when);
        let target = Target::open(victim.pid()).unwrap();
        target.reclaim_userfaultfds().unwrap();
        assert_eq!(victim.fds(), fds, "{when}");
        inject_healthily(&mut victim, &when);
        assert_eq!(victim.fds(), fds, "{when}");
    }
    victim
}

macro_rules! survives {
    ($($name:ident $kind:literal $interruptions:pat),* $(,)?) => {$(
        #[test]
        #[ignore = "privileged: needs root (ptrace)"]
        fn $name() {
            let victim = killing_the_injector_of($kind, STEPS);
            assert!(matches!(victim.interruptions(), $interruptions), "{}", victim.interruptions());
        }
    )*};
}

// A wait with a timeout is interrupted when its injector dies within the injection, and never else.
survives! {
    killing_the_injector_at_each_step_leaves_a_computation_running "compute" 0,
    killing_the_injector_at_each_step_leaves_many_threads_running "threads" 0,
    killing_the_injector_at_each_step_leaves_a_nanosleep_running "nanosleep" 0..=20,
    killing_the_injector_at_each_step_leaves_a_poll_running "poll" 0,
    killing_the_injector_at_each_step_leaves_a_ppoll_running "ppoll" 0,
    killing_the_injector_at_each_step_leaves_an_epoll_running "epoll" 0..=20,
    killing_the_injector_at_each_step_leaves_a_read_running "read" 0,
    killing_the_injector_at_each_step_leaves_a_futex_running "futex" 0..=20,
    killing_the_injector_at_each_step_leaves_a_filtered_program_running "seccomp-errno" 0,
}

/// Kills an injector that injects without end, a little later in each round than in the last.
fn killing_the_injector_at_any_moment_of(kind: &str) {
    let mut victim = Victim::start(kind);
    let fds = victim.fds();
    for round in 0..150_u32 {
        let mut injector = injector(&victim, "forever").spawn().unwrap();
        wait_until("the injector injects", || victim.status("TracerPid") != "0");
        let moment = Instant::now() + Duration::from_micros(u64::from(round) * 37);
        while Instant::now() < moment {
            std::hint::spin_loop();
        }
        injector.kill().unwrap();
        let status = injector.wait().unwrap();
        assert_eq!(status.signal(), Some(libc::SIGKILL), "{status}");
        victim.must_be_well(&format!("in round {round}"));
        let target = Target::open(victim.pid()).unwrap();
        target.reclaim_userfaultfds().unwrap();
        assert_eq!(victim.fds(), fds);
    }
}

#[test]
#[ignore = "privileged: needs root (ptrace)"]
fn killing_the_injector_at_any_moment_leaves_a_computation_running() {
    killing_the_injector_at_any_moment_of("compute");
}

#[test]
#[ignore = "privileged: needs root (ptrace)"]
fn killing_the_injector_at_any_moment_leaves_a_read_running() {
    killing_the_injector_at_any_moment_of("read");
}

#[test]
#[ignore = "privileged: needs root (ptrace)"]
fn a_filter_that_kills_does_so_only_between_two_steps() {
    let harmless = STEPS
        .into_iter()
        .filter(|step| !matches!(step, Step::Redirected | Step::RunningToExit));
    killing_the_injector_of("seccomp-kill", harmless);
}

#[test]
#[ignore = "privileged: needs root (ptrace)"]
fn a_filter_that_kills_is_not_overruled_unless_told() {
    let mut victim = Victim::start("seccomp-kill");
    let error = Target::open(victim.pid())
        .unwrap()
        .userfaultfd(Keep::Close)
        .unwrap_err();
    assert!(
        matches!(
            error,
            AttachError::SeccompForbids {
                overrulable: true,
                ..
            }
        ),
        "{error}"
    );
    victim.must_be_well("after the refusal");
}

#[test]
#[ignore = "privileged: needs root (ptrace)"]
fn no_queued_signal_is_lost() {
    const SIGNALS: u64 = 400;

    let mut victim = Victim::start("signals");
    let pid = victim.pid().cast_signed();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for sent in 0..SIGNALS {
                // SAFETY: sends a signal to a child that was not reaped.
                assert_eq!(unsafe { libc::kill(pid, libc::SIGRTMIN()) }, 0);
                if sent % 100 == 99 {
                    wait_until("signals arrive", || {
                        victim.signals() > sent.saturating_sub(50)
                    });
                }
            }
        });
        let target = Target::open(victim.pid()).unwrap();
        while victim.signals() < SIGNALS {
            target.userfaultfd(Keep::Close).unwrap();
        }
    });
    victim.must_be_well("after the signals");
    assert_eq!(victim.signals(), SIGNALS);
}

#[test]
#[ignore = "privileged: needs root (ptrace)"]
fn a_stopped_process_stays_stopped() {
    let mut victim = Victim::start("compute");
    let pid = victim.pid().cast_signed();
    // SAFETY: sends a signal to a child that was not reaped.
    unsafe { libc::kill(pid, libc::SIGSTOP) };
    wait_until("the victim stops", || victim.states() == ['T']);
    let target = Target::open(victim.pid()).unwrap();
    for _ in 0..20 {
        target.userfaultfd(Keep::Close).unwrap();
        wait_until("the victim is stopped again", || victim.states() == ['T']);
        assert_eq!(victim.status("TracerPid"), "0");
    }
    let count = victim.count();
    assert_eq!(count, victim.count());
    // SAFETY: as above.
    unsafe { libc::kill(pid, libc::SIGCONT) };
    victim.must_be_well("after SIGCONT");
}

#[test]
#[ignore = "privileged: needs root (ptrace)"]
fn a_stopped_process_survives_its_injector_too() {
    let mut victim = Victim::start("compute");
    let pid = victim.pid().cast_signed();
    for step in STEPS {
        // SAFETY: sends a signal to a child that was not reaped.
        unsafe { libc::kill(pid, libc::SIGSTOP) };
        wait_until("the victim stops", || victim.states() == ['T']);
        injector(&victim, &format!("{step:?}")).status().unwrap();
        wait_until("the victim is let go, and stopped", || {
            victim.states() == ['T'] && victim.status("TracerPid") == "0"
        });
        // SAFETY: as above.
        unsafe { libc::kill(pid, libc::SIGCONT) };
        victim.must_be_well(&format!(
            "after SIGCONT, the injector having died at {step:?}"
        ));
    }
}

#[test]
#[ignore = "privileged: needs root (ptrace)"]
fn a_kept_descriptor_is_open_in_the_target_until_it_is_closed() {
    let mut victim = Victim::start("read");
    let fds = victim.fds();
    let target = Target::open(victim.pid()).unwrap();
    let stolen = target.inject_userfaultfd().unwrap();
    assert_eq!(victim.fds(), fds + 1);
    let remote = stolen.remote.unwrap();
    assert_eq!(target.stale_userfaultfds().unwrap(), [remote]);
    target.close_remote(remote).unwrap();
    assert_eq!(victim.fds(), fds);
    assert!(matches!(
        target.close_remote(remote),
        Err(AttachError::NotUserfaultfd { .. })
    ));
    victim.must_be_well("after closing");
}

#[test]
#[ignore = "privileged: needs root (ptrace)"]
fn the_userfaultfd_is_of_the_targets_memory() {
    let victim = Victim::start("read");
    let target = Target::open(victim.pid()).unwrap();
    let stolen = target.userfaultfd(Keep::Close).unwrap();
    let link = std::fs::read_link(format!("/proc/self/fd/{}", stolen.fd.as_raw_fd())).unwrap();
    assert_eq!(link.as_os_str(), "anon_inode:[userfaultfd]");
    let flags = rustix::io::fcntl_getfd(stolen.fd.as_fd()).unwrap();
    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
}

#[test]
#[ignore = "privileged: needs root (ptrace)"]
fn a_deleted_file_is_found_among_the_mappings() {
    let victim = Victim::start("read");
    let target = Target::open(victim.pid()).unwrap();
    let program = std::fs::File::open(std::env::current_exe().unwrap()).unwrap();
    let found = target.mappings_of(&program).unwrap();
    assert!(found.iter().any(|mapping| mapping.permissions.execute));
    assert!(found.len() < target.mappings().unwrap().len());
}

#[test]
#[ignore = "privileged: needs root (ptrace)"]
fn a_traced_process_is_refused_and_its_tracer_named() {
    let mut victim = Victim::start("compute");
    let mut tracer = injector(&victim, "hold")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut held = [0; 4];
    tracer
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut held)
        .unwrap();
    let error = Target::open(victim.pid()).unwrap_err();
    assert!(matches!(error, AttachError::Traced { .. }), "{error}");
    drop(tracer.stdin.take());
    assert!(tracer.wait().unwrap().success());
    victim.must_be_well("after the tracer let go");
}

#[test]
#[ignore = "privileged: needs root (ptrace)"]
fn what_cannot_be_attached_to_is_refused_with_the_reason() {
    let open = |pid| Target::open(pid).unwrap_err();
    assert!(matches!(
        open(std::process::id()),
        AttachError::OurOwnProcess { .. }
    ));
    assert!(matches!(open(2), AttachError::KernelThread { .. }));
    assert!(matches!(open(0), AttachError::NoSuchProcess { .. }));
    assert!(matches!(open(u32::MAX), AttachError::NoSuchProcess { .. }));

    let mut child = Command::new("true").spawn().unwrap();
    wait_until("the child has ended", || {
        matches!(Target::open(child.id()), Err(AttachError::Zombie { .. }))
    });
    child.wait().unwrap();
    assert!(matches!(
        open(child.id()),
        AttachError::NoSuchProcess { .. }
    ));
}

#[test]
#[ignore = "privileged: needs root (ptrace)"]
fn a_thread_is_refused_and_its_process_named() {
    let victim = Victim::start("threads");
    let thread = std::fs::read_dir(format!("/proc/{}/task", victim.pid()))
        .unwrap()
        .map(|entry| {
            entry
                .unwrap()
                .file_name()
                .to_str()
                .unwrap()
                .parse()
                .unwrap()
        })
        .find(|&tid: &u32| tid != victim.pid())
        .unwrap();
    let error = Target::open(thread).unwrap_err();
    assert!(matches!(error, AttachError::Thread { process, .. } if process == victim.pid()));
}

/// A 32-bit program that calls pause(2) for ever: an ELF header, one segment, and the code.
fn program_of_32_bits() -> Vec<u8> {
    const BASE: u32 = 0x0804_8000;
    const CODE: [u8; 9] = [0xb8, 29, 0, 0, 0, 0xcd, 0x80, 0xeb, 0xf7]; // mov $29, %eax; int $0x80; jmp back

    let mut program = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let half = |words: &[u16]| {
        words
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect::<Vec<_>>()
    };
    let word = |words: &[u32]| {
        words
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect::<Vec<_>>()
    };
    program.extend(half(&[2, 3])); // executable, i386
    program.extend(word(&[1, BASE + 84, 52, 0, 0]));
    program.extend(half(&[52, 32, 1, 0, 0, 0]));
    let length = 84 + 9;
    program.extend(word(&[1, 0, BASE, BASE, length, length, 5, 0x1000]));
    program.extend(CODE);
    program
}

#[test]
#[ignore = "privileged: needs root (ptrace), and a kernel that runs 32-bit programs"]
fn a_32_bit_process_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("pause");
    std::fs::write(&path, program_of_32_bits()).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut child = Command::new(&path).spawn().unwrap();
    let error = Target::open(child.id()).unwrap_err();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(matches!(error, AttachError::Bits32 { .. }), "{error}");
}

#[test]
#[ignore = "privileged: needs root (ptrace)"]
fn a_process_of_another_user_is_refused() {
    let victim = Victim::start("compute");
    let status = injector(&victim, "denied").uid(NOBODY).status().unwrap();
    assert!(status.success(), "{status}");
}

#[test]
#[ignore = "privileged: needs root (ptrace)"]
fn an_unprivileged_target_gets_what_it_is_allowed() {
    let mut victim = Victim::start("unprivileged");
    let allowed = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap();
    let everything = allowed.trim() == "1";
    let target = Target::open(victim.pid()).unwrap();
    let stolen = target.userfaultfd(Keep::Close).unwrap();
    assert_eq!(stolen.user_mode_only, !everything);
    match target.userfaultfd(Keep::Keep) {
        Ok(stolen) => {
            assert!(everything);
            target.close_remote(stolen.remote.unwrap()).unwrap();
        }
        Err(error) => {
            assert!(!everything);
            assert!(matches!(error, AttachError::Userfaultfd { .. }), "{error}");
        }
    }
    victim.must_be_well("after both");
}

#[test]
#[ignore = "privileged: needs root (ptrace)"]
fn memory_below_a_stack_of_unknown_size_is_never_written() {
    let mut victim = Victim::start("coroutine");
    let target = Target::open(victim.pid()).unwrap();
    let mut refusals = 0;
    for _ in 0..50 {
        match target.userfaultfd(Keep::Close) {
            Ok(_) => {} // it was caught between two spins
            Err(AttachError::NoStack { .. }) => refusals += 1,
            Err(error) => panic!("{error}"),
        }
        victim.must_be_well("after an attempt");
    }
    assert!(refusals > 0);
}

#[test]
#[ignore = "privileged: needs root (ptrace)"]
fn a_thread_that_cannot_be_stopped_is_given_up_at_the_deadline() {
    let victim = Victim::start("uninterruptible");
    wait_until("the victim cannot be interrupted", || {
        victim.states() == ['D']
    });
    let start = Instant::now();
    let error = Target::open(victim.pid())
        .unwrap()
        .userfaultfd(Keep::Close)
        .unwrap_err();
    assert!(
        matches!(error, AttachError::Deadline { state: 'D', .. }),
        "{error}"
    );
    assert!(start.elapsed() < Duration::from_secs(4));
    assert_eq!(victim.status("TracerPid"), "0");
}

#[test]
#[ignore = "privileged: needs root (ptrace)"]
fn a_target_that_dies_is_an_error() {
    let mut victim = Victim::start("compute");
    let target = Target::open(victim.pid()).unwrap();
    victim.kill();
    wait_until("the victim is dead", || target.has_exited());
    let error = target.userfaultfd(Keep::Close).unwrap_err();
    assert!(
        matches!(
            error,
            AttachError::Exited { .. } | AttachError::Deadline { .. }
        ),
        "{error}"
    );
    assert!(matches!(target.mappings(), Err(AttachError::Exited { .. })));
}

#[test]
#[ignore = "privileged: needs root (ptrace)"]
fn hundreds_of_injections_in_a_row_do_no_harm() {
    let mut victim = Victim::start("threads");
    let fds = victim.fds();
    let target = Target::open(victim.pid()).unwrap();
    let mut stopped: Vec<Duration> = (0..200)
        .map(|_| target.userfaultfd(Keep::Close).unwrap().stopped)
        .collect();
    stopped.sort();
    println!(
        "stopped: median {:?}, worst {:?}",
        stopped[100], stopped[199]
    );
    victim.must_be_well("after 200 injections");
    assert_eq!(victim.fds(), fds);
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_running_qemu_takes_hundreds_of_injections() {
    let mut qemu = Command::new("qemu-system-x86_64")
        .args([
            "-accel",
            "tcg",
            "-M",
            "none",
            "-nodefaults",
            "-display",
            "none",
            "-S",
        ])
        .args(["-monitor", "none", "-sandbox", "on"])
        .spawn()
        .unwrap();
    let pid = qemu.id();
    wait_until("QEMU is sandboxed", || {
        std::fs::read_to_string(format!("/proc/{pid}/status"))
            .unwrap()
            .contains("Seccomp:\t2")
    });
    let target = Target::open(pid).unwrap();
    let fds = || {
        std::fs::read_dir(format!("/proc/{pid}/fd"))
            .unwrap()
            .count()
    };
    let before = fds();
    let mut stopped: Vec<Duration> = (0..300)
        .map(|_| target.userfaultfd(Keep::Close).unwrap().stopped)
        .collect();
    stopped.sort();
    println!(
        "stopped: median {:?}, worst {:?}",
        stopped[150], stopped[299]
    );
    assert_eq!(fds(), before);
    assert!(qemu.try_wait().unwrap().is_none(), "QEMU died");
    qemu.kill().unwrap();
    qemu.wait().unwrap();
}
