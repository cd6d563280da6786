//! The source's end of a migration.

mod compare;
mod driver;
mod forecast;
mod lanes;
mod let_go;
mod offers;
mod state;

use std::sync::Arc;
use std::sync::mpsc::Sender;

use migrate_proto::{ChunkBitmap, Layout, RegionDescriptor};

use super::cancel::Cancel;
use super::ending::Cause;
use super::options::SeedOptions;
use super::progress::{Forecast, Progress, Reporter, SeedReport};
use crate::chunk::Storage;
use crate::dirty::DirtyTracker;
use crate::subject::{Outgoing, SubjectError};
use crate::transport::Session;
use driver::Driver;
pub(in crate::migrate) use offers::digest as offer_digest;

/// A region that is sent.
#[derive(Debug, Clone)]
pub struct SourceRegion {
    /// What both sides call it.
    pub name: String,
    /// Its bytes.
    pub storage: Arc<dyn Storage>,
    /// Which of its chunks were written; its chunk size is that of [`SeedOptions::chunk_size`].
    pub tracker: Arc<dyn DirtyTracker>,
    /// Finds changes that `tracker` does not see, and takes long for it. Asked beside `tracker` while the subject runs,
    /// and once while it saves its state.
    pub late: Option<Arc<dyn DirtyTracker>>,
}

impl SourceRegion {
    fn trackers(&self) -> impl Iterator<Item = &dyn DirtyTracker> {
        [Some(&self.tracker), self.late.as_ref()]
            .into_iter()
            .flatten()
            .map(AsRef::as_ref)
    }
}

/// How a session of the source ended well.
#[derive(Debug, Clone, PartialEq)]
pub enum SeedOutcome {
    /// The subject runs at the destination and all of its memory is there.
    Moved(SeedReport),
    /// It was a dry run: nothing was changed.
    Forecast(Forecast),
}

/// Why a migration failed, and what that means for the subject.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SeedError {
    /// Ownership never passed; the subject runs here as before.
    #[error(
        "the migration was given up ({cause}); the guest runs on at the source, nothing was lost"
    )]
    Aborted {
        /// Why.
        #[source]
        cause: Cause,
    },
    /// Ownership never passed, but the subject could not be made to run again.
    #[error(
        "the migration was given up ({cause}), and the guest at the source could not be resumed: {resume}; \
         if it still exists it is suspended and complete here, and can be resumed by hand"
    )]
    Stuck {
        /// Why the migration ended.
        cause: Cause,
        /// Why the subject does not run.
        #[source]
        resume: SubjectError,
    },
    /// The subject runs at the destination with all of its memory, and the session broke before the copies were compared.
    #[error(
        "the guest runs at the destination and all of its memory is there, but the connection was lost ({cause}) before the copies were \
         compared. Nothing is known to be wrong. Do not resume the guest here"
    )]
    Unverified {
        /// Why.
        #[source]
        cause: Cause,
    },
    /// Ownership has passed, and the session broke before all memory had followed.
    #[error(
        "the connection was lost after hand-over ({cause}): {missing} bytes of the guest's memory are only here, and the \
         guest at the destination waits where it needs them. Do not resume or quit the guest here. {advice}"
    )]
    Lost {
        /// Why.
        #[source]
        cause: Cause,
        /// Bytes that only this side has.
        missing: u64,
        /// What to do.
        advice: &'static str,
    },
}

/// Sends `regions` and `subject` over `session`; returns when the session has ended.
///
/// Blocks for as long as that takes; progress goes to `progress`. The subject and the trackers are in the state that the
/// result says, and no thread is left.
///
/// # Errors
/// Every error says what runs where.
///
/// # Panics
/// If there is no region, or one is empty: the caller chooses them.
pub fn seed(
    session: &Session,
    regions: &[SourceRegion],
    subject: &mut dyn Outgoing,
    options: &SeedOptions,
    progress: Option<Sender<Progress>>,
    cancel: &Cancel,
) -> Result<SeedOutcome, SeedError> {
    let descriptors = regions
        .iter()
        .map(|region| RegionDescriptor {
            name: region.name.clone(),
            len: region.storage.len(),
        })
        .collect();
    let layout = Layout::new(options.chunk_size, descriptors)
        .filter(|layout| layout.chunks() > 0)
        .expect("regions have bytes, and fewer than 2^64");
    let reporter = Reporter(progress);
    Driver::new(session, regions, &layout, options, &reporter, cancel).run(subject)
}

/// The chunks that may hold anything but zeros.
fn present_chunks(regions: &[SourceRegion], layout: &Layout) -> std::io::Result<ChunkBitmap> {
    let mut present = ChunkBitmap::empty(layout.chunks());
    for (index, region) in regions.iter().enumerate() {
        for range in region.storage.data_ranges(0..region.storage.len())? {
            present.insert_run(layout.chunks_touched(index, range.start, range.end - range.start));
        }
    }
    Ok(present)
}

/// The chunks that were written since these trackers, of which each region has some, were last asked.
fn take_dirty<'a, T: IntoIterator<Item = &'a dyn DirtyTracker>>(
    regions: &'a [SourceRegion],
    layout: &Layout,
    trackers: impl Fn(&'a SourceRegion) -> T,
) -> std::io::Result<ChunkBitmap> {
    let mut dirty = ChunkBitmap::empty(layout.chunks());
    for (index, region) in regions.iter().enumerate() {
        let first = layout.chunks_of(index).start.0;
        for tracker in trackers(region) {
            for run in tracker.take()?.runs() {
                dirty.insert_run(migrate_proto::ChunkRun::new(first + run.start.0, run.count));
            }
        }
    }
    Ok(dirty)
}

/// Gives chunks back to their trackers.
fn restore_dirty(
    regions: &[SourceRegion],
    layout: &Layout,
    restore: &ChunkBitmap,
) -> std::io::Result<()> {
    if restore.is_empty() {
        return Ok(());
    }
    for (index, region) in regions.iter().enumerate() {
        let chunks = layout.chunks_of(index);
        let mut theirs = ChunkBitmap::empty(chunks.count);
        let mut next = chunks.start.0;
        while let Some(run) = restore.run_from(next, chunks.end().saturating_sub(next).max(1)) {
            if run.start.0 >= chunks.end() {
                break;
            }
            let count = run.end().min(chunks.end()) - run.start.0;
            theirs.insert_run(migrate_proto::ChunkRun::new(
                run.start.0 - chunks.start.0,
                count,
            ));
            next = run.start.0 + count;
        }
        region.tracker.restore(&theirs)?;
    }
    Ok(())
}
