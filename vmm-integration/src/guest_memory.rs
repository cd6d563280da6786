//! The memory of a guest, as Memferry reads and writes it.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use memferry::backend::FileStorage;
use memferry::chunk::Storage;
use vm_memory::guest_memory::Error as MemoryError;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

/// One region of a guest's memory as [`Storage`]: a region for Memferry is a region of `vm-memory`, by its index.
///
/// The guest and the VMM's devices may write at any time. Every access is volatile, or the kernel's, and no reference to guest memory
/// exists. What is written here is marked in the region's dirty bitmap, after it was written, as any write of the VMM.
///
/// The map of the guest's memory is the one that it is made from. If memory is plugged or unplugged later, make new
/// ones of the new map.
pub struct GuestRam<M> {
    memory: Arc<M>,
    index: usize,
    start: GuestAddress,
    len: u64,
    /// Where holes are looked for, if they may be.
    file: Option<Backing>,
}

/// The part of a file that a region is mapped from.
#[derive(Debug)]
struct Backing {
    storage: FileStorage,
    offset: u64,
}

/// Why a region of guest memory cannot be used as asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GuestRamError {
    /// There is no such region.
    #[error("the guest's memory has {regions} regions, and none has the index {index}")]
    NoRegion {
        /// The index asked for.
        index: usize,
        /// How many there are.
        regions: usize,
    },
    /// The region is not mapped from a file.
    #[error(
        "region {index} of the guest's memory is not mapped from a file, so its holes cannot be found"
    )]
    NoFile {
        /// The region.
        index: usize,
    },
    /// Its file cannot be used.
    #[error("the file of region {index} of the guest's memory cannot be used")]
    File {
        /// The region.
        index: usize,
        /// Why.
        source: io::Error,
    },
}

impl<M: GuestMemoryBackend> GuestRam<M> {
    /// The region with this index, in the order of [`GuestMemoryBackend::iter`]. All of it counts as data.
    ///
    /// # Errors
    /// [`GuestRamError::NoRegion`].
    pub fn new(memory: Arc<M>, index: usize) -> Result<Self, GuestRamError> {
        let Some(region) = memory.iter().nth(index) else {
            return Err(GuestRamError::NoRegion {
                index,
                regions: memory.num_regions(),
            });
        };
        let (start, len) = (region.start_addr(), region.len());
        Ok(Self {
            memory,
            index,
            start,
            len,
            file: None,
        })
    }

    /// Every region, in order: what a migration takes.
    #[must_use]
    pub fn regions(memory: &Arc<M>) -> Vec<Self> {
        let regions = memory.iter().enumerate();
        regions
            .map(|(index, region)| Self {
                memory: Arc::clone(memory),
                index,
                start: region.start_addr(),
                len: region.len(),
                file: None,
            })
            .collect()
    }

    /// The same region, whose holes are found by asking its file: what the guest never wrote is neither read nor sent.
    ///
    /// The region has to be mapped *shared*: what is written through a private mapping is not in the file, and would
    /// be taken for a hole. That cannot be told from here.
    ///
    /// # Errors
    /// If the region has no file, or that is of a kind that has no bytes at positions.
    pub fn mapped_shared(mut self) -> Result<Self, GuestRamError> {
        let index = self.index;
        let backing = self.region()?.file_offset();
        let backing = backing.ok_or(GuestRamError::NoFile { index })?;
        let failed = |source| GuestRamError::File { index, source };
        let file = backing.file().try_clone().map_err(failed)?;
        self.file = Some(Backing {
            storage: FileStorage::new(file).map_err(failed)?,
            offset: backing.start(),
        });
        Ok(self)
    }

    /// Its place among the regions.
    pub(crate) fn index(&self) -> usize {
        self.index
    }

    /// Where the region begins in the guest's physical addresses.
    #[must_use]
    pub fn start(&self) -> GuestAddress {
        self.start
    }

    fn region(&self) -> Result<&M::R, GuestRamError> {
        let region = self.memory.iter().nth(self.index);
        region.ok_or_else(|| GuestRamError::NoRegion {
            index: self.index,
            regions: self.memory.num_regions(),
        })
    }

