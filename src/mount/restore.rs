//! A VMM that restores a snapshot whose memory is elsewhere: what it accesses comes at once, and the rest in the background.
//!
//! ```text
//!              fault                      read of a page, urgent
//!  VMM ──────────────────► SnapshotServer ──────────────────────► Storage
//!   ▲                            │ where                              │
//!   │                            ▼                                    │
//!   └──────── install ──────── Pulls ◄──── what is absent, a window ──┘
//! ```
//!
//! The VMM's own memory is where the bytes are kept, so nothing is kept twice.

use std::fmt::Debug;
use std::io;
use std::ops::Range;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::managed::pull::{Filled, NEARBY, Pulls};
use super::options::ManagedOptions;
use crate::chunk::{ChunkRun, Claim, Residency, Storage};
use crate::frontend::{
    RefusedSnapshot, Snapshot, SnapshotError, SnapshotOptions, SnapshotProgress, SnapshotServer,
};

/// How a [`Restore`] goes about it.
#[derive(Debug, Clone)]
pub struct RestoreOptions {
    /// Fetches everything in the background, until all is there.
    pub populate: bool,
    /// How many bytes are fetched at once in the background; without it, as many as the link carries in a round trip, measured as it goes.
    pub window: Option<u64>,
    /// How faults are served.
    pub faults: SnapshotOptions,
}

impl Default for RestoreOptions {
    fn default() -> Self {
        Self {
            populate: true,
            window: None,
            faults: SnapshotOptions::default(),
        }
    }
}

/// A VMM that restores a snapshot, and whoever fills its memory.
///
/// When [all of it](Self::is_complete) is there, [`finish`](Self::finish) lets go of it. Dropping this before leaves the VMM
/// waiting at every absent page.
#[derive(Debug)]
pub struct Restore {
    guest: Arc<Guest>,
    pulls: Arc<Pulls>,
    /// Begun later, where nothing was to be fetched in the background at first.
    later: OnceLock<Arc<Pulls>>,
    window: Option<u64>,
}

/// How a [`Restore`] goes.
#[derive(Debug, Clone, PartialEq)]
pub struct RestoreProgress {
    /// How far the memory is.
    pub memory: SnapshotProgress,
    /// Bytes a second that come in the background at best, of late.
    pub rate: f64,
    /// Why the last fetch in the background that failed did so.
    pub last_error: Option<String>,
}

/// The memory of the VMM, by pages.
#[derive(Debug)]
struct Guest {
    server: SnapshotServer,
    /// What the background has brought, or brings. The server knows what faults have brought, too.
    residency: Residency,
}

impl Restore {
    /// Serves the VMM's faults from `storage`, and begins to fill its memory.
    ///
    /// # Errors
    /// See [`SnapshotError`]; the VMM waits then.
    pub fn open(
        snapshot: Snapshot,
        storage: Arc<dyn Storage>,
        options: &RestoreOptions,
    ) -> Result<Self, RefusedSnapshot> {
        let pulls = pulls(options.populate, options.window);
        let mappings = snapshot.mappings().iter();
        let len: u64 = mappings.map(|mapping| mapping.len).sum();
        let page = snapshot
            .mappings()
            .first()
            .map_or(1, |mapping| mapping.page_size);
        let told = Arc::clone(&pulls);
        let on_fault = move |range: Range<u64>| {
            let start = range.start - range.start % NEARBY.max(page);
            let end = start.saturating_add(NEARBY.max(page)).min(len);
            told.come_near(ChunkRun::new(start / page, (end - start) / page));
        };
        let on_fault = options.populate.then(|| Box::new(on_fault) as _);
        let server = SnapshotServer::serve(snapshot, storage, &options.faults, on_fault)?;
        let residency = Residency::new(server.len() / server.page_size());
        let guest = Arc::new(Guest { server, residency });
        let filled: Arc<dyn Filled> = Arc::clone(&guest) as _;
        pulls.start(&filled).map_err(|error| RefusedSnapshot {
            error: SnapshotError::Io(error),
            waits: true,
        })?;
        Ok(Self {
            guest,
            pulls,
            later: OnceLock::new(),
            window: options.window,
        })
    }

    /// Begins to fetch everything in the background, if that was not asked for at first.
    ///
    /// # Errors
    /// If the system gives us no threads.
    pub fn populate(&self) -> io::Result<()> {
        if self.pulls.pulls_all() || self.later.get().is_some() {
            return Ok(());
        }
        let filled: Arc<dyn Filled> = Arc::clone(&self.guest) as _;
        let pulls = pulls(true, self.window);
        pulls.start(&filled)?;
        let _ = self.later.set(pulls);
        Ok(())
    }

    fn pulls(&self) -> &Pulls {
        self.later.get().unwrap_or(&self.pulls)
    }

    /// How it goes.
    #[must_use]
    pub fn progress(&self) -> RestoreProgress {
        let pulls = self.pulls().progress();
        RestoreProgress {
            memory: self.guest.server.progress(),
            rate: pulls.rate,
            last_error: pulls.last_error,
        }
    }

    /// Whether the VMM needs nothing any more.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.guest.server.progress().is_complete()
    }

    /// Lets go of the VMM, which has all of its memory.
    ///
    /// # Errors
    /// As [`SnapshotServer::finish`].
    pub fn finish(&self, at_most: Duration) -> io::Result<()> {
        self.guest.server.finish(at_most)
    }
}

impl Drop for Restore {
    fn drop(&mut self) {
        self.pulls.end();
        self.pulls().end();
    }
}

fn pulls(all: bool, window: Option<u64>) -> Arc<Pulls> {
    Pulls::new(&ManagedOptions {
        pull: all,
        // Those who serve faults do that.
        read_ahead: false,
        window,
        ..ManagedOptions::default()
    })
}

impl Filled for Guest {
    fn residency(&self) -> &Residency {
        &self.residency
    }

    fn bytes(&self) -> u64 {
        self.server.len()
    }

    fn chunk_bytes(&self) -> u64 {
        self.server.page_size()
    }

    fn fetch(&self, claim: Claim<'_>, buf: &mut Vec<u8>) -> io::Result<()> {
        match self.server.bring(self.bytes_of(claim.run()), buf) {
            Ok(()) => {
                claim.land().done();
                Ok(())
            }
            Err(error) => {
                claim.fail(&error);
                Err(error)
            }
        }
    }

    fn fetch_zeros(&self, claim: Claim<'_>) -> io::Result<()> {
        self.server.skip(self.bytes_of(claim.run()));
        claim.land().done();
        Ok(())
    }

    fn data_ranges(&self, within: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        self.server.data_ranges(within)
    }
}
