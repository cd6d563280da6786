//! A file as storage: the RAM file of a guest, a memfd, an ordinary file.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::{Errno, ReadWriteFlags, preadv2};

use crate::chunk::{Storage, write_zeros};
use crate::sys::mapping::page_size;
use crate::sys::sparse::{next_data, next_hole};

/// A file, read and written by position; its holes stay holes until they are written.
///
/// Looking for holes moves the cursor of the file, which nothing here uses. What others write to the file, or to a shared
/// mapping of it, is seen at once. The length is that which the file had when this was made.
#[derive(Debug)]
pub struct FileStorage {
    file: File,
    len: u64,
    /// Where the last page ends, if there is anything behind the last byte.
    end_of_pages: u64,
    /// What becomes a hole begins and ends at a multiple of this, on a disk; a file system does the rest itself.
    block: u64,
    /// Whether the file system keeps it in memory.
    in_memory: bool,
}

impl FileStorage {
    /// The whole of `file`, as long as it is now. It must be open for reading, and for writing if it will be written.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] if it is neither a regular file nor a block device.
    pub fn new(file: File) -> io::Result<Self> {
        use std::os::unix::fs::FileTypeExt;
        let metadata = file.metadata()?;
        let (len, end_of_pages, block) = if metadata.is_file() {
            let len = metadata.len();
            (len, len.next_multiple_of(page_size()), 1)
        } else if metadata.file_type().is_block_device() {
            let len = rustix::fs::seek(&file, SeekFrom::End(0))?;
            let block = rustix::fs::ioctl_blksszget(&file)?.max(1);
            (len, len, u64::from(block))
        } else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "only a regular file or a block device has bytes at positions",
            ));
        };
        let in_memory = metadata.is_file() && is_of_tmpfs(&file);
        Ok(Self {
            file,
            len,
            end_of_pages,
            block,
            in_memory,
        })
    }

    /// The file itself.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Turns `range` back into a hole: it reads as zeros, its room is free, and an access to a mapping that is
    /// registered for missing pages faults.
    ///
    /// Only whole pages (blocks, on a disk) become holes; what the range has of others is set to zero. A last page that
    /// the file only begins is whole if the range reaches the end.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] if the range reaches beyond the end; [`io::ErrorKind::Unsupported`] if the
    /// file system has no holes.
    pub fn punch(&self, range: Range<u64>) -> io::Result<()> {
        let len = range
            .end
            .checked_sub(range.start)
            .ok_or_else(|| outside(self.len))?;
        self.check(range.start, len)?;
        if len == 0 {
            return Ok(());
        }
        let whole = whole_blocks(&range, self.block);
        if whole != range {
            write_zeros(self, range.start..whole.start)?;
            write_zeros(self, whole.end..range.end)?;
            return self.punch(whole);
        }
        // The kernel would take the last page for a part of one, zero it and leave it present: no access would fault.
        let len = if range.end == self.len {
            self.end_of_pages - range.start
        } else {
            len
        };
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        loop {
            return match rustix::fs::fallocate(&self.file, flags, range.start, len) {
                Ok(()) => Ok(()),
                Err(Errno::INTR) => continue,
                Err(errno @ (Errno::OPNOTSUPP | Errno::NOSYS)) => Err(io::Error::new(
                    io::ErrorKind::Unsupported,
                    format!(
                        "the file system cannot punch holes ({errno}): keep the file on tmpfs, ext4, xfs or btrfs"
                    ),
                )),
                Err(errno) => Err(errno.into()),
            };
        }
    }

    /// Whether the page cache has the first and the last byte of `range`. It reads ahead and gives up in larger pieces, so that is as good
    /// as all of a small range.
    fn is_cached(&self, range: Range<u64>) -> bool {
        let has = |offset| {
            let mut byte = [0];
            let mut bytes = [io::IoSliceMut::new(&mut byte)];
            matches!(
                preadv2(&self.file, &mut bytes, offset, ReadWriteFlags::NOWAIT),
                Ok(1)
            )
        };
        !range.is_empty() && has(range.start) && has(range.end - 1)
    }

    fn check(&self, offset: u64, len: u64) -> io::Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(outside(self.len)),
        }
    }
}

