//! Regions that come: the destination of a move, step by step.

use std::fmt;
use std::io::Read;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::cut_over::CutOver;
use super::hooks::LeecherHooks;
use super::leech::{LeechError, LeechOutcome, leech};
use super::options::LeechOptions;
use super::progress::{LeechReport, Progress};
use super::region::{Arrival, OnChunk, Region, RegionError};
use super::running::{Course, OnProgress, Running};
use crate::subject::{Description, Incoming, SubjectError};
use crate::transport::Session;

/// Brings regions here: [`open`](Self::open) begins to receive, [`Receiving::finalize`] asks for the cut-over and waits until the regions
/// belong to this side and can be used, [`Finalized::release`] waits until everything is here.
///
/// Front ends may show the regions all the time: who looks before they belong here waits. Once they are here they can leave again, with the front ends
/// still there.
pub struct Leecher {
    regions: Vec<(String, Arc<Region>)>,
    options: LeechOptions,
    subject: Box<dyn Incoming>,
    looks: bool,
    on_progress: Option<OnProgress>,
    on_chunk: Option<OnChunk>,
}

impl fmt::Debug for Leecher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Leecher")
            .field("regions", &self.regions)
            .finish_non_exhaustive()
    }
}

impl Leecher {
    /// Into these regions, with the names that both ends know them by, in an order that both share.
    #[must_use]
    pub fn new<N: Into<String>>(regions: impl IntoIterator<Item = (N, Arc<Region>)>) -> Self {
        Self {
            regions: regions
                .into_iter()
                .map(|(name, region)| (name.into(), region))
                .collect(),
            options: LeechOptions::default(),
            subject: Box::new(LeecherHooks::default()),
            looks: false,
            on_progress: None,
            on_chunk: None,
        }
    }

    /// With these options. With [`hold`](LeechOptions::hold) it is [`Receiving::finalize`] that decides when to cut over, else the source.
    #[must_use]
    pub fn options(mut self, options: LeechOptions) -> Self {
        self.options = options;
        self
    }

    /// With something that runs here afterwards, and perhaps with state of its own: [`LeecherHooks`], or any other subject.
    #[must_use]
    pub fn subject(mut self, subject: impl Incoming + 'static) -> Self {
        self.subject = Box::new(subject);
        self
    }

    /// Lets everybody into the regions while the subject's state is loaded, because loading it needs them. The regions may still go back to
    /// the source then: nobody else than who loads may use them.
    #[must_use]
    pub fn looking_while_loading(mut self) -> Self {
        self.looks = true;
        self
    }

    /// Calls `listener` with all progress, on a thread of its own.
    #[must_use]
    pub fn on_progress(mut self, listener: impl FnMut(&Progress) + Send + 'static) -> Self {
        self.on_progress = Some(Box::new(listener));
        self
    }

    /// Calls `listener` with the index of a region and a range of it whenever bytes of it have come, on the threads that receive: it
    /// should be quick. What is zero comes without bytes, and what is kept does not come. A listener that panics is not called any more, and the
    /// move goes on.
    #[must_use]
    pub fn on_chunk(
        mut self,
        listener: impl Fn(usize, Range<u64>) + Send + Sync + 'static,
    ) -> Self {
        self.on_chunk = Some(surviving(listener));
        self
    }

