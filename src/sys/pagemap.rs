//! What the kernel remembers about the pages of a process: `/proc/PID/pagemap`.

use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::ptr;

use linux_raw_sys::general as raw;
use rustix::io::Errno;

/// The page table of one process, to be asked and, for pages that were written, reset.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
    process: String,
    /// Where the kernel puts what it finds. Made by the first scan, then reused.
    found: Vec<raw::page_region>,
}

/// Room for 8192 ranges: 192 KiB, so that a GiB of which every other page was written takes 16 calls.
const FOUND: usize = 8192;

/// The unit in which the kernel looks at page tables, whatever the size of the page mapped.
const PAGE: u64 = 4096;

impl Pagemap {
    /// Opens the page table of process `pid`.
    ///
    /// # Errors
    /// If there is no such process, or it may not be traced by this one.
    pub fn open(pid: u32) -> io::Result<Self> {
        Self::open_as(pid.to_string())
    }

    /// Opens the page table of this process.
    ///
    /// # Errors
    /// If `/proc` is not mounted.
    pub fn of_this_process() -> io::Result<Self> {
        Self::open_as("self".to_owned())
    }

    fn open_as(process: String) -> io::Result<Self> {
        let path = format!("/proc/{process}/pagemap");
        let file = File::open(&path).map_err(|error| {
            io::Error::new(error.kind(), format!("{path} cannot be opened: {error}"))
        })?;
        Ok(Self {
            file,
            process,
            found: Vec::new(),
        })
    }

    /// Names the pages of `range` that were written since they were last write-protected, and write-protects them
    /// again, atomically for each page: a write lands before, and is named now, or after, and is named next time.
    ///
    /// The range must be registered with a userfaultfd that has [`Features::TRACKING`](super::uffd::Features::TRACKING).
    /// The first scan after that names everything, holes too; it allocates none of them.
    ///
    /// # Errors
    /// `EPERM` if a mapping in the range is not registered so. Pages may have been reset and not named then, so take
    /// the whole range for written. Addresses where nothing is mapped are no error and never named.
    pub fn scan_written_and_protect(
        &mut self,
        range: Range<u64>,
        found: &mut dyn FnMut(Range<u64>),
    ) -> io::Result<()> {
        let flags = raw::PM_SCAN_WP_MATCHING | raw::PM_SCAN_CHECK_WPASYNC;
        self.scan(range, flags, Wanted::Written, found)
    }

    /// As [`scan_written_and_protect`](Self::scan_written_and_protect), but never names a page that is not there, and leaves those
    /// alone: for memory whose absent pages fault.
    ///
    /// # Errors
    /// As [`scan_written_and_protect`](Self::scan_written_and_protect).
    pub fn scan_present_written_and_protect(
        &mut self,
        range: Range<u64>,
        found: &mut dyn FnMut(Range<u64>),
    ) -> io::Result<()> {
        let flags = raw::PM_SCAN_WP_MATCHING | raw::PM_SCAN_CHECK_WPASYNC;
        self.scan(range, flags, Wanted::PresentWritten, found)
    }

    /// As [`scan_present_written_and_protect`](Self::scan_present_written_and_protect), and leaves them so.
    ///
    /// # Errors
    /// As [`scan_written_and_protect`](Self::scan_written_and_protect).
    pub fn peek_present_written(
        &mut self,
        range: Range<u64>,
        found: &mut dyn FnMut(Range<u64>),
    ) -> io::Result<()> {
        self.scan(
            range,
            raw::PM_SCAN_CHECK_WPASYNC,
            Wanted::PresentWritten,
            found,
        )
    }

    /// Names the pages of `range` that were written since they were last write-protected, and leaves them so.
    ///
    /// # Errors
    /// `EPERM` if a mapping in the range is not registered for tracking.
    pub fn peek_written(
        &mut self,
        range: Range<u64>,
        found: &mut dyn FnMut(Range<u64>),
    ) -> io::Result<()> {
        let flags = raw::PM_SCAN_CHECK_WPASYNC;
        self.scan(range, flags, Wanted::Written, found)
    }

