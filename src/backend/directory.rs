//! A folder as a store of chunks: one file a chunk.
//!
//! ```text
//! geometry          what the chunks are cut to; locked by the process that uses the folder
//! 0/ 1/ … a3/       4096 chunks each
//!   000 … fff       a chunk that was flushed
//! new/
//!   a3fff.17        a chunk that was put and not yet flushed, and which put it was
//! ```
//!
//! A put never touches what was flushed: it writes a file in `new`, and a flush, when that file is on the disk, renames
//! it over the old one. So a full disk, a crash and a loss of power leave each chunk as it was flushed, or newer, and
//! never half of it.

mod durable;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use crate::chunk::{ChunkBitmap, ChunkIndex, ChunkRun, ChunkSize, ChunkStore};

/// How many chunks share a folder: few enough to list one at once, and millions of chunks are some hundred folders.
const FOLDER: u64 = 4096;
/// Up to so many chunks are looked for one by one rather than by listing folders.
const LOOKED_FOR: u64 = 32;

/// Chunks as files of a folder, for media that have files and nothing else, and for looking at what is there.
///
/// Holds one open file, whatever the number of chunks, and a few words for each chunk that is not flushed yet. One
/// process at a time may use a folder.
#[derive(Debug)]
pub struct DirectoryStore {
    path: PathBuf,
    chunk_size: ChunkSize,
    len: u64,
    /// Locked for as long as this lives, and open on the file system that a flush syncs.
    geometry: File,
    state: Mutex<State>,
    /// Held by a flush.
    flushing: Mutex<()>,
    /// A test's disk that fails.
    #[cfg(test)]
    sync_fails: std::sync::atomic::AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    /// Put and not flushed, and by which put: the number in the name of its file.
    pending: BTreeMap<u64, u64>,
    /// Of the pending, those that a sync failed for, or may have in an earlier process: the kernel takes their bytes for
    /// written, and a second sync would too.
    doubtful: BTreeSet<u64>,
    /// Folders whose entries changed since they were synced.
    changed: BTreeSet<u64>,
    /// Whether there are folders that the folder above does not have on the disk yet.
    new_folders: bool,
    /// Whether anything was put or removed since the last flush that succeeded began.
    unflushed: bool,
    /// The number of the next put.
    next: u64,
}

