//! What is mounted: the remote end, and what is kept here of it.

use std::fs::OpenOptions;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use anyhow::{Context, ensure};
use memferry::backend::nbd::{DoubtfulWrites, Remote, RemoteOptions, TlsOptions};
use memferry::backend::{FileStorage, MemoryStorage};
use memferry::chunk::Storage;
use memferry::mount::{CloseError, Managed, ManagedOptions, MountProgress, Push};

use super::Mount;
use super::place::Failures;

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

/// A remote region, as it is shown here.
pub(super) struct Region {
    remote: Arc<Remote>,
    managed: Option<Arc<Managed>>,
    file: Option<CacheFile>,
}

/// A file that is removed when it is not needed any more.
struct CacheFile {
    path: PathBuf,
    keep: std::sync::atomic::AtomicBool,
}

impl Drop for CacheFile {
    fn drop(&mut self) {
        if !*self.keep.get_mut() {
            // Somebody may have removed it.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Region {
    pub(super) fn open(args: &Mount) -> anyhow::Result<Self> {
        let mut options = RemoteOptions {
            deadline: args.deadline,
            connections: usize::from(args.connections),
            read_only: args.read_only,
            assume_durable: args.assume_durable,
            tls: TlsOptions {
                authorities: args.tls_ca.clone(),
                certificate: args.tls_cert.clone().zip(args.tls_key.clone()),
                name: args.tls_name.clone(),
            },
            ..RemoteOptions::default()
        };
        let window = args.window.map(|window| window.as_u64());
        if let Some(window) = window {
            options.window = usize::try_from(window)?;
        }
        let remote = Remote::connect(&args.url, &options)?;
        ensure!(
            remote.len() > 0,
            "the export is empty: there is nothing to mount"
        );
        let remote = Arc::new(remote);
        if args.direct {
            return Ok(Self {
                remote,
                managed: None,
                file: None,
            });
        }
        let (local, file) = local(&args.cache, remote.len())?;
        let push = match args.push_interval {
            Duration::ZERO => Push::OnFlush,
            interval => Push::Every(interval),
        };
        let options = ManagedOptions {
            chunk_size: args.chunk_size,
            pull: !args.no_pull,
            window,
            push,
            read_only: remote.is_read_only(),
            deadline: patience(args),
            ..ManagedOptions::default()
        };
        let managed = Managed::open(Arc::clone(&remote) as _, local, &options)
            .context("cannot fetch the region")?;
        Ok(Self {
            remote,
            managed: Some(Arc::new(managed)),
            file,
        })
    }

    /// Returns when everything is here, if that was asked for.
    ///
    /// # Errors
    /// If a signal came, or nothing else for as long as the server may take to answer.
    pub(super) fn wait_for_all(&self, args: &Mount, signal: &Receiver<()>) -> anyhow::Result<()> {
        let Some(managed) = self.managed.clone().filter(|_| args.pull_first) else {
            return Ok(());
        };
        let patience = patience(args);
        // Not waited for when a signal has come: this process ends then.
        let waiting = std::thread::spawn(move || managed.wait_for_all(patience));
        while !waiting.is_finished() {
            let signalled = signal.recv_timeout(Duration::from_millis(20));
            ensure!(
                signalled == Err(RecvTimeoutError::Timeout),
                "it was ended before everything had come"
            );
        }
        waiting
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the wait for it broke off")))
            .context("cannot fetch the region")
    }

    pub(super) fn storage(&self) -> Arc<dyn Storage> {
        match &self.managed {
            Some(managed) => Arc::clone(managed) as _,
            None => Arc::clone(&self.remote) as _,
        }
    }

    pub(super) fn len(&self) -> u64 {
        self.remote.len()
    }

    pub(super) fn is_read_only(&self) -> bool {
        self.remote.is_read_only()
    }

    /// How a managed mount goes.
    pub(super) fn progress(&self) -> Option<MountProgress> {
        self.managed.as_ref().map(|managed| managed.progress())
    }

    /// Saves what was written; nothing can be written after that. `failures` is what could not be saved before.
    ///
    /// # Errors
    /// [`Lost`] or [`Unsaved`].
    pub(super) fn close(&self, deadline: Duration, failures: Failures) -> anyhow::Result<()> {
        let Some(managed) = &self.managed else {
            self.remote.flush().map_err(Lost)?;
            // Each loss is told once, and it may have been told to the kernel.
            let ranges = self.remote.take_doubtful();
            if !ranges.is_empty() {
                return Err(Lost(io::Error::other(DoubtfulWrites { ranges })).into());
            }
            return lost(failures.missing.or(failures.told));
        };
        // What the kernel was told of was brought here, and is saved now.
        match managed.close(deadline) {
            Ok(()) => lost(failures.missing),
            Err(error) => {
                let kept = self.keep(&error);
                Err(Unsaved {
                    kept,
                    source: error,
                }
                .into())
            }
        }
    }

    /// What is lost if saving is given up now.
    pub(super) fn give_up(&self) -> anyhow::Error {
        let not_in_time = || io::Error::new(io::ErrorKind::TimedOut, "it was not saved in time");
        let Some(managed) = &self.managed else {
            return Lost(not_in_time()).into();
        };
        let source = CloseError::Lost {
            ranges: managed.dirty(),
            source: not_in_time(),
        };
        let kept = self.keep(&source);
        Unsaved { kept, source }.into()
    }

    /// Keeps the file that has what was not saved.
    fn keep(&self, error: &CloseError) -> Option<PathBuf> {
        let file = self.file.as_ref()?;
        matches!(error, CloseError::Lost { .. }).then(|| {
            file.keep.store(true, std::sync::atomic::Ordering::Relaxed);
            file.path.clone()
        })
    }
}

/// What was written to a managed mount is not all saved.
#[derive(Debug, thiserror::Error)]
#[error("not everything that was written was saved{}", hint(kept.as_deref()))]
pub(crate) struct Unsaved {
    kept: Option<PathBuf>,
    source: CloseError,
}

fn hint(kept: Option<&Path>) -> String {
    kept.map_or_else(String::new, |path| {
        format!(", and is in {}, at the same places", path.display())
    })
}

/// What was written is not known to be saved, and not here either.
#[derive(Debug, thiserror::Error)]
#[error("what was written last may be lost")]
pub(crate) struct Lost(#[source] pub(super) io::Error);

/// How long a managed mount waits for the server: its own error, which says more, comes before.
fn patience(args: &Mount) -> Duration {
    args.deadline + args.deadline / 2
}

fn lost(why: Option<anyhow::Error>) -> anyhow::Result<()> {
    why.map_or(Ok(()), |why| Err(Lost(io::Error::other(why)).into()))
}

fn local(cache: &Cache, len: u64) -> anyhow::Result<(Arc<dyn Storage>, Option<CacheFile>)> {
    let Cache::Path(path) = cache else {
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
