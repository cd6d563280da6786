//! The regions of a destination, as memory that the engine fills.

use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use rustix::event::epoll;

use super::access::touched;
use super::{Region, RegionError, UNIT, lock};
use crate::chunk::{ChunkBitmap, ChunkRun, ChunkState, Install, Place, Storage};

const SIZE: u64 = UNIT.bytes() as u64;

/// Told of bytes that have come: the region's index, and where.
pub(in crate::migrate) type OnChunk = Box<dyn Fn(usize, Range<u64>) + Send + Sync>;

/// Regions while they come.
pub(in crate::migrate) struct Arrival {
    regions: Vec<Arc<Region>>,
    /// Readable when a fault waits in any of them.
    faults: OwnedFd,
    on_chunk: Option<OnChunk>,
}

impl fmt::Debug for Arrival {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Arrival")
            .field("regions", &self.regions)
            .finish_non_exhaustive()
    }
}

impl Arrival {
    pub(in crate::migrate) fn new(
        regions: Vec<Arc<Region>>,
        on_chunk: Option<OnChunk>,
    ) -> io::Result<Self> {
        let faults = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for region in &regions {
            let fd = region.residency.fault_fd().expect("it reports its faults");
            let nothing = epoll::EventData::new_u64(0);
            epoll::add(&faults, fd, nothing, epoll::EventFlags::IN)?;
        }
        Ok(Self {
            regions,
            faults,
            on_chunk,
        })
    }

    fn told(&self, place: Place, len: u64) {
        if let Some(on_chunk) = &self.on_chunk {
            on_chunk(place.region, place.offset..place.offset + len);
        }
    }
}

impl Install for Arrival {
    fn lens(&self) -> Vec<u64> {
        self.regions.iter().map(|region| region.len()).collect()
    }

    fn page_size(&self) -> u64 {
        SIZE
    }

    fn can_fault(&self) -> bool {
        true
    }

    fn old(&self) -> Option<Vec<Arc<dyn Storage>>> {
        let old = self.regions.iter().any(|region| region.held().old);
        old.then(|| self.regions.iter().map(|region| region.source()).collect())
    }

    fn clear(&self) -> io::Result<()> {
        for region in &self.regions {
            region.local.zero(0..region.len())?;
        }
        Ok(())
    }

    fn discard(&self, region: usize, range: Range<u64>) -> io::Result<()> {
        self.regions[region].discard(range)
    }

    fn write(&self, place: Place, data: &[u8]) -> io::Result<()> {
        self.regions[place.region].write(place.offset, data)?;
        self.told(place, data.len() as u64);
        Ok(())
    }

    /// The local storage knows whether there is room, and tells when it is written.
    fn check_room(&self, _bytes: &[u64]) -> io::Result<()> {
        Ok(())
    }

    fn arm(&self) -> io::Result<()> {
        for region in &self.regions {
            region.arm();
        }
        Ok(())
    }

    fn fault_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.faults.as_fd())
    }

    fn faults(&self, faults: &mut Vec<Place>) -> io::Result<()> {
        let mut units = Vec::new();
        for (index, region) in self.regions.iter().enumerate() {
            units.clear();
            region.residency.take_faults(&mut units);
            faults.extend(units.iter().map(|unit| Place {
                region: index,
                offset: unit.0 * SIZE,
            }));
        }
        Ok(())
    }

    fn install(&self, place: Place, data: &[u8]) -> io::Result<()> {
        self.regions[place.region].install(place.offset, data)?;
        self.told(place, data.len() as u64);
        Ok(())
    }

    fn install_zeros(&self, place: Place, len: u64) -> io::Result<()> {
        self.regions[place.region].install_zeros(place.offset, len)
    }

    fn wake(&self, place: Place, len: u64) -> io::Result<()> {
        let region = &self.regions[place.region];
        let end = (place.offset + len).min(region.len());
        region.residency.look_again(touched(&(place.offset..end)));
        Ok(())
    }

    fn disarm(&self) -> io::Result<()> {
        for region in &self.regions {
            region.disarm();
        }
        Ok(())
    }
}

/// What of a region is to be remote.
#[derive(Debug)]
pub(super) enum Absent {
    /// Nothing: what is discarded is zeros that are here.
    Unknown,
    /// This, as soon as somebody has to know. Nobody looks at the region before.
    Pending(ChunkBitmap),
    /// What the residency says.
    Marked,
}

