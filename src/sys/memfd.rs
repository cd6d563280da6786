//! Files that live in memory only.

use std::fs::File;
use std::io;

use rustix::fs::MemfdFlags;

/// Makes a file in memory of `len` bytes, all holes; `name` is what `/proc/PID/maps` shows.
///
/// It goes away with its last descriptor and its last mapping.
///
/// # Errors
/// If the kernel has no room for descriptors, or `name` is longer than 249 bytes or holds a zero byte.
pub fn memfd(name: &str, len: u64) -> io::Result<File> {
    let file = File::from(rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)?);
    file.set_len(len)?;
    Ok(file)
}
