//! Guest memory that a migration fills.

use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use memferry::chunk::{Install, Place};
use memferry::frontend::FaultArea;
use memferry::sys::mapping::page_size;
use memferry::sys::uffd::{Features, Installed, Mode, Scope, Stop, Uffd};
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use crate::sys;

/// The size of the huge pages that are looked for.
const HUGE: u64 = 2 << 20;

/// Zeros to install where the kernel has no page of zeros: in huge pages.
static ZEROS: [u8; 2 << 20] = [0; 2 << 20];

/// Guest memory at a destination: what chunks are put into, and where vCPUs that come too early wait for them.
///
/// Any memory of `vm-memory` whose regions have host addresses: anonymous, or mapped *shared* from a file. All of it is emptied
/// when a migration begins. With post-copy, an access to what has not come is a fault of userfaultfd; KVM's accesses are the kernel's, so that
/// needs what [`Scope::UserAndKernel`] says.
///
/// If the source is lost before all has come, what is missing stays so, also when this value is dropped: who accesses it waits
/// until the process ends, and never reads zeros in its place.
pub struct ArrivingRam<M> {
    memory: Arc<M>,
    /// The whole of each region.
    areas: Vec<FaultArea>,
    page_size: u64,
    uffd: Option<Uffd>,
    armed: AtomicBool,
}

/// Why guest memory cannot be arrived in.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ArrivingError {
    /// A region has no address in this process.
    #[error("region {region} of the guest's memory is not mapped here")]
    NotMapped {
        /// Which.
        region: usize,
    },
    /// There can be no userfaultfd.
    #[error(
        "pages that have not come cannot be waited for, so post-copy is impossible: {source}; or forbid post-copy"
    )]
    NoFaults {
        /// Why, and what would allow it.
        source: io::Error,
    },
}

impl<M: GuestMemoryBackend> ArrivingRam<M> {
    /// Guest memory that cannot be accessed before all of it has come: no post-copy, and no privilege is needed.
    ///
    /// # Errors
    /// [`ArrivingError::NotMapped`].
    pub fn without_faults(memory: Arc<M>) -> Result<Self, ArrivingError> {
        let areas = memory
            .iter()
            .enumerate()
            .map(|(index, region)| {
                let address = region
                    .get_host_address(MemoryRegionAddress(0))
                    .map_err(|_| ArrivingError::NotMapped { region: index })?;
                let start = address.expose_provenance() as u64;
                Ok(FaultArea {
                    addresses: start..start + region.len(),
                    place: Place {
                        region: index,
                        offset: 0,
                    },
                })
            })
            .collect::<Result<_, _>>()?;
        let huge = memory
            .iter()
            .any(|region| region.is_hugetlbfs() == Some(true));
        Ok(Self {
            memory,
            areas,
            page_size: if huge { HUGE } else { page_size() },
            uffd: None,
            armed: AtomicBool::new(false),
        })
    }

    /// Guest memory whose vCPUs may run before all of it has come.
    ///
    /// # Errors
    /// [`ArrivingError`].
    pub fn new(memory: Arc<M>) -> Result<Self, ArrivingError> {
        let mut ram = Self::without_faults(memory)?;
        let mut features = Features::none();
        if ram.page_size == HUGE {
            features = features | Features::MISSING_HUGETLBFS;
        }
        if ram
            .memory
            .iter()
            .any(|region| region.file_offset().is_some())
        {
            features = features | Features::MISSING_SHMEM;
        }
        let uffd = Uffd::create(Scope::UserAndKernel, features);
        ram.uffd = Some(uffd.map_err(|source| ArrivingError::NoFaults { source })?);
        Ok(ram)
    }

    pub(crate) fn memory(&self) -> &Arc<M> {
        &self.memory
    }

    fn uffd(&self) -> io::Result<&Uffd> {
        self.uffd.as_ref().ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::Unsupported,
                "this memory was made without faults",
            )
        })
    }

    fn region(&self, index: usize) -> io::Result<&M::R> {
        let none = || io::Error::new(io::ErrorKind::NotFound, "the guest has no such region");
        self.memory.iter().nth(index).ok_or_else(none)
    }

    /// The host's addresses of whole pages from `place` on.
    fn host(&self, place: Place, len: u64) -> Range<u64> {
        let region = &self.areas[place.region].addresses;
        let start = region.start + place.offset;
        start..(start + len.next_multiple_of(self.page_size)).min(region.end)
    }

    /// Fills absent pages by `fill`, which is told what is left of them; goes on until it is done.
    fn fill(
        &self,
        mut addresses: Range<u64>,
        mut fill: impl FnMut(Range<u64>) -> io::Result<Installed>,
    ) -> io::Result<()> {
        while addresses.start < addresses.end {
            let installed = fill(addresses.clone())?;
            addresses.start += installed.done;
            match installed.stopped {
                None => {}
                // The VMM changes its mappings.
                Some(Stop::Changing) => std::thread::yield_now(),
                // Everything has come: a page that comes once more, as the answer to a fault that it overtook, finds nothing registered.
                Some(Stop::Unmapped) if !self.armed.load(Ordering::Acquire) => return Ok(()),
                Some(Stop::Unmapped | Stop::Exited) => {
                    return Err(io::Error::new(
                        io::ErrorKind::NotFound,
                        "guest memory was unmapped while it was filled",
                    ));
                }
                Some(Stop::NoRoom) => {
                    return Err(io::Error::new(
                        io::ErrorKind::StorageFull,
                        "there is no memory for a page of the guest",
                    ));
                }
            }
        }
        Ok(())
    }
}