impl Region {
    /// From now on what is discarded is remote.
    fn arm(&self) {
        // What was asked for in an earlier session and did not come: nobody waits for it any more.
        self.residency.take_faults(&mut Vec::new());
        let units = self.residency.chunks();
        *lock(&self.absent) = Absent::Pending(ChunkBitmap::empty(units));
    }

    fn discard(&self, range: Range<u64>) -> io::Result<()> {
        let mut absent = lock(&self.absent);
        self.local.zero(range.clone())?;
        match &mut *absent {
            Absent::Unknown => Ok(()),
            Absent::Pending(set) => {
                set.insert_run(touched(&range));
                Ok(())
            }
            Absent::Marked => {
                let mut set = ChunkBitmap::empty(self.residency.chunks());
                set.insert_run(touched(&range));
                self.mark_remote(&set)
            }
        }
    }

    /// Puts `data` over whatever is there, while nobody looks.
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut absent = lock(&self.absent);
        self.local.write_all_at(data, offset)?;
        let run = touched(&(offset..offset + data.len() as u64));
        match &mut *absent {
            Absent::Unknown => {}
            // It was discarded, and has come again.
            Absent::Pending(set) => set.remove_run(run),
            Absent::Marked => {
                self.residency.fill(run).done();
            }
        }
        Ok(())
    }

    /// What was discarded is remote from now on. Nobody may look before.
    ///
    /// Whoever finds that it was done already may rely on it: so the lock is held until it is. When it was let go of before, a second lane took
    /// absent chunks for resident ones, dropped what came for them, and they were zeros.
    pub(in crate::migrate) fn mark_absent(&self) -> Result<(), RegionError> {
        let mut absent = lock(&self.absent);
        let Absent::Pending(set) = &*absent else {
            return Ok(());
        };
        self.complete.store(false, Ordering::Release);
        self.mark_remote(set)
            .map_err(|source| RegionError::Failed {
                what: "what is remote cannot be marked",
                source,
            })?;
        *absent = Absent::Marked;
        Ok(())
    }

    fn mark_remote(&self, set: &ChunkBitmap) -> io::Result<()> {
        self.residency
            .mark_remote(set, Instant::now() + self.patience)
    }

    /// Puts `data` where nothing is. What a program writes at the same moment counts, if it can be written.
    fn install(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let end = offset + data.len() as u64;
        self.fill_units(touched(&(offset..end)), |run| {
            let (from, upto) = (run.start.0 * SIZE, (run.end() * SIZE).min(end));
            let at = |position: u64| usize::try_from(position - offset).expect("within the data");
            self.local.write_all_at(&data[at(from)..at(upto)], from)
        })
    }

    fn install_zeros(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = (offset + len).min(self.len());
        self.fill_units(touched(&(offset..end)), |run| {
            let upto = (run.end() * SIZE).min(self.len());
            self.local.zero(run.start.0 * SIZE..upto)
        })
    }

    fn fill_units(
        &self,
        run: ChunkRun,
        put: impl Fn(ChunkRun) -> io::Result<()>,
    ) -> io::Result<()> {
        self.mark_absent().map_err(io::Error::other)?;
        let deadline = Instant::now() + self.patience;
        let mut left = run;
        while left.count > 0 {
            let writing = self.residency.fill(left);
            for &part in writing.runs() {
                if let Err(error) = put(part) {
                    writing.fail(&error);
                    return Err(error);
                }
            }
            writing.done();
            // A program writes one of them right now. If it fails, these are the bytes that count, and they come only once.
            let Some(busy) = self.residency.find(left, 1, ChunkState::Writing) else {
                return Ok(());
            };
            left = ChunkRun::new(busy.start.0, left.end() - busy.start.0);
            if self.residency.settle(busy.start, deadline)? == ChunkState::Resident {
                left = ChunkRun::new(busy.end(), left.end() - busy.end());
            }
        }
        Ok(())
    }

    /// Everything is here but what is zero; or nothing of it matters, and nobody may look.
    fn disarm(&self) {
        *lock(&self.absent) = Absent::Unknown;
        if !self.held().owned {
            return;
        }
        let rest = self.residency.fill(self.residency.all_chunks());
        rest.done();
        self.complete.store(true, Ordering::Release);
    }
}
