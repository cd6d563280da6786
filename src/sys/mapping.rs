//! A shared mapping of a file: memory that others write too.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::ptr::{self, NonNull};

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use xxhash_rust::xxh3::{Xxh3Default, xxh3_64};

/// A file mapped shared, for reading and writing; unmapped on drop.
///
/// Others (a guest, another thread, another process) may write the same bytes at any time, so they are never lent as
/// `&[u8]`: they are copied in, copied out, received into, or digested. All methods may be called from any thread.
///
/// The file must not be made shorter while it is mapped: [`write`](Self::write) would die of `SIGBUS`.
#[derive(Debug)]
pub struct Mapping {
    address: NonNull<u8>,
    /// Bytes of the file that are in reach; the mapping itself goes on to the end of the page.
    len: u64,
    file: File,
}

// SAFETY: the mapping belongs to this value alone and is not bound to the thread that made it.
unsafe impl Send for Mapping {}
// SAFETY: no method gives out a reference into the memory. Loads and stores are made by the kernel or by assembly
// (volatile accesses elsewhere), so two of them at once are a race for bytes and no undefined behaviour.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `len` bytes of `file`, a regular one or a block device. Nothing is read or allocated yet.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] if `len` is zero, or more than the file has; else what the kernel says.
    pub fn new(file: File, len: u64) -> io::Result<Self> {
        let has = length(&file)?;
        if len == 0 || len > has {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{len} bytes of a file of {has} bytes cannot be mapped"),
            ));
        }
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
        let address = unsafe {
            rustix::mm::mmap(
                ptr::null_mut(),
                in_memory(len)?,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &file,
                0,
            )
        }?;
        let address = NonNull::new(address.cast()).expect("the kernel maps nothing at zero");
        Ok(Self { address, len, file })
    }

    /// Maps `len` fresh bytes, all zeros, that no file name leads to.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn anonymous(len: u64) -> io::Result<Self> {
        Self::new(super::memfd::memfd("memferry", len)?, len)
    }

    /// Its length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no bytes; never, since an empty file is not mapped.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where it lies in this process, whole pages: for [`Uffd::register`](super::uffd::Uffd::register).
    #[must_use]
    pub fn addresses(&self) -> Range<u64> {
        let start = self.address.as_ptr().expose_provenance() as u64;
        start..start + self.len.next_multiple_of(page_size())
    }

    /// The file that is mapped.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Makes the pages of `range` present and writable, so that storing to them cannot fail. Counts as writing them.
    ///
    /// `range` begins at a page and ends at one or at the end of the mapping. Blocks while the kernel finds memory.
    ///
    /// # Errors
    /// [`io::ErrorKind::StorageFull`] if the file system or the memory is full; the pages that found room are present.
    /// [`io::ErrorKind::InvalidInput`] if the range begins or ends within a page.
    pub fn populate(&self, range: Range<u64>) -> io::Result<()> {
        self.check(&range)?;
        let page = page_size();
        if !range.start.is_multiple_of(page)
            || !(range.end.is_multiple_of(page) || range.end == self.len)
        {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{range:?} does not begin and end at pages"),
            ));
        }
        if range.is_empty() {
            return Ok(());
        }
        let len = in_memory(range.end.next_multiple_of(page) - range.start)?;
        loop {
            // SAFETY: the range was checked to lie within the mapping, whose last page counts whole. The advice makes
            // pages present with the bytes that they have.
            let advised = unsafe {
                rustix::mm::madvise(self.at(range.start).cast(), len, Advice::LinuxPopulateWrite)
            };
            return match advised {
                Ok(()) => Ok(()),
                Err(Errno::INTR | Errno::AGAIN) => continue,
                // Linux before 5.14. Room for the pages is what matters.
                Err(Errno::INVAL) => rustix::fs::fallocate(
                    &self.file,
                    FallocateFlags::KEEP_SIZE,
                    range.start,
                    range.end - range.start,
                )
                .map_err(|errno| no_room(&range, errno)),
                Err(errno) => Err(no_room(&range, errno)),
            };
        }
    }

    /// Receives from `fd` straight into `spans` of the mapping, in order, by one system call; says how many bytes
    /// came, zero at the end of the stream. Blocks as the descriptor does.
    ///
    /// At most 1024 spans are used at once, which a short answer also covers.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] if a span is outside of the mapping; `EFAULT` if there is no room for a page
    /// ([`populate`](Self::populate) first to know); else what the descriptor says.
    pub fn read_vectored_from(
        &self,
        fd: BorrowedFd<'_>,
        spans: &[Range<u64>],
    ) -> io::Result<usize> {
        const MOST: usize = 1024; // IOV_MAX
        let none = libc::iovec {
            iov_base: ptr::null_mut(),
            iov_len: 0,
        };
        let mut few = [none; 16];
        let mut many = Vec::new();
        let spans = &spans[..spans.len().min(MOST)];
        let vectors = if let Some(few) = few.get_mut(..spans.len()) {
            few
        } else {
            many.resize(spans.len(), none);
            &mut many[..]
        };
        for (vector, span) in vectors.iter_mut().zip(spans) {
            self.check(span)?;
            *vector = libc::iovec {
                iov_base: self.at(span.start).cast(),
                iov_len: in_memory(span.end - span.start)?,
            };
        }
        let count = libc::c_int::try_from(vectors.len()).expect("at most 1024");
        loop {
            // SAFETY: every vector was checked to lie within the mapping, which lives as long as `self`; nobody holds
            // a reference into it, so the kernel may write there.
            let read = unsafe { libc::readv(fd.as_raw_fd(), vectors.as_ptr(), count) };
            match usize::try_from(read) {
                Ok(read) => return Ok(read),
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
    }

    /// Copies the bytes of `range` out. Holes read as zeros and stay holes.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] if the range is outside of the mapping.
    ///
    /// # Panics
    /// If `buf` is not as long as `range`.
    pub fn read(&self, range: Range<u64>, buf: &mut [u8]) -> io::Result<()> {
        self.check(&range)?;
        assert_eq!(
            buf.len() as u64,
            range.end - range.start,
            "the buffer is as long as the range"
        );
        // Through the file: a load from a hole would allocate it, and die of SIGBUS where there is no room.
        self.file.read_exact_at(buf, range.start)
    }

    /// Stores `bytes` at `offset`, as the program that owns the memory would.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] if they reach beyond the mapping; [`io::ErrorKind::StorageFull`] if there is
    /// no room for their pages, and nothing was written then.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let range = offset..offset.saturating_add(bytes.len() as u64);
        self.check(&range)?;
        let page = page_size();
        let start = offset - offset % page;
        let end = range.end.next_multiple_of(page).min(self.len);
        self.populate(start..end)?;
        // SAFETY: the range was checked to lie within the mapping, and its pages are there. `bytes` does not overlap
        // it, since nobody has a reference into the mapping.
        unsafe { copy_shared(self.at(offset), bytes.as_ptr(), bytes.len()) };
        Ok(())
    }

    /// Stores `bytes` at `offset` without making sure of their pages, so that the store itself faults.
    #[cfg(test)]
    pub(super) fn store_unpopulated(&self, offset: u64, bytes: &[u8]) {
        self.check(&(offset..offset + bytes.len() as u64)).unwrap();
        // SAFETY: as in `write`, but that a full file system ends the test.
        unsafe { copy_shared(self.at(offset), bytes.as_ptr(), bytes.len()) };
    }

    /// The `xxh3_64` digest of the bytes of `range`, as they are while it is computed.
    ///
    /// Loads from the memory, so a hole in the range is **allocated**: digest what is known to be there.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] if the range is outside of the mapping.
    pub fn digest(&self, range: Range<u64>) -> io::Result<u64> {
        self.check(&range)?;
        // Fits the first-level cache beside what the hash needs.
        let mut block = [const { MaybeUninit::uninit() }; 8 << 10];
        if range.end - range.start <= block.len() as u64 {
            return Ok(xxh3_64(self.load(range, &mut block)));
        }
        let mut hasher = Xxh3Default::new();
        let mut next = range.start;
        while next < range.end {
            let bytes = self.load(next..range.end, &mut block);
            hasher.update(bytes);
            next += bytes.len() as u64;
        }
        Ok(hasher.digest())
    }

    /// Copies the first bytes of `range`, which was checked, as many as fit, into `block`.
    fn load<'b>(&self, range: Range<u64>, block: &'b mut [MaybeUninit<u8>]) -> &'b [u8] {
        let len = usize::try_from(range.end - range.start)
            .map_or(block.len(), |len| len.min(block.len()));
        // SAFETY: the range lies within the mapping, and the block is at least `len` long and outside of it.
        unsafe { copy_shared(block.as_mut_ptr().cast(), self.at(range.start), len) };
        // SAFETY: those bytes have just been written.
        unsafe { block[..len].assume_init_ref() }
    }

    fn check(&self, range: &Range<u64>) -> io::Result<()> {
        if range.start <= range.end && range.end <= self.len {
            return Ok(());
        }
        Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            format!("{range:?} is outside of a mapping of {} bytes", self.len),
        ))
    }

    /// The address of byte `offset`, which was checked.
    fn at(&self, offset: u64) -> *mut u8 {
        let offset = usize::try_from(offset).expect("what is mapped fits the address space");
        self.address.as_ptr().wrapping_add(offset)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let len = in_memory(self.len).expect("it was mapped with this length");
        // SAFETY: the whole mapping, which is ours, and into which nobody has a reference.
        let unmapped = unsafe { rustix::mm::munmap(self.address.as_ptr().cast(), len) };
        debug_assert!(unmapped.is_ok(), "a mapping of our own is unmapped");
    }
}

