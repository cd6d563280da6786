//! What is moved: something that runs, can be suspended and has state besides its memory.
//!
//! [`Outgoing`] is the subject where it runs now, [`Incoming`] where it will run. The engine calls them in the
//! order of a migration and never both ends at once; every call that waits for the subject has a deadline.

pub mod qemu;

use std::fmt::Debug;
use std::io::{Read, Write};
use std::time::Instant;

/// What both ends must agree on before anything is copied.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Description {
    /// What the subject is, for example `qemu`; the two ends must say the same.
    pub kind: String,
    /// Facts that the incoming side compares with its own, in an order both sides share.
    pub attributes: Vec<(String, String)>,
}

/// Why a subject could not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[error("{context}")]
pub struct SubjectError {
    /// What was attempted and what the user can do about it.
    pub context: String,
    /// The cause, where there is one.
    #[source]
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl SubjectError {
    /// An error without a deeper cause.
    pub fn new(context: impl Into<String>) -> Self {
        Self {
            context: context.into(),
            source: None,
        }
    }

    /// An error with its cause.
    pub fn because(
        context: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self {
            context: context.into(),
            source: Some(source.into()),
        }
    }
}

/// The subject where it runs now.
pub trait Outgoing: Debug + Send {
    /// What the destination compares.
    fn describe(&self) -> Description;

    /// Stops the subject: when this returns, nothing it does will write its memory again until
    /// [`resume`](Self::resume), but for what saving its state writes.
    ///
    /// # Errors
    /// If it does not stop by the deadline. The caller then calls [`resume`](Self::resume).
    fn suspend(&mut self, deadline: Instant) -> Result<(), SubjectError>;

    /// Writes the state that is not in the regions to `sink`, whole. The subject is suspended.
    ///
    /// # Errors
    /// If the state cannot be had by the deadline or `sink` fails. The caller then calls
    /// [`resume`](Self::resume).
    fn save(&mut self, sink: &mut dyn Write, deadline: Instant) -> Result<(), SubjectError>;

    /// Undoes everything since the subject ran: it runs on as though nothing had been asked of it. May be called
    /// in any state, after any failure, and more than once.
    ///
    /// # Errors
    /// If it does not run by the deadline; says what an operator has to do.
    fn resume(&mut self, deadline: Instant) -> Result<(), SubjectError>;

    /// The destination owns the subject now: this copy never runs again. The destination is told so only when this has returned, and does
    /// not wait long: what takes time is [`farewell`](Self::farewell)'s.
    fn release(&mut self);

    /// What is left to do here once the destination knows that it owns the subject; asked for after [`release`](Self::release). It is done on a
    /// thread of its own, when the destination runs the subject or the session has been lost, and the session's end waits for it. Nothing
    /// by default.
    fn farewell(&mut self) -> Option<Farewell> {
        None
    }
}

/// What is done where a subject was, after it has left.
pub type Farewell = Box<dyn FnOnce() + Send>;

/// The subject where it will run.
pub trait Incoming: Debug + Send {
    /// What kind of subject it takes: as [`Description::kind`] of the source.
    fn kind(&self) -> &'static str;

    /// Compares the source's description with this end's.
    ///
    /// # Errors
    /// Names the attribute that differs, both values, and what to do.
    fn accept(&self, source: &Description) -> Result<(), SubjectError>;

    /// Loads the state that [`Outgoing::save`] wrote. Memory is readable, or faults are served, while this runs.
    /// The subject does not run yet when it returns.
    ///
    /// # Errors
    /// If the state is refused or not loaded by the deadline.
    fn load(
        &mut self,
        state: &mut (dyn Read + Send),
        deadline: Instant,
    ) -> Result<(), SubjectError>;

    /// Runs the subject. Called once, after ownership has passed.
    ///
    /// # Errors
    /// If it does not run by the deadline; this end owns it all the same.
    fn resume(&mut self, deadline: Instant) -> Result<(), SubjectError>;
}
