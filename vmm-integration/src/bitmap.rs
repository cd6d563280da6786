//! What the VMM itself writes into the guest's memory.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memferry::chunk::{ChunkBitmap, ChunkSize};
use memferry::dirty::DirtyTracker;
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use crate::not_started;
use crate::pages::Pages;

/// A [`DirtyTracker`] of what the VMM writes into one region through `vm-memory`: its devices, its loader, Memferry.
///
/// `vm-memory` marks a page after it was written, in the bitmap of the region; a take takes the marks. Writes that do not
/// go through `vm-memory` are not marked: those of the guest, which [`kvm`](crate::kvm) tracks (join the two by
/// [`Union`](memferry::dirty::Union)), and those through a raw pointer or by the kernel for the VMM (`readv` into guest
/// memory, `io_uring`, vhost), which the VMM has to mark itself, once they are done, with [`Bitmap::mark_dirty`].
///
/// The marks are taken away from whoever else asks for them, such as a snapshot of the VMM's own.
///
/// ```no_run
/// # use std::sync::Arc;
/// use memferry::chunk::ChunkSize;
/// use memferry::dirty::{DirtyTracker, Union};
/// use vm_memory::bitmap::AtomicBitmap;
/// use vm_memory::{GuestAddress, GuestMemoryMmap};
/// use vmm_integration::VmmWrites;
///
/// # fn guests_writes() -> Arc<dyn DirtyTracker> { unimplemented!() }
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let memory = GuestMemoryMmap::<AtomicBitmap>::from_ranges(&[(GuestAddress(0), 256 << 20)])?;
/// for vmms_writes in VmmWrites::regions(&memory, ChunkSize::PAGE)? {
///     let all_writes: Arc<dyn DirtyTracker> = Arc::new(Union(guests_writes(), vmms_writes));
/// }
/// # Ok(())
/// # }
/// ```
pub struct VmmWrites<T> {
    bitmap: T,
    pages: Pages,
    /// From start to stop.
    tracking: Mutex<Option<Tracking>>,
}

#[derive(Debug, Default)]
struct Tracking {
    /// Taken and put back, for the next take.
    pending: Option<ChunkBitmap>,
}

/// Marks of pages that were written, which can be taken: [`AtomicBitmap`], and whatever holds one.
pub trait WrittenPages: Send + Sync {
    /// For how many bytes there are marks, and how many marks. `None` if no marks are kept.
    ///
    /// A mark is for so many bytes as the smallest power of two says with which the marks are enough.
    fn extent(&self) -> Option<(u64, u64)>;

    /// Takes the marks: 64 pages a word, the lowest page in the lowest bit. A mark that is set meanwhile is in the
    /// answer or stays; whoever has the answer sees what was written before its marks were set.
    fn take_marks(&self) -> Vec<u64>;
}

impl WrittenPages for AtomicBitmap {
    fn extent(&self) -> Option<(u64, u64)> {
        Some((self.byte_size() as u64, self.len() as u64))
    }

    fn take_marks(&self) -> Vec<u64> {
        // Its `reset` would be cheaper and is a plain store, which orders nothing after the writes that were marked.
        self.get_and_reset()
    }
}

impl<T: WrittenPages> WrittenPages for Option<T> {
    fn extent(&self) -> Option<(u64, u64)> {
        self.as_ref()?.extent()
    }

    fn take_marks(&self) -> Vec<u64> {
        self.as_ref().map_or_else(Vec::new, T::take_marks)
    }
}

impl<T: WrittenPages + ?Sized> WrittenPages for Arc<T> {
    fn extent(&self) -> Option<(u64, u64)> {
        (**self).extent()
    }

    fn take_marks(&self) -> Vec<u64> {
        (**self).take_marks()
    }
}

impl<T: WrittenPages + Bitmap> WrittenPages for MmapRegion<T> {
    fn extent(&self) -> Option<(u64, u64)> {
        self.bitmap().extent()
    }

    fn take_marks(&self) -> Vec<u64> {
        self.bitmap().take_marks()
    }
}

/// Why marks cannot be taken for a tracker.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmmWritesError {
    /// There is no bitmap.
    #[error(
        "the guest's memory is kept without marks of what the VMM writes: make it with an `AtomicBitmap`"
    )]
    NoBitmap,
    /// Its pages are of no usable size.
    #[error("{marks} marks for {bytes} bytes are no marks of pages whose size is a power of two")]
    Pages {
        /// The bytes that there are marks for.
        bytes: u64,
        /// The marks.
        marks: u64,
    },
}

impl<T: WrittenPages> VmmWrites<T> {
    /// Tracks by the marks of one region. A mark may be for more or less than a chunk.
    ///
    /// # Errors
    /// If there are no marks, or their pages are not as those of [`WrittenPages::extent`].
    pub fn new(bitmap: T, chunk_size: ChunkSize) -> Result<Self, VmmWritesError> {
        let (bytes, marks) = bitmap.extent().ok_or(VmmWritesError::NoBitmap)?;
        let page = bytes.div_ceil(marks.max(1)).checked_next_power_of_two();
        let page = page
            .filter(|&page| bytes.div_ceil(page) == marks)
            .ok_or(VmmWritesError::Pages { bytes, marks })?;
        Ok(Self {
            bitmap,
            pages: Pages {
                region_len: bytes,
                chunk_size,
                offset: 0,
                page,
                count: marks,
            },
            tracking: Mutex::new(None),
        })
    }

