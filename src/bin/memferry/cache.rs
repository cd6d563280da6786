//! Where what was fetched is kept.

use std::fs::OpenOptions;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use memferry::backend::{FileStorage, MemoryStorage};
use memferry::chunk::Storage;

/// Where what is here is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Cache {
    Memory,
    Path(PathBuf),
}

impl FromStr for Cache {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "" => Err("write `memory`, or a path".to_owned()),
            "memory" => Ok(Self::Memory),
            path => Ok(Self::Path(path.into())),
        }
    }
}

/// A file that is removed when it is not needed any more.
pub(crate) struct CacheFile {
    path: PathBuf,
    keep: AtomicBool,
}

impl CacheFile {
    /// It is not removed.
    pub(crate) fn keep(&self) -> &Path {
        self.keep.store(true, Ordering::Relaxed);
        &self.path
    }
}

impl Drop for CacheFile {
    fn drop(&mut self) {
        if !*self.keep.get_mut() {
            // Somebody may have removed it.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Cache {
    /// Makes room for `len` bytes, nothing of which is there yet.
    pub(crate) fn open(&self, len: u64) -> anyhow::Result<(Arc<dyn Storage>, Option<CacheFile>)> {
        let Self::Path(path) = self else {
            return Ok((Arc::new(MemoryStorage::new(len)), None));
        };
        let path = if path.is_dir() {
            path.join(format!("memferry-cache-{}", std::process::id()))
        } else {
            path.clone()
        };
        let make = || {
            // What an earlier mount has left there may be all that is left of something.
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .open(&path)?;
            let cleanup = CacheFile {
                path: path.clone(),
                keep: false.into(),
            };
            file.set_len(len)?;
            Ok::<_, io::Error>((Arc::new(FileStorage::new(file)?) as _, Some(cleanup)))
        };
        make().with_context(|| format!("cannot make the cache file {}", path.display()))
    }
}
