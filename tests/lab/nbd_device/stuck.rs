//! Devices that somebody left behind.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use super::*;
use memferry::frontend::nbd::{Force, FreeError, free};
use memferry::sys::nbd::{ClientFlags, Connect, Netlink};

/// Connects a device as a process would that ends at once and leaves it behind.
fn leave_behind(identifier: &str) -> (u32, UnixStream) {
    let (ours, kernels) = UnixStream::pair().unwrap();
    let device = Connect {
        index: None,
        size: 1 << 20,
        block_size: 4096,
        server_flags: 1,
        client_flags: ClientFlags::default(),
        timeout: Duration::from_secs(300),
        dead_connection_timeout: Duration::ZERO,
        identifier,
        sockets: &[kernels.as_fd()],
    };
    // Another thread, which the kernel notes and which ends.
    let index = std::thread::scope(|scope| {
        scope
            .spawn(|| {
                Netlink::open()
                    .unwrap()
                    .connect(&device, Instant::now() + LIMIT)
                    .unwrap()
            })
            .join()
            .unwrap()
    });
    (index, ours)
}

#[test]
#[ignore = "kernel: needs nbd"]
fn a_device_that_was_left_behind_is_found_and_freed() {
    let (index, socket) = leave_behind("memferry-4000000-1-0");
    drop(socket);
    let listed = devices().unwrap();
    let listed = listed.iter().find(|listed| listed.index == index).unwrap();
    assert!(
        matches!(listed.state, DeviceState::Abandoned { .. }),
        "{listed:?}"
    );
    free(index, Force::OnlyAbandoned, LIMIT).unwrap();
    assert_eq!(in_use(), NONE);
    free(index, Force::OnlyAbandoned, LIMIT).unwrap();
}

#[test]
#[ignore = "kernel: needs nbd"]
fn a_device_that_is_served_is_freed_by_force_alone() {
    let mut device = attach(&memory(1 << 20));
    let refused = free(device.index(), Force::OnlyAbandoned, LIMIT).unwrap_err();
    assert!(
        matches!(refused, FreeError::NotAbandoned { .. }),
        "{refused}"
    );
    let used = free(device.index(), Force::Whatever, Duration::from_secs(1)).unwrap_err();
    assert!(matches!(used, FreeError::InUse { .. }), "{used}");
    // It is not connected again behind the back of who did that.
    let _lost = device.detach(LIMIT);
    drop(device);
    until("the device is free", || in_use().is_empty().then_some(()));
}

#[test]
#[ignore = "kernel: needs nbd"]
fn a_device_of_somebody_else_whose_process_has_ended_is_not_taken_for_abandoned() {
    let (index, socket) = leave_behind("somebody else");
    let listed = devices().unwrap();
    let listed = listed.iter().find(|listed| listed.index == index).unwrap();
    assert!(
        matches!(listed.state, DeviceState::Unattended { .. }),
        "{listed:?}"
    );
    assert!(free(index, Force::OnlyAbandoned, LIMIT).is_err());
    free(index, Force::Whatever, LIMIT).unwrap();
    drop(socket);
    assert_eq!(in_use(), NONE);
}
