//! The QEMU driver with real QEMUs: whole migrations, rollbacks and deaths.

use std::io::{self, Read, Write};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use memferry::subject::qemu::{
    Executor, IncomingQemu, LastWill, Machine, OutgoingQemu, QemuError, Qmp, QmpError, RunState,
};
use memferry::subject::{Incoming, Outgoing, SubjectError};
use serde_json::{Value, json};

use crate::qemu::{Options, Vm, copy_ram, soon};

/// A source that runs and counts.
pub(crate) fn outgoing(vm: &mut Vm) -> OutgoingQemu {
    vm.wait_until_it_counts();
    let (qmp, machine) = vm.inspected();
    OutgoingQemu::new(qmp, machine).unwrap()
}

/// A destination that waits.
pub(crate) fn incoming(vm: &mut Vm) -> IncomingQemu {
    let (qmp, machine) = vm.inspected();
    IncomingQemu::new(qmp, machine, soon()).unwrap()
}

/// Copies all RAM of a suspended guest, by what both QEMUs have mapped.
fn copy_backends(source: &OutgoingQemu, destination: &IncomingQemu) {
    let (from, to) = (source.machine(), destination.machine());
    for (one, other) in from.backends.iter().zip(&to.backends) {
        copy_ram(&one.open(from.pid).unwrap(), &other.open(to.pid).unwrap());
    }
}

/// A whole migration; the guest counts on at the destination when this returns.
fn migrate(mut source: OutgoingQemu, vm: &Vm, to: &mut Vm) {
    let mut destination = incoming(to);
    destination.accept(&source.describe()).unwrap();
    source.suspend(soon()).unwrap();
    let counted = vm.count();
    copy_backends(&source, &destination);
    let mut state = Vec::new();
    source.save(&mut state, soon()).unwrap();
    destination.load(&mut &state[..], soon()).unwrap();
    assert_eq!(
        (vm.count(), to.count()),
        (counted, counted),
        "nobody counts before the release"
    );
    source.release();
    destination.resume(soon()).unwrap();
    to.wait_until_it_counts();
    assert_eq!(vm.count(), counted, "the source never runs again");
    println!("{:?}, {:?}", source.timings(), destination.timings());
}

