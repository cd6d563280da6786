//! An application as a subject: something to call before its regions leave, and when they have come.

use std::fmt;
use std::io::{Read, Write};
use std::time::Instant;

use crate::subject::{Description, Farewell, Incoming, Outgoing, SubjectError};

/// What both ends of a move of plain regions call their subject.
const KIND: &str = "regions";

/// Something to be called; what it returns as an error ends the migration, if it can still be ended.
pub type Hook = Box<dyn FnMut() -> Result<(), SubjectError> + Send>;

/// What is called at the source of regions that have no state besides. An application with state of its own implements
/// [`Outgoing`] instead.
///
/// None of these is needed for the regions to arrive whole: programs that go on while the regions are suspended wait, and are sent away
/// when they have left.
#[derive(Default)]
pub struct SeederHooks {
    /// Suspends the application, directly before the last writes are looked for: it has done nothing half.
    pub suspend: Option<Hook>,
    /// The application goes on: nothing became of it. May be called without `suspend`.
    pub resume: Option<Hook>,
    /// The regions have left: the application ends here. Its error is lost, and so is a panic, for nothing can be undone any more.
    ///
    /// Called once, on a thread of its own, when the application runs at the destination already or when the session was lost after the
    /// hand-over. It may take as long as it needs: nothing but the end of the session at this side waits for it.
    pub released: Option<Hook>,
}

/// What is called at the destination of regions that have no state besides. An application with state of its own implements
/// [`Incoming`] instead.
#[derive(Default)]
pub struct LeecherHooks {
    /// The application runs here from now on. If it fails, or panics, the region belongs here all the same, and what is missing comes.
    pub run: Option<Hook>,
}

impl fmt::Debug for SeederHooks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SeederHooks")
    }
}

impl fmt::Debug for LeecherHooks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LeecherHooks")
    }
}

fn call(hook: &mut Option<Hook>) -> Result<(), SubjectError> {
    hook.as_mut().map_or(Ok(()), |hook| hook())
}

impl Outgoing for SeederHooks {
    fn describe(&self) -> Description {
        Description {
            kind: KIND.into(),
            attributes: Vec::new(),
        }
    }

    fn suspend(&mut self, _deadline: Instant) -> Result<(), SubjectError> {
        call(&mut self.suspend)
    }

    fn save(&mut self, _sink: &mut dyn Write, _deadline: Instant) -> Result<(), SubjectError> {
        Ok(())
    }

    fn resume(&mut self, _deadline: Instant) -> Result<(), SubjectError> {
        call(&mut self.resume)
    }

    fn release(&mut self) {}

    fn farewell(&mut self) -> Option<Farewell> {
        let mut released = self.released.take()?;
        Some(Box::new(move || {
            // The regions are at the destination, whatever the application says.
            let _ = released();
        }))
    }
}

impl Incoming for LeecherHooks {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn accept(&self, _source: &Description) -> Result<(), SubjectError> {
        Ok(())
    }

    fn load(
        &mut self,
        _state: &mut (dyn Read + Send),
        _deadline: Instant,
    ) -> Result<(), SubjectError> {
        Ok(())
    }

    fn resume(&mut self, _deadline: Instant) -> Result<(), SubjectError> {
        call(&mut self.run)
    }
}
