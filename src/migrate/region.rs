//! A region that programs use and that can move.
//!
//! ```text
//!   front end: NBD device, FUSE file, slice …            the engine: seed(), leech()
//!         │ read, write                                     │ read        │ install, discard
//!         ▼                                                 │             │
//!       door ── open, closed (who comes waits), refusing    │             │
//!         ▼                                                 │             ▼
//!    residency ── what is remote is a fault ────────────────┼──────► residency
//!         ▼                                                 ▼             ▼
//!      tracked ── marks what is written ──────────────────────► local storage
//! ```
//!
//! One end at a time is the region's owner, and the door says which: it is open where the owner is. A copy that is not complete,
//! or not the newest, is never looked at, so that no cache of the kernel ever holds a byte of it.
//!
//! `door.rs` lets in and waits until all are out; `access.rs` is what programs do; `arrival.rs` is what the engine does with the
//! regions of a destination; `swept.rs` is how the writes are found that a cache still has.

mod access;
mod arrival;
mod door;
mod swept;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arrival::Absent;
pub(super) use arrival::{Arrival, OnChunk};
use door::{Door, Mode};
use swept::Swept;

use crate::chunk::{Caches, ChunkSize, ChunkState, Residency, Storage};
use crate::dirty::{DirtyTracker, Tracked, Union};

/// The unit in which presence is kept, whatever the chunks of a session: the least that a chunk can be, so that a page that is
/// written whole need not be fetched.
const UNIT: ChunkSize = ChunkSize::PAGE;

/// How long an operation of a program waits at most, for the region to move or for a chunk to come.
const PATIENCE: Duration = Duration::from_secs(30);

const MOVED: &str = "the region has moved to another host: use it there";
const LOST: &str =
    "the connection was lost while the region was moving here: these bytes are at the source alone";
const DOUBTFUL: &str = "the connection was lost at hand-over, and nobody knows yet which side owns the region: settle it";

/// A region that programs use, through any front end, and that can move to another host and back.
///
/// To a front end it is a [`Storage`]. Of the engine's two calls, [`Seeder`](super::Seeder) takes regions away and
/// [`Leecher`](super::Leecher) brings them; both take regions that are in use, and a region that has come can leave at once, with all of
/// its front ends still there.
///
/// Operations wait while the region is being moved and, at a destination, for what is still remote; not longer than the patience that it was
/// [given](Self::with_patience), 30 seconds if it was given none. What the region is right now, [`standing`](Self::standing) says.
///
/// The local storage must not be touched by anybody else. It takes two bits for each 4 KiB, and one for each chunk.
pub struct Region {
    local: Arc<dyn Storage>,
    tracked: Arc<Tracked>,
    /// Trackers of the owner's, for writes that do not come through here.
    others: Mutex<Vec<Arc<dyn DirtyTracker>>>,
    residency: Residency,
    door: Door,
    /// Nothing is remote: nobody needs to look at the residency.
    complete: AtomicBool,
    /// Held while what is absent changes, so that nobody relies on half of it.
    absent: Mutex<Absent>,
    standing: Mutex<Held>,
    /// Who uses it has been suspended: nothing is written back any more but by who suspends.
    still: AtomicBool,
    caches: Mutex<Vec<Arc<dyn Caches>>>,
    patience: Duration,
}

/// What a copy of a region is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// The region: programs use it here.
    Owner,
    /// The region, which stands still while it is handed over: programs wait.
    Suspended,
    /// What the region was when it left: programs are sent away.
    Moved,
    /// Nothing yet, or something old: programs wait for what comes.
    Waiting,
    /// Something is coming: programs wait.
    Receiving,
    /// All that is needed to run has come; the rest is fetched when it is looked at.
    Arriving,
    /// The session broke at the hand-over: this copy or the source's is the region. Programs are sent away.
    Undecided,
    /// The region, and parts of it will not come: programs that look at those get errors.
    Lost,
}

#[derive(Debug, Clone, Copy)]
struct Held {
    standing: Standing,
    /// A seeder or a leecher works with it.
    busy: bool,
    /// The local storage holds something of an earlier time.
    old: bool,
    /// What comes belongs here: what is looked at is the region.
    owned: bool,
}

