//! Making guest memory.

use std::fs::File;
use std::io;
use std::sync::Arc;

use memferry::sys::mapping::page_size;
use rustix::fs::{MemfdFlags, SeekFrom};
use vm_memory::bitmap::{Bitmap, NewBitmap};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionCollectionError, GuestRegionMmap,
};

use crate::sys;

/// Where the addresses of a PC's devices begin, below 4 GiB.
const HOLE: u64 = 0xC000_0000;
/// Where memory goes on above them.
const HIGH: u64 = 1 << 32;

/// How large the pages of guest memory are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Pages {
    /// The processor's smallest: 4 KiB.
    #[default]
    Base,
    /// The smallest, and larger ones where the kernel finds it worth while (`madvise(MADV_HUGEPAGE)`). It decides by
    /// `/sys/kernel/mm/transparent_hugepage/shmem_enabled`, which has to be `advise` or `always` for memory of this crate.
    ///
    /// Tracking of writes splits them, so it is the destination, after a migration, that gains from them.
    Transparent,
    /// Pages of 2 MiB that an administrator has set aside (`/proc/sys/vm/nr_hugepages`). Chunks have to be as large: set
    /// [`SeedOptions::chunk_size`](memferry::migrate::SeedOptions::chunk_size).
    Huge,
}

impl Pages {
    /// Their size in bytes.
    #[must_use]
    pub fn size(self) -> u64 {
        match self {
            Self::Base | Self::Transparent => page_size(),
            Self::Huge => 2 << 20,
        }
    }
}

