//! A guest's migration: one call at each end.

use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::{self, Sender};
use std::thread;

use memferry::chunk::{Install, Storage};
use memferry::dirty::{DirtyTracker, Union};
use memferry::migrate::{
    Cancel, LeechError, LeechOptions, LeechOutcome, PostCopy, Progress, SeedError, SeedOptions,
    SeedOutcome, SourceRegion, leech, seed,
};
use memferry::transport::Session;
use vm_memory::{GuestAddressSpace, GuestMemoryBackend};

use crate::guest_memory::GuestRam;
use crate::memory::{ArrivingRam, Layout, Unchanged, describe, layout};
use crate::throttle::{AutoConverge, Round};
use crate::vmm::{Coming, Leaving, Vmm};
use crate::withheld::Withheld;

/// Slows the guest's vCPUs down, as the policy says; called when that changes, from a thread of the migration.
type Throttling = Box<dyn FnMut(&AutoConverge) + Send>;

/// A guest that leaves: what is sent, and how.
///
/// ```no_run
/// use std::sync::Arc;
/// use std::time::{Duration, Instant};
///
/// use memferry::chunk::ChunkSize;
/// use memferry::migrate::SeedError;
/// use memferry::transport::{Pairing, Session};
/// use vm_memory::GuestMemoryMmap;
/// use vm_memory::bitmap::AtomicBitmap;
/// use vmm_integration::kvm::{DirtyLog, Slots};
/// use vmm_integration::{Departure, Vmm, VmmWrites};
///
/// fn migrate(
///     vmm: &mut dyn Vmm,
///     memory: Arc<GuestMemoryMmap<AtomicBitmap>>,
///     slots: &Arc<Slots>,
///     pairing: &Pairing,
/// ) -> Result<(), Box<dyn std::error::Error>> {
///     let departure = Departure::new(Arc::clone(&memory), DirtyLog::regions(slots, ChunkSize::PAGE)?)
///         .and(VmmWrites::regions(&memory, ChunkSize::PAGE)?)
///         .mapped_shared();
///     let limit = Duration::from_secs(10);
///     let session = Session::connect(pairing, 2, limit, Instant::now() + limit)?;
///     match departure.run(&session, vmm) {
///         Ok(_) => println!("it runs there"),
///         Err(error @ SeedError::Aborted { .. }) => println!("it runs here: {error}"),
///         Err(error) => return Err(error.into()),
///     }
///     Ok(())
/// }
/// ```
pub struct Departure<M> {
    memory: Arc<M>,
    trackers: Vec<Arc<dyn DirtyTracker>>,
    space: Option<Layout>,
    mapped_shared: bool,
    withheld: bool,
    options: SeedOptions,
    throttling: Option<Throttling>,
    progress: Option<Sender<Progress>>,
    cancel: Cancel,
}

