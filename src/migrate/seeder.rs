//! Regions that leave: the source of a move, step by step.

use std::fmt;
use std::io::Write;
use std::sync::Arc;
use std::time::Instant;

use super::cut_over::CutOver;
use super::hooks::SeederHooks;
use super::options::SeedOptions;
use super::progress::{Progress, SeedReport};
use super::region::{Region, RegionError};
use super::running::{Course, OnProgress, Running};
use super::seed::{SeedError, SeedOutcome, SourceRegion, seed};
use crate::subject::{Description, Farewell, Outgoing, SubjectError};
use crate::transport::Session;

/// Takes regions away that are used here: [`open`](Self::open) begins to track and to send, [`Tracking::released`] waits until they belong to
/// the destination, [`Released::close`] until everything is there.
///
/// Programs use the regions all the time, but for the moment of the hand-over: then they wait, and are sent away afterwards.
pub struct Seeder {
    regions: Vec<(String, Arc<Region>)>,
    options: SeedOptions,
    subject: Box<dyn Outgoing>,
    on_progress: Option<OnProgress>,
}

impl fmt::Debug for Seeder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Seeder")
            .field("regions", &self.regions)
            .finish_non_exhaustive()
    }
}

impl Seeder {
    /// Of these regions, with the names that both ends know them by, in an order that both share. They move as one.
    #[must_use]
    pub fn new<N: Into<String>>(regions: impl IntoIterator<Item = (N, Arc<Region>)>) -> Self {
        Self {
            regions: regions
                .into_iter()
                .map(|(name, region)| (name.into(), region))
                .collect(),
            options: SeedOptions::default(),
            subject: Box::new(SeederHooks::default()),
            on_progress: None,
        }
    }

    /// With these options. The chunk size is the regions' own, and it is never a dry run: that is [`seed()`]'s.
    #[must_use]
    pub fn options(mut self, options: SeedOptions) -> Self {
        self.options = options;
        self
    }

    /// With something to suspend, and perhaps with state of its own: [`SeederHooks`], or any other subject.
    #[must_use]
    pub fn subject(mut self, subject: impl Outgoing + 'static) -> Self {
        self.subject = Box::new(subject);
        self
    }

    /// Calls `listener` with all progress, on a thread of its own.
    #[must_use]
    pub fn on_progress(mut self, listener: impl FnMut(&Progress) + Send + 'static) -> Self {
        self.on_progress = Some(Box::new(listener));
        self
    }

    /// **Track.** Begins to track and to send over `session`; returns at once.
    ///
    /// # Errors
    /// If there is no region, one is not used here or is being moved already, they are cut into chunks of different sizes, or no thread can
    /// be started. Nothing has happened then.
    pub fn open(self, session: Session) -> Result<Tracking, RegionError> {
        let Self {
            regions,
            mut options,
            subject,
            on_progress,
        } = self;
        let first = regions.first();
        let size = first.map(|(_, region)| region.chunk_size());
        let alike = |(_, region): &(String, Arc<Region>)| Some(region.chunk_size()) == size;
        let Some(size) = size.filter(|_| regions.iter().all(alike)) else {
            return Err(RegionError::Unlike);
        };
        options.chunk_size = size;
        options.dry_run = false;
        let leaving = Leaving::begin(regions)?;
        let cut_over = options.cut_over.clone();
        let running = Running::start(
            "memferry-seeder",
            on_progress,
            move |course, cancel, told| {
                let mut subject = Suspending {
                    subject,
                    regions: &leaving.0,
                    course,
                };
                let sources = leaving.sources();
                seed(
                    &session,
                    &sources,
                    &mut subject,
                    &options,
                    Some(told),
                    cancel,
                )
            },
        );
        let running = running.map_err(RegionError::thread)?;
        Ok(Tracking { running, cut_over })
    }
}

/// Regions that are leaving, until the session has ended.
#[derive(Debug)]
struct Leaving(Vec<(String, Arc<Region>)>);

impl Leaving {
    /// All of them or none.
    fn begin(regions: Vec<(String, Arc<Region>)>) -> Result<Self, RegionError> {
        let mut leaving = Self(Vec::new());
        for (name, region) in regions {
            region.begin_to_leave().map_err(|error| error.of(&name))?;
            leaving.0.push((name, region));
        }
        Ok(leaving)
    }

    fn sources(&self) -> Vec<SourceRegion> {
        self.0
            .iter()
            .map(|(name, region)| SourceRegion {
                name: name.clone(),
                storage: region.source(),
                tracker: region.tracker(),
                late: None,
            })
            .collect()
    }
}