    /// **Track, pull.** Begins to receive over `session`; returns at once.
    ///
    /// # Errors
    /// If there is no region, one is used here or is being moved already, or the kernel has no thread or descriptor left. Nothing has happened
    /// then.
    pub fn open(self, session: Session) -> Result<Receiving, RegionError> {
        let Self {
            regions,
            options,
            subject,
            looks,
            on_progress,
            on_chunk,
        } = self;
        if regions.is_empty() {
            return Err(RegionError::Unlike);
        }
        let names: Vec<_> = regions.iter().map(|(name, _)| name.clone()).collect();
        let memory: Vec<_> = regions.iter().map(|(_, region)| region.clone()).collect();
        let memory = Arrival::new(memory, on_chunk).map_err(|source| RegionError::Failed {
            what: "the faults of the regions cannot be watched",
            source,
        })?;
        let coming = Coming::begin(regions)?;
        let cut_over = options.cut_over.clone();
        let kept: Vec<_> = coming.regions.iter().map(|(_, r)| r.clone()).collect();
        let running = Running::start(
            "memferry-leecher",
            on_progress,
            move |course, cancel, told| {
                let mut subject = Taking {
                    subject,
                    looks,
                    regions: &coming.regions,
                    course,
                };
                let ending = leech(
                    &session,
                    &names,
                    &memory,
                    &mut subject,
                    &options,
                    Some(told),
                    cancel,
                );
                coming.end(&ending);
                ending
            },
        );
        let running = running.map_err(RegionError::thread)?;
        Ok(Receiving {
            running,
            cut_over,
            regions: kept,
        })
    }
}

/// The same listener, whose panic is its own: regions that belong here already are not lost by it.
fn surviving(listener: impl Fn(usize, Range<u64>) + Send + Sync + 'static) -> OnChunk {
    let panicked = AtomicBool::new(false);
    Box::new(move |region, range| {
        if panicked.load(Ordering::Relaxed) {
            return;
        }
        // It is not called again, so that nobody sees what it left half done.
        if catch_unwind(AssertUnwindSafe(|| listener(region, range))).is_err() {
            panicked.store(true, Ordering::Relaxed);
        }
    })
}

/// Regions that are coming. Dropped without having ended, by a panic, what belongs here already is not given up, and of the rest nothing
/// has come.
#[derive(Debug)]
struct Coming {
    regions: Vec<(String, Arc<Region>)>,
    ended: bool,
}

impl Coming {
    /// All of them or none.
    fn begin(regions: Vec<(String, Arc<Region>)>) -> Result<Self, RegionError> {
        let mut coming = Self {
            regions: Vec::new(),
            ended: false,
        };
        for (name, region) in regions {
            region.begin_to_come().map_err(|error| error.of(&name))?;
            coming.regions.push((name, region));
        }
        Ok(coming)
    }

    /// The regions are what the session's end has made of them.
    fn end(mut self, ending: &Ending) {
        self.ended = true;
        for (_, region) in &self.regions {
            match ending {
                Ok(LeechOutcome::Moved(_)) | Err(LeechError::NotRunning { .. }) => region.arrive(),
                // Programs that do not let go keep the region from coming again until it is given up, which says so.
                Ok(LeechOutcome::DryRun) | Err(LeechError::Aborted { .. }) => {
                    let _ = region.abandon();
                }
                Err(LeechError::Undecided { .. }) => region.doubt(),
                Err(LeechError::Lost { .. }) => region.lose(),
            }
        }
    }
}

impl Drop for Coming {
    fn drop(&mut self) {
        if !self.ended {
            for (_, region) in &self.regions {
                if region.is_owned() {
                    region.lose();
                } else {
                    let _ = region.abandon();
                }
            }
        }
    }
}

/// The subject, with the regions.
#[derive(Debug)]
struct Taking<'a> {
    subject: Box<dyn Incoming>,
    looks: bool,
    regions: &'a [(String, Arc<Region>)],
    course: &'a Course,
}

impl Incoming for Taking<'_> {
    fn kind(&self) -> &'static str {
        self.subject.kind()
    }

    fn accept(&self, source: &Description) -> Result<(), SubjectError> {
        self.subject.accept(source)
    }

    fn load(
        &mut self,
        state: &mut (dyn Read + Send),
        deadline: Instant,
    ) -> Result<(), SubjectError> {
        for (name, region) in self.regions {
            region.mark_absent().map_err(|error| {
                SubjectError::because(format!("cannot use region {name}"), error)
            })?;
            if self.looks {
                region.let_look();
            }
        }
        self.subject.load(state, deadline)
    }

    fn resume(&mut self, deadline: Instant) -> Result<(), SubjectError> {
        for (_, region) in self.regions {
            region.own();
        }
        // The regions belong here: what is missing of them is fetched, whatever becomes of the application.
        let result = catch_unwind(AssertUnwindSafe(|| self.subject.resume(deadline)));
        self.course.hand_over();
        result.unwrap_or_else(|_| Err(SubjectError::new("the application panicked")))
    }
}

