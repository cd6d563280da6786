//! Memory that a program maps from files, such as the RAM of a QEMU guest.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::{Mutex, PoisonError};

use crate::backend::FileStorage;
use crate::chunk::{Install, Place, Storage};
use crate::sys::mapping::page_size;
use crate::sys::uffd::{Event, Installed, Mode, Stop, Uffd};

/// Where the program has a part of a region mapped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FaultArea {
    /// The addresses in the program, whole pages.
    pub addresses: Range<u64>,
    /// What of which region begins there.
    pub place: Place,
}

impl FaultArea {
    /// Appends the pages of `areas` whose accesses wait, by one system call; what happens elsewhere is nothing. Never blocks.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn read_faults(
        uffd: &Uffd,
        areas: &[Self],
        page_size: u64,
        faults: &mut Vec<Place>,
    ) -> io::Result<()> {
        let mut events = Vec::new();
        uffd.read_events(&mut events)?;
        for event in events {
            let Event::Fault { address, .. } = event else {
                continue;
            };
            let area = areas.iter().find(|area| area.addresses.contains(&address));
            if let Some(area) = area {
                let offset = area.place.offset + (address - area.addresses.start);
                faults.push(Place {
                    region: area.place.region,
                    offset: offset - offset % page_size,
                });
            }
        }
        Ok(())
    }
}

/// What it takes to notice that the program accesses absent pages.
pub struct Watch {
    /// A userfaultfd of the program's memory, with missing faults of shared memory.
    pub uffd: Uffd,
    /// Every mapping of the regions in the program.
    pub areas: Vec<FaultArea>,
    /// Called once when nothing needs to be watched any more, for example to close the program's own copy of the
    /// descriptor. While that copy is open, the program waits for absent pages even if this process dies; it never
    /// reads zeros in their place.
    pub release: Box<dyn FnOnce() -> io::Result<()> + Send>,
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch")
            .field("uffd", &self.uffd)
            .field("areas", &self.areas)
            .finish_non_exhaustive()
    }
}

/// The files of a program's memory, as something that chunks are installed into.
#[derive(Debug)]
pub struct FileRam {
    regions: Vec<FileStorage>,
    areas: Vec<FaultArea>,
    uffd: Option<Uffd>,
    release: Mutex<Release>,
}

/// What is left to be undone.
enum Release {
    /// Nothing is registered yet, or no more.
    Disarmed(Option<Box<dyn FnOnce() -> io::Result<()> + Send>>),
    Armed(Box<dyn FnOnce() -> io::Result<()> + Send>),
}

impl fmt::Debug for Release {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Disarmed(_) => "Disarmed",
            Self::Armed(_) => "Armed",
        })
    }
}

impl FileRam {
    /// The regions that these files hold, in this order; with `watch` absent pages can fault.
    ///
    /// # Errors
    /// If one of them has no bytes at positions.
    pub fn new(files: Vec<File>, watch: Option<Watch>) -> io::Result<Self> {
        let regions = files
            .into_iter()
            .map(FileStorage::new)
            .collect::<io::Result<_>>()?;
        let (uffd, areas, release) = match watch {
            Some(watch) => (Some(watch.uffd), watch.areas, Some(watch.release)),
            None => (None, Vec::new(), None),
        };
        Ok(Self {
            regions,
            areas,
            uffd,
            release: Mutex::new(Release::Disarmed(release)),
        })
    }

    fn uffd(&self) -> io::Result<&Uffd> {
        self.uffd.as_ref().ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::Unsupported,
                "this memory has no userfaultfd, so its absent pages cannot fault",
            )
        })
    }

    /// The addresses of a range, once for each mapping of it, and where in the range each begins.
    fn addresses(&self, place: Place, len: u64) -> impl Iterator<Item = (u64, Range<u64>)> + '_ {
        let wanted = place.offset..place.offset + len;
        self.areas
            .iter()
            .filter(move |area| area.place.region == place.region)
            .filter_map(move |area| {
                let offset = area.place.offset;
                let end = offset + (area.addresses.end - area.addresses.start);
                let start = wanted.start.max(offset);
                let end = wanted.end.min(end);
                let address = |at: u64| area.addresses.start + (at - offset);
                (start < end).then(|| (start - wanted.start, address(start)..address(end)))
            })
    }

    /// Fills absent pages by `fill`, which is told where in the range to begin; goes on until it is done.
    fn fill(
        &self,
        place: Place,
        len: u64,
        mut fill: impl FnMut(u64, Range<u64>) -> io::Result<Installed>,
    ) -> io::Result<()> {
        let mut filled: Vec<Range<u64>> = Vec::new();
        for (start, addresses) in self.addresses(place, len) {
            let part = start..start + (addresses.end - addresses.start);
            let there = |filled: &Range<u64>| filled.start <= part.start && part.end <= filled.end;
            if filled.iter().any(there) {
                // The pages are present through another mapping; who waits on this one finds them there.
                self.uffd()?.wake(addresses)?;
            } else if Self::fill_area(start, addresses, &mut fill)? {
                filled.push(part);
            }
        }
        Ok(())
    }

    /// Fills one mapping of a range, from byte `skipped` of the range on. `false` if it is not mapped any more, and so
    /// nobody looks there.
    fn fill_area(
        mut skipped: u64,
        mut addresses: Range<u64>,
        fill: &mut impl FnMut(u64, Range<u64>) -> io::Result<Installed>,
    ) -> io::Result<bool> {
        while addresses.start < addresses.end {
            let installed = fill(skipped, addresses.clone())?;
            skipped += installed.done;
            addresses.start += installed.done;
            match installed.stopped {
                None => {}
                // The program changes its mappings; the fault loop reads the events meanwhile.
                Some(Stop::Changing) => std::thread::yield_now(),
                Some(Stop::Unmapped | Stop::Exited) => return Ok(false),
                Some(Stop::NoRoom) => {
                    return Err(io::Error::new(
                        io::ErrorKind::StorageFull,
                        "there is no room for a page: the memory, or the file system of the guest's RAM, is full",
                    ));
                }
            }
        }
        Ok(true)
    }
}

