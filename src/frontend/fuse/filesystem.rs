//! The file system with one file in it: each request of the kernel becomes one call of the storage.

use std::cell::RefCell;
use std::ffi::{OsStr, OsString};
use std::io;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, ReplyAttr, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite,
    Request, TimeOrNow, WriteFlags,
};
use rustix::fs::FallocateFlags;

use super::mountpoint::Shape;
use super::unsaved::Unsaved;
use super::{Cache, PAGE};
use crate::chunk::Storage;

/// The most bytes of one request. The kernel's own limit, unless somebody has raised it.
pub(super) const LARGEST: u32 = 1 << 20;

/// Names and attributes never change, so the kernel may keep them.
const FOR_EVER: Duration = Duration::from_secs(1 << 30);

/// How far [`RegionFile::seek`] looks at once, to begin with. Each next look goes twice as far: a storage lists data by the
/// range, and all of a large one may be a long list.
const FIRST_LOOK: u64 = 64 << 20;

/// The open files that may write, whose closing is a flush.
const WRITER: FileHandle = FileHandle(1);
const READER: FileHandle = FileHandle(0);

#[derive(Debug)]
pub(super) struct RegionFile {
    storage: Arc<dyn Storage>,
    name: OsString,
    shape: Shape,
    cache: Cache,
    read_only: bool,
    everyone: bool,
    threads: u16,
    /// Whether something was written since the last good flush.
    unflushed: AtomicBool,
    /// What the kernel had cached and could not write back.
    unsaved: Arc<Unsaved>,
    since: SystemTime,
}

impl RegionFile {
    pub(super) fn new(
        storage: Arc<dyn Storage>,
        shape: Shape,
        options: &super::FuseOptions,
    ) -> Self {
        Self {
            storage,
            name: options.name.clone(),
            shape,
            cache: options.cache,
            read_only: options.read_only,
            everyone: options.everyone,
            threads: u16::try_from(options.threads).unwrap_or(u16::MAX),
            unflushed: AtomicBool::new(false),
            unsaved: Arc::default(),
            since: SystemTime::now(),
        }
    }

    pub(super) fn unsaved(&self) -> &Arc<Unsaved> {
        &self.unsaved
    }

    /// The number of the file: that of the root where the file is what is mounted.
    pub(super) fn inode(shape: Shape) -> INodeNo {
        match shape {
            Shape::File => INodeNo::ROOT,
            Shape::Directory => INodeNo(INodeNo::ROOT.0 + 1),
        }
    }

    fn is_file(&self, inode: INodeNo) -> bool {
        inode == Self::inode(self.shape)
    }

    fn attributes(&self, inode: INodeNo) -> FileAttr {
        let is_file = self.is_file(inode);
        let writable = u16::from(!self.read_only) * 0o200;
        let owner = 0o400 | writable;
        let others = u16::from(self.everyone) * (owner >> 3 | owner >> 6);
        let (kind, perm, size) = if is_file {
            (FileType::RegularFile, owner | others, self.storage.len())
        } else {
            let others = u16::from(self.everyone) * 0o055;
            (FileType::Directory, 0o500 | others, 0)
        };
        FileAttr {
            ino: inode,
            size,
            blocks: size.div_ceil(512),
            atime: self.since,
            mtime: self.since,
            ctime: self.since,
            crtime: self.since,
            kind,
            perm,
            nlink: if is_file { 1 } else { 2 },
            uid: rustix::process::getuid().as_raw(),
            gid: rustix::process::getgid().as_raw(),
            rdev: 0,
            blksize: LARGEST,
            flags: 0,
        }
    }

    /// Writes as much of `data` as the file has room for; says how much that was.
    fn write_within(&self, offset: u64, data: &[u8]) -> io::Result<usize> {
        let room = self.storage.len().saturating_sub(offset);
        let len = usize::try_from(room).map_or(data.len(), |room| room.min(data.len()));
        if len > 0 {
            // Set after the write whatever came of it: a part of it may have been written.
            let written = self.storage.write_all_at(&data[..len], offset);
            self.unflushed.store(true, Ordering::Release);
            written?;
        }
        Ok(len)
    }