impl<M> Drop for ArrivingRam<M> {
    fn drop(&mut self) {
        if *self.armed.get_mut() {
            // A vCPU that accesses what has not come waits for ever. Were the descriptor closed, it would read zeros.
            std::mem::forget(self.uffd.take());
        }
    }
}

impl<M> fmt::Debug for ArrivingRam<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ArrivingRam")
            .field("areas", &self.areas)
            .field("page_size", &self.page_size)
            .field("uffd", &self.uffd)
            .field("armed", &self.armed)
            .finish_non_exhaustive()
    }
}

impl<M: GuestMemoryBackend + Send + Sync> Install for ArrivingRam<M> {
    fn lens(&self) -> Vec<u64> {
        self.memory.iter().map(GuestMemoryRegion::len).collect()
    }

    fn page_size(&self) -> u64 {
        self.page_size
    }

    fn can_fault(&self) -> bool {
        self.uffd.is_some()
    }

    fn clear(&self) -> io::Result<()> {
        for region in self.memory.iter() {
            sys::remove(region, 0..region.len())?;
        }
        Ok(())
    }

    fn discard(&self, region: usize, range: Range<u64>) -> io::Result<()> {
        let region = self.region(region)?;
        // The last chunk may be shorter than its page.
        let end = range.end.next_multiple_of(self.page_size).min(region.len());
        sys::remove(region, range.start..end)
    }

    fn write(&self, place: Place, data: &[u8]) -> io::Result<()> {
        if data.is_empty() {
            return Ok(());
        }
        let region = self.region(place.region)?;
        region
            .write_slice(data, MemoryRegionAddress(place.offset))
            .map_err(io::Error::other)
    }

    /// Memory that is short is not known beforehand.
    fn check_room(&self, _: &[u64]) -> io::Result<()> {
        Ok(())
    }

    fn arm(&self) -> io::Result<()> {
        let uffd = self.uffd()?;
        let missing = Mode {
            missing: true,
            ..Mode::default()
        };
        for (index, area) in self.areas.iter().enumerate() {
            if let Err(error) = uffd.register(area.addresses.clone(), missing) {
                for registered in &self.areas[..index] {
                    // Why the other one failed is what the caller has to know.
                    let _ = uffd.unregister(registered.addresses.clone());
                }
                return Err(error);
            }
        }
        self.armed.store(true, Ordering::Release);
        Ok(())
    }