type Ending = Result<LeechOutcome, LeechError>;

/// Why regions have not come.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FinalizeError {
    /// The move has failed.
    #[error(transparent)]
    Failed(#[from] LeechError),
    /// The source only wanted to know whether it would work, and how long it would take.
    #[error("the source only compared and measured: nothing was moved")]
    DryRun,
}

/// Regions that are being received: who looks at them waits. Dropped, the move is cancelled.
#[derive(Debug)]
pub struct Receiving {
    running: Running<Ending>,
    cut_over: CutOver,
    regions: Vec<Arc<Region>>,
}

impl Receiving {
    /// **Sync, mark as remote, finalize.** Asks for the cut-over and waits until the regions belong to this side. They are used here from then on; what
    /// has not come is fetched when it is looked at.
    ///
    /// # Errors
    /// How it ended, if it ended before.
    pub fn finalize(self) -> Result<Finalized, FinalizeError> {
        self.cut_over.ask();
        self.finalized()
    }

    /// As [`finalize`](Self::finalize), when the source wants.
    ///
    /// # Errors
    /// How it ended, if it ended before.
    pub fn finalized(self) -> Result<Finalized, FinalizeError> {
        if self.running.wait_for_hand_over() {
            return Ok(Finalized {
                running: self.running,
                regions: self.regions,
            });
        }
        match self.running.join() {
            Err(error) => Err(error.into()),
            Ok(LeechOutcome::DryRun) => Err(FinalizeError::DryRun),
            Ok(LeechOutcome::Moved(_)) => unreachable!("nothing moves without being owned"),
        }
    }

    /// Gives the move up, if it can be: the source goes on.
    pub fn cancel(&self) {
        self.running.cancel();
    }

    /// What was told last.
    #[must_use]
    pub fn progress(&self) -> Option<Progress> {
        self.running.last()
    }
}

/// Regions that are used here, and of which something may be missing. Dropped, it is waited for.
#[derive(Debug)]
pub struct Finalized {
    running: Running<Ending>,
    regions: Vec<Arc<Region>>,
}

impl Finalized {
    /// How many bytes of the regions are not here.
    #[must_use]
    pub fn missing(&self) -> u64 {
        self.regions.iter().map(|region| region.missing()).sum()
    }

    /// What was told last.
    #[must_use]
    pub fn progress(&self) -> Option<Progress> {
        self.running.last()
    }

    /// **Release, close.** Waits until everything is here: the source is not needed any more, and the regions may leave again.
    ///
    /// # Errors
    /// See [`LeechError`].
    pub fn release(self) -> Result<LeechReport, LeechError> {
        self.running.join().map(|outcome| match outcome {
            LeechOutcome::Moved(report) => report,
            LeechOutcome::DryRun => unreachable!("a dry run hands nothing over"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::MemoryStorage;
    use crate::chunk::ChunkSize;
    use crate::migrate::region::Standing;

    #[test]
    fn a_session_that_panics_gives_up_what_has_not_come_and_keeps_what_belongs_here() {
        let regions: Vec<_> = ["owned", "coming"]
            .into_iter()
            .map(|name| {
                let local = Arc::new(MemoryStorage::new(4096));
                let region = Region::empty(local, ChunkSize::PAGE).unwrap();
                (name.to_owned(), Arc::new(region))
            })
            .collect();
        let coming = Coming::begin(regions.clone()).unwrap();
        regions[0].1.mark_absent().unwrap();
        regions[0].1.own();
        drop(coming);
        let standing: Vec<_> = regions.iter().map(|(_, r)| r.standing()).collect();
        assert_eq!(standing, [Standing::Lost, Standing::Waiting]);
    }
}
