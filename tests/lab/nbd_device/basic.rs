//! What a device is for.

use std::os::unix::fs::FileExt;

use super::*;
use memferry::frontend::nbd::{Control, Readiness};

#[test]
#[ignore = "kernel: needs nbd"]
fn what_is_written_to_a_device_is_in_the_storage_after_detaching() {
    let storage = memory(8 << 20);
    storage.write_all_at(&pattern(0, 1 << 20), 0).unwrap();
    let mut device = attach(&storage);
    assert_eq!(device.len(), 8 << 20);
    let mut bytes = vec![0; 1 << 20];
    device.file().read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, pattern(0, 1 << 20));
    device
        .file()
        .write_all_at(&pattern(7, 300_000), 5_000_001)
        .unwrap();
    device.detach(LIMIT).unwrap();
    assert_eq!(read(&*storage, 5_000_001, 300_000), pattern(7, 300_000));
    assert_eq!(in_use(), NONE);
}

#[test]
#[ignore = "kernel: needs nbd"]
fn every_way_to_attach_gives_the_same_device() {
    let storage = memory(1 << 20);
    for control in [Control::Auto, Control::Netlink, Control::Ioctl] {
        for readiness in [Readiness::Poll, Readiness::Uevent] {
            for connections in [1, 3] {
                for direct in [false, true] {
                    let options = DeviceOptions {
                        control,
                        readiness,
                        connections,
                        direct,
                        ..DeviceOptions::default()
                    };
                    let mut device = Device::attach(Arc::clone(&storage), &options)
                        .unwrap_or_else(|error| panic!("{options:?}: {error}"));
                    assert_eq!(device.connections(), usize::from(connections));
                    assert!(device.is_safe_when_memory_is_short());
                    if !direct {
                        device.file().write_all_at(b"hello", 4096).unwrap();
                    }
                    device
                        .detach(LIMIT)
                        .unwrap_or_else(|error| panic!("{options:?}: {error}"));
                    assert_eq!(in_use(), NONE);
                }
            }
        }
    }
    assert_eq!(read(&*storage, 4096, 5), b"hello");
}

#[test]
#[ignore = "kernel: needs nbd"]
fn a_length_that_is_no_whole_number_of_blocks_is_rounded_up_and_reads_as_zeros_there() {
    for len in [1, 511, 4095, 4097, 1_000_001] {
        let storage = memory(len);
        let whole = usize::try_from(len).unwrap();
        storage.write_all_at(&pattern(0, whole), 0).unwrap();
        let mut device = attach(&storage);
        assert_eq!(device.len(), len.next_multiple_of(4096));
        let mut bytes = vec![0xee; usize::try_from(device.len()).unwrap()];
        device.file().read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes[..whole], pattern(0, whole));
        assert!(bytes[whole..].iter().all(|&byte| byte == 0), "{len}");
        // The kernel writes the last block whole.
        device.file().write_all_at(&[9], len - 1).unwrap();
        device.sync().unwrap();
        assert_eq!(read(&*storage, len - 1, 1), [9]);
        device.file().write_all_at(&[1], len).unwrap();
        device.sync().unwrap_err();
        assert!(
            device.detach(LIMIT).is_err(),
            "what nobody keeps is not saved"
        );
        drop(device);
        assert_eq!(in_use(), NONE);
    }
}

#[test]
#[ignore = "kernel: needs nbd"]
fn a_read_only_device_is_not_written() {
    let storage = memory(1 << 20);
    let options = DeviceOptions {
        read_only: true,
        ..DeviceOptions::default()
    };
    let mut device = Device::attach(Arc::clone(&storage), &options).unwrap();
    let listed = devices().unwrap();
    assert!(
        listed
            .iter()
            .any(|listed| listed.index == device.index() && listed.read_only)
    );
    let written = std::fs::File::options()
        .write(true)
        .open(device.path())
        .and_then(|file| {
            file.write_all_at(&[1; 4096], 0)
                .and_then(|()| file.sync_all())
        });
    assert!(written.is_err());
    assert!(device.map().is_err());
    device.detach(LIMIT).unwrap();
    assert_eq!(read(&*storage, 0, 4096), [0; 4096]);
}

#[test]
#[ignore = "kernel: needs nbd"]
fn what_is_stored_through_a_mapping_is_in_the_storage_after_msync() {
    let storage = memory(4 << 20);
    storage.write_all_at(&pattern(0, 4 << 20), 0).unwrap();
    let mut device = attach(&storage);
    let mapping = device.map().unwrap();
    let mut bytes = vec![0; 1 << 20];
    mapping.read(1 << 20..2 << 20, &mut bytes).unwrap();
    assert_eq!(bytes, pattern(1 << 20, 1 << 20));
    mapping.write(3_000_000, &pattern(5, 100_000)).unwrap();
    // For a shared mapping of a device this is what msync does.
    device.sync().unwrap();
    assert_eq!(read(&*storage, 3_000_000, 100_000), pattern(5, 100_000));
    drop(mapping);
    device.detach(LIMIT).unwrap();
}

#[test]
#[ignore = "kernel: needs nbd"]
fn requests_go_over_all_connections_at_once() {
    use memferry::chunk::{Fault, Faulty, Operation};
    let faulty = Arc::new(Faulty::new(memory(16 << 20)));
    let faults = faulty.faults();
    let options = DeviceOptions {
        connections: 4,
        direct: true,
        ..DeviceOptions::default()
    };
    let mut device = Device::attach(faulty as Arc<dyn Storage>, &options).unwrap();
    faults.add(Fault::stall(LIMIT).on(Operation::Read));
    std::thread::scope(|scope| {
        for reader in 0..8_u64 {
            let device = &device;
            scope.spawn(move || {
                let mut pages = vec![0; 3 * 4096];
                let bytes = aligned(&mut pages);
                device.file().read_exact_at(bytes, reader << 20).unwrap();
            });
        }
        faults.await_stalled(8, LIMIT);
        faults.clear();
    });
    device.detach(LIMIT).unwrap();
}
