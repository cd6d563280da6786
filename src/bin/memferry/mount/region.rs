//! What is mounted: the remote end, and what is kept here of it.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use anyhow::{Context, ensure};
use memferry::backend::nbd::{DoubtfulWrites, Remote, RemoteOptions};
use memferry::chunk::Storage;
use memferry::mount::{CloseError, Managed, ManagedOptions, MountProgress, Push};

use super::Mount;
use super::place::Failures;
use crate::cache::CacheFile;

/// A remote region, as it is shown here.
pub(super) struct Region {
    remote: Arc<Remote>,
    managed: Option<Arc<Managed>>,
    file: Option<CacheFile>,
}

impl Region {
    pub(super) fn open(args: &Mount) -> anyhow::Result<Self> {
        let mut options = RemoteOptions {
            read_only: args.read_only,
            assume_durable: args.assume_durable,
            ..args.remote.options(args.deadline)
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
        let (local, file) = args.cache.open(remote.len())?;
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
        matches!(error, CloseError::Lost { .. }).then(|| file.keep().to_owned())
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
