//! Storages that fail, and connections that die.

use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use memferry::chunk::{Fault, Faulty, Operation};
use memferry::frontend::nbd::DetachError;
use memferry::sys::nbd::LinkEvents;

#[test]
#[ignore = "kernel: needs nbd"]
fn a_storage_that_errs_is_an_error_to_the_reader_and_the_device_works_on() {
    let faulty = Arc::new(Faulty::new(memory(4 << 20)));
    let faults = faulty.faults();
    let options = DeviceOptions {
        direct: true,
        ..DeviceOptions::default()
    };
    let mut device = Device::attach(faulty as Arc<dyn Storage>, &options).unwrap();
    let mut pages = vec![0; 3 * 4096];
    let bytes = aligned(&mut pages);
    faults.add(Fault::error(io::ErrorKind::ConnectionReset));
    assert!(is_io_error(
        &device.file().read_exact_at(bytes, 0).unwrap_err()
    ));
    assert!(is_io_error(
        &device.file().write_all_at(bytes, 0).unwrap_err()
    ));
    faults.clear();
    device.file().write_all_at(bytes, 0).unwrap();
    device.file().read_exact_at(bytes, 0).unwrap();
    device.detach(LIMIT).unwrap();
}

#[test]
#[ignore = "kernel: needs nbd"]
fn what_could_not_be_saved_is_never_called_saved_afterwards() {
    // The kernel tells a failed write-back once. A second sync succeeded, and the bytes were lost.
    let faulty = Arc::new(Faulty::new(memory(4 << 20)));
    let faults = faulty.faults();
    let mut device = Device::attach(faulty as Arc<dyn Storage>, &DeviceOptions::default()).unwrap();
    faults.add(Fault::error(io::ErrorKind::ConnectionReset).on(Operation::Write));
    device.file().write_all_at(&[1; 4096], 0).unwrap();
    device.sync().unwrap_err();
    faults.clear();
    device.sync().unwrap_err();
    assert!(matches!(
        device.detach(LIMIT),
        Err(DetachError::Unsaved { .. })
    ));
    drop(device);
    assert_eq!(in_use(), NONE);
}

#[test]
#[ignore = "kernel: needs nbd"]
fn a_storage_that_stalls_is_an_error_within_the_timeout_and_the_device_works_on() {
    let faulty = Arc::new(Faulty::new(memory(4 << 20)));
    let faults = faulty.faults();
    let options = DeviceOptions {
        direct: true,
        timeout: Duration::from_secs(2),
        ..DeviceOptions::default()
    };
    let mut device = Device::attach(faulty as Arc<dyn Storage>, &options).unwrap();
    let mut pages = vec![0; 3 * 4096];
    let bytes = aligned(&mut pages);
    faults.add(Fault::stall(Duration::from_secs(600)));
    let start = Instant::now();
    assert!(is_io_error(
        &device.file().read_exact_at(bytes, 0).unwrap_err()
    ));
    let took = start.elapsed();
    assert!(took >= Duration::from_secs(2) && took < LIMIT, "{took:?}");
    assert_eq!(device.connections(), 2, "no connection was given up for it");
    faults.clear();
    device.file().read_exact_at(bytes, 0).unwrap();
    device.detach(LIMIT).unwrap();
    assert_eq!(in_use(), NONE);
}

#[test]
#[ignore = "kernel: needs nbd"]
fn a_storage_that_panics_is_an_error_to_the_reader_alone() {
    let storage = Arc::new(Panicking {
        storage: memory(4 << 20),
        panics: AtomicBool::new(false),
    });
    let options = DeviceOptions {
        direct: true,
        ..DeviceOptions::default()
    };
    let mut device = Device::attach(Arc::clone(&storage) as Arc<dyn Storage>, &options).unwrap();
    let mut pages = vec![0; 3 * 4096];
    let bytes = aligned(&mut pages);
    storage.panics.store(true, Ordering::SeqCst);
    assert!(is_io_error(
        &device.file().read_exact_at(bytes, 0).unwrap_err()
    ));
    device.file().read_exact_at(bytes, 0).unwrap();
    assert_eq!(device.connections(), 2);
    device.detach(LIMIT).unwrap();
}