impl DirectoryStore {
    /// The chunks in the folder at `path`, which is made if it is missing: `len` bytes in chunks of `chunk_size`.
    ///
    /// What an earlier process put and did not flush is kept where it is whole.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] if the folder holds chunks of another size or number, or is not empty and none of
    /// ours; [`io::ErrorKind::ResourceBusy`] if another process uses it; else what the file system says.
    pub fn open(path: impl Into<PathBuf>, chunk_size: ChunkSize, len: u64) -> io::Result<Self> {
        let path = path.into();
        fs::create_dir_all(&path)?;
        let geometry = lock_geometry(&path, chunk_size, len)?;
        let store = Self {
            path,
            chunk_size,
            len,
            geometry,
            state: Mutex::default(),
            flushing: Mutex::default(),
            #[cfg(test)]
            sync_fails: false.into(),
        };
        store.keep_what_is_whole()?;
        Ok(store)
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Each change is one insertion or removal, so a panic leaves no half of one.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long `chunk` is; an error if it does not exist.
    fn len_of(&self, chunk: ChunkIndex) -> io::Result<u64> {
        let size = u64::from(self.chunk_size.bytes());
        if chunk.0 >= self.chunk_size.chunks_in(self.len) {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("there is no chunk {} in {} bytes", chunk.0, self.len),
            ));
        }
        Ok(size.min(self.len - chunk.0 * size))
    }

    fn folder(&self, folder: u64) -> PathBuf {
        self.path.join(format!("{folder:x}"))
    }

    /// Where a chunk is once it was flushed.
    fn place(&self, chunk: u64) -> PathBuf {
        let folder = self.folder(chunk / FOLDER);
        folder.join(format!("{:03x}", chunk % FOLDER))
    }

    fn new_folder(&self) -> PathBuf {
        self.path.join("new")
    }

    /// Where a chunk is until it is flushed.
    fn new_place(&self, chunk: u64, put: u64) -> PathBuf {
        self.new_folder().join(format!("{chunk:x}.{put}"))
    }

    /// Makes pending what a process before us left in `new`, the last put of each chunk, if it is whole.
    fn keep_what_is_whole(&self) -> io::Result<()> {
        let mut state = self.state();
        fs::create_dir_all(self.new_folder())?;
        for entry in fs::read_dir(self.new_folder())? {
            let entry = entry?;
            let name = entry.file_name();
            let numbers = name.to_str().and_then(|name| {
                let (chunk, put) = name.split_once('.')?;
                Some((u64::from_str_radix(chunk, 16).ok()?, put.parse().ok()?))
            });
            let left = numbers.filter(|&(chunk, _)| {
                let len = self.len_of(ChunkIndex(chunk)).ok();
                len.is_some() && len == entry.metadata().ok().map(|about| about.len())
            });
            let Some((chunk, put)) = left else {
                fs::remove_file(entry.path())?;
                continue;
            };
            state.next = state.next.max(put + 1);
            state.unflushed = true;
            // A sync of it may have failed then, which the next one does not say.
            state.doubtful.insert(chunk);
            let older = match state.pending.get(&chunk) {
                Some(&newer) if newer > put => Some(put),
                _ => state.pending.insert(chunk, put),
            };
            if let Some(older) = older {
                fs::remove_file(self.new_place(chunk, older))?;
            }
        }
        Ok(())
    }

    /// Reads a chunk, whose length is that of `buf`; whether it is there.
    fn read(&self, chunk: u64, buf: &mut [u8]) -> io::Result<bool> {
        let mut looked_at = None;
        loop {
            let put = self.state().pending.get(&chunk).copied();
            let path = put.map_or_else(|| self.place(chunk), |put| self.new_place(chunk, put));
            match File::open(&path) {
                Ok(file) => return read_whole(file, buf, &path).map(|()| true),
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                Err(_) if put.is_none() => return Ok(false),
                // It was flushed or put again meanwhile, unless somebody else has removed it.
                Err(error) if looked_at == Some(put) => return Err(error),
                Err(_) => looked_at = Some(put),
            }
        }
    }

    /// Writes a chunk, so that it is seen whole or not at all.
    fn write(&self, chunk: u64, bytes: &[u8]) -> io::Result<()> {
        let put = {
            let mut state = self.state();
            state.next += 1;
            state.next - 1
        };
        let path = self.new_place(chunk, put);
        let written = File::create_new(&path).and_then(|mut file| file.write_all(bytes));
        if let Err(error) = written {
            let _ = fs::remove_file(&path);
            return Err(error);
        }
        let mut state = self.state();
        state.unflushed = true;
        state.doubtful.remove(&chunk);
        if let Some(older) = state.pending.insert(chunk, put) {
            // What is left behind costs room and no more.
            let _ = fs::remove_file(self.new_place(chunk, older));
        }
        Ok(())
    }
}