    /// Names the pages of `range` that this process has mapped or swapped out. A page that only the memory's file
    /// has is not among them: ask the file for those.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn present(
        &mut self,
        range: Range<u64>,
        found: &mut dyn FnMut(Range<u64>),
    ) -> io::Result<()> {
        self.scan(range, 0, Wanted::Present, found)
    }

    fn scan(
        &mut self,
        range: Range<u64>,
        flags: u32,
        wanted: Wanted,
        found: &mut dyn FnMut(Range<u64>),
    ) -> io::Result<()> {
        // Neighbours become one range if what is returned of them is equal, so nothing is returned of present pages.
        let (category_mask, category_anyof_mask) = match wanted {
            // Exactly this question takes the kernel's short way, which also names what became a hole since.
            Wanted::Written => (raw::PAGE_IS_WRITTEN.into(), 0),
            Wanted::Present => (0, (raw::PAGE_IS_PRESENT | raw::PAGE_IS_SWAPPED).into()),
            Wanted::PresentWritten => (
                raw::PAGE_IS_WRITTEN.into(),
                (raw::PAGE_IS_PRESENT | raw::PAGE_IS_SWAPPED).into(),
            ),
        };
        if self.found.is_empty() {
            let none = raw::page_region {
                start: 0,
                end: 0,
                categories: 0,
            };
            self.found.resize(FOUND, none);
        }
        let mut next = range.start;
        while next < range.end {
            let mut scan = raw::pm_scan_arg {
                size: size_of::<raw::pm_scan_arg>() as u64,
                flags: flags.into(),
                start: next,
                end: range.end,
                walk_end: 0,
                vec: 0,
                vec_len: 0,
                max_pages: 0,
                category_inverted: 0,
                category_mask,
                category_anyof_mask,
                return_mask: category_mask,
            };
            match self.pagemap_scan(&mut scan) {
                Ok(count) => {
                    for region in &self.found[..count] {
                        found(region.start..region.end);
                    }
                    next = scan.walk_end.max(next);
                    if next < range.end && count == 0 && scan.walk_end <= scan.start {
                        return Err(io::Error::other(
                            "the kernel's page table scan makes no progress",
                        ));
                    }
                }
                // Only a signal that kills us interrupts it, so this costs nobody anything: what was reset and not
                // named is lost, so everything is named.
                Err(Errno::INTR) => found(next..range.end),
                Err(Errno::NOTTY | Errno::INVAL) => {
                    return Err(io::Error::new(
                        io::ErrorKind::Unsupported,
                        "the kernel has no PAGEMAP_SCAN (Linux 6.7 and later do) or refuses the range",
                    ));
                }
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// Runs `scan` with its answer in `self.found`; says how many ranges are there.
    fn pagemap_scan(&mut self, scan: &mut raw::pm_scan_arg) -> Result<usize, Errno> {
        scan.vec = self.found.as_mut_ptr().expose_provenance() as u64;
        scan.vec_len = self.found.len() as u64;
        // SAFETY: the number is that of PAGEMAP_SCAN, which takes this struct; beside it the kernel writes at most
        // `vec_len` entries to `vec`, which is `self.found`, that long and exclusively ours. It changes the
        // protection of pages and never their bytes.
        let result = unsafe {
            libc::ioctl(
                self.file.as_raw_fd(),
                PAGEMAP_SCAN as libc::Ioctl,
                ptr::from_mut(scan),
            )
        };
        usize::try_from(result)
            .map_err(|_| Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO))
    }

    /// Names the pages of `range` whose soft-dirty bit is set: those written since
    /// [`clear_soft_dirty`](Self::clear_soft_dirty).
    ///
    /// The bits mean nothing where [`soft_dirty_works`] says no.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn soft_dirty(
        &self,
        range: Range<u64>,
        found: &mut dyn FnMut(Range<u64>),
    ) -> io::Result<()> {
        // 8 bytes a page; 64 KiB answer for 32 MiB.
        let mut entries = vec![0; 64 << 10];
        let mut page = range.start / PAGE;
        let end = range.end.div_ceil(PAGE);
        let mut dirty: Option<Range<u64>> = None;
        while page < end {
            let count = (end - page).min(entries.len() as u64 / 8);
            let bytes = &mut entries[..usize::try_from(count * 8).expect("at most the buffer")];
            self.file.read_exact_at(bytes, page * 8)?;
            for entry in bytes.as_chunks::<8>().0 {
                #[expect(clippy::host_endian_bytes, reason = "the kernel's own words")]
                let soft_dirty = u64::from_ne_bytes(*entry) >> SOFT_DIRTY_BIT & 1 == 1;
                let address = page * PAGE;
                match &mut dirty {
                    Some(run) if soft_dirty => run.end = address + PAGE,
                    None if soft_dirty => dirty = Some(address..address + PAGE),
                    run => run.take().into_iter().for_each(&mut *found),
                }
                page += 1;
            }
        }
        dirty.into_iter().for_each(found);
        Ok(())
    }

    /// Clears the soft-dirty bits of **all** memory of the process: whoever else watches them loses theirs.
    ///
    /// Not atomic with reading them: what is written between the two is lost, so the process must not run.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn clear_soft_dirty(&self) -> io::Result<()> {
        let path = format!("/proc/{}/clear_refs", self.process);
        File::options()
            .write(true)
            .open(&path)
            .and_then(|mut file| file.write_all(b"4"))
            .map_err(|error| {
                io::Error::new(error.kind(), format!("{path} cannot be written: {error}"))
            })
    }
}