    fn fault_fd(&self) -> Option<BorrowedFd<'_>> {
        self.uffd.as_ref().map(AsFd::as_fd)
    }

    fn faults(&self, faults: &mut Vec<Place>) -> io::Result<()> {
        FaultArea::read_faults(self.uffd()?, &self.areas, self.page_size, faults)
    }

    fn install(&self, place: Place, data: &[u8]) -> io::Result<()> {
        let addresses = self.host(place, data.len() as u64);
        let len = addresses.end - addresses.start;
        if len != data.len() as u64 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "{} bytes are no whole pages of {}: the chunks are too small for this memory",
                    data.len(),
                    self.page_size
                ),
            ));
        }
        let (uffd, start) = (self.uffd()?, addresses.start);
        self.fill(addresses, |left| {
            let from = usize::try_from(left.start - start).expect("within the slice");
            uffd.install(left.start, &data[from..], self.page_size)
        })
    }

    fn install_zeros(&self, place: Place, len: u64) -> io::Result<()> {
        let (uffd, addresses) = (self.uffd()?, self.host(place, len));
        self.fill(addresses, |left| match self.page_size {
            HUGE => {
                // Bytes that are not in memory yet would cost the kernel a huge page more, for a while, and there may be none.
                let touched = ZEROS.iter().step_by(4096).fold(0, |all, byte| all | byte);
                std::hint::black_box(touched);
                let len = usize::try_from(left.end - left.start).unwrap_or(usize::MAX);
                uffd.install(left.start, &ZEROS[..len.min(ZEROS.len())], HUGE)
            }
            page_size => uffd.zero(left, page_size),
        })
    }

    fn wake(&self, place: Place, len: u64) -> io::Result<()> {
        self.uffd()?.wake(self.host(place, len))
    }

    fn disarm(&self) -> io::Result<()> {
        if !self.armed.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        let uffd = self.uffd()?;
        let mut failed = Ok(());
        for area in &self.areas {
            let unregistered = uffd.unregister(area.addresses.clone());
            failed = failed.and(unregistered);
        }
        failed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;
    use std::time::Duration;
    use vm_memory::bitmap::AtomicBitmap;
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    use crate::{Pages, RamBuilder};

    const PAGE: u64 = 4096;
    const HIGH: u64 = 1 << 32;

    fn anonymous() -> Arc<GuestMemoryMmap<()>> {
        let ranges = [(GuestAddress(0), 0x4000), (GuestAddress(HIGH), 0x2000)];
        Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap())
    }

    fn at(region: usize, offset: u64) -> Place {
        Place { region, offset }
    }

    #[test]
    fn memory_is_written_and_emptied_whatever_it_is_made_of() {
        let shared = RamBuilder::new(0x4000).in_memory::<AtomicBitmap>().unwrap();
        written_and_emptied(&Arc::new(shared));
        written_and_emptied(&anonymous());
    }

    fn written_and_emptied<M: GuestMemoryBackend + Send + Sync>(memory: &Arc<M>) {
        let ram = ArrivingRam::without_faults(Arc::clone(memory)).unwrap();
        let page = |number: u64| {
            let mut bytes = [0; 4];
            memory
                .read_slice(&mut bytes, GuestAddress(number * PAGE))
                .unwrap();
            bytes
        };
        ram.write(at(0, PAGE), b"once").unwrap();
        ram.write(at(0, 2 * PAGE), b"more").unwrap();
        assert_eq!((&page(1), &page(2)), (b"once", b"more"));
        ram.discard(0, PAGE..2 * PAGE).unwrap();
        assert_eq!((&page(1), &page(2)), (&[0; 4], b"more"));
        ram.clear().unwrap();
        assert_eq!(page(2), [0; 4]);
        ram.write(at(0, 0x4000), b"beyond").unwrap_err();
        ram.write(at(7, 0), b"nowhere").unwrap_err();
        assert!(!ram.can_fault() && ram.arm().is_err());
    }

    #[test]
    #[ignore = "privileged: needs CAP_SYS_PTRACE (userfaultfd that sees the kernel's faults)"]
    fn who_comes_too_early_waits_until_the_page_has_come() {
        let shared = RamBuilder::new(0x4000).in_memory::<AtomicBitmap>().unwrap();
        waits(Arc::new(shared), PAGE);
        waits(anonymous(), PAGE);
    }

    #[test]
    #[ignore = "privileged: needs root (sets huge pages aside)"]
    fn who_comes_too_early_waits_for_a_huge_page() {
        let setting = "/proc/sys/vm/nr_hugepages";
        let before = std::fs::read_to_string(setting).unwrap();
        std::fs::write(setting, "8").unwrap();
        let memory = RamBuilder::new(4 * HUGE).pages(Pages::Huge);
        let memory = memory.in_memory::<AtomicBitmap>();
        std::fs::write(setting, before.trim()).unwrap();
        waits(Arc::new(memory.unwrap()), HUGE);
    }

    fn waits<M: GuestMemoryBackend + Send + Sync + 'static>(memory: Arc<M>, page: u64) {
        let ram = ArrivingRam::new(Arc::clone(&memory)).unwrap();
        assert_eq!(ram.page_size(), page);
        ram.write(at(0, 0), b"came before").unwrap();
        ram.arm().unwrap();
        let read = move |number: u64| {
            let mut bytes = [1; 11];
            let address = GuestAddress(number * page);
            memory.read_slice(&mut bytes, address).unwrap();
            bytes
        };
        assert_eq!(&read(0), b"came before");
        let early = thread::spawn(move || (read(2), read(3)));
        let data = vec![b'x'; usize::try_from(page).unwrap()];
        let mut faults = Vec::new();
        await_faults(&ram, &mut faults);
        assert_eq!(faults, [at(0, 2 * page)]);
        ram.install(at(0, 2 * page), &data).unwrap();
        // What is there already stays.
        ram.install(at(0, 0), &data).unwrap();
        faults.clear();
        await_faults(&ram, &mut faults);
        assert_eq!(faults, [at(0, 3 * page)]);
        ram.install_zeros(at(0, 3 * page), page).unwrap();
        assert_eq!(early.join().unwrap(), ([b'x'; 11], [0; 11]));
        ram.install(at(0, page), &data[..100]).unwrap_err();
        ram.disarm().unwrap();
        ram.disarm().unwrap();
    }

    fn await_faults<M: GuestMemoryBackend + Send + Sync>(
        ram: &ArrivingRam<M>,
        faults: &mut Vec<Place>,
    ) {
        let fd = ram.fault_fd().unwrap();
        let mut fds = [rustix::event::PollFd::from_borrowed_fd(
            fd,
            rustix::event::PollFlags::IN,
        )];
        let patience = rustix::event::Timespec::try_from(Duration::from_secs(10)).unwrap();
        assert_eq!(rustix::event::poll(&mut fds, Some(&patience)).unwrap(), 1);
        ram.faults(faults).unwrap();
    }
}