impl<M: GuestMemoryBackend + Send + Sync + 'static> Departure<M> {
    /// All of `memory`; `trackers` tell what is written to each of its regions, by chunks of
    /// [`SeedOptions::chunk_size`]. Between them they have to see every write, those of the VMM as those of the guest.
    ///
    /// # Panics
    /// If there is not one tracker a region.
    #[must_use]
    pub fn new<T: DirtyTracker + 'static>(memory: Arc<M>, trackers: Vec<T>) -> Self {
        assert_eq!(memory.num_regions(), trackers.len(), "one tracker a region");
        let trackers = trackers.into_iter().map(|one| Arc::new(one) as _).collect();
        Self {
            memory,
            trackers,
            space: None,
            mapped_shared: false,
            withheld: false,
            options: SeedOptions::default(),
            throttling: None,
            progress: None,
            cancel: Cancel::default(),
        }
    }

    /// Writes are also tracked by these, one a region: what any of them names is sent.
    ///
    /// # Panics
    /// If there is not one tracker a region.
    #[must_use]
    pub fn and<T: DirtyTracker + 'static>(mut self, trackers: Vec<T>) -> Self {
        assert_eq!(self.trackers.len(), trackers.len(), "one tracker a region");
        let both = self.trackers.into_iter().zip(trackers);
        self.trackers = both
            .map(|(one, other)| Arc::new(Union(one, other)) as _)
            .collect();
        self
    }

    /// The regions are mapped *shared* from their files, as those of [`RamBuilder`](crate::RamBuilder) are: what was never written is not even looked at.
    #[must_use]
    pub fn mapped_shared(mut self) -> Self {
        self.mapped_shared = true;
        self
    }

    /// The migration is given up if this address space has other memory than that which is sent, at any time: the guest runs on at the
    /// source.
    #[must_use]
    pub fn in_space<A>(mut self, space: A) -> Self
    where
        A: GuestAddressSpace + Send + Sync + 'static,
    {
        self.space = Some(Arc::new(move || layout(&space)));
        self
    }

    /// When to suspend, whether post-copy is allowed, how fast, how long.
    #[must_use]
    pub fn options(mut self, options: SeedOptions) -> Self {
        self.options = options;
        self
    }

    /// Post-copy at once: nothing is copied before the guest runs at the destination. It leaves the source as soon as can be, and has to
    /// wait for every page that it touches.
    #[must_use]
    pub fn at_once(mut self) -> Self {
        self.withheld = true;
        self
    }

    /// Without post-copy, a guest that writes faster than the link moves is slowed down until its migration can end. `throttling` is
    /// given the policy when a round has changed it, and one that slows nothing down when the migration is over, however it went.
    #[must_use]
    pub fn throttling(mut self, throttling: impl FnMut(&AutoConverge) + Send + 'static) -> Self {
        self.throttling = Some(Box::new(throttling));
        self
    }

    /// Where progress goes.
    #[must_use]
    pub fn progress(mut self, progress: Sender<Progress>) -> Self {
        self.progress = Some(progress);
        self
    }

    /// What it can be called off by, before the guest has been handed over.
    #[must_use]
    pub fn cancel(mut self, cancel: Cancel) -> Self {
        self.cancel = cancel;
        self
    }

    /// Sends the guest. Blocks until the session has ended, with threads of its own; none is left.
    ///
    /// # Errors
    /// [`SeedError`] says what runs where. After all but [`SeedError::Aborted`] and [`SeedError::Stuck`] the guest must not run here again.
    pub fn run(mut self, session: &Session, vmm: &mut dyn Vmm) -> Result<SeedOutcome, SeedError> {
        if self.withheld {
            self.options.budget.post_copy = PostCopy::Always;
        }
        let regions = self.regions();
        let mut leaving = Leaving {
            vmm,
            memory: describe(&*self.memory),
            chunk: self.options.chunk_size.bytes().into(),
            released: false,
        };
        let Self {
            options,
            throttling,
            progress,
            cancel,
            ..
        } = self;
        let Some(throttling) = throttling else {
            return seed(session, &regions, &mut leaving, &options, progress, &cancel);
        };
        let may_post_copy = options.budget.post_copy != PostCopy::Never;
        thread::scope(|scope| {
            let (sender, receiver) = mpsc::channel();
            scope.spawn(move || throttle(throttling, may_post_copy, receiver, progress.as_ref()));
            seed(
                session,
                &regions,
                &mut leaving,
                &options,
                Some(sender),
                &cancel,
            )
        })
    }

    fn regions(&self) -> Vec<SourceRegion> {
        let rams = GuestRam::regions(&self.memory).into_iter();
        let regions = rams.zip(&self.trackers).enumerate();
        let regions = regions.map(|(index, (ram, tracker))| SourceRegion {
            name: region_name(index),
            tracker: match &self.space {
                // The space is asked once a round, beside the first region.
                Some(space) if index == 0 => {
                    let chunks = self.options.chunk_size.chunks_in(ram.len());
                    let was = describe(&*self.memory);
                    let unchanged = Unchanged::new(Arc::clone(space), was, chunks);
                    Arc::new(Union(Arc::clone(tracker), unchanged))
                }
                _ => Arc::clone(tracker),
            },
            storage: Arc::new(self.with_holes(ram)),
            late: None,
        });
        if !self.withheld {
            return regions.collect();
        }
        let chunk_size = self.options.chunk_size;
        regions
            .map(|region| Withheld::of(region, chunk_size))
            .collect()
    }

    /// A region with its holes, where it has some that can be found.
    fn with_holes(&self, ram: GuestRam<M>) -> GuestRam<M> {
        if !self.mapped_shared {
            return ram;
        }
        let shared = GuestRam::new(Arc::clone(&self.memory), ram.index());
        // Where it is anonymous, or of a file that knows no holes, all of it is looked at.
        shared.and_then(GuestRam::mapped_shared).unwrap_or(ram)
    }
}

impl<M> fmt::Debug for Departure<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Departure")
            .field("trackers", &self.trackers)
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