impl AsFd for Mapping {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The page size of this machine in bytes.
#[must_use]
pub fn page_size() -> u64 {
    rustix::param::page_size() as u64
}

/// How long a regular file or a block device is.
fn length(file: &File) -> io::Result<u64> {
    let metadata = file.metadata()?;
    if metadata.file_type().is_block_device() {
        // Moves the cursor, which nothing here uses.
        return Ok(rustix::fs::seek(file, SeekFrom::End(0))?);
    }
    Ok(metadata.len())
}

pub(super) fn in_memory(len: u64) -> io::Result<usize> {
    usize::try_from(len).map_err(|_| {
        io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{len} bytes do not fit the address space"),
        )
    })
}

fn no_room(range: &Range<u64>, errno: Errno) -> io::Error {
    match errno {
        // A store would have died of SIGBUS, or been refused memory.
        Errno::FAULT | Errno::NOMEM | Errno::NOSPC | Errno::DQUOT => io::Error::new(
            io::ErrorKind::StorageFull,
            format!(
                "no room in the file system or the memory for bytes {range:?} of a mapping ({errno}): give the tmpfs \
                 more room, or free some"
            ),
        ),
        errno => errno.into(),
    }
}

/// Copies `len` bytes, of which one side may be written by others meanwhile.
///
/// # Safety
/// Both sides are valid for `len` bytes and do not overlap.
pub(super) unsafe fn copy_shared(to: *mut u8, from: *const u8, len: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: copies `len` bytes between valid ranges (the direction flag is clear on entry to assembly). The compiler
    // does not look inside, so racing with another writer is not undefined behaviour. Fast strings make it as quick
    // as memcpy for a page or more.
    unsafe {
        std::arch::asm!(
            "rep movsb",
            inout("rcx") len => _,
            inout("rdi") to => _,
            inout("rsi") from => _,
            options(nostack, preserves_flags),
        );
    }
    #[cfg(not(target_arch = "x86_64"))]
    for index in 0..len {
        // SAFETY: within the range, by the contract.
        let from = unsafe { from.add(index) };
        // SAFETY: within the range, by the contract.
        let to = unsafe { to.add(index) };
        // SAFETY: valid by the contract.
        let byte = unsafe { from.read_volatile() };
        // SAFETY: valid by the contract.
        unsafe { to.write_volatile(byte) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tmpfs_file(len: u64) -> File {
        super::super::memfd::memfd("mapping-test", len).unwrap()
    }

    #[test]
    fn what_is_written_is_read_digested_and_in_the_file() {
        let mapping = Mapping::new(tmpfs_file(20_000), 19_999).unwrap();
        let bytes: Vec<u8> = (0..12_345_u32).map(|n| (n % 251) as u8).collect();
        mapping.write(5000, &bytes).unwrap();
        let range = 5000..5000 + bytes.len() as u64;
        let mut read = vec![0; bytes.len()];
        mapping.read(range.clone(), &mut read).unwrap();
        assert_eq!(read, bytes);
        assert_eq!(mapping.digest(range).unwrap(), xxh3_64(&bytes));
        let short = 5000..5100;
        assert_eq!(mapping.digest(short).unwrap(), xxh3_64(&bytes[..100]));
        mapping.file().read_exact_at(&mut read, 5000).unwrap();
        assert_eq!(read, bytes);
    }

    #[test]
    fn reading_a_hole_leaves_it_a_hole() {
        use std::os::unix::fs::MetadataExt;
        let mapping = Mapping::anonymous(1 << 20).unwrap();
        let mut buf = vec![1; 1 << 20];
        mapping.read(0..1 << 20, &mut buf).unwrap();
        assert!(buf.iter().all(|&byte| byte == 0));
        assert_eq!(mapping.file().metadata().unwrap().blocks(), 0);
    }

    #[test]
    fn a_range_outside_is_refused() {
        let mapping = Mapping::anonymous(5000).unwrap();
        let outside = |result: io::Result<()>| {
            assert_eq!(result.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        };
        outside(mapping.write(4999, &[1, 2]));
        outside(mapping.write(u64::MAX, &[1]));
        outside(mapping.read(5000..5001, &mut [0]));
        outside(mapping.digest(0..5001).map(drop));
        outside(mapping.populate(8192..8193));
        let (read, _write) = io::pipe().unwrap();
        outside(
            mapping
                .read_vectored_from(read.as_fd(), &[0..10, 4999..5001])
                .map(drop),
        );
        assert!(Mapping::new(tmpfs_file(10), 11).is_err());
        assert!(Mapping::new(tmpfs_file(0), 0).is_err());
    }

    #[test]
    fn a_stream_is_received_into_scattered_spans_and_may_come_short() {
        use std::io::Write;
        let mapping = Mapping::anonymous(1 << 20).unwrap();
        let (read, mut write) = io::pipe().unwrap();
        write.write_all(b"abcdefgh").unwrap();
        let spans: Vec<_> = (0..100).map(|n| n * 4096..n * 4096 + 3).collect();
        let count = mapping.read_vectored_from(read.as_fd(), &spans).unwrap();
        assert_eq!(count, 8);
        let mut buf = [0; 4];
        mapping.read(4096..4100, &mut buf).unwrap();
        assert_eq!(&buf, b"def\0");
        drop(write);
        let count = mapping
            .read_vectored_from(read.as_fd(), &spans[..1])
            .unwrap();
        assert_eq!(count, 0);
    }

    #[test]
    fn the_last_page_may_be_short() {
        let mapping = Mapping::anonymous(4097).unwrap();
        mapping.populate(4096..4097).unwrap();
        mapping.write(4096, &[7]).unwrap();
        assert_eq!(mapping.addresses().end - mapping.addresses().start, 8192);
        assert!(mapping.populate(1..4096).is_err());
        assert!(mapping.populate(0..100).is_err());
    }

    #[test]
    #[ignore = "measurement"]
    fn measure_the_digest() {
        let len = 1 << 30;
        let mapping = Mapping::anonymous(len).unwrap();
        let bytes: Vec<u8> = (0..1 << 20).map(|n: u32| (n % 251) as u8).collect();
        for offset in (0..len).step_by(bytes.len()) {
            mapping.write(offset, &bytes).unwrap();
        }
        for chunk in [4096, 64 << 10, 1 << 20].repeat(2) {
            let start = std::time::Instant::now();
            for offset in (0..len).step_by(chunk) {
                std::hint::black_box(mapping.digest(offset..offset + chunk as u64).unwrap());
            }
            let rate = len as f64 / start.elapsed().as_secs_f64() / 1e9;
            println!("digest, chunks of {chunk}: {rate:.1} GB/s");
        }
    }
}
