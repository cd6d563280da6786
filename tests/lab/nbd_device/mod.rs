//! Regions as block devices of a real kernel.

mod basic;
mod commands;
mod failures;
mod files;
mod killed;
mod leaks;
mod measured;
mod memory_pressure;
mod stuck;

use std::io;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use memferry::backend::MemoryStorage;
use memferry::chunk::Storage;
use memferry::frontend::nbd::{Device, DeviceOptions, DeviceState, devices};

/// An emulated machine is slow, and what hangs does so for ever.
const LIMIT: Duration = Duration::from_secs(30);

fn memory(len: u64) -> Arc<dyn Storage> {
    Arc::new(MemoryStorage::new(len))
}

fn attach(storage: &Arc<dyn Storage>) -> Device {
    Device::attach(Arc::clone(storage), &DeviceOptions::default()).unwrap()
}

/// Bytes that say where they are.
fn pattern(offset: u64, len: usize) -> Vec<u8> {
    (0..len as u64)
        .map(|at| ((offset + at).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8)
        .collect()
}

fn read(storage: &dyn Storage, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; len];
    storage.read_exact_at(&mut bytes, offset).unwrap();
    bytes
}

/// Runs a program to its end and returns what it printed.
fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {said}");
    said
}

fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}: not within {LIMIT:?}");
        std::thread::park_timeout(Duration::from_millis(1));
    }
}

/// How many descriptors and threads this process has.
fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

const NONE: [u32; 0] = [];

/// The devices that somebody serves, or did.
fn in_use() -> Vec<u32> {
    let listed = devices().unwrap();
    let used = listed
        .iter()
        .filter(|device| device.state != DeviceState::Free);
    used.map(|device| device.index).collect()
}

fn is_io_error(error: &io::Error) -> bool {
    error.raw_os_error() == Some(5)
}

/// Two pages of a buffer of three, beginning at a page.
fn aligned(buffer: &mut [u8]) -> &mut [u8] {
    let skip = buffer.as_ptr().align_offset(4096);
    &mut buffer[skip..skip + 8192]
}