/// Why something cannot be done with a region now.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegionError {
    /// Somebody moves it already.
    #[error("the region is being moved already: wait until that has ended")]
    Busy,
    /// There is no region, or they are not alike.
    #[error(
        "regions that move as one have to be cut into chunks of one size, and there has to be at least one: make them alike"
    )]
    Unlike,
    /// It is not what it would have to be.
    #[error("this copy of the region is {is:?}: it would have to be {expected}")]
    Standing {
        /// What it is.
        is: Standing,
        /// What it would have to be.
        expected: &'static str,
    },
    /// One of several.
    #[error("region {name}: {source}")]
    Of {
        /// What it is called.
        name: String,
        /// What is wrong with it.
        source: Box<Self>,
    },
    /// Parts of it are not here.
    #[error("{missing} bytes of the region are not here, and would be zeros")]
    Incomplete {
        /// How many bytes.
        missing: u64,
    },
    /// A cache of a front end, or an operation, did not let go.
    #[error("{what}: {source}")]
    Failed {
        /// What was attempted.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Region")
            .field("local", &self.local)
            .field("standing", &self.standing())
            .finish_non_exhaustive()
    }
}

impl RegionError {
    /// The same, of the region of this name: a region does not know its own.
    pub(super) fn of(self, name: &str) -> Self {
        Self::Of {
            name: name.to_owned(),
            source: Box::new(self),
        }
    }

    pub(super) fn thread(source: io::Error) -> Self {
        Self::Failed {
            what: "no thread can be started for the move",
            source,
        }
    }
}

impl Region {
    /// A region that is in `local` and used from now on. Writes are tracked in chunks of `chunk_size`, which are also the unit of transfer when
    /// it leaves: the page where writes are small.
    ///
    /// # Errors
    /// If the kernel has no descriptor left.
    pub fn new(local: Arc<dyn Storage>, chunk_size: ChunkSize) -> io::Result<Self> {
        Self::with(local, chunk_size, Standing::Owner, false)
    }