/// What both ends call a region: its place in the order of addresses.
fn region_name(index: usize) -> String {
    format!("ram{index}")
}

/// Passes progress on, and slows the guest down as it shows to be necessary, until the migration is over.
fn throttle(
    mut throttling: Throttling,
    mut may_post_copy: bool,
    events: mpsc::Receiver<Progress>,
    progress: Option<&Sender<Progress>>,
) {
    let mut policy = AutoConverge::new();
    for event in events {
        match event {
            Progress::Agreed { post_copy, .. } => may_post_copy &= post_copy,
            Progress::Round {
                dirty_rate,
                bandwidth,
                ..
            } if !may_post_copy => {
                let before = policy.throttle();
                let round = Round {
                    dirty_rate,
                    bandwidth,
                };
                if policy.after(round) != before {
                    throttling(&policy);
                }
            }
            _ => {}
        }
        if let Some(progress) = progress {
            // Who does not listen any more need not.
            let _ = progress.send(event);
        }
    }
    throttling(&AutoConverge::new());
}

/// A guest that comes: where it is put, and how.
///
/// ```no_run
/// use std::sync::Arc;
/// use std::time::Duration;
///
/// use memferry::transport::{Listener, Pairing};
/// use vm_memory::GuestMemoryMmap;
/// use vm_memory::bitmap::AtomicBitmap;
/// use vmm_integration::{Arrival, Vmm};
///
/// fn receive(
///     vmm: &mut dyn Vmm,
///     memory: Arc<GuestMemoryMmap<AtomicBitmap>>,
/// ) -> Result<(), Box<dyn std::error::Error>> {
///     let listener = Listener::bind("[::]:4711".parse()?)?;
///     let pairing = Pairing::new("destination.example:4711".to_owned())?;
///     println!("{pairing}");
///     let limit = Duration::from_secs(10);
///     let session = listener.accept(&pairing, limit, limit, || true, |_, _| {})?;
///     Arrival::new(memory)?.run(&session, vmm)?;
///     Ok(())
/// }
/// ```
#[derive(Debug)]
pub struct Arrival<M> {
    ram: ArrivingRam<M>,
    options: LeechOptions,
    progress: Option<Sender<Progress>>,
    cancel: Cancel,
}

impl<M: GuestMemoryBackend + Send + Sync> Arrival<M> {
    /// Into all of `memory`, whose vCPUs may run before all has come.
    ///
    /// # Errors
    /// [`ArrivingError`](crate::ArrivingError): [`ArrivingRam::without_faults`] needs no privilege.
    pub fn new(memory: Arc<M>) -> Result<Self, crate::ArrivingError> {
        ArrivingRam::new(memory).map(Self::into_ram)
    }

    /// Into this memory.
    #[must_use]
    pub fn into_ram(ram: ArrivingRam<M>) -> Self {
        Self {
            ram,
            options: LeechOptions::default(),
            progress: None,
            cancel: Cancel::default(),
        }
    }

    /// How much is under way at once, how long to wait.
    #[must_use]
    pub fn options(mut self, options: LeechOptions) -> Self {
        self.options = options;
        self
    }

    /// Where progress goes.
    #[must_use]
    pub fn progress(mut self, progress: Sender<Progress>) -> Self {
        self.progress = Some(progress);
        self
    }

    /// What it can be called off by, before the guest is owned here.
    #[must_use]
    pub fn cancel(mut self, cancel: Cancel) -> Self {
        self.cancel = cancel;
        self
    }

    /// Receives the guest and runs it. Blocks until the session has ended, with threads of its own; none is left.
    ///
    /// After [`LeechError::Lost`] the guest is owned here and waits where it needs what has not come; who drops this value lets it read
    /// zeros there. [`run`](Self::run) borrows it for that reason.
    ///
    /// # Errors
    /// [`LeechError`] says what runs where.
    pub fn run(&self, session: &Session, vmm: &mut dyn Vmm) -> Result<LeechOutcome, LeechError> {
        let memory = self.ram.memory();
        let names: Vec<String> = (0..memory.num_regions()).map(region_name).collect();
        let mut coming = Coming {
            vmm,
            memory: describe(&**memory),
            page: self.ram.page_size(),
        };
        let (options, cancel) = (&self.options, &self.cancel);
        let progress = self.progress.clone();
        leech(
            session,
            &names,
            &self.ram,
            &mut coming,
            options,
            progress,
            cancel,
        )
    }
}