    /// The region, and where in it `len` bytes from `offset` on are.
    fn place(&self, offset: u64, len: usize) -> io::Result<(&M::R, MemoryRegionAddress)> {
        let end = offset.checked_add(len as u64);
        if end.is_none_or(|end| end > self.len) {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!(
                    "region {} of the guest's memory has {} bytes: none at {offset} and {len} more",
                    self.index, self.len
                ),
            ));
        }
        let region = self.region().map_err(io::Error::other)?;
        Ok((region, MemoryRegionAddress(offset)))
    }
}

impl<M> fmt::Debug for GuestRam<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestRam")
            .field("index", &self.index)
            .field("start", &self.start)
            .field("len", &self.len)
            .field("file", &self.file)
            .finish_non_exhaustive()
    }
}

impl<M: GuestMemoryBackend + Send + Sync> Storage for GuestRam<M> {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let (region, address) = self.place(offset, buf.len())?;
        if buf.is_empty() {
            return Ok(());
        }
        // By way of the mapping, a page that was never written would be allocated to be read.
        if let Some(Backing {
            storage,
            offset: start,
        }) = &self.file
        {
            return storage.read_exact_at(buf, start.saturating_add(offset));
        }
        region.read_slice(buf, address).map_err(failed)
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let (region, address) = self.place(offset, buf.len())?;
        if buf.is_empty() {
            return Ok(());
        }
        region.write_slice(buf, address).map_err(failed)
    }

    /// Does nothing: memory has what was written to it.
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn data_ranges(&self, within: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let within = within.start..within.end.min(self.len);
        if within.start >= within.end {
            return Ok(Vec::new());
        }
        let Some(Backing { storage, offset }) = &self.file else {
            return Ok(vec![within]);
        };
        let in_file = within.start.saturating_add(*offset)..within.end.saturating_add(*offset);
        let ranges = storage.data_ranges(in_file)?.into_iter();
        Ok(ranges
            .map(|data| data.start - offset..data.end - offset)
            .collect())
    }
}

