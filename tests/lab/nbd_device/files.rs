//! File systems, and programs that read back what they wrote.

use std::fs;

use super::*;
use memferry::frontend::nbd::{DetachError, Holder};

/// A mounted file system, until it is unmounted.
struct Mounted(&'static str);

impl Mounted {
    fn new(device: &Device, at: &'static str) -> Self {
        fs::create_dir_all(at).unwrap();
        run(
            "mount",
            &["-t", "ext4", device.path().to_str().unwrap(), at],
        );
        Self(at)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0).output();
    }
}

fn with_ext4(storage: &Arc<dyn Storage>) -> Device {
    let device = attach(storage);
    run("mkfs.ext4", &["-q", "-F", device.path().to_str().unwrap()]);
    device
}

#[test]
#[ignore = "kernel: needs nbd"]
fn a_file_system_on_a_device_is_whole_after_moving_to_another_one() {
    let storage = memory(64 << 20);
    let mut device = with_ext4(&storage);
    let mounted = Mounted::new(&device, "/tmp/ext4-first");
    for file in 0..50_u64 {
        let len = usize::try_from(file * 10_000 + 1).unwrap();
        fs::write(format!("{}/{file}", mounted.0), pattern(file, len)).unwrap();
    }
    fs::remove_file(format!("{}/7", mounted.0)).unwrap();
    drop(mounted);
    device.detach(LIMIT).unwrap();

    let mut device = attach(&storage);
    run("e2fsck", &["-f", "-n", device.path().to_str().unwrap()]);
    let mounted = Mounted::new(&device, "/tmp/ext4-second");
    for file in (0..50_u64).filter(|file| *file != 7) {
        let len = usize::try_from(file * 10_000 + 1).unwrap();
        let bytes = fs::read(format!("{}/{file}", mounted.0)).unwrap();
        assert!(bytes == pattern(file, len), "file {file}");
    }
    drop(mounted);
    device.detach(LIMIT).unwrap();
}

#[test]
#[ignore = "kernel: needs nbd"]
fn a_device_that_is_mounted_is_busy_and_works_on() {
    let storage = memory(32 << 20);
    let mut device = with_ext4(&storage);
    let mounted = Mounted::new(&device, "/tmp/ext4-busy");
    match device.detach(Duration::from_millis(200)) {
        Err(DetachError::Busy { holders, .. }) => {
            assert_eq!(holders, [Holder::Mount("/tmp/ext4-busy".into())]);
        }
        other => panic!("{other:?}"),
    }
    fs::write("/tmp/ext4-busy/file", b"still here").unwrap();
    drop(mounted);
    device.detach(LIMIT).unwrap();
    assert_eq!(in_use(), NONE);
}

#[test]
#[ignore = "kernel: needs nbd"]
fn a_device_that_a_process_has_open_or_mapped_is_busy() {
    let mut device = attach(&memory(1 << 20));
    let me = |error: DetachError| match error {
        DetachError::Busy { holders, .. } => {
            assert!(
                matches!(holders[..], [Holder::Process { pid, .. }] if pid == std::process::id()),
                "{holders:?}"
            );
        }
        other => panic!("{other:?}"),
    };
    let open = fs::File::open(device.path()).unwrap();
    me(device.detach(Duration::from_millis(100)).unwrap_err());
    drop(open);
    let mapping = device.map().unwrap();
    me(device.detach(Duration::from_millis(100)).unwrap_err());
    drop(mapping);
    device.detach(LIMIT).unwrap();
    assert!(matches!(
        device.detach(LIMIT),
        Err(DetachError::Detached { .. })
    ));
}

#[test]
#[ignore = "kernel: needs nbd (and fio)"]
fn fio_reads_back_what_it_wrote() {
    let mut device = attach(&memory(32 << 20));
    let path = format!("--filename={}", device.path().display());
    for (engine, direct, pattern) in [
        ("libaio", "1", "randrw"),
        ("psync", "1", "write"),
        ("psync", "0", "randwrite"),
    ] {
        run(
            "fio",
            &[
                "--name=verify",
                &path,
                &format!("--ioengine={engine}"),
                &format!("--direct={direct}"),
                &format!("--rw={pattern}"),
                "--bsrange=4k-128k",
                "--blockalign=4k",
                "--size=32m",
                "--iodepth=16",
                "--verify=crc32c",
                "--verify_fatal=1",
                "--randseed=7",
            ],
        );
    }
    device.detach(LIMIT).unwrap();
}
