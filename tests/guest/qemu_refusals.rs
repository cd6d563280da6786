//! What the QEMU driver refuses before it touches anything, with real QEMUs.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use memferry::subject::qemu::{IncomingQemu, Machine, OutgoingQemu, QemuError, Refusal};
use memferry::subject::{Incoming, Outgoing};

use crate::qemu::{Options, Vm, soon};
use crate::qemu_driver::{incoming, outgoing};

/// Why the guest with these options is refused, whichever end it is.
fn refusals(options: &Options<'_>) -> Vec<Refusal> {
    let (_vm, mut qmp) = Vm::start_and_connect(options);
    match Machine::inspect(&mut qmp, soon()) {
        Err(QemuError::Refused(refusals)) => refusals.0,
        other => panic!("{other:?}"),
    }
}

fn backend_refusals(backend: &str) -> Vec<Refusal> {
    refusals(&Options {
        backend,
        ..Options::default()
    })
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn plain_memory_is_refused() {
    let [Refusal::BackendKind { id, kind }] = &backend_refusals("")[..] else {
        panic!("not one refusal of the kind");
    };
    assert_eq!((&id[..], &kind[..]), ("pc.ram", "memory-backend-ram"));
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_memfd_is_refused() {
    let found = backend_refusals("memory-backend-memfd,id=m0,size=64M,share=on");
    assert!(
        matches!(&found[..], [Refusal::BackendKind { kind, .. }] if kind == "memory-backend-memfd"),
        "{found:?}"
    );
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_private_file_is_refused() {
    let found = backend_refusals("memory-backend-file,id=m0,size=64M,share=off,mem-path=RAM");
    assert_eq!(found, [Refusal::NotShared { id: "m0".into() }]);
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_file_that_is_emptied_at_exit_is_refused() {
    let found = backend_refusals(
        "memory-backend-file,id=m0,size=64M,share=on,discard-data=on,mem-path=RAM",
    );
    assert_eq!(found, [Refusal::DiscardData { id: "m0".into() }]);
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_dimm_without_a_file_is_refused() {
    let found = refusals(&Options {
        more: &[
            "-m",
            "64,slots=2,maxmem=1G",
            "-object",
            "memory-backend-ram,id=m1,size=128M",
            "-device",
            "pc-dimm,memdev=m1,id=d1",
        ],
        ..Options::default()
    });
    assert!(
        matches!(&found[..], [Refusal::BackendKind { id, .. }] if id == "m1"),
        "{found:?}"
    );
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn memory_shared_with_other_guests_is_refused() {
    let found = refusals(&Options {
        more: &[
            "-object",
            "memory-backend-file,id=s0,size=1M,share=on,mem-path=/dev/shm",
            "-device",
            "ivshmem-plain,memdev=s0,id=i0",
        ],
        ..Options::default()
    });
    // QEMU has a reason of its own against it.
    assert!(
        matches!(&found[..], [Refusal::ForeignWriter { device, .. }, Refusal::Blocked { .. }] if device == "i0"),
        "{found:?}"
    );
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_network_card_served_by_another_process_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("vhost");
    let listener = UnixListener::bind(&socket).unwrap();
    std::thread::spawn(move || serve_vhost_user(listener.accept().unwrap().0));
    let chardev = format!("socket,id=c0,path={}", socket.display());
    let found = refusals(&Options {
        more: &[
            "-chardev",
            &chardev,
            "-netdev",
            "vhost-user,id=n0,chardev=c0",
            "-device",
            "virtio-net-pci,netdev=n0",
        ],
        ..Options::default()
    });
    assert!(
        found.iter().any(
            |reason| matches!(reason, Refusal::ForeignWriter { kind, .. } if kind == "vhost-user")
        ),
        "{found:?}"
    );
}

/// As little of a vhost-user back end as QEMU needs to start: it answers `GET_FEATURES`, with none.
fn serve_vhost_user(mut stream: UnixStream) {
    let mut header = [0; 12];
    while stream.read_exact(&mut header).is_ok() {
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
        let mut payload = vec![0; usize::try_from(word(8)).unwrap()];
        if stream.read_exact(&mut payload).is_err() {
            return;
        }
        if word(0) == 1 {
            // Version 1, a reply, of 8 bytes.
            let answer: Vec<u8> = [1_u32, 1 | 1 << 2, 8, 0, 0]
                .iter()
                .flat_map(|word| word.to_le_bytes())
                .collect();
            if stream.write_all(&answer).is_err() {
                return;
            }
        }
    }
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_guest_that_waits_for_a_migration_is_no_source() {
    let mut vm = Vm::destination();
    let (qmp, machine) = vm.inspected();
    let error = OutgoingQemu::new(qmp, machine).unwrap_err();
    assert!(
        error.to_string().contains("is this the destination?"),
        "{error}"
    );
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_migration_of_somebody_else_is_refused() {
    let mut vm = Vm::source();
    let mut first = outgoing(&mut vm);
    first.suspend(soon()).unwrap();
    // As though its owner had died: the connection ends and the migration stays.
    first.release();
    drop(first);
    let error = Machine::inspect(&mut vm.qmp(), soon()).unwrap_err();
    let QemuError::Refused(refusals) = &error else {
        panic!("{error}");
    };
    assert!(
        matches!(&refusals.0[..], [Refusal::MigrationActive { .. }]),
        "{refusals}"
    );
}

/// Why a QEMU with these options is no destination.
fn destination_refusals(options: &Options<'_>) -> Vec<Refusal> {
    let mut vm = Vm::start(options);
    let (qmp, machine) = vm.inspected();
    match IncomingQemu::new(qmp, machine, soon()) {
        Err(QemuError::Refused(refusals)) => refusals.0,
        other => panic!("{other:?}"),
    }
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_running_guest_is_no_destination() {
    assert_eq!(
        destination_refusals(&Options::default()),
        [Refusal::NotIncoming {
            state: "running".into()
        }]
    );
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_destination_that_listens_for_another_sender_is_refused() {
    let found = destination_refusals(&Options {
        more: &["-incoming", "tcp:127.0.0.1:0"],
        ..Options::default()
    });
    assert_eq!(found, [Refusal::IncomingStarted]);
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn a_preallocated_destination_is_refused() {
    let found = destination_refusals(&Options {
        backend: "memory-backend-file,id=m0,size=64M,share=on,prealloc=on,mem-path=RAM",
        more: &["-incoming", "defer"],
        ..Options::default()
    });
    assert_eq!(found, [Refusal::Prealloc { id: "m0".into() }]);
}

/// The destination with `options` differs from a plain source in `attribute`.
fn differs(options: &Options<'_>, attribute: &str) {
    let mut vm = Vm::source();
    let mut to = Vm::start(options);
    let description = vm.inspected().1.describe();
    let error = incoming(&mut to).accept(&description).unwrap_err();
    assert!(error.to_string().starts_with(attribute), "{error}");
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn another_machine_type_is_refused() {
    differs(
        &Options {
            machine: "q35",
            more: &["-incoming", "defer"],
            ..Options::default()
        },
        "machine is",
    );
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn another_number_of_processors_is_refused() {
    differs(
        &Options {
            more: &["-incoming", "defer", "-smp", "2"],
            ..Options::default()
        },
        "vcpus is \"1\"",
    );
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn another_size_of_memory_is_refused() {
    differs(
        &Options {
            backend: "memory-backend-file,id=m0,size=128M,share=on,mem-path=/dev/shm",
            more: &["-incoming", "defer", "-m", "128"],
            ..Options::default()
        },
        "backend:m0 is \"67108864\"",
    );
}

#[test]
#[ignore = "guest: needs qemu-system-x86_64"]
fn other_devices_are_refused() {
    differs(
        &Options {
            more: &["-incoming", "defer", "-device", "virtio-rng-pci"],
            ..Options::default()
        },
        "devices is",
    );
}