impl Storage for FileStorage {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.check(offset, buf.len() as u64)?;
        self.file.read_exact_at(buf, offset)
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.check(offset, buf.len() as u64)?;
        self.file.write_all_at(buf, offset)
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn zero(&self, range: Range<u64>) -> io::Result<()> {
        match self.punch(range.clone()) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => write_zeros(self, range),
            punched => punched,
        }
    }

    fn data_ranges(&self, within: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let end_of_all = within.end.min(self.len);
        let mut ranges = Vec::new();
        let mut next = within.start;
        while next < end_of_all {
            let Some(start) = next_data(&self.file, next)?.filter(|&start| start < end_of_all)
            else {
                break;
            };
            let end = next_hole(&self.file, start)?.map_or(end_of_all, |end| end.min(end_of_all));
            // The data may have been punched between the two questions.
            if end > start {
                ranges.push(start..end);
                next = end;
            } else {
                next = start + 1;
            }
        }
        Ok(ranges)
    }

    fn is_at_hand(&self, range: Range<u64>) -> bool {
        self.in_memory || self.is_cached(range)
    }
}

impl AsFd for FileStorage {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The blocks that are wholly in `range`; none, at its end, if there are none.
fn whole_blocks(range: &Range<u64>, block: u64) -> Range<u64> {
    let end = range.end - range.end % block;
    match range.start.checked_next_multiple_of(block) {
        Some(start) if start < end => start..end,
        _ => range.end..range.end,
    }
}

/// A memfd is a file of a tmpfs, too.
fn is_of_tmpfs(file: &File) -> bool {
    const TMPFS_MAGIC: u64 = 0x0102_1994;
    rustix::fs::fstatfs(file).is_ok_and(|about| u64::try_from(about.f_type) == Ok(TMPFS_MAGIC))
}

fn outside(len: u64) -> io::Error {
    io::Error::new(
        io::ErrorKind::UnexpectedEof,
        format!("the range is outside of a file of {len} bytes"),
    )
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::sys::memfd::memfd;

    mod on_a_file_system {
        crate::chunk::conformance::storage_conformance!(|len| {
            let [_, ordinary] = super::files(len);
            std::sync::Arc::new(ordinary) as _
        });
    }

    mod in_memory {
        crate::chunk::conformance::storage_conformance!(|len| {
            let [memfd, _] = super::files(len);
            std::sync::Arc::new(memfd) as _
        });
    }

    fn files(len: u64) -> [FileStorage; 2] {
        let ordinary = tempfile::tempfile().unwrap();
        ordinary.set_len(len).unwrap();
        [memfd("file-test", len).unwrap(), ordinary].map(|file| FileStorage::new(file).unwrap())
    }

    #[test]
    fn holes_are_left_out_and_reading_them_does_not_fill_them() {
        for storage in files(1 << 20) {
            assert_eq!(storage.data_ranges(0..storage.len()).unwrap(), []);
            let mut buf = vec![1; 1 << 20];
            storage.read_exact_at(&mut buf, 0).unwrap();
            assert!(buf.iter().all(|&byte| byte == 0));
            assert_eq!(storage.file().metadata().unwrap().blocks(), 0);
            storage.write_all_at(&[1; 4096], 8192).unwrap();
            storage.write_all_at(&[1; 4096], 1 << 19).unwrap();
            storage.flush().unwrap();
            assert_eq!(
                storage.data_ranges(0..storage.len()).unwrap(),
                [8192..12288, 1 << 19..(1 << 19) + 4096]
            );
        }
    }

    #[test]
    fn a_length_that_is_no_multiple_of_a_page_works_up_to_its_last_byte() {
        for storage in files(4097) {
            storage.write_all_at(&[9], 4096).unwrap();
            let ranges = storage.data_ranges(0..storage.len()).unwrap();
            assert_eq!(ranges.last().unwrap().end, 4097);
            let mut buf = [0; 2];
            storage.read_exact_at(&mut buf, 4095).unwrap();
            assert_eq!(buf, [0, 9]);
            let beyond = storage.read_exact_at(&mut buf, 4096).unwrap_err();
            assert_eq!(beyond.kind(), io::ErrorKind::UnexpectedEof);
            let beyond = storage.write_all_at(&buf, 4096).unwrap_err();
            assert_eq!(beyond.kind(), io::ErrorKind::UnexpectedEof);
            let beyond = storage.write_all_at(&buf, u64::MAX).unwrap_err();
            assert_eq!(beyond.kind(), io::ErrorKind::UnexpectedEof);
            assert_eq!(storage.file().metadata().unwrap().len(), 4097);
        }
    }

    #[test]
    fn a_punched_range_reads_as_zeros_and_gives_its_room_back() {
        for storage in files(64 << 10) {
            storage.write_all_at(&[1; 64 << 10], 0).unwrap();
            storage.punch(4096..16384).unwrap();
            storage.punch(0..0).unwrap();
            storage.punch(20_000..20_001).unwrap();
            let mut buf = vec![2; 64 << 10];
            storage.read_exact_at(&mut buf, 0).unwrap();
            for (offset, byte) in buf.iter().enumerate() {
                let punched = (4096..16384).contains(&offset) || offset == 20_000;
                assert_eq!(*byte, u8::from(!punched), "byte {offset}");
            }
            assert_eq!(
                storage.data_ranges(0..storage.len()).unwrap(),
                [0..4096, 16384..65536]
            );
            let beyond = storage.punch(0..65537).unwrap_err();
            assert_eq!(beyond.kind(), io::ErrorKind::UnexpectedEof);
        }
    }

    #[test]
    fn a_last_page_that_the_file_only_begins_becomes_a_hole_like_the_others() {
        // It was zeroed and left present, so a guest that ran before its last page had come read zeros there.
        for storage in files(4096 + 100) {
            storage.write_all_at(&[1; 4196], 0).unwrap();
            storage.punch(4096..4196).unwrap();
            let ranges = storage.data_ranges(0..storage.len()).unwrap();
            assert_eq!((ranges.len(), ranges[0].end), (1, 4096));
            assert_eq!(storage.file().metadata().unwrap().len(), 4196);
        }
    }

    #[test]
    fn a_terabyte_of_holes_is_looked_through_at_once() {
        let storage = FileStorage::new(memfd("sparse", 1 << 40).unwrap()).unwrap();
        storage.write_all_at(&[1], (1 << 40) - 1).unwrap();
        let ranges = storage.data_ranges(0..storage.len()).unwrap();
        assert_eq!((ranges.len(), ranges[0].start), (1, (1 << 40) - 4096));
    }

    #[test]
    fn what_the_page_cache_has_is_at_hand() {
        for storage in files(1 << 20) {
            storage.write_all_at(&[1; 8192], 4096).unwrap();
            assert!(storage.is_at_hand(4096..12288));
            assert!(!storage.is_at_hand(4096..(1 << 20) + 1) || storage.in_memory);
        }
    }

    #[test]
    fn only_whole_blocks_become_holes() {
        for (range, whole) in [
            (512..1024, 512..1024),
            (0..1000, 0..512),
            (1..1536, 512..1536),
            (1..1023, 1023..1023),
            (513..1025, 1025..1025),
            (u64::MAX - 1..u64::MAX, u64::MAX..u64::MAX),
        ] {
            assert_eq!(whole_blocks(&range, 512), whole, "{range:?}");
            assert_eq!(whole_blocks(&range, 1), range);
        }
    }

    #[test]
    #[ignore = "privileged: needs root (loop devices)"]
    fn a_part_of_a_block_of_a_disk_is_zeroed_and_the_rest_of_it_stays() {
        let mut disk = tempfile::NamedTempFile::new().unwrap();
        io::Write::write_all(&mut disk, &[1; 64 << 10]).unwrap();
        let output = std::process::Command::new("losetup")
            .args(["--find", "--show"])
            .arg(disk.path())
            .output()
            .unwrap();
        let device = String::from_utf8(output.stdout).unwrap();
        let device = device.trim();
        let outcome = std::panic::catch_unwind(|| {
            let file = File::options().read(true).write(true).open(device).unwrap();
            let storage = FileStorage::new(file).unwrap();
            let mut expected = vec![1; 64 << 10];
            for range in [100..200, 1000..9000, 20_000..20_480, 65_000..65_536] {
                storage.zero(range.start..range.end).unwrap();
                expected
                    [usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()]
                    .fill(0);
            }
            let mut found = vec![2; 64 << 10];
            storage.read_exact_at(&mut found, 0).unwrap();
            assert!(found == expected);
        });
        let detached = std::process::Command::new("losetup")
            .args(["--detach", device])
            .status()
            .unwrap();
        outcome.unwrap();
        assert!(detached.success());
    }

    #[test]
    fn a_pipe_is_no_storage() {
        let (read, _write) = io::pipe().unwrap();
        let file = File::from(std::os::fd::OwnedFd::from(read));
        assert_eq!(
            FileStorage::new(file).unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
    }
}
