//! Advice to the kernel about guest memory: the only `unsafe` of this crate besides that of `kvm`.

use std::io;
use std::ops::Range;

use vm_memory::{GuestMemoryRegion, MemoryRegionAddress};

/// Makes a range of a region absent: it reads as zeros, and an access is a fault if somebody watches. Whole pages.
///
/// # Errors
/// What the kernel says; for memory that is a private mapping of a file, `EINVAL` or `EACCES`.
pub(crate) fn remove<R: GuestMemoryRegion>(region: &R, range: Range<u64>) -> io::Result<()> {
    // The pages of a shared mapping are its file's: without the mapping they would be there still.
    let advice = match region.file_offset() {
        Some(_) => libc::MADV_REMOVE,
        None => libc::MADV_DONTNEED,
    };
    advise(region, range, advice)
}

/// Asks for huge pages where the kernel can make some.
///
/// # Errors
/// `EINVAL` if the kernel was built without them.
pub(crate) fn prefer_huge_pages<R: GuestMemoryRegion>(region: &R) -> io::Result<()> {
    advise(region, 0..region.len(), libc::MADV_HUGEPAGE)
}

fn advise<R: GuestMemoryRegion>(region: &R, range: Range<u64>, advice: i32) -> io::Result<()> {
    if range.start >= range.end {
        return Ok(());
    }
    let outside = || io::Error::from(io::ErrorKind::UnexpectedEof);
    let last = region.check_address(MemoryRegionAddress(range.end - 1));
    last.ok_or_else(outside)?;
    let address = region
        .get_host_address(MemoryRegionAddress(range.start))
        .map_err(io::Error::other)?;
    let len = usize::try_from(range.end - range.start).map_err(|_| outside())?;
    // SAFETY: the range is within the region, whose mapping lasts as long as the borrow. Its bytes may change at any time for
    // all that anybody may assume of guest memory, and these pieces of advice do no more than that.
    let result = unsafe { libc::madvise(address.cast(), len, advice) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