#[derive(Debug, Clone, Copy)]
enum Wanted {
    Written,
    Present,
    PresentWritten,
}

/// Whether the kernel keeps soft-dirty bits (`CONFIG_MEM_SOFT_DIRTY`), found out on a page of our own.
///
/// A fresh mapping reads as soft-dirty where they are kept, so no bits need to be cleared to know.
///
/// # Errors
/// If our own page table cannot be read.
pub fn soft_dirty_works() -> io::Result<bool> {
    let page = super::mapping::Mapping::anonymous(PAGE)?;
    page.write(0, &[1])?;
    let mut works = false;
    Pagemap::of_this_process()?.soft_dirty(page.addresses(), &mut |_| works = true)?;
    Ok(works)
}

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: u32 = 0xc060_6610;

/// In an entry of the page map.
const SOFT_DIRTY_BIT: u32 = 55;

const _: () = assert!(size_of::<raw::pm_scan_arg>() as u64 == (PAGEMAP_SCAN >> 16 & 0x3fff) as u64);
const _: () = assert!(size_of::<raw::page_region>() == 24);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::mapping::Mapping;
    use crate::sys::uffd::{Features, Mode, Scope, Uffd};

    /// Eight pages of memory that are tracked and armed, the third of them present.
    fn tracked() -> (Mapping, Uffd, Pagemap) {
        let memory = Mapping::anonymous(8 * PAGE).unwrap();
        memory.write(2 * PAGE, &[1]).unwrap();
        let uffd = Uffd::create(Scope::UserModeOnly, Features::TRACKING).unwrap();
        let wp = Mode {
            wp: true,
            ..Mode::default()
        };
        uffd.register(memory.addresses(), wp).unwrap();
        let mut pagemap = Pagemap::of_this_process().unwrap();
        pagemap
            .scan_written_and_protect(memory.addresses(), &mut |_| {})
            .unwrap();
        (memory, uffd, pagemap)
    }

    fn pages(
        memory: &Mapping,
        scan: impl FnOnce(Range<u64>, &mut dyn FnMut(Range<u64>)) -> io::Result<()>,
    ) -> Vec<(u64, u64)> {
        let all = memory.addresses();
        let mut found = Vec::new();
        let page = |address: u64| (address - all.start) / PAGE;
        scan(all.clone(), &mut |range| {
            found.push((page(range.start), page(range.end)));
        })
        .unwrap();
        found
    }

    #[test]
    fn peeking_names_what_was_written_and_leaves_it_written() {
        let (memory, _uffd, mut pagemap) = tracked();
        memory.write(4 * PAGE, &[1]).unwrap();
        memory.write(5 * PAGE, &[1]).unwrap();
        let written = [(4, 6)];
        assert_eq!(pages(&memory, |a, f| pagemap.peek_written(a, f)), written);
        assert_eq!(pages(&memory, |a, f| pagemap.peek_written(a, f)), written);
        let taken = pages(&memory, |a, f| pagemap.scan_written_and_protect(a, f));
        assert_eq!(taken, written);
        assert_eq!(pages(&memory, |a, f| pagemap.peek_written(a, f)), []);
    }

    #[test]
    fn what_is_mapped_is_present_and_neighbours_are_one_range() {
        let memory = Mapping::anonymous(8 * PAGE).unwrap();
        memory.populate(2 * PAGE..5 * PAGE).unwrap();
        let mut pagemap = Pagemap::open(std::process::id()).unwrap();
        let present = pages(&memory, |a, f| pagemap.present(a, f));
        assert_eq!(present, [(2, 5)]);
    }

    #[test]
    fn memory_that_is_not_tracked_is_refused() {
        let memory = Mapping::anonymous(PAGE).unwrap();
        let mut pagemap = Pagemap::of_this_process().unwrap();
        let refused = pagemap.scan_written_and_protect(memory.addresses(), &mut |_| {});
        assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    }

    #[test]
    fn a_process_that_is_not_there_is_named() {
        let refused = Pagemap::open(u32::MAX).unwrap_err();
        assert!(refused.to_string().contains("/proc/4294967295/pagemap"));
    }
}