/// What the driver says is the cause.
#[track_caller]
fn cause(error: &SubjectError) -> &QemuError {
    let source = error.source.as_deref().expect("an error with its cause");
    source.downcast_ref().expect("a QemuError")
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_pc_guest_counts_on_at_the_destination() {
    let (mut vm, mut to) = (Vm::source(), Vm::destination());
    migrate(outgoing(&mut vm), &vm, &mut to);
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_guest_with_a_dimm_counts_on_at_the_destination() {
    let dimm = [
        "-m",
        "64,slots=2,maxmem=1G",
        "-object",
        "memory-backend-file,id=m1,size=128M,share=on,mem-path=/dev/shm",
        "-device",
        "pc-dimm,memdev=m1,id=d1",
    ];
    let waiting = [&dimm[..], &["-incoming", "defer", "-S"]].concat();
    let [mut vm, mut to] = [&dimm[..], &waiting].map(|more| {
        Vm::start(&Options {
            more,
            ..Options::default()
        })
    });
    migrate(outgoing(&mut vm), &vm, &mut to);
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_q35_guest_is_saved_and_loaded() {
    // Its firmware finds no boot disk on an IDE bus that q35 does not have, so it does not count.
    let options = |more| Options {
        machine: "q35",
        more,
        ..Options::default()
    };
    let mut vm = Vm::start(&options(&["-device", "VGA"]));
    let mut to = Vm::start(&options(&["-device", "VGA", "-incoming", "defer", "-S"]));
    let (qmp, machine) = vm.inspected();
    let mut source = OutgoingQemu::new(qmp, machine).unwrap();
    let mut destination = incoming(&mut to);
    destination.accept(&source.describe()).unwrap();
    source.suspend(soon()).unwrap();
    copy_backends(&source, &destination);
    let mut state = Vec::new();
    source.save(&mut state, soon()).unwrap();
    destination.load(&mut &state[..], soon()).unwrap();
    source.release();
    destination.resume(soon()).unwrap();
    println!("{:?}, {:?}", source.timings(), destination.timings());
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_destination_without_s_does_not_run_before_it_is_told() {
    let mut vm = Vm::source();
    let mut to = Vm::start(&Options {
        more: &["-incoming", "defer"],
        ..Options::default()
    });
    migrate(outgoing(&mut vm), &vm, &mut to);
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_paused_guest_stays_paused_at_the_destination() {
    let (mut vm, mut to) = (Vm::source(), Vm::destination());
    vm.wait_until_it_counts();
    let mut qmp = vm.qmp();
    qmp.execute("stop", &Value::Null, soon()).unwrap();
    let machine = Machine::inspect(&mut qmp, soon()).unwrap();
    let mut source = OutgoingQemu::new(qmp, machine).unwrap();
    let mut destination = incoming(&mut to);
    destination.accept(&source.describe()).unwrap();
    source.suspend(soon()).unwrap();
    copy_backends(&source, &destination);
    let mut state = Vec::new();
    source.save(&mut state, soon()).unwrap();
    destination.load(&mut &state[..], soon()).unwrap();
    source.release();
    destination.resume(soon()).unwrap();
    drop(destination);
    let (mut qmp, machine) = to.inspected();
    assert_eq!(machine.run_state, RunState::Paused);
    qmp.execute("cont", &Value::Null, soon()).unwrap();
    to.wait_until_it_counts();
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_paused_guest_is_still_paused_after_a_rollback() {
    let mut vm = Vm::source();
    vm.wait_until_it_counts();
    let mut qmp = vm.qmp();
    qmp.execute("stop", &Value::Null, soon()).unwrap();
    let machine = Machine::inspect(&mut qmp, soon()).unwrap();
    let mut source = OutgoingQemu::new(qmp, machine).unwrap();
    source.suspend(soon()).unwrap();
    source.resume(soon()).unwrap();
    drop(source);
    assert_eq!(vm.inspected().1.run_state, RunState::Paused);
}

/// Rolls back after `steps`; then the guest counts on, and can still be migrated.
fn rollback(steps: fn(&mut OutgoingQemu)) {
    let (mut vm, mut to) = (Vm::source(), Vm::destination());
    let mut source = outgoing(&mut vm);
    steps(&mut source);
    source.resume(soon()).unwrap();
    vm.wait_until_it_counts();
    source.resume(soon()).unwrap();
    vm.wait_until_it_counts();
    migrate(source, &vm, &mut to);
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_rollback_before_the_suspension_leaves_the_guest_running() {
    rollback(|source| source.prepare(soon()).unwrap());
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_rollback_of_a_suspended_guest_lets_it_run() {
    rollback(|source| source.suspend(soon()).unwrap());
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_rollback_of_a_saved_guest_lets_it_run() {
    rollback(|source| {
        source.suspend(soon()).unwrap();
        source.save(&mut io::sink(), soon()).unwrap();
    });
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_rollback_after_the_engine_failed_to_take_the_state_lets_the_guest_run() {
    struct Lost;
    impl Write for Lost {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::ConnectionReset.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    // A rollback that cancelled here, QEMU 7.2 being in the middle of its last step, left the guest running with its disks
    // inactive: QEMU aborted at the next migration, or at the guest's next write to a disk. It has to end that step first.
    rollback(|source| {
        source.suspend(soon()).unwrap();
        let error = source.save(&mut Lost, soon()).unwrap_err();
        assert!(matches!(cause(&error), QemuError::Stream(_)), "{error:?}");
    });
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_suspension_that_has_no_time_is_rolled_back() {
    rollback(|source| {
        source.prepare(soon()).unwrap();
        source.suspend(Instant::now()).unwrap_err();
    });
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_rollback_puts_the_owners_settings_back() {
    let mut vm = Vm::source();
    let mut qmp = vm.qmp();
    let set = json!({"capabilities": [{"capability": "xbzrle", "state": true}]});
    qmp.execute("migrate-set-capabilities", &set, soon())
        .unwrap();
    let tls = json!({"qom-type": "tls-creds-anon", "id": "t0", "endpoint": "client"});
    qmp.execute("object-add", &tls, soon()).unwrap();
    let set = json!({"tls-creds": "t0", "downtime-limit": 77});
    qmp.execute("migrate-set-parameters", &set, soon()).unwrap();
    let settings = |qmp: &mut Qmp| {
        ["query-migrate-capabilities", "query-migrate-parameters"]
            .map(|query| qmp.execute(query, &Value::Null, soon()).unwrap())
    };
    let before = settings(&mut qmp);
    let machine = Machine::inspect(&mut qmp, soon()).unwrap();
    let mut source = OutgoingQemu::new(qmp, machine).unwrap();
    source.suspend(soon()).unwrap();
    source.resume(soon()).unwrap();
    drop(source);
    assert_eq!(settings(&mut vm.qmp()), before);
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_suspended_guest_that_is_dropped_runs_again() {
    let mut vm = Vm::source();
    let mut source = outgoing(&mut vm);
    source.suspend(soon()).unwrap();
    drop(source);
    vm.wait_until_it_counts();
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_released_guest_cannot_be_resumed_at_the_source() {
    let mut vm = Vm::source();
    let mut source = outgoing(&mut vm);
    source.suspend(soon()).unwrap();
    source.save(&mut io::sink(), soon()).unwrap();
    source.release();
    let error = source.resume(soon()).unwrap_err();
    assert!(matches!(cause(&error), QemuError::Order { .. }));
    drop(source);
    let mut qmp = vm.qmp();
    let status = qmp.execute("query-status", &Value::Null, soon()).unwrap();
    assert_eq!(status["status"], "postmigrate");
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_last_will_that_comes_late_does_not_run_a_guest_that_another_sender_has_moved() {
    #[derive(Debug)]
    struct Notes(mpsc::Sender<LastWill>);
    impl Executor for Notes {
        fn note(&mut self, will: Option<&LastWill>) -> io::Result<()> {
            will.map_or(Ok(()), |will| {
                self.0.send(will.clone()).map_err(io::Error::other)
            })
        }
    }
    let mut vm = Vm::source();
    let (notes, wills) = mpsc::channel();
    let mut source = outgoing(&mut vm).with_executor(Box::new(Notes(notes)));
    source.suspend(soon()).unwrap();
    source.resume(soon()).unwrap();
    drop(source);
    let mut other = outgoing(&mut vm);
    other.suspend(soon()).unwrap();
    other.save(&mut io::sink(), soon()).unwrap();
    other.release();
    drop(other);
    let counted = vm.count();
    let mut qmp = vm.qmp();
    for will in wills {
        assert!(!will.execute(&mut qmp, soon()).unwrap());
    }
    let status = qmp.execute("query-status", &Value::Null, soon()).unwrap();
    assert_eq!(status["status"], "postmigrate");
    assert_eq!(vm.count(), counted);
}

/// The source dies after `steps`; `then` says so, well before its deadline.
#[track_caller]
fn source_dies(
    steps: fn(&mut OutgoingQemu),
    then: fn(&mut OutgoingQemu) -> Result<(), SubjectError>,
) {
    let mut vm = Vm::source();
    let mut source = outgoing(&mut vm);
    steps(&mut source);
    vm.kill();
    let began = Instant::now();
    let error = then(&mut source).unwrap_err();
    assert!(began.elapsed() < Duration::from_secs(5));
    let QemuError::Qmp(error) = cause(&error) else {
        panic!("{error:?}");
    };
    assert!(
        error.is_closed() || matches!(error, QmpError::Connect { .. }),
        "{error:?}"
    );
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_source_that_died_before_the_suspension_is_told() {
    source_dies(|_| {}, |source| source.suspend(soon()));
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_source_that_died_while_suspended_is_told_by_save() {
    source_dies(
        |source| source.suspend(soon()).unwrap(),
        |source| source.save(&mut io::sink(), soon()),
    );
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_source_that_died_while_suspended_is_told_by_resume() {
    source_dies(
        |source| source.suspend(soon()).unwrap(),
        |source| source.resume(soon()),
    );
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_source_that_died_after_the_save_is_told_by_resume() {
    source_dies(
        |source| {
            source.suspend(soon()).unwrap();
            source.save(&mut io::sink(), soon()).unwrap();
        },
        |source| source.resume(soon()),
    );
}

/// A whole device state, from a source of its own.
fn some_state() -> Vec<u8> {
    let mut vm = Vm::source();
    let mut source = outgoing(&mut vm);
    source.suspend(soon()).unwrap();
    let mut state = Vec::new();
    source.save(&mut state, soon()).unwrap();
    state
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_destination_that_dies_while_its_state_arrives_is_told() {
    /// Kills the destination after the last byte.
    #[derive(Debug)]
    struct Deadly<'a>(&'a [u8], u32);
    impl Read for Deadly<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            if self.0.is_empty() {
                let pid = rustix::process::Pid::from_raw(i32::try_from(self.1).unwrap()).unwrap();
                rustix::process::kill_process(pid, rustix::process::Signal::KILL)?;
            }
            self.0.read(buffer)
        }
    }
    let state = some_state();
    let mut to = Vm::destination();
    let mut destination = incoming(&mut to);
    let began = Instant::now();
    let error = destination
        .load(&mut Deadly(&state, to.pid()), soon())
        .unwrap_err();
    assert!(began.elapsed() < Duration::from_secs(5));
    assert!(
        matches!(cause(&error), QemuError::Qmp(error) if error.is_closed()),
        "{error:?}"
    );
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_state_that_qemu_refuses_is_told_in_its_last_words() {
    let mut state = some_state();
    state.truncate(state.len() / 2);
    let mut to = Vm::destination();
    let error = incoming(&mut to).load(&mut &state[..], soon()).unwrap_err();
    let QemuError::Exited {
        last_words: Some(words),
    } = cause(&error)
    else {
        panic!("{error:?}");
    };
    assert!(words.contains("load of migration failed"), "{words}");
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_destination_outlives_a_state_that_never_came() {
    let state = some_state();
    let (mut vm, mut to) = (Vm::source(), Vm::destination());
    let mut destination = incoming(&mut to);
    let error = destination.load(&mut &b""[..], soon()).unwrap_err();
    assert!(matches!(cause(&error), QemuError::Stream(_)), "{error:?}");
    drop(destination);
    drop(state);
    migrate(outgoing(&mut vm), &vm, &mut to);
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_second_client_is_told_of_the_first() {
    let mut vm = Vm::source();
    let _first = vm.qmp();
    let deadline = Instant::now() + Duration::from_millis(50);
    let error = Qmp::connect(vm.socket(), deadline).unwrap_err();
    assert!(matches!(error, QmpError::NoGreeting { .. }), "{error}");
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_stopped_qemu_is_told_at_the_deadline() {
    let mut vm = Vm::source();
    let mut qmp = vm.qmp();
    let pid = rustix::process::Pid::from_raw(i32::try_from(vm.pid()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    let deadline = Instant::now() + Duration::from_millis(50);
    let error = Machine::inspect(&mut qmp, deadline).unwrap_err();
    assert!(
        matches!(error, QemuError::Qmp(QmpError::Timeout { .. })),
        "{error}"
    );
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_file_that_was_deleted_is_opened_by_its_mapping() {
    let mut vm = Vm::source();
    vm.wait_until_it_counts();
    let (_, machine) = vm.inspected();
    std::fs::remove_file(vm.ram_path()).unwrap();
    std::fs::write(vm.ram_path(), b"another file of the same name").unwrap();
    let ram = machine.backends[0].open(machine.pid).unwrap();
    assert_eq!(ram.metadata().unwrap().len(), crate::qemu::RAM);
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_nameless_file_in_a_folder_is_opened_by_its_mapping() {
    let mut vm = Vm::start(&Options {
        backend: "memory-backend-file,id=m0,size=64M,share=on,mem-path=/dev/shm",
        ..Options::default()
    });
    let (_, machine) = vm.inspected();
    let ram = machine.backends[0].open(machine.pid).unwrap();
    assert_eq!(ram.metadata().unwrap().len(), crate::qemu::RAM);
}