    fn tracking(&self) -> MutexGuard<'_, Option<Tracking>> {
        // A panic elsewhere leaves the set as it was: no change to it is half done.
        self.tracking.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<B: WrittenPages + Bitmap> VmmWrites<Arc<MmapRegion<B>>> {
    /// A tracker for each region of `memory`, in order.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn regions(
        memory: &GuestMemoryMmap<B>,
        chunk_size: ChunkSize,
    ) -> Result<Vec<Self>, VmmWritesError> {
        let regions = memory.iter().map(GuestRegionMmap::get_mmap);
        regions
            .map(|region| Self::new(region, chunk_size))
            .collect()
    }
}

impl<T> fmt::Debug for VmmWrites<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VmmWrites")
            .field("pages", &self.pages)
            .finish_non_exhaustive()
    }
}

impl<T: WrittenPages> DirtyTracker for VmmWrites<T> {
    fn start(&self) -> io::Result<()> {
        let mut tracking = self.tracking();
        self.bitmap.take_marks();
        *tracking = Some(Tracking::default());
        Ok(())
    }

    /// Allocates and frees a bit a page besides the answer, since that is how `vm-memory` gives marks away.
    fn take(&self) -> io::Result<ChunkBitmap> {
        let mut tracking = self.tracking();
        let Tracking { pending } = tracking.as_mut().ok_or_else(not_started)?;
        let mut taken = pending.take().unwrap_or_else(|| self.pages.no_chunks());
        self.pages.insert(self.bitmap.take_marks(), &mut taken);
        Ok(taken)
    }

    fn restore(&self, chunks: &ChunkBitmap) -> io::Result<()> {
        let mut tracking = self.tracking();
        let Tracking { pending } = tracking.as_mut().ok_or_else(not_started)?;
        pending
            .get_or_insert_with(|| self.pages.no_chunks())
            .union_with(chunks);
        Ok(())
    }

    fn stop(&self) -> io::Result<()> {
        *self.tracking() = None;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use memferry::dirty::conformance;
    use std::num::NonZeroUsize;
    use vm_memory::{Bytes, GuestAddress};

    /// Memory that a VMM writes through `vm-memory`.
    struct Written {
        memory: GuestMemoryMmap<AtomicBitmap>,
        tracker: VmmWrites<Arc<MmapRegion<AtomicBitmap>>>,
    }

    fn written(len: u64, chunk_size: ChunkSize) -> Written {
        let len = usize::try_from(len).unwrap();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), len)]).unwrap();
        let tracker = VmmWrites::regions(&memory, chunk_size).unwrap().remove(0);
        Written { memory, tracker }
    }

    impl conformance::Tracked for Written {
        fn tracker(&self) -> &dyn DirtyTracker {
            &self.tracker
        }

        fn write(&self, offset: u64, bytes: &[u8]) {
            self.memory
                .write_slice(bytes, GuestAddress(offset))
                .unwrap();
        }

        fn read(&self, offset: u64, buf: &mut [u8]) {
            self.memory.read_slice(buf, GuestAddress(offset)).unwrap();
        }

        /// The pages of the mapping that exist.
        fn allocated(&self) -> u64 {
            let region = self.memory.iter().next().unwrap();
            let start = region.as_ptr().addr();
            resident(start, region.size())
        }
    }

    /// Bytes of this process's memory that have been given a page, as the kernel tells.
    fn resident(start: usize, len: usize) -> u64 {
        let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
        let mut entries = vec![0; len.div_ceil(4096) * 8];
        let at = u64::try_from(start / 4096 * 8).unwrap();
        std::os::unix::fs::FileExt::read_exact_at(&pagemap, &mut entries, at).unwrap();
        let present = entries.chunks_exact(8).filter(|entry| entry[7] >> 6 != 0);
        present.count() as u64 * 4096
    }

    #[test]
    fn every_promise_of_a_tracker_is_kept() {
        conformance::run_all(written);
    }

    #[test]
    fn a_mark_may_be_for_more_or_less_than_a_chunk() {
        for (page, chunk, expected) in [
            (512, 4096, vec![1]),
            (4096, 16384, vec![0]),
            (16384, 4096, vec![0, 1, 2, 3]),
        ] {
            let page = NonZeroUsize::new(page).unwrap();
            let bitmap = Arc::new(AtomicBitmap::new(1 << 20, page));
            let tracker = VmmWrites::new(bitmap.clone(), ChunkSize::new(chunk).unwrap()).unwrap();
            tracker.start().unwrap();
            bitmap.mark_dirty(5000, 1);
            let taken = tracker.take().unwrap();
            let named: Vec<u64> = taken.runs().flat_map(|run| run.range()).collect();
            assert_eq!(named, expected, "marks of {page} bytes, chunks of {chunk}");
        }
    }

    #[test]
    fn the_size_of_a_page_is_found_for_any_length() {
        for page in [512, 4096, 16384] {
            for len in [
                1,
                page - 1,
                page,
                page + 1,
                7 * page - 1,
                64 * page,
                999_983,
            ] {
                let page = NonZeroUsize::new(page).unwrap();
                let tracker = VmmWrites::new(AtomicBitmap::new(len, page), ChunkSize::PAGE);
                let pages = tracker.unwrap().pages;
                // One mark is for all there is, however large its page.
                let all = pages.page >= len as u64;
                assert!(
                    pages.page == page.get() as u64 || (pages.count == 1 && all),
                    "{pages:?}"
                );
            }
        }
    }

    #[test]
    fn memory_without_marks_is_refused() {
        let none = VmmWrites::new(None::<AtomicBitmap>, ChunkSize::PAGE);
        assert!(matches!(none, Err(VmmWritesError::NoBitmap)));
        let page = NonZeroUsize::new(5000).unwrap();
        let odd = VmmWrites::new(AtomicBitmap::new(1 << 20, page), ChunkSize::PAGE);
        assert!(matches!(odd, Err(VmmWritesError::Pages { .. })));
    }
}
