//! Memory that fills up while somebody waits for it.

use std::fmt::Debug;
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::Storage;

/// A place in a set of regions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Index of the region.
    pub region: usize,
    /// Byte offset in it.
    pub offset: u64,
}

/// The memory of a destination: several regions that chunks are put into.
///
/// It has two lives. At first nobody looks at it, and bytes are written in place. After
/// [`arm`](Self::arm) the subject may look at any time: an access to an absent page is a fault, which waits until the
/// page is installed; a page is installed whole, and one that is present is never overwritten.
pub trait Install: Debug + Send + Sync {
    /// The lengths of the regions in bytes.
    fn lens(&self) -> Vec<u64>;

    /// The unit of presence in bytes.
    fn page_size(&self) -> u64;

    /// Whether [`arm`](Self::arm) works.
    fn can_fault(&self) -> bool;

    /// What the regions hold of an earlier time, one storage a region, if that may be worth to be compared with what comes: a
    /// copy that the memory was moved from, or what an attempt that failed has left. It is read while chunks are written.
    ///
    /// Where the source can compare, [`clear`](Self::clear) is not called then, and what is equal is not sent.
    fn old(&self) -> Option<Vec<Arc<dyn Storage>>> {
        None
    }

    /// Makes all of it zero and absent.
    ///
    /// # Errors
    /// What the medium says.
    fn clear(&self) -> io::Result<()>;

    /// Makes `range` of a region zero and absent; whole pages, but for the end of the region.
    ///
    /// # Errors
    /// What the medium says.
    fn discard(&self, region: usize, range: Range<u64>) -> io::Result<()>;

    /// Puts `data` at `place`, over whatever is there. Not after `arm`: a page would be seen before all of it is there.
    ///
    /// # Errors
    /// [`io::ErrorKind::StorageFull`] if there is no room for the pages; [`io::ErrorKind::UnexpectedEof`] beyond the
    /// region.
    fn write(&self, place: Place, data: &[u8]) -> io::Result<()>;

    /// Looks whether there is room for so many bytes more in each region. For what comes once it is too late to give up.
    ///
    /// # Errors
    /// [`io::ErrorKind::StorageFull`] if there is not; else what the medium says.
    fn check_room(&self, bytes: &[u64]) -> io::Result<()>;

    /// From now on an access to an absent page is a fault.
    ///
    /// # Errors
    /// If the kernel refuses.
    fn arm(&self) -> io::Result<()>;

    /// Something to poll for reading: faults wait then. `None` if this memory cannot fault.
    fn fault_fd(&self) -> Option<BorrowedFd<'_>>;

    /// Appends the places that were accessed and are absent. Never blocks.
    ///
    /// # Errors
    /// What the kernel says.
    fn faults(&self, faults: &mut Vec<Place>) -> io::Result<()>;

    /// Makes the pages from `place` on present with `data`, but for those that are present already, and wakes who waits.
    ///
    /// # Errors
    /// [`io::ErrorKind::StorageFull`] if there is no room.
    fn install(&self, place: Place, data: &[u8]) -> io::Result<()>;

    /// Makes the absent pages of a range present with zeros, and wakes who waits.
    ///
    /// # Errors
    /// As [`install`](Self::install).
    fn install_zeros(&self, place: Place, len: u64) -> io::Result<()>;

    /// Lets who waits for a page of the range try again: it faults again if the page is still absent.
    ///
    /// # Errors
    /// What the kernel says.
    fn wake(&self, place: Place, len: u64) -> io::Result<()>;

    /// Nothing is absent any more but what is zero: an access is no fault from now on. Releases what arming took.
    ///
    /// # Errors
    /// What the kernel says; faults may still be reported then.
    fn disarm(&self) -> io::Result<()>;
}
