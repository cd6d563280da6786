//! What the kernel asks for reaches the storage.

use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Mutex;

use rustix::fs::{FallocateFlags, OFlags};

use super::*;

#[derive(Debug, Clone, PartialEq, Eq)]
enum Done {
    Write(Range<u64>),
    Zero(Range<u64>),
    Flush,
}

/// A storage that notes what it is told to do.
#[derive(Debug)]
struct Noting {
    storage: Arc<dyn Storage>,
    done: Mutex<Vec<Done>>,
}

impl Noting {
    fn new(len: u64) -> Arc<Self> {
        Arc::new(Self {
            storage: memory(len),
            done: Mutex::default(),
        })
    }

    fn note(&self, done: Done) {
        self.done.lock().unwrap().push(done);
    }

    fn take(&self) -> Vec<Done> {
        std::mem::take(&mut self.done.lock().unwrap())
    }
}

impl Storage for Noting {
    fn len(&self) -> u64 {
        self.storage.len()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.storage.read_exact_at(buf, offset)
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.note(Done::Write(offset..offset + buf.len() as u64));
        self.storage.write_all_at(buf, offset)
    }

    fn zero(&self, range: Range<u64>) -> io::Result<()> {
        self.note(Done::Zero(range.clone()));
        self.storage.zero(range)
    }

    fn flush(&self) -> io::Result<()> {
        self.note(Done::Flush);
        self.storage.flush()
    }

    fn data_ranges(&self, within: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        self.storage.data_ranges(within)
    }
}

#[test]
#[ignore = "kernel: needs nbd"]
fn fsync_flushes_the_storage_after_everything_was_written() {
    let storage = Noting::new(4 << 20);
    let mut device = Device::attach(
        Arc::clone(&storage) as Arc<dyn Storage>,
        &DeviceOptions::default(),
    )
    .unwrap();
    storage.take();
    device.file().write_all_at(&[1; 8192], 4096).unwrap();
    device.sync().unwrap();
    let done = storage.take();
    let flush = done.iter().rposition(|done| *done == Done::Flush).unwrap();
    let write = done
        .iter()
        .rposition(|done| matches!(done, Done::Write(_)))
        .unwrap();
    assert!(write < flush, "{done:?}");
    device.detach(LIMIT).unwrap();
}

#[test]
#[ignore = "kernel: needs nbd"]
fn a_write_that_is_to_be_durable_at_once_is_flushed() {
    let storage = Noting::new(4 << 20);
    let mut device = Device::attach(
        Arc::clone(&storage) as Arc<dyn Storage>,
        &DeviceOptions::default(),
    )
    .unwrap();
    let flags = OFlags::DIRECT | OFlags::DSYNC;
    let file = std::fs::File::options()
        .write(true)
        .custom_flags(i32::try_from(flags.bits()).unwrap())
        .open(device.path())
        .unwrap();
    storage.take();
    let mut pages = vec![3; 3 * 4096];
    file.write_all_at(aligned(&mut pages), 1 << 20).unwrap();
    // The write asks for it itself (FUA); the kernel may flush once more.
    let done = storage.take();
    let write = Done::Write(1 << 20..(1 << 20) + 8192);
    assert_eq!(done[..2], [write, Done::Flush], "{done:?}");
    drop(file);
    device.detach(LIMIT).unwrap();
}

#[test]
#[ignore = "kernel: needs nbd"]
fn discarded_blocks_are_zeroed_in_the_storage() {
    let storage = Noting::new(4 << 20);
    storage.write_all_at(&[7; 1 << 20], 0).unwrap();
    let mut device = Device::attach(
        Arc::clone(&storage) as Arc<dyn Storage>,
        &DeviceOptions::default(),
    )
    .unwrap();
    storage.take();
    let path = device.path().to_str().unwrap().to_owned();
    run(
        "busybox",
        &["blkdiscard", "-o", "8192", "-l", "65536", &path],
    );
    assert_eq!(storage.take(), [Done::Zero(8192..8192 + 65536)]);
    assert_eq!(read(&*storage, 8191, 2), [7, 0]);
    device.detach(LIMIT).unwrap();
}

#[test]
#[ignore = "kernel: needs nbd"]
fn blocks_that_are_to_be_zero_are_so_however_the_kernel_asks() {
    let storage = Noting::new(4 << 20);
    storage.write_all_at(&[7; 1 << 20], 0).unwrap();
    let mut device = Device::attach(
        Arc::clone(&storage) as Arc<dyn Storage>,
        &DeviceOptions::default(),
    )
    .unwrap();
    storage.take();
    let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(device.file(), flags, 4096, 512 << 10).unwrap();
    // Up to Linux 6.12 its client knows no WRITE_ZEROES and sends bytes.
    let done = storage.take();
    assert!(!done.is_empty());
    println!("asked for as {:?}", done[0]);
    assert_eq!(read(&*storage, 4096, 512 << 10), vec![0; 512 << 10]);
    assert_eq!(read(&*storage, 4095, 1), [7]);
    device.detach(LIMIT).unwrap();
}
