//! Memory of this process alone: what a userfaultfd fills as it is accessed.

use std::io;
use std::ops::Range;
use std::ptr::{self, NonNull};

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use super::mapping::{copy_shared, in_memory, page_size};

/// A stretch of private memory, all absent at first; unmapped on drop.
///
/// Other threads may load and store there by its [pointer](Self::as_ptr) at any time, so it is never lent as `&[u8]`. A
/// child of this process does not inherit it: there, every access is a segmentation fault.
#[derive(Debug)]
pub struct Memory {
    address: NonNull<u8>,
    len: u64,
}

// SAFETY: the mapping belongs to this value alone and is not bound to the thread that made it.
unsafe impl Send for Memory {}
// SAFETY: no method gives out a reference into the memory. Loads and stores are made by assembly (volatile accesses
// elsewhere), so two of them at once are a race for bytes and no undefined behaviour.
unsafe impl Sync for Memory {}

impl Memory {
    /// Reserves `len` bytes, rounded up to pages. They count as used when they become present.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] if `len` is zero or more than the address space; else what the kernel says.
    pub fn reserve(len: u64) -> io::Result<Self> {
        if len == 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "no bytes at all cannot be mapped",
            ));
        }
        let whole = len
            .checked_next_multiple_of(page_size())
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))
            .and_then(in_memory)?;
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
        let address = unsafe {
            rustix::mm::mmap_anonymous(
                ptr::null_mut(),
                whole,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }?;
        let address = NonNull::new(address.cast()).expect("the kernel maps nothing at zero");
        let memory = Self { address, len };
        // A child would see zeros where nobody serves its faults.
        memory.advise(Advice::LinuxDontFork)?;
        match memory.advise(Advice::LinuxNoHugepage) {
            // One fault makes one page present, whatever the machine's habits. No huge pages, no such habit.
            Ok(()) | Err(Errno::INVAL) => Ok(memory),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Its length in bytes, as it was asked for.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no bytes; never.
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

    /// Its first byte. Valid for reads and writes of [`len`](Self::len) bytes while this value lives, with volatile or atomic
    /// accesses if another thread may write the same bytes.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.address.as_ptr()
    }

    /// Loads the bytes from `offset` on. An absent page faults: this waits for who serves the faults, and is killed by
    /// `SIGBUS` if the page was poisoned.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] if the range is outside.
    pub fn load(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let from = self.at(offset, buf.len())?;
        // SAFETY: `at` has checked that the range lies within the mapping, which lives as long as `self`, and the buffer is
        // outside of it, since nobody has a reference into the mapping.
        unsafe { copy_shared(buf.as_mut_ptr(), from, buf.len()) };
        Ok(())
    }

    /// Stores `bytes` from `offset` on. Faults as [`load`](Self::load) does.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] if the range is outside.
    pub fn store(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let to = self.at(offset, bytes.len())?;
        // SAFETY: as in `load`, the other way round.
        unsafe { copy_shared(to, bytes.as_ptr(), bytes.len()) };
        Ok(())
    }

    /// Makes `range`, whole pages, absent again: what they held is gone.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] if the range is outside; [`io::ErrorKind::InvalidInput`] if it does not begin at a page.
    pub fn discard(&self, range: Range<u64>) -> io::Result<()> {
        let whole = self.addresses().end - self.addresses().start;
        if range.start > range.end || range.end > whole {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let len = in_memory(range.end - range.start)?;
        let start = in_memory(range.start)?;
        // SAFETY: the range was checked to lie within the mapping. Nobody has a reference into it.
        unsafe {
            rustix::mm::madvise(
                self.address.as_ptr().wrapping_add(start).cast(),
                len,
                Advice::LinuxDontNeed,
            )
        }?;
        Ok(())
    }

    fn advise(&self, advice: Advice) -> Result<(), Errno> {
        let all = self.addresses();
        let len = usize::try_from(all.end - all.start).expect("it was mapped with this length");
        // SAFETY: the whole mapping; neither advice changes what it holds.
        unsafe { rustix::mm::madvise(self.address.as_ptr().cast(), len, advice) }
    }

    /// The address of `offset`, from which `len` bytes are within the mapping.
    fn at(&self, offset: u64, len: usize) -> io::Result<*mut u8> {
        match offset.checked_add(len as u64) {
            Some(end) if end <= self.len => {
                Ok(self.address.as_ptr().wrapping_add(in_memory(offset)?))
            }
            _ => Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!(
                    "{len} bytes at {offset} are outside of memory of {} bytes",
                    self.len
                ),
            )),
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let all = self.addresses();
        let len = usize::try_from(all.end - all.start).expect("it was mapped with this length");
        // SAFETY: the whole mapping, which is ours, and into which nobody has a reference.
        let unmapped = unsafe { rustix::mm::munmap(self.address.as_ptr().cast(), len) };
        debug_assert!(unmapped.is_ok(), "a mapping of our own is unmapped");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_stored_is_loaded_until_it_is_discarded() {
        let memory = Memory::reserve(20_001).unwrap();
        memory.store(19_996, b"abcde").unwrap();
        let mut buf = [0; 5];
        memory.load(19_996, &mut buf).unwrap();
        assert_eq!(&buf, b"abcde");
        memory.discard(16384..20480).unwrap();
        memory.load(19_996, &mut buf).unwrap();
        assert_eq!(buf, [0; 5]);
    }

    #[test]
    fn what_is_outside_is_refused() {
        let memory = Memory::reserve(4097).unwrap();
        let outside = |result: io::Result<()>| {
            assert_eq!(result.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        };
        outside(memory.store(4096, &[1, 2]));
        outside(memory.load(u64::MAX, &mut [0]));
        outside(memory.discard(0..12288));
        assert!(memory.discard(1..4096).is_err());
        assert!(Memory::reserve(0).is_err());
        assert!(Memory::reserve(u64::MAX).is_err());
        assert!(Memory::reserve(1 << 60).is_err());
    }
}
