//! Nothing is left behind, however it ends.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::*;
use memferry::frontend::nbd::{AttachError, Control};

/// What a process could leave behind: descriptors, and threads. Taken when those that have nothing to do any more have ended.
fn settled(before: Option<(usize, usize)>) -> (usize, usize) {
    assert_eq!(in_use(), NONE);
    let mut last = (0, 0);
    until("descriptors and threads are as before", || {
        let now = (descriptors(), threads());
        let same = before.map_or(now == last && now.1 <= 2, |before| now == before);
        last = now;
        same.then_some(now)
    })
}

#[test]
#[ignore = "kernel: needs nbd"]
fn two_hundred_devices_one_after_the_other_leave_nothing() {
    let storage = memory(1 << 20);
    attach(&storage).detach(LIMIT).unwrap();
    let before = settled(None);
    let nodes = devices().unwrap().len();
    for round in 0..200 {
        let mut device = attach(&storage);
        // Every third is only dropped.
        if round % 3 > 0 {
            device.detach(LIMIT).unwrap();
        }
    }
    settled(Some(before));
    assert_eq!(devices().unwrap().len(), nodes);
}

#[test]
#[ignore = "kernel: needs nbd"]
fn sixteen_devices_at_once_do_not_get_into_each_others_way() {
    let before = settled(None);
    let all: Vec<(u32, Arc<dyn Storage>)> = std::thread::scope(|scope| {
        let attached: Vec<_> = (0..16_u8)
            .map(|number| {
                scope.spawn(move || {
                    let storage = memory(1 << 20);
                    // The kernel connects one after the other, and an emulated one is slow.
                    let options = DeviceOptions {
                        attach_limit: LIMIT * 4,
                        ..DeviceOptions::default()
                    };
                    let device = Device::attach(Arc::clone(&storage), &options).unwrap();
                    std::os::unix::fs::FileExt::write_all_at(device.file(), &[number; 4096], 8192)
                        .unwrap();
                    (device, storage)
                })
            })
            .collect();
        let attached: Vec<_> = attached
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect();
        attached
            .into_iter()
            .map(|(mut device, storage)| {
                device.detach(LIMIT).unwrap();
                (device.index(), storage)
            })
            .collect()
    });
    for (number, (_, storage)) in all.iter().enumerate() {
        assert_eq!(
            read(&**storage, 8192, 4096),
            [u8::try_from(number).unwrap(); 4096]
        );
    }
    let mut indices: Vec<u32> = all.iter().map(|(index, _)| *index).collect();
    indices.sort_unstable();
    indices.dedup();
    assert_eq!(indices.len(), 16, "{all:?}");
    settled(Some(before));
}

#[test]
#[ignore = "kernel: needs nbd"]
fn a_process_without_descriptors_is_told_so_and_leaves_nothing() {
    let storage = memory(1 << 20);
    attach(&storage).detach(LIMIT).unwrap();
    let before = settled(None);
    let limits = getrlimit(Resource::Nofile);
    for control in [Control::Netlink, Control::Ioctl] {
        let options = DeviceOptions {
            connections: 2,
            control,
            attach_limit: Duration::from_secs(3),
            ..DeviceOptions::default()
        };
        let mut succeeded = false;
        for spare in 0..16 {
            // One of those counted was the one that counted.
            let most = before.0 as u64 - 1 + spare;
            let limit = Rlimit {
                current: Some(most),
                ..limits
            };
            setrlimit(Resource::Nofile, limit).unwrap();
            let attached = Device::attach(Arc::clone(&storage), &options);
            setrlimit(Resource::Nofile, limits).unwrap();
            match attached {
                Ok(mut device) => {
                    succeeded = true;
                    device.detach(LIMIT).unwrap();
                }
                Err(error) => assert!(
                    !matches!(error, AttachError::TimedOut { .. }) && !succeeded,
                    "{control:?}, {spare} spare descriptors: {error}"
                ),
            }
            settled(Some(before));
        }
        assert!(succeeded, "{control:?}");
    }
}