impl Drop for Leaving {
    fn drop(&mut self) {
        for (_, region) in &self.0 {
            region.end();
        }
    }
}

/// The subject, with the regions and their caches.
#[derive(Debug)]
struct Suspending<'a> {
    subject: Box<dyn Outgoing>,
    regions: &'a [(String, Arc<Region>)],
    course: &'a Course,
}

impl Suspending<'_> {
    fn for_all(
        &self,
        what: &str,
        each: impl Fn(&Region) -> Result<(), RegionError>,
    ) -> Result<(), SubjectError> {
        for (name, region) in self.regions {
            each(region)
                .map_err(|error| SubjectError::because(format!("cannot {what} {name}"), error))?;
        }
        Ok(())
    }
}

impl Outgoing for Suspending<'_> {
    fn describe(&self) -> Description {
        self.subject.describe()
    }

    /// What is cached is brought while the application still runs, so that little is left to bring when it stands still.
    fn suspend(&mut self, deadline: Instant) -> Result<(), SubjectError> {
        self.for_all("write back region", Region::write_back)?;
        self.subject.suspend(deadline)?;
        self.for_all("write back region", Region::write_back)?;
        for (_, region) in self.regions {
            region.set_still(true);
        }
        Ok(())
    }

    /// Saving may write, so it is only now that the door is closed. What comes behind it waits, and fails when the region has left: a late
    /// write is never done at the source and missing at the destination.
    fn save(&mut self, sink: &mut dyn Write, deadline: Instant) -> Result<(), SubjectError> {
        self.subject.save(sink, deadline)?;
        self.for_all("write back region", Region::write_back)?;
        self.for_all("suspend region", |region| region.stand_still(deadline))
    }

    fn resume(&mut self, deadline: Instant) -> Result<(), SubjectError> {
        for (_, region) in self.regions {
            region.go_on();
        }
        self.subject.resume(deadline)
    }

    fn release(&mut self) {
        for (_, region) in self.regions {
            region.leave();
        }
        self.subject.release();
        self.course.hand_over();
    }

    /// What programs have read before is not shown to them while the rest is fetched. They are sent away, so that nothing is cached again.
    fn farewell(&mut self) -> Option<Farewell> {
        let regions: Vec<_> = self.regions.iter().map(|(_, r)| r.clone()).collect();
        let subject = self.subject.farewell();
        Some(Box::new(move || {
            for region in regions {
                region.forget();
            }
            if let Some(farewell) = subject {
                farewell();
            }
        }))
    }
}

type Ending = Result<SeedOutcome, SeedError>;

fn moved(ending: Ending) -> Result<SeedReport, SeedError> {
    ending.map(|outcome| match outcome {
        SeedOutcome::Moved(report) => report,
        SeedOutcome::Forecast(_) => unreachable!("it is never a dry run"),
    })
}

/// Regions that are used here while they are sent. Dropped, the move is cancelled.
#[derive(Debug)]
pub struct Tracking {
    running: Running<Ending>,
    cut_over: CutOver,
}

impl Tracking {
    /// Asks for the cut-over, if the source [waits](SeedOptions::hold) to be asked.
    pub fn cut_over(&self) {
        self.cut_over.ask();
    }

    /// Gives the move up, if it can be: the regions are used here as before.
    pub fn cancel(&self) {
        self.running.cancel();
    }

    /// What was told last.
    #[must_use]
    pub fn progress(&self) -> Option<Progress> {
        self.running.last()
    }

    /// **Sync, finalize.** Waits until the regions belong to the destination: nobody uses them here any more.
    ///
    /// # Errors
    /// How it ended, if it ended before; see [`SeedError`].
    pub fn released(self) -> Result<Released, SeedError> {
        if self.running.wait_for_hand_over() {
            return Ok(Released {
                running: self.running,
            });
        }
        match moved(self.running.join()) {
            Err(error) => Err(error),
            Ok(_) => unreachable!("nothing moves without being released"),
        }
    }
}

/// Regions that belong to the destination, which still needs this side for what is not there. Dropped, it is waited for.
#[derive(Debug)]
pub struct Released {
    running: Running<Ending>,
}

impl Released {
    /// **Close.** Waits until everything is at the destination. The regions are old copies from then on.
    ///
    /// # Errors
    /// See [`SeedError`].
    pub fn close(self) -> Result<SeedReport, SeedError> {
        moved(self.running.join())
    }
}
