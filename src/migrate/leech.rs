//! The destination's end of a migration.

mod driver;
mod faults;
mod lanes;
mod offer;
mod state;

use std::sync::mpsc::Sender;

use super::cancel::Cancel;
use super::ending::Cause;
use super::options::LeechOptions;
use super::progress::{LeechReport, Progress, Reporter};
use crate::chunk::Install;
use crate::subject::{Incoming, SubjectError};
use crate::transport::Session;
use driver::Driver;

/// How a session of the destination ended well.
#[derive(Debug, Clone, PartialEq)]
pub enum LeechOutcome {
    /// The subject runs here and all of its memory is here.
    Moved(LeechReport),
    /// The source only compared and measured: nothing was changed.
    DryRun,
}

/// Why a migration failed, and what that means for the subject.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LeechError {
    /// Nothing was owned here; the source runs on.
    #[error(
        "the migration was given up ({cause}); the guest runs on at the source, this copy is worthless"
    )]
    Aborted {
        /// Why.
        #[source]
        cause: Cause,
    },
    /// The session broke at the very moment of hand-over.
    #[error(
        "the connection was lost at hand-over ({cause}): the source may have let go of the guest, which stands still on both sides. \
         Look at the source: if it says that it handed over, it must not run there, and this copy may be resumed by hand if the \
         source reports no memory that is only there; if the source runs it, quit this one"
    )]
    Undecided {
        /// Why.
        #[source]
        cause: Cause,
    },
    /// The subject is owned here, and the session broke before all memory had followed.
    #[error(
        "the connection was lost after hand-over ({cause}): {missing} bytes of the guest's memory are still at the source. The guest \
         is owned here and waits where it needs them; it never sees wrong data. Do not resume the guest at the source"
    )]
    Lost {
        /// Why.
        #[source]
        cause: Cause,
        /// Bytes that only the source has.
        missing: u64,
    },
    /// The subject is owned here and complete, but does not run.
    #[error(
        "the guest is owned here and all of its memory is here, but it could not be started: {cause}; start it by hand"
    )]
    NotRunning {
        /// Why.
        cause: SubjectError,
    },
}

/// Receives the subject into `memory` and runs it; returns when the session has ended.
///
/// `names` are what both sides call the regions of `memory`, in its order. Blocks for as long as it takes; progress goes to
/// `progress`. No thread is left. After [`LeechError::Lost`] the memory stays armed, so that the subject waits rather than
/// reads zeros; `memory` must be kept, or its watch held open elsewhere.
///
/// # Errors
/// Every error says what runs where.
///
/// # Panics
/// If there is no region, one is empty, or there is not one name a region: the caller chooses them.
pub fn leech(
    session: &Session,
    names: &[String],
    memory: &dyn Install,
    subject: &mut dyn Incoming,
    options: &LeechOptions,
    progress: Option<Sender<Progress>>,
    cancel: &Cancel,
) -> Result<LeechOutcome, LeechError> {
    assert_eq!(names.len(), memory.lens().len(), "one name a region");
    let reporter = Reporter(progress);
    Driver::new(session, names, memory, options, &reporter, cancel).run(subject)
}
