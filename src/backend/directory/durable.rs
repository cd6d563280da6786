//! How the chunks of a folder become durable.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::sync::PoisonError;

use super::{DirectoryStore, FOLDER};

/// From so many files on, one sync of the file system is faster than one of each; where others write to it, too, not by
/// much.
const ALL_AT_ONCE: usize = 256;

impl DirectoryStore {
    /// Returns when what was put and removed before is durable.
    pub(super) fn make_durable(&self) -> io::Result<()> {
        // Two at once could each take the other's work for done.
        let _one_at_a_time = self.flushing.lock().unwrap_or_else(PoisonError::into_inner);
        if !std::mem::take(&mut self.state().unflushed) {
            return Ok(());
        }
        let flushed = self.flush_all();
        if flushed.is_err() {
            self.state().unflushed = true;
        }
        flushed
    }

    fn flush_all(&self) -> io::Result<()> {
        let doubtful = self.state().doubtful.clone();
        for chunk in doubtful {
            self.write_again(chunk)?;
        }
        let pending: Vec<(u64, u64)> = {
            let state = self.state();
            state.pending.iter().map(|(&n, &put)| (n, put)).collect()
        };
        self.sync(&pending)?;
        for &(chunk, put) in &pending {
            self.promote(chunk, put)?;
        }
        self.sync_folders()
    }

    /// Gets the bytes of files onto the disk. If that fails, all that may be lost is doubtful.
    fn sync(&self, pending: &[(u64, u64)]) -> io::Result<()> {
        if pending.len() > ALL_AT_ONCE {
            let synced = self
                .disk()
                .and_then(|()| Ok(rustix::fs::syncfs(&self.geometry)?));
            return synced.inspect_err(|_| self.doubt(pending));
        }
        for (place, &(chunk, put)) in pending.iter().enumerate() {
            let opened = match File::open(self.new_place(chunk, put)) {
                // Put again or removed meanwhile: for the next flush.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                opened => opened,
            };
            let synced = opened.and_then(|file| {
                self.disk()?;
                file.sync_data()
            });
            synced.inspect_err(|_| self.doubt(&pending[place..]))?;
        }
        Ok(())
    }

    fn doubt(&self, pending: &[(u64, u64)]) {
        let mut state = self.state();
        for (chunk, put) in pending {
            if state.pending.get(chunk) == Some(put) {
                state.doubtful.insert(*chunk);
            }
        }
    }

    /// Writes a chunk as a file of its own once more: after a sync has failed, another one of the same file says that all
    /// is well, though its bytes may be nowhere but in memory.
    fn write_again(&self, chunk: u64) -> io::Result<()> {
        let old = {
            let state = self.state();
            state.pending.get(&chunk).copied()
        };
        let Some(old) = old else {
            return Ok(());
        };
        let bytes = match fs::read(self.new_place(chunk, old)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            read => read?,
        };
        let put = {
            let mut state = self.state();
            state.next += 1;
            state.next - 1
        };
        let path = self.new_place(chunk, put);
        let written = File::create_new(&path).and_then(|mut file| file.write_all(&bytes));
        let mut state = self.state();
        // Who has put it meanwhile was right.
        let wins = written.is_ok() && state.pending.get(&chunk) == Some(&old);
        if wins {
            state.pending.insert(chunk, put);
            state.doubtful.remove(&chunk);
        }
        let loser = if wins { old } else { put };
        let _ = fs::remove_file(self.new_place(chunk, loser));
        written
    }

    /// Renames a chunk that is on the disk over the one that was flushed before.
    fn promote(&self, chunk: u64, put: u64) -> io::Result<()> {
        let folder = chunk / FOLDER;
        let mut state = self.state();
        if state.pending.get(&chunk) != Some(&put) {
            return Ok(());
        }
        let (from, to) = (self.new_place(chunk, put), self.place(chunk));
        let renamed = match fs::rename(&from, &to) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                fs::create_dir_all(self.folder(folder))?;
                state.new_folders = true;
                fs::rename(&from, &to)
            }
            renamed => renamed,
        };
        renamed?;
        state.pending.remove(&chunk);
        state.doubtful.remove(&chunk);
        state.changed.insert(folder);
        Ok(())
    }

    /// Gets onto the disk which files there are.
    fn sync_folders(&self) -> io::Result<()> {
        let (changed, new_folders) = {
            let mut state = self.state();
            (
                std::mem::take(&mut state.changed),
                std::mem::take(&mut state.new_folders),
            )
        };
        let synced = self.sync_each(&changed, new_folders);
        if synced.is_err() {
            let mut state = self.state();
            state.changed.extend(changed);
            state.new_folders |= new_folders;
        }
        synced
    }

    fn sync_each(&self, changed: &BTreeSet<u64>, new_folders: bool) -> io::Result<()> {
        let sync = |path: &Path| {
            self.disk()?;
            File::open(path)?.sync_all()
        };
        for &folder in changed {
            sync(&self.folder(folder))?;
        }
        if new_folders {
            sync(&self.path)?;
        }
        // What was put twice must not come back from here over what was flushed.
        sync(&self.new_folder())
    }

    /// An error if a test has broken the disk.
    #[cfg_attr(not(test), expect(clippy::unused_self, reason = "tests break it"))]
    fn disk(&self) -> io::Result<()> {
        #[cfg(test)]
        if self.sync_fails.load(std::sync::atomic::Ordering::Relaxed) {
            return Err(io::Error::other("a disk that a test broke"));
        }
        Ok(())
    }
}