/// A storage that panics once when it is told to.
#[derive(Debug)]
struct Panicking {
    storage: Arc<dyn Storage>,
    panics: AtomicBool,
}

impl Storage for Panicking {
    fn len(&self) -> u64 {
        self.storage.len()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        assert!(!self.panics.swap(false, Ordering::SeqCst), "on purpose");
        self.storage.read_exact_at(buf, offset)
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.storage.write_all_at(buf, offset)
    }

    fn flush(&self) -> io::Result<()> {
        self.storage.flush()
    }

    fn data_ranges(&self, within: std::ops::Range<u64>) -> io::Result<Vec<std::ops::Range<u64>>> {
        self.storage.data_ranges(within)
    }
}

/// The descriptors of this process that are sockets.
fn sockets() -> Vec<i32> {
    let open = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    open.filter(|open| {
        let target = std::fs::read_link(open.path()).unwrap_or_default();
        target.to_string_lossy().starts_with("socket:")
    })
    .map(|open| open.file_name().to_str().unwrap().parse().unwrap())
    .collect()
}

/// Ends the connections of a device, all but the sockets that were open `before`.
fn end_connections(before: &[i32]) {
    let me = rustix::process::getpid();
    let me = rustix::process::pidfd_open(me, rustix::process::PidfdFlags::empty()).unwrap();
    for socket in sockets()
        .into_iter()
        .filter(|socket| !before.contains(socket))
    {
        let flags = rustix::process::PidfdGetfdFlags::empty();
        // One that died before may be closed by now, because it was replaced.
        let Ok(socket) = rustix::process::pidfd_getfd(&me, socket, flags) else {
            continue;
        };
        // Fails on that which the kernel is talked to with.
        let _ended = rustix::net::shutdown(&socket, rustix::net::Shutdown::Both);
    }
}

#[test]
#[ignore = "kernel: needs nbd"]
fn connections_that_die_are_replaced_and_nobody_notices() {
    for connections in [1, 2] {
        let before = sockets();
        let options = DeviceOptions {
            direct: true,
            connections,
            ..DeviceOptions::default()
        };
        let mut device = Device::attach(memory(4 << 20), &options).unwrap();
        for round in 0..3 {
            let events = LinkEvents::listen().unwrap();
            end_connections(&before);
            let dead = events.next(Instant::now() + LIMIT).unwrap();
            assert_eq!(dead, Some(device.index()));
            drop(events);
            let mut pages = vec![0; 3 * 4096];
            device
                .file()
                .read_exact_at(aligned(&mut pages), 0)
                .unwrap_or_else(|error| {
                    panic!("{connections} connections, round {round}: {error}")
                });
            until("the connections are replaced", || {
                (device.connections() == usize::from(connections)).then_some(())
            });
        }
        device.detach(LIMIT).unwrap();
        assert_eq!(in_use(), NONE);
    }
}

#[test]
#[ignore = "kernel: needs nbd"]
fn what_was_under_way_when_its_connection_died_is_asked_again() {
    let before = sockets();
    let faulty = Arc::new(Faulty::new(memory(4 << 20)));
    let faults = faulty.faults();
    let options = DeviceOptions {
        direct: true,
        timeout: Duration::from_secs(4),
        ..DeviceOptions::default()
    };
    let mut device = Device::attach(faulty as Arc<dyn Storage>, &options).unwrap();
    faults.add(Fault::stall(LIMIT).on(Operation::Read).times(1));
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut pages = vec![0; 3 * 4096];
            device.file().read_exact_at(aligned(&mut pages), 0)
        });
        faults.await_stalled(1, LIMIT);
        end_connections(&before);
        faults.clear();
        reader.join().unwrap().unwrap();
    });
    device.detach(LIMIT).unwrap();
}