    /// A place for a region that comes from elsewhere; what is in `local` is thrown away then.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn empty(local: Arc<dyn Storage>, chunk_size: ChunkSize) -> io::Result<Self> {
        Self::with(local, chunk_size, Standing::Waiting, false)
    }

    /// A place for a region that comes from elsewhere, where `local` has an old copy: what is still right is not sent.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn outdated(local: Arc<dyn Storage>, chunk_size: ChunkSize) -> io::Result<Self> {
        Self::with(local, chunk_size, Standing::Waiting, true)
    }

    fn with(
        local: Arc<dyn Storage>,
        chunk_size: ChunkSize,
        standing: Standing,
        old: bool,
    ) -> io::Result<Self> {
        let units = UNIT.chunks_in(local.len());
        let mode = match standing {
            Standing::Owner => Mode::Open,
            _ => Mode::Closed,
        };
        Ok(Self {
            tracked: Arc::new(Tracked::new(Arc::clone(&local), chunk_size)),
            others: Mutex::default(),
            residency: Residency::all_resident(units).reporting_faults()?,
            door: Door::new(mode),
            complete: AtomicBool::new(true),
            absent: Mutex::new(Absent::Unknown),
            standing: Mutex::new(Held {
                standing,
                busy: false,
                old,
                owned: standing == Standing::Owner,
            }),
            still: AtomicBool::new(false),
            caches: Mutex::default(),
            patience: PATIENCE,
            local,
        })
    }

    /// The same region, whose operations wait at most for so long.
    #[must_use]
    pub fn with_patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// A tracker beside the region's own is asked, too, when it leaves: for writes that go to the local storage's memory and not through here.
    /// It must be of the same chunk size.
    pub fn track_also(&self, tracker: Arc<dyn DirtyTracker>) {
        lock(&self.others).push(tracker);
    }

    /// The caches of a front end that shows this region: they are written back before the region leaves, and forgotten when it has left.
    pub fn attach(&self, caches: Arc<dyn Caches>) {
        lock(&self.caches).push(caches);
    }

    /// The front end is gone.
    pub fn detach(&self, caches: &Arc<dyn Caches>) {
        lock(&self.caches).retain(|kept| !Arc::ptr_eq(kept, caches));
    }

    /// What this copy is.
    #[must_use]
    pub fn standing(&self) -> Standing {
        self.held().standing
    }

    /// The size of a chunk in which its writes are tracked.
    #[must_use]
    pub fn chunk_size(&self) -> ChunkSize {
        self.tracked.chunk_size()
    }

    /// How many bytes of the region are not here, counted in pages. Takes time in proportion to it.
    #[must_use]
    pub fn missing(&self) -> u64 {
        if self.complete.load(Ordering::Acquire) {
            return 0;
        }
        let all = self.residency.all_chunks();
        let resident = self.residency.count(all, ChunkState::Resident);
        let missing = (all.count - resident) * u64::from(UNIT.bytes());
        missing.min(self.local.len())
    }

    /// This copy is the region from now on: an operator has decided so, who has made sure that no other one is used or will be.
    ///
    /// That is for a region whose move has failed at or after the hand-over: at the source, whose copy is as it was then, if the destination is
    /// gone for good; at a destination that does not know whether it owns the region, if the source says that it let go.
    ///
    /// # Errors
    /// If it is neither [`Standing::Moved`] nor [`Standing::Undecided`], or parts of it are missing; nothing is changed then.
    pub fn take_back(&self) -> Result<(), RegionError> {
        let missing = self.missing();
        let mut held = self.free("moved away, or undecided", |standing| {
            matches!(standing, Standing::Moved | Standing::Undecided)
        })?;
        if missing > 0 {
            return Err(RegionError::Incomplete { missing });
        }
        held.owned = true;
        self.residency.refuse(None);
        self.set(&mut held, Standing::Owner);
        Ok(())
    }

    /// This copy is not the region: what is here is an old copy from now on, over which the region may come again.
    ///
    /// That is for a destination that has lost its source, if the source took the region back. Also ends a wait for a region that does not come:
    /// programs are sent away, and wait again from now on.
    ///
    /// # Errors
    /// If it is the region, and whole: a copy that somebody works with is not given up by a slip. If operations do not end within the patience: programs
    /// are sent away then, and this can be tried again.
    pub fn give_up(&self) -> Result<(), RegionError> {
        let mut held = self.free("undecided, lost, moved away or waiting", |standing| {
            !matches!(standing, Standing::Owner | Standing::Suspended)
        })?;
        held.busy = true;
        drop(held);
        self.abandon()
    }

    /// Makes room for a region that comes from elsewhere, where programs have used this one meanwhile: a machine monitor, for example, that was
    /// started to receive a guest and has written to its memory. What is here is thrown away; programs wait from now on.
    ///
    /// # Errors
    /// If it is not used here or is being moved; if what is cached cannot be written back or operations do not end within the patience: it is
    /// used on then.
    pub fn vacate(&self) -> Result<(), RegionError> {
        let owner = |standing| standing == Standing::Owner;
        self.free("used here", owner)?.busy = true;
        let vacated = self
            .write_back()
            .and_then(|()| self.stand_still(Instant::now() + self.patience));
        if let Err(error) = vacated {
            self.go_on();
            self.held().busy = false;
            return Err(error);
        }
        // Nothing is left to be written back, so that nobody waits at the door for this.
        self.forget();
        let mut held = self.held();
        held.busy = false;
        held.owned = false;
        held.old = false;
        self.set(&mut held, Standing::Waiting);
        Ok(())
    }

    /// The standing, if nobody works with the region and it is as it should be.
    fn free(
        &self,
        expected: &'static str,
        fits: impl Fn(Standing) -> bool,
    ) -> Result<MutexGuard<'_, Held>, RegionError> {
        let held = self.held();
        if held.busy {
            return Err(RegionError::Busy);
        }
        if !fits(held.standing) {
            return Err(RegionError::Standing {
                is: held.standing,
                expected,
            });
        }
        Ok(held)
    }

    fn set(&self, held: &mut Held, standing: Standing) {
        held.standing = standing;
        self.door.set(match standing {
            Standing::Owner | Standing::Arriving | Standing::Lost => Mode::Open,
            Standing::Suspended | Standing::Waiting | Standing::Receiving => Mode::Closed,
            Standing::Moved => Mode::Refusing(MOVED),
            Standing::Undecided => Mode::Refusing(DOUBTFUL),
        });
    }

    /// What the engine reads while the region leaves.
    pub(super) fn source(&self) -> Arc<dyn Storage> {
        Arc::clone(&self.local)
    }

    /// What tells which chunks were written.
    pub(super) fn tracker(self: &Arc<Self>) -> Arc<dyn DirtyTracker> {
        let own: Arc<dyn DirtyTracker> = self.tracked.clone();
        let others = lock(&self.others);
        let all = others.iter().fold(own, |all, other| {
            Arc::new(Union(all, Arc::clone(other))) as Arc<dyn DirtyTracker>
        });
        Arc::new(Swept::new(Arc::clone(self), all))
    }

    /// Somebody takes the region away. To be [ended](Self::end).
    pub(super) fn begin_to_leave(&self) -> Result<(), RegionError> {
        let mut held = self.free("the owner, with everything here", |standing| {
            standing == Standing::Owner
        })?;
        held.busy = true;
        Ok(())
    }

    /// Whoever uses the region is suspended, or is not any more.
    pub(super) fn set_still(&self, still: bool) {
        self.still.store(still, Ordering::Release);
    }

    /// Brings what programs have written and the kernel has kept to the local storage, past the tracker. Programs write on, if they run.
    pub(super) fn write_back(&self) -> Result<(), RegionError> {
        for caches in &self.caches() {
            caches.write_back().map_err(|source| RegionError::Failed {
                what: "what programs have written could not be brought to the region",
                source,
            })?;
        }
        Ok(())
    }

    /// Nobody writes any more when this returns: what comes waits.
    pub(super) fn stand_still(&self, deadline: Instant) -> Result<(), RegionError> {
        let mut held = self.held();
        self.set(&mut held, Standing::Suspended);
        drop(held);
        let drained = self.door.drain(deadline);
        drained.map_err(|source| RegionError::Failed {
            what: "the region cannot be made to stand still",
            source,
        })
    }

    /// Nothing became of it: programs go on.
    pub(super) fn go_on(&self) {
        self.set_still(false);
        let mut held = self.held();
        self.set(&mut held, Standing::Owner);
    }

    /// The region leaves. What was waiting has to fail: a write that came too late must not seem to be done.
    pub(super) fn leave(&self) {
        let mut held = self.held();
        held.old = true;
        held.owned = false;
        self.set(&mut held, Standing::Moved);
    }

    /// The session with which it was to leave has ended.
    pub(super) fn end(&self) {
        self.set_still(false);
        let left = {
            let mut held = self.held();
            held.busy = false;
            held.standing == Standing::Moved
        };
        // While programs are sent away, nothing is cached again. A front end that does not forget shows old bytes to those who
        // use it although the region has moved, and is told to forget once more when the region comes back.
        if left {
            self.forget();
        }
    }

    /// Somebody brings the region here. To be ended by `arrive`, `abandon`, `lose` or `doubt`.
    pub(super) fn begin_to_come(&self) -> Result<(), RegionError> {
        let mut held = self.free("moved away, or waiting", |standing| {
            matches!(standing, Standing::Moved | Standing::Waiting)
        })?;
        held.busy = true;
        let moved = held.standing == Standing::Moved;
        drop(held);
        if moved {
            // Programs are still sent away, so that nothing is cached again.
            self.forget();
        }
        self.set(&mut self.held(), Standing::Receiving);
        Ok(())
    }

    /// What is here is as it was when the source suspended it, and what is not is known: who loads device state may look.
    pub(super) fn let_look(&self) {
        let mut held = self.held();
        self.set(&mut held, Standing::Arriving);
    }

    pub(super) fn is_owned(&self) -> bool {
        self.held().owned
    }

    /// The region belongs here.
    pub(super) fn own(&self) {
        let mut held = self.held();
        held.owned = true;
        self.set(&mut held, Standing::Arriving);
    }

    /// Everything has come.
    pub(super) fn arrive(&self) {
        let mut held = self.held();
        held.busy = false;
        held.old = false;
        self.set(&mut held, Standing::Owner);
    }

    /// What has come is worth nothing: an old copy.
    pub(super) fn abandon(&self) -> Result<(), RegionError> {
        self.door.set(Mode::Refusing(
            "the region did not come: it is used elsewhere",
        ));
        self.residency
            .refuse(Some(io::Error::other("the region did not come")));
        let drained = self.door.drain(Instant::now() + self.patience);
        if let Err(source) = drained {
            self.held().busy = false;
            return Err(RegionError::Failed {
                what: "somebody still works with what has come of the region",
                source,
            });
        }
        self.forget();
        self.complete.store(true, Ordering::Release);
        let everything = self.residency.fill(self.residency.all_chunks());
        everything.done();
        self.residency.refuse(None);
        *lock(&self.absent) = Absent::Unknown;
        let mut held = self.held();
        held.busy = false;
        held.old = true;
        held.owned = false;
        self.set(&mut held, Standing::Waiting);
        Ok(())
    }

    /// It is the region, and what is missing does not come.
    pub(super) fn lose(&self) {
        self.residency.refuse(Some(io::Error::other(LOST)));
        let mut held = self.held();
        held.busy = false;
        self.set(&mut held, Standing::Lost);
    }

    /// Nobody knows whether it is the region.
    pub(super) fn doubt(&self) {
        self.residency.refuse(Some(io::Error::other(DOUBTFUL)));
        let mut held = self.held();
        held.busy = false;
        held.old = true;
        self.set(&mut held, Standing::Undecided);
    }

    /// What the front ends have cached is not the region.
    pub(super) fn forget(&self) {
        for caches in &self.caches() {
            // A front end that was taken away has nothing cached; of another one nobody could do more.
            let _ = caches.forget();
        }
    }

    /// Not held while they are called: a front end may come or go at that moment.
    fn caches(&self) -> Vec<Arc<dyn Caches>> {
        lock(&self.caches).clone()
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        lock(&self.standing)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is behind these locks is replaced whole, so that a panic leaves nothing half done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
