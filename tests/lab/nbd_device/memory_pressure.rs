//! A process that writes to a device which it serves itself, in less memory than it writes.

use std::fs;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;

/// A storage that needs no memory: it knows what it will be written, and checks that it is.
#[derive(Debug)]
struct Expecting {
    len: u64,
    written: AtomicU64,
}

fn expected(offset: u64, buf: &mut [u8]) {
    for (page, bytes) in buf.chunks_mut(4096).enumerate() {
        bytes.fill(u8::try_from((offset / 4096 + page as u64) % 251).unwrap());
    }
}

impl Storage for Expecting {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        expected(offset, buf);
        Ok(())
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let mut page = [0; 4096];
        for (at, bytes) in buf.chunks(4096).enumerate() {
            expected(offset + at as u64 * 4096, &mut page);
            if bytes != page {
                return Err(io::ErrorKind::InvalidData.into());
            }
        }
        self.written.fetch_add(buf.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn data_ranges(&self, within: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        Ok(vec![within])
    }
}

/// This process in a group of its own with little memory, until this is dropped.
struct Small(&'static str);

impl Small {
    fn new(most: u64) -> Self {
        let root = "/tmp/cgroup";
        if !std::path::Path::new("/tmp/cgroup/cgroup.procs").exists() {
            fs::create_dir_all(root).unwrap();
            run("mount", &["-t", "cgroup2", "none", root]);
        }
        fs::write("/tmp/cgroup/cgroup.subtree_control", "+memory").unwrap();
        let group = "/tmp/cgroup/small";
        fs::create_dir_all(group).unwrap();
        fs::write(format!("{group}/memory.max"), most.to_string()).unwrap();
        fs::write(
            format!("{group}/cgroup.procs"),
            std::process::id().to_string(),
        )
        .unwrap();
        Self(group)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = fs::write("/tmp/cgroup/cgroup.procs", std::process::id().to_string());
        until("the group is empty", || fs::remove_dir(self.0).ok());
    }
}

#[test]
#[ignore = "kernel: needs nbd and memory cgroups"]
fn a_process_that_dirties_more_than_its_memory_goes_on() {
    let storage = Arc::new(Expecting {
        len: 640 << 20,
        written: AtomicU64::new(0),
    });
    // A worker for each request, so that what the device asks for while this process waits for memory has to be answered by threads that
    // want memory, too.
    let mut device = Device::attach(
        Arc::clone(&storage) as Arc<dyn Storage>,
        &DeviceOptions::default(),
    )
    .unwrap();
    assert!(device.is_safe_when_memory_is_short());
    let small = Small::new(160 << 20);
    // What it holds itself, 64 MiB for requests among it, has room; what it writes has not.
    let mut bytes = vec![0; 1 << 20];
    let start = Instant::now();
    for offset in (0..storage.len).step_by(bytes.len()) {
        expected(offset, &mut bytes);
        device.file().write_all_at(&bytes, offset).unwrap();
        assert!(start.elapsed() < LIMIT * 4, "stuck at {offset}");
    }
    device.sync().unwrap();
    drop(small);
    assert!(storage.written.load(Ordering::Relaxed) >= storage.len);
    device.detach(LIMIT).unwrap();
}