impl ChunkStore for DirectoryStore {
    fn chunk_size(&self) -> ChunkSize {
        self.chunk_size
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn get(
        &self,
        chunks: &[ChunkIndex],
        found: &mut dyn FnMut(usize, Option<&[u8]>),
    ) -> io::Result<()> {
        let mut buf = Vec::new();
        for (place, &chunk) in chunks.iter().enumerate() {
            // At most a chunk, whose size is limited.
            let len = usize::try_from(self.len_of(chunk)?).expect("a chunk fits the memory");
            buf.resize(len, 0);
            let there = self.read(chunk.0, &mut buf)?;
            found(place, there.then_some(&buf[..]));
        }
        Ok(())
    }

    fn put(&self, chunks: &[(ChunkIndex, &[u8])]) -> io::Result<()> {
        for &(chunk, bytes) in chunks {
            let len = self.len_of(chunk)?;
            if bytes.len() as u64 != len {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    format!("chunk {} has {len} bytes, not {}", chunk.0, bytes.len()),
                ));
            }
            self.write(chunk.0, bytes)?;
        }
        Ok(())
    }

    fn remove(&self, chunks: &[ChunkIndex]) -> io::Result<()> {
        for &ChunkIndex(chunk) in chunks {
            let mut state = self.state();
            state.unflushed = true;
            match fs::remove_file(self.place(chunk)) {
                Ok(()) => {
                    state.changed.insert(chunk / FOLDER);
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
            let put = state.pending.remove(&chunk);
            state.doubtful.remove(&chunk);
            if let Some(put) = put {
                fs::remove_file(self.new_place(chunk, put))?;
            }
        }
        Ok(())
    }

    fn present(&self, within: ChunkRun) -> io::Result<ChunkBitmap> {
        let chunks = self.chunk_size.chunks_in(self.len);
        let mut present = ChunkBitmap::empty(chunks);
        let end = within.start.0.saturating_add(within.count).min(chunks);
        if within.start.0 >= end {
            return Ok(present);
        }
        // First what is pending: it may be flushed while the folders are looked through.
        for (&chunk, _) in self.state().pending.range(within.start.0..end) {
            present.insert(chunk);
        }
        if end - within.start.0 <= LOOKED_FOR {
            for chunk in within.start.0..end {
                if !present.contains(chunk) && self.place(chunk).try_exists()? {
                    present.insert(chunk);
                }
            }
            return Ok(present);
        }
        for folder in numbers_in(&self.path)? {
            if folder < within.start.0 / FOLDER || folder > (end - 1) / FOLDER {
                continue;
            }
            for number in numbers_in(&self.folder(folder))? {
                let chunk = folder.saturating_mul(FOLDER).saturating_add(number);
                if (within.start.0..end).contains(&chunk) {
                    present.insert(chunk);
                }
            }
        }
        Ok(present)
    }

    fn flush(&self) -> io::Result<()> {
        self.make_durable()
    }
}

/// The names in a folder that are numbers.
fn numbers_in(path: &Path) -> io::Result<Vec<u64>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(path)? {
        let name = entry?.file_name();
        numbers.extend(name.to_str().and_then(|n| u64::from_str_radix(n, 16).ok()));
    }
    Ok(numbers)
}

/// Fills `buf` with the whole of `file`.
fn read_whole(mut file: File, buf: &mut [u8], path: &Path) -> io::Result<()> {
    let len = file.metadata()?.len();
    if len != buf.len() as u64 {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!(
                "{} has {len} bytes and should have {}: it was damaged; remove it to have zeros there",
                path.display(),
                buf.len()
            ),
        ));
    }
    file.read_exact(buf)
}

/// Opens and locks the file that says what the folder holds; writes it into a folder that is empty.
fn lock_geometry(folder: &Path, chunk_size: ChunkSize, len: u64) -> io::Result<File> {
    let path = folder.join("geometry");
    let wanted = format!(
        "memferry chunks, version 1\nchunk size {}\nlength {len}\n",
        chunk_size.bytes()
    );
    let is_new = !path.try_exists()?;
    if is_new && fs::read_dir(folder)?.next().is_some() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "{} holds other files: name an empty folder",
                folder.display()
            ),
        ));
    }
    let mut file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => {
            return Err(io::Error::new(
                io::ErrorKind::ResourceBusy,
                format!("another process uses {}: end it first", folder.display()),
            ));
        }
        Err(errno) => return Err(errno.into()),
    }
    let mut found = String::new();
    (&mut file).take(1024).read_to_string(&mut found)?;
    if found.is_empty() {
        file.write_all(wanted.as_bytes())?;
        file.sync_all()?;
        File::open(folder)?.sync_all()?;
    } else if found != wanted {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "{} is of other chunks: it says {found:?} and not {wanted:?}",
                path.display()
            ),
        ));
    }
    Ok(file)
}

#[cfg(test)]
mod tests;