/// Why guest memory could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// It is not whole pages, or nothing.
    #[error("guest memory of {len} bytes is not whole pages of {page} bytes, at least one")]
    Length {
        /// What was asked for.
        len: u64,
        /// The size of a page.
        page: u64,
    },
    /// A file in memory could not be made.
    #[error("cannot make {len} bytes of memory")]
    Create {
        /// How large it was to be.
        len: u64,
        /// What the kernel says.
        source: io::Error,
    },
    /// There are not enough huge pages.
    #[error(
        "there are not enough huge pages for {len} bytes of guest memory: have more set aside in /proc/sys/vm/nr_hugepages"
    )]
    NoHugePages {
        /// How many bytes were asked for.
        len: u64,
        /// What the kernel says.
        source: io::Error,
    },
    /// The file or device is too small.
    #[error("guest memory of {len} bytes does not fit into a file or device of {has}")]
    TooSmall {
        /// How many bytes were asked for.
        len: u64,
        /// How many it has.
        has: u64,
    },
    /// The file or device cannot be looked at.
    #[error("cannot find out how large the file or device of the guest's memory is")]
    Look(#[source] io::Error),
    /// It could not be mapped.
    #[error("cannot map guest memory")]
    Map(#[source] MmapRegionError),
    /// The regions do not go together.
    #[error("the regions of guest memory do not go together")]
    Regions(#[source] GuestRegionCollectionError),
}

/// Makes guest memory that Memferry can move: mapped *shared*, so that what the guest has never written is known, and
/// what is missing at a destination can be faulted in.
///
/// ```
/// use vm_memory::GuestMemoryBackend;
/// use vm_memory::bitmap::AtomicBitmap;
/// use vmm_integration::RamBuilder;
///
/// // 64 MiB, with a bitmap of what the VMM itself writes.
/// let memory = RamBuilder::new(64 << 20).in_memory::<AtomicBitmap>()?;
/// assert_eq!(memory.num_regions(), 1);
/// # Ok::<(), vmm_integration::MemoryError>(())
/// ```
#[derive(Debug, Clone)]
pub struct RamBuilder {
    len: u64,
    pages: Pages,
    name: String,
}

impl RamBuilder {
    /// Guest memory of `len` bytes, laid out as [`ranges`] says.
    #[must_use]
    pub fn new(len: u64) -> Self {
        Self {
            len,
            pages: Pages::Base,
            name: "guest-ram".to_owned(),
        }
    }

    /// How large its pages are, where it is [in memory](Self::in_memory).
    #[must_use]
    pub fn pages(mut self, pages: Pages) -> Self {
        self.pages = pages;
        self
    }

    /// What `/proc/PID/maps` calls it; at most 249 bytes.
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// Makes it of files that live in memory alone, one a region.
    ///
    /// # Errors
    /// [`MemoryError`].
    pub fn in_memory<B: Bitmap + NewBitmap>(&self) -> Result<GuestMemoryMmap<B>, MemoryError> {
        self.check_len()?;
        let regions = ranges(self.len).into_iter().map(|(address, len)| {
            let file = FileOffset::new(self.memfd(len)?, 0);
            let region = self.map(address, len, file)?;
            if self.pages == Pages::Transparent {
                // It is a wish; a kernel without them has small ones.
                let _ = sys::prefer_huge_pages(&region);
            }
            Ok(region)
        });
        collect(regions)
    }

    /// Maps it from a file or a block device, from its first byte on: one that Memferry shows
    /// ([`FuseFile`](memferry::frontend::FuseFile), [`Device`](memferry::frontend::nbd::Device)), or any other.
    ///
    /// # Errors
    /// [`MemoryError::TooSmall`] if it does not fit; others.
    pub fn on<B: Bitmap + NewBitmap>(&self, file: File) -> Result<GuestMemoryMmap<B>, MemoryError> {
        self.check_len()?;
        let has = rustix::fs::seek(&file, SeekFrom::End(0))
            .map_err(|errno| MemoryError::Look(errno.into()))?;
        if has < self.len {
            return Err(MemoryError::TooSmall { len: self.len, has });
        }
        let file = Arc::new(file);
        let mut offset = 0;
        let regions = ranges(self.len).into_iter().map(|(address, len)| {
            let part = FileOffset::from_arc(Arc::clone(&file), offset);
            offset += len;
            self.map(address, len, part)
        });
        collect(regions)
    }

    fn check_len(&self) -> Result<(), MemoryError> {
        let (len, page) = (self.len, self.pages.size());
        if len == 0 || !len.is_multiple_of(page) {
            return Err(MemoryError::Length { len, page });
        }
        Ok(())
    }

    fn memfd(&self, len: u64) -> Result<File, MemoryError> {
        let huge = match self.pages {
            Pages::Base | Pages::Transparent => MemfdFlags::empty(),
            Pages::Huge => MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
        };
        let create = |source| MemoryError::Create { len, source };
        let file = rustix::fs::memfd_create(&self.name, MemfdFlags::CLOEXEC | huge);
        let file = File::from(file.map_err(|errno| create(errno.into()))?);
        file.set_len(len).map_err(create)?;
        Ok(file)
    }

    fn map<B: Bitmap + NewBitmap>(
        &self,
        address: GuestAddress,
        len: u64,
        file: FileOffset,
    ) -> Result<GuestRegionMmap<B>, MemoryError> {
        let too_long = || MemoryError::Length {
            len,
            page: self.pages.size(),
        };
        let size = usize::try_from(len).map_err(|_| too_long())?;
        let huge = self.pages == Pages::Huge;
        let mapping = MmapRegionBuilder::new_with_bitmap(size, B::with_len(size))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            // No room is promised for it, as a guest seldom uses all that it has; but huge pages are counted out beforehand,
            // since nothing could take the place of one that is missing later.
            .with_mmap_flags(libc::MAP_SHARED | if huge { 0 } else { libc::MAP_NORESERVE })
            .with_hugetlbfs(huge)
            .with_file_offset(file)
            .build()
            .map_err(|error| match error {
                MmapRegionError::Mmap(source) if huge => MemoryError::NoHugePages { len, source },
                error => MemoryError::Map(error),
            })?;
        // None only at the end of the address space.
        GuestRegionMmap::new(mapping, address).ok_or_else(too_long)
    }
}

/// Where `len` bytes of guest memory are: from 0 on, but for a hole from 3 GiB to 4 GiB, in which a PC has its devices.
#[must_use]
pub fn ranges(len: u64) -> Vec<(GuestAddress, u64)> {
    let low = len.min(HOLE);
    let mut ranges = vec![(GuestAddress(0), low)];
    if len > low {
        ranges.push((GuestAddress(HIGH), len - low));
    }
    ranges
}

fn collect<B: Bitmap>(
    regions: impl Iterator<Item = Result<GuestRegionMmap<B>, MemoryError>>,
) -> Result<GuestMemoryMmap<B>, MemoryError> {
    let regions = regions.collect::<Result<Vec<_>, _>>()?;
    GuestMemoryMmap::from_regions(regions).map_err(MemoryError::Regions)
}

#[cfg(test)]
mod tests {
    use super::*;
    use memferry::chunk::Storage;
    use std::os::unix::fs::FileExt;
    use vm_memory::bitmap::AtomicBitmap;
    use vm_memory::{Bytes, GuestMemoryBackend};

    use crate::GuestRam;

    #[test]
    fn memory_leaves_the_addresses_of_devices_out() {
        let gib = 1 << 30;
        assert_eq!(ranges(gib), [(GuestAddress(0), gib)]);
        assert_eq!(ranges(3 * gib), [(GuestAddress(0), 3 * gib)]);
        assert_eq!(
            ranges(5 * gib),
            [(GuestAddress(0), 3 * gib), (GuestAddress(4 * gib), 2 * gib)]
        );
    }

    #[test]
    fn five_gibibytes_cost_nothing_until_they_are_written() {
        let memory = RamBuilder::new(5 << 30).in_memory::<()>().unwrap();
        let memory = Arc::new(memory);
        memory
            .write_slice(b"high", GuestAddress((6 << 30) - 4))
            .unwrap();
        memory.write_slice(b"hole", GuestAddress(HOLE)).unwrap_err();
        let rams = GuestRam::regions(&memory).into_iter();
        let rams: Vec<_> = rams.map(|ram| ram.mapped_shared().unwrap()).collect();
        assert_eq!(rams[0].data_ranges(0..3 << 30).unwrap(), []);
        let end = 2 << 30;
        let data = rams[1].data_ranges(0..end).unwrap();
        assert_eq!(data, std::slice::from_ref(&(end - 4096..end)));
    }

    #[test]
    fn a_file_holds_the_regions_one_after_the_other() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 << 30).unwrap();
        let twin = file.try_clone().unwrap();
        let memory = RamBuilder::new(4 << 30).on::<AtomicBitmap>(file).unwrap();
        memory
            .write_slice(b"after the hole", GuestAddress(HIGH))
            .unwrap();
        let mut bytes = [0; 14];
        twin.read_exact_at(&mut bytes, HOLE).unwrap();
        assert_eq!(&bytes, b"after the hole");
        assert_eq!(memory.num_regions(), 2);
    }

    #[test]
    fn what_does_not_fit_or_is_not_whole_pages_is_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        assert!(matches!(
            RamBuilder::new(8192).on::<()>(file),
            Err(MemoryError::TooSmall {
                len: 8192,
                has: 4096
            })
        ));
        for (len, pages) in [(0, Pages::Base), (4097, Pages::Base), (4096, Pages::Huge)] {
            let error = RamBuilder::new(len).pages(pages).in_memory::<()>();
            assert!(matches!(error, Err(MemoryError::Length { .. })), "{len}");
        }
    }

    #[test]
    fn huge_pages_that_are_not_there_are_told_of_by_their_setting() {
        // More than any machine of today has set aside.
        let wanted = RamBuilder::new(1 << 46).pages(Pages::Huge);
        let error = wanted.in_memory::<()>().unwrap_err();
        assert!(error.to_string().contains("nr_hugepages"), "{error}");
    }
}
