//! A file in memory as storage.

use std::io;

use super::FileStorage;
use crate::sys::memfd::memfd;

/// `len` bytes in a file that lives in memory, all holes: its [descriptor](FileStorage::file) can be mapped, and handed
/// to other processes. `name` is what `/proc/PID/maps` shows.
///
/// # Errors
/// If the kernel has no room for descriptors, or `name` is longer than 249 bytes or holds a zero byte.
pub fn memfd_storage(name: &str, len: u64) -> io::Result<FileStorage> {
    FileStorage::new(memfd(name, len)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunk::Storage;

    #[test]
    fn a_memfd_is_at_hand_and_has_holes() {
        let storage = memfd_storage("at-hand", 8192).unwrap();
        assert!(storage.is_at_hand(0..8192));
        storage.write_all_at(&[1], 5000).unwrap();
        storage.write_all_at(&[1], 0).unwrap();
        storage.zero(0..4096).unwrap();
        let data = storage.data_ranges(0..8192).unwrap();
        assert_eq!((data.len(), data[0].clone()), (1, 4096..8192));
    }
}