/// A length as the whole pages that hold it.
fn whole_pages(len: u64) -> u64 {
    len.next_multiple_of(page_size())
}

impl Install for FileRam {
    fn lens(&self) -> Vec<u64> {
        self.regions.iter().map(Storage::len).collect()
    }

    fn page_size(&self) -> u64 {
        page_size()
    }

    fn can_fault(&self) -> bool {
        self.uffd.is_some()
    }

    fn clear(&self) -> io::Result<()> {
        for region in &self.regions {
            region.punch(0..region.len())?;
        }
        Ok(())
    }

    fn discard(&self, region: usize, range: Range<u64>) -> io::Result<()> {
        self.regions[region].punch(range)
    }

    fn write(&self, place: Place, data: &[u8]) -> io::Result<()> {
        self.regions[place.region]
            .write_all_at(data, place.offset)
            .map_err(|error| match error.kind() {
                io::ErrorKind::StorageFull
                | io::ErrorKind::QuotaExceeded
                | io::ErrorKind::OutOfMemory => io::Error::new(
                    io::ErrorKind::StorageFull,
                    format!("there is no room in the file system of the guest's RAM, or no memory: {error}"),
                ),
                _ => error,
            })
    }

    fn check_room(&self, bytes: &[u64]) -> io::Result<()> {
        // Regions in files of one file system share its room.
        let mut wanted = BTreeMap::<u64, (u64, &FileStorage)>::new();
        for (region, bytes) in self.regions.iter().zip(bytes) {
            let device = region.file().metadata()?.dev();
            wanted.entry(device).or_insert((0, region)).0 += bytes;
        }
        for (bytes, region) in wanted.into_values() {
            let file_system = rustix::fs::fstatvfs(region.file())?;
            let room = file_system.f_bavail.saturating_mul(file_system.f_frsize);
            // A file system without a size, as that of memfds, has no limit of its own.
            if file_system.f_blocks > 0 && room < bytes {
                return Err(io::Error::new(
                    io::ErrorKind::StorageFull,
                    format!(
                        "there is no room for {bytes} bytes in the file system of the guest's RAM, which has {room} left: give it more \
                         room, or free some"
                    ),
                ));
            }
        }
        Ok(())
    }

    fn arm(&self) -> io::Result<()> {
        let uffd = self.uffd()?;
        let missing = Mode {
            missing: true,
            ..Mode::default()
        };
        for area in &self.areas {
            uffd.register(area.addresses.clone(), missing)?;
        }
        let mut release = self.release.lock().unwrap_or_else(PoisonError::into_inner);
        if let Release::Disarmed(undo) = &mut *release
            && let Some(undo) = undo.take()
        {
            *release = Release::Armed(undo);
        }
        Ok(())
    }

    fn fault_fd(&self) -> Option<BorrowedFd<'_>> {
        self.uffd.as_ref().map(AsFd::as_fd)
    }

    fn faults(&self, faults: &mut Vec<Place>) -> io::Result<()> {
        FaultArea::read_faults(self.uffd()?, &self.areas, page_size(), faults)
    }

    fn install(&self, place: Place, data: &[u8]) -> io::Result<()> {
        let len = data.len() as u64;
        let padded;
        let data = if len == whole_pages(len) {
            data
        } else {
            // The last page of a region that is no multiple of a page.
            let mut pages = data.to_vec();
            pages.resize(
                usize::try_from(whole_pages(len)).expect("little more than it was"),
                0,
            );
            padded = pages;
            &padded
        };
        self.fill(place, data.len() as u64, |skipped, addresses| {
            let from = usize::try_from(skipped).expect("within the slice");
            self.uffd()?
                .install(addresses.start, &data[from..], page_size())
        })
    }

    fn install_zeros(&self, place: Place, len: u64) -> io::Result<()> {
        self.fill(place, whole_pages(len), |_, addresses| {
            self.uffd()?.zero(addresses, page_size())
        })
    }

    fn wake(&self, place: Place, len: u64) -> io::Result<()> {
        for (_, addresses) in self.addresses(place, whole_pages(len)) {
            self.uffd()?.wake(addresses)?;
        }
        Ok(())
    }

    fn disarm(&self) -> io::Result<()> {
        let mut release = self.release.lock().unwrap_or_else(PoisonError::into_inner);
        let mut failed = None;
        let undo = match std::mem::replace(&mut *release, Release::Disarmed(None)) {
            Release::Armed(undo) => {
                let uffd = self.uffd()?;
                for area in &self.areas {
                    if let Err(error) = uffd.unregister(area.addresses.clone())
                        // Not mapped any more, or by a process that has ended: nothing is watched there.
                        && !matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOMEM))
                    {
                        failed.get_or_insert(error);
                    }
                }
                Some(undo)
            }
            Release::Disarmed(undo) => undo,
        };
        // Whatever failed: once every descriptor is closed, nothing is watched.
        let undone = undo.map_or(Ok(()), |undo| undo());
        failed.map_or(undone, Err)
    }
}