fn failed(error: MemoryError) -> io::Error {
    match error {
        MemoryError::IOError(error) => error,
        other => io::Error::other(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::MemfdFlags;
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use vm_memory::bitmap::{AtomicBitmap, Bitmap};
    use vm_memory::{FileOffset, GuestMemoryMmap};

    const PAGE: u64 = 4096;
    const HIGH: u64 = 1 << 32;

    /// Two regions with a hole between them, as a PC has them.
    fn memory() -> Arc<GuestMemoryMmap<()>> {
        let ranges = [(GuestAddress(0), 0x4000), (GuestAddress(HIGH), 0x2000)];
        Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap())
    }

    fn read(ram: &impl Storage, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0xff; len];
        ram.read_exact_at(&mut bytes, offset).map(|()| bytes)
    }

    #[test]
    fn every_region_is_a_storage_of_its_own() {
        let memory = memory();
        let rams = GuestRam::regions(&memory);
        let lens: Vec<u64> = rams.iter().map(Storage::len).collect();
        assert_eq!(lens, [0x4000, 0x2000]);
        assert_eq!(rams[1].start(), GuestAddress(HIGH));
        rams[1].write_all_at(b"high", PAGE).unwrap();
        let mut seen = [0; 4];
        memory
            .read_slice(&mut seen, GuestAddress(HIGH + PAGE))
            .unwrap();
        assert_eq!(&seen, b"high");
        assert_eq!(read(&rams[0], PAGE, 4).unwrap(), [0; 4]);
    }

    #[test]
    fn what_the_guest_writes_is_read() {
        let memory = memory();
        let ram = GuestRam::new(Arc::clone(&memory), 0).unwrap();
        memory.write_slice(b"guest", GuestAddress(0x3ffb)).unwrap();
        assert_eq!(read(&ram, 0x3ffb, 5).unwrap(), b"guest");
    }

    #[test]
    fn a_region_that_does_not_exist_is_refused() {
        let error = GuestRam::new(memory(), 2).unwrap_err();
        assert!(matches!(
            error,
            GuestRamError::NoRegion {
                index: 2,
                regions: 2
            }
        ));
    }

    #[test]
    fn what_was_never_written_reads_as_zeros() {
        let ram = GuestRam::new(memory(), 1).unwrap();
        assert_eq!(read(&ram, 0, 0x2000).unwrap(), vec![0; 0x2000]);
    }

    #[test]
    fn a_range_across_the_end_is_an_end_of_file_and_changes_nothing() {
        let ram = GuestRam::new(memory(), 0).unwrap();
        for (offset, len) in [(0x3fff, 2), (0x4000, 1), (u64::MAX, 2), (0, 0x4001)] {
            let refused = read(&ram, offset, len).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::UnexpectedEof, "{refused}");
            let refused = ram.write_all_at(&vec![1; len], offset).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::UnexpectedEof, "{refused}");
        }
        assert_eq!(read(&ram, 0, 0x4000).unwrap(), vec![0; 0x4000]);
    }

    #[test]
    fn nothing_may_be_read_at_the_end_and_not_beyond_it() {
        let ram = GuestRam::new(memory(), 0).unwrap();
        ram.read_exact_at(&mut [], 0x4000).unwrap();
        ram.write_all_at(&[], 0x4000).unwrap();
        assert!(ram.read_exact_at(&mut [], 0x4001).is_err());
    }

    #[test]
    fn a_write_is_marked_in_the_bitmap_of_the_vmm_and_a_read_is_not() {
        let ranges = [(GuestAddress(0), 0x4000)];
        let memory = GuestMemoryMmap::<AtomicBitmap>::from_ranges(&ranges).unwrap();
        let ram = GuestRam::new(Arc::new(memory), 0).unwrap();
        read(&ram, 0, 0x4000).unwrap();
        ram.write_all_at(&[1], 2 * PAGE).unwrap();
        let bitmap = ram.region().unwrap().bitmap();
        let dirty: Vec<bool> = (0..4).map(|page| bitmap.dirty_at(page * 4096)).collect();
        assert_eq!(dirty, [false, false, true, false]);
    }

    /// A region that begins one page into a memfd of 16 pages, and the memfd.
    fn in_a_file() -> (GuestRam<GuestMemoryMmap<()>>, File) {
        let file: File = rustix::fs::memfd_create("ram", MemfdFlags::CLOEXEC)
            .unwrap()
            .into();
        file.set_len(16 * PAGE).unwrap();
        let backing = FileOffset::new(file.try_clone().unwrap(), PAGE);
        let ranges = [(GuestAddress(0), 8 * 4096, Some(backing))];
        let memory = GuestMemoryMmap::from_ranges_with_files(ranges).unwrap();
        (GuestRam::new(Arc::new(memory), 0).unwrap(), file)
    }

    fn data(ram: &impl Storage) -> Vec<(u64, u64)> {
        let ranges = ram.data_ranges(0..ram.len()).unwrap().into_iter();
        ranges.map(|range| (range.start, range.end)).collect()
    }

    #[test]
    fn only_what_was_written_is_data_in_a_shared_file() {
        let (ram, file) = in_a_file();
        let ram = ram.mapped_shared().unwrap();
        assert_eq!(data(&ram), []);
        ram.write_all_at(&[1], 2 * PAGE).unwrap();
        // Outside of the region, on both sides.
        file.write_all_at(&[1], 0).unwrap();
        file.write_all_at(&[1], 12 * PAGE).unwrap();
        assert_eq!(data(&ram), [(2 * PAGE, 3 * PAGE)]);
    }

    #[test]
    fn reading_what_was_never_written_allocates_nothing_in_a_shared_file() {
        let (ram, _file) = in_a_file();
        let ram = ram.mapped_shared().unwrap();
        ram.write_all_at(b"written", 2 * PAGE).unwrap();
        let all = read(&ram, 0, 8 * 4096).unwrap();
        assert_eq!(&all[2 * 4096..][..7], b"written");
        assert_eq!(data(&ram), [(2 * PAGE, 3 * PAGE)]);
    }

    #[test]
    fn all_of_a_region_is_data_unless_it_is_said_to_be_shared() {
        let (ram, _file) = in_a_file();
        assert_eq!(data(&ram), [(0, 8 * PAGE)]);
    }

    #[test]
    fn memory_without_a_file_has_no_holes_to_be_found() {
        let ram = GuestRam::new(memory(), 1).unwrap();
        let error = ram.mapped_shared().unwrap_err();
        assert!(matches!(error, GuestRamError::NoFile { index: 1 }));
    }
}