    /// Keeps in mind what of a write has come to nothing if it came from the cache, where the kernel does not try again. All others are
    /// told to who writes, and leave nothing cached.
    fn remember<E>(&self, offset: u64, len: usize, cached: bool, written: &Result<usize, E>) {
        match written {
            Ok(written) => self.unsaved.saved(offset..offset + *written as u64),
            Err(_) if cached => {
                // What is behind the end is no part of the region.
                let end = offset.saturating_add(len as u64).min(self.storage.len());
                self.unsaved.failed(offset..end);
            }
            Err(_) => {}
        }
    }

    fn flush_storage(&self) -> io::Result<()> {
        // Before the flush: what is written during it may not be covered by it.
        self.unflushed.store(false, Ordering::Release);
        self.storage.flush().inspect_err(|_| {
            self.unflushed.store(true, Ordering::Release);
        })
    }

    fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        let len = self.storage.len();
        let range = offset.min(len)..offset.saturating_add(length).min(len);
        let zeroed = self.storage.zero(range.clone());
        self.unflushed.store(true, Ordering::Release);
        zeroed.inspect(|()| self.unsaved.saved(range))
    }

    /// The next data at or after `offset`, or the next hole; `None` if there is no such data. The end is a hole.
    fn seek(&self, offset: u64, whence: Whence) -> io::Result<Option<u64>> {
        let len = self.storage.len();
        if offset >= len {
            return Ok(None);
        }
        let mut from = offset;
        let mut look = FIRST_LOOK;
        while from < len {
            let within = from..from.saturating_add(look).min(len);
            let ranges = self.storage.data_ranges(within.clone())?;
            match whence {
                Whence::Data => {
                    if let Some(first) = ranges.first() {
                        return Ok(Some(first.start.max(from)));
                    }
                }
                Whence::Hole => {
                    let hole = end_of_data(from, &ranges);
                    if hole < within.end {
                        return Ok(Some(hole));
                    }
                }
            }
            from = within.end;
            look = look.saturating_mul(2);
        }
        Ok((whence == Whence::Hole).then_some(len))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whence {
    Data,
    Hole,
}

/// Where the data that `from` is in ends; `from` itself if it is in none.
fn end_of_data(from: u64, ranges: &[Range<u64>]) -> u64 {
    ranges
        .iter()
        .take_while(|range| range.start <= range.end)
        .fold(from, |end, range| {
            if range.start <= end {
                end.max(range.end)
            } else {
                end
            }
        })
}

impl Filesystem for RegionFile {
    fn init(&mut self, _: &Request, kernel: &mut KernelConfig) -> io::Result<()> {
        let nearest = |wish: Result<u32, u32>| wish.err();
        if let Some(most) = nearest(kernel.set_max_write(LARGEST)) {
            let _ = kernel.set_max_write(most);
        }
        if let Some(most) = nearest(kernel.set_max_readahead(LARGEST)) {
            let _ = kernel.set_max_readahead(most);
        }
        // Read-ahead and write-back in the background, as many as there are threads for; the kernel slows nobody down before.
        let _ = kernel.set_max_background(self.threads.max(1));
        let _ = kernel.set_congestion_threshold(self.threads.max(1));
        // Each is worth having alone; a kernel that lacks one works without.
        let mut wished = vec![
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_EXPLICIT_INVAL_DATA,
            InitFlags::FUSE_PARALLEL_DIROPS,
        ];
        match self.cache {
            // Nothing to write back, and then the length is ours to say.
            Cache::Writeback if self.read_only => {}
            Cache::Writeback => wished.push(InitFlags::FUSE_WRITEBACK_CACHE),
            Cache::Direct => wished.push(InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP),
        }
        for flag in wished {
            let _ = kernel.add_capabilities(flag);
        }
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if self.shape == Shape::Directory && parent == INodeNo::ROOT && name == self.name {
            let file = self.attributes(Self::inode(self.shape));
            reply.entry(&FOR_EVER, &file, Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&FOR_EVER, &self.attributes(inode));
    }

    fn setattr(
        &self,
        _: &Request,
        inode: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let resized = size.is_some_and(|size| size != self.attributes(inode).size);
        if resized || mode.is_some() || uid.is_some() || gid.is_some() {
            reply.error(Errno::EPERM);
        } else {
            // Times are the kernel's business; it says them so that they are kept, which they are not.
            reply.attr(&FOR_EVER, &self.attributes(inode));
        }
    }

    fn open(&self, _: &Request, inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if !self.is_file(inode) {
            return reply.error(Errno::EISDIR);
        }
        let writes = flags.acc_mode() != OpenAccMode::O_RDONLY;
        if writes && self.read_only {
            return reply.error(Errno::EROFS);
        }
        let flags = match self.cache {
            // Nobody changes the bytes behind the kernel's back but who says so by `invalidate`.
            Cache::Writeback => FopenFlags::FOPEN_KEEP_CACHE,
            Cache::Direct => FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES,
        };
        reply.opened(if writes { WRITER } else { READER }, flags);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        thread_local! {
            /// Where a request is read into: as large as the largest that this thread has served.
            static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
        }
        BUFFER.with_borrow_mut(|buffer| {
            let left = self.storage.len().saturating_sub(offset);
            let wanted = usize::try_from(left.min(size.into())).expect("at most a u32");
            if buffer.len() < wanted {
                buffer.resize(wanted, 0);
            }
            let buffer = &mut buffer[..wanted];
            match answer(|| self.storage.read_exact_at(buffer, offset)) {
                Ok(()) => reply.data(buffer),
                Err(errno) => reply.error(errno),
            }
        });
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let cached = write_flags.contains(WriteFlags::FUSE_WRITE_CACHE);
        let written = answer(|| self.write_within(offset, data));
        // Before the kernel hears of it, and tells others.
        self.remember(offset, data.len(), cached, &written);
        match written {
            // From the cache nobody sees a short count: an error there is what `fsync` reports.
            Ok(len) if len < data.len() && (cached || len == 0) => reply.error(Errno::ENOSPC),
            Ok(len) => reply.written(u32::try_from(len).expect("at most the largest request")),
            Err(errno) => reply.error(errno),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, handle: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        if handle == WRITER && self.unflushed.load(Ordering::Acquire) {
            finish(reply, || self.flush_storage());
        } else {
            reply.ok();
        }
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        finish(reply, || self.flush_storage());
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn readdir(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let entries = [
            (INodeNo::ROOT, FileType::Directory, OsStr::new(".")),
            (INodeNo::ROOT, FileType::Directory, OsStr::new("..")),
            (
                Self::inode(self.shape),
                FileType::RegularFile,
                self.name.as_os_str(),
            ),
        ];
        for (next, (inode, kind, name)) in (1..).zip(entries) {
            if next > offset && reply.add(inode, next, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        // All of it can be written, so all of it is room.
        let blocks = self.storage.len().div_ceil(PAGE);
        reply.statfs(blocks, blocks, blocks, 1, 0, 4096, 255, 4096);
    }

    fn fallocate(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let mode = FallocateFlags::from_bits_retain(mode.cast_unsigned());
        let keeps_size = mode.contains(FallocateFlags::KEEP_SIZE);
        let grows = offset.saturating_add(length) > self.storage.len();
        if mode.intersects(FallocateFlags::PUNCH_HOLE | FallocateFlags::ZERO_RANGE) {
            if grows && !keeps_size {
                reply.error(Errno::EPERM);
            } else {
                finish(reply, || self.zero(offset, length));
            }
        } else if !mode.difference(FallocateFlags::KEEP_SIZE).is_empty() {
            reply.error(Errno::EOPNOTSUPP);
        } else if grows {
            reply.error(if keeps_size {
                Errno::ENOSPC
            } else {
                Errno::EPERM
            });
        } else {
            // What was never written has its place already.
            reply.ok();
        }
    }

    fn lseek(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        // What the kernel has not written back yet would be a hole of the storage's, and a copy would leave it out. It knows
        // what to do without an answer: all is data.
        if self.cache == Cache::Writeback && !self.read_only {
            return reply.error(Errno::ENOSYS);
        }
        let whence = match whence {
            libc::SEEK_DATA => Whence::Data,
            libc::SEEK_HOLE => Whence::Hole,
            _ => return reply.error(Errno::EINVAL),
        };
        let Ok(offset) = u64::try_from(offset) else {
            return reply.error(Errno::ENXIO);
        };
        let found = answer(|| self.seek(offset, whence));
        match found.map(|found| found.and_then(|at| i64::try_from(at).ok())) {
            Ok(Some(at)) => reply.offset(at),
            Ok(None) => reply.error(Errno::ENXIO),
            Err(errno) => reply.error(errno),
        }
    }
}

fn finish(reply: ReplyEmpty, work: impl FnOnce() -> io::Result<()>) {
    match answer(work) {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(errno),
    }
}

/// Does the storage's work for a request. A panic there fails the request and not the thread, which others need, too.
fn answer<T>(work: impl FnOnce() -> io::Result<T>) -> Result<T, Errno> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err(io::Error::other("the storage panicked")))
        .map_err(|error| errno_of(&error))
}

/// What the program at the file is told. Only what it can make something of passes as it is: a number that means something to
/// the kernel (`ENOSYS`, `EINTR`, `EAGAIN`) or speaks of the storage's own connections does not.
fn errno_of(error: &io::Error) -> Errno {
    match error.kind() {
        io::ErrorKind::StorageFull => Errno::ENOSPC,
        io::ErrorKind::QuotaExceeded => Errno::from_i32(libc::EDQUOT),
        io::ErrorKind::ReadOnlyFilesystem => Errno::EROFS,
        io::ErrorKind::PermissionDenied => Errno::EPERM,
        io::ErrorKind::OutOfMemory => Errno::ENOMEM,
        io::ErrorKind::Unsupported => Errno::EOPNOTSUPP,
        _ => Errno::EIO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::MemoryStorage;
    use crate::frontend::FuseOptions;

    #[test]
    fn the_end_is_a_hole_and_no_data_is_found_behind_the_last() {
        let storage = Arc::new(MemoryStorage::new(1 << 40));
        storage.write_all_at(&[1; 8192], 1 << 30).unwrap();
        storage.write_all_at(&[1], (1 << 40) - 1).unwrap();
        let file = RegionFile::new(storage, Shape::File, &FuseOptions::default());
        let data = |at| file.seek(at, Whence::Data).unwrap();
        let hole = |at| file.seek(at, Whence::Hole).unwrap();
        let (gib, end) = (1 << 30, 1 << 40);
        assert_eq!((data(0), hole(0)), (Some(gib), Some(0)));
        assert_eq!(
            (data(gib + 1), hole(gib + 1)),
            (Some(gib + 1), Some(gib + 8192))
        );
        assert_eq!(data(gib + 8192), Some(end - 4096));
        assert_eq!(hole(end - 1), Some(end));
        assert_eq!((data(end), hole(end)), (None, None));
    }

    #[test]
    fn data_that_touches_is_one() {
        assert_eq!(end_of_data(5, &[0..10, 10..20, 30..40]), 20);
        assert_eq!(end_of_data(20, &[30..40, 50..60]), 20);
        assert_eq!(end_of_data(20, &[]), 20);
    }

    #[test]
    fn what_the_kernel_would_take_for_itself_is_an_input_output_error() {
        for number in [libc::EINTR, libc::EAGAIN, libc::ECONNRESET, libc::ETIMEDOUT] {
            assert_eq!(
                errno_of(&io::Error::from_raw_os_error(number)).code(),
                libc::EIO
            );
        }
        let lacking = io::Error::from_raw_os_error(libc::ENOSYS);
        assert_eq!(errno_of(&lacking).code(), libc::EOPNOTSUPP);
        let full = io::Error::from_raw_os_error(libc::ENOSPC);
        assert_eq!(errno_of(&full).code(), libc::ENOSPC);
    }

    #[test]
    fn a_storage_that_panics_fails_its_request_alone() {
        let failed = answer(|| -> io::Result<()> { panic!("as a test") });
        assert_eq!(failed.unwrap_err().code(), libc::EIO);
    }
}
