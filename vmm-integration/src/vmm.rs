//! What a VMM does for a migration.

use std::error::Error;
use std::fmt::Debug;
use std::io::{Read, Write};
use std::time::Instant;

use memferry::subject::{Description, Incoming, Outgoing, SubjectError};

/// Why a VMM could not do what it was asked. It is told as the cause of a migration's failure, so it should say what happened
/// and what to do.
pub type VmmError = Box<dyn Error + Send + Sync>;

/// A virtual machine, as a migration needs it: five calls, at the source and at the destination.
///
/// ```text
///  source                              destination
///    facts ───────── compared ────────── facts
///    (memory is copied, the guest runs)
///    suspend
///    save ────────── state ───────────── load
///    (never resumed again)               resume
/// ```
///
/// They are called from one thread, one at a time. Each has a deadline by which it has to return, and one that fails
/// at the source is followed by [`resume`](Self::resume): the guest runs on there.
pub trait Vmm: Debug + Send {
    /// What this VMM is called; both ends must say the same.
    fn kind(&self) -> &'static str;

    /// What both ends must have alike, as names and values: the version of the state's format, the features of the processors
    /// that the guest was shown, the frequency of its clock, its devices. They are compared before anything is copied, and
    /// one that differs is named to the user. The layout of the memory is compared in any case.
    fn facts(&self) -> Vec<(String, String)>;

    /// Whether the destination can do with the source's value of a fact, where its own is another. `here` is `None` if it has
    /// no such fact. Asked at the destination.
    fn accepts(&self, fact: &str, source: &str, here: Option<&str>) -> bool {
        let _ = fact;
        here == Some(source)
    }

    /// Stops all vCPUs and drains all devices: when this returns, nothing writes guest memory but what [`save`](Self::save) does, and
    /// all that was written is seen by the trackers. Calling it on a guest that is suspended does nothing.
    ///
    /// # Errors
    /// If it does not stop by `deadline`; says which vCPU or device.
    fn suspend(&mut self, deadline: Instant) -> Result<(), VmmError>;

    /// Writes the state of vCPUs and devices: bytes that only the VMM understands. Guest memory is not part of it. It
    /// may write guest memory.
    ///
    /// # Errors
    /// If a state cannot be had, or `state` fails.
    fn save(&mut self, state: &mut dyn Write, deadline: Instant) -> Result<(), VmmError>;

    /// Loads what [`save`](Self::save) has written, into a machine that has not run. Guest memory may be accessed: what
    /// has not come is waited for. The bytes are whole and as they were sent; whether they make sense is for this to see.
    ///
    /// # Errors
    /// If they do not: says which part. The guest runs on at the source then.
    fn load(&mut self, state: &mut dyn Read, deadline: Instant) -> Result<(), VmmError>;

    /// Lets the guest run: at the source after a migration that was given up, in whatever state it was left; at the
    /// destination once it is owned there. Calling it on a guest that runs does nothing.
    ///
    /// # Errors
    /// If it does not run by `deadline`.
    fn resume(&mut self, deadline: Instant) -> Result<(), VmmError>;
}

/// A fact of ours: the layout of the guest's memory.
const MEMORY: &str = "memory";
/// A fact of ours: how large the source's chunks are.
const CHUNK: &str = "chunk size";

/// The guest at the source, as the engine takes it.
#[derive(Debug)]
pub(crate) struct Leaving<'a> {
    pub(crate) vmm: &'a mut dyn Vmm,
    pub(crate) memory: String,
    pub(crate) chunk: u64,
    /// Ownership has passed: it never runs here again.
    pub(crate) released: bool,
}

impl Outgoing for Leaving<'_> {
    fn describe(&self) -> Description {
        let ours = [
            (MEMORY, self.memory.clone()),
            (CHUNK, self.chunk.to_string()),
        ];
        let ours = ours.map(|(name, value)| (name.to_owned(), value));
        Description {
            kind: self.vmm.kind().to_owned(),
            attributes: ours.into_iter().chain(self.vmm.facts()).collect(),
        }
    }

    fn suspend(&mut self, deadline: Instant) -> Result<(), SubjectError> {
        self.vmm
            .suspend(deadline)
            .map_err(because("the VMM did not suspend the guest"))
    }

    fn save(&mut self, sink: &mut dyn Write, deadline: Instant) -> Result<(), SubjectError> {
        self.vmm
            .save(sink, deadline)
            .map_err(because("the VMM could not save the guest's state"))
    }

    fn resume(&mut self, deadline: Instant) -> Result<(), SubjectError> {
        if self.released {
            return Err(SubjectError::new(
                "the guest runs at the destination and never again here",
            ));
        }
        self.vmm
            .resume(deadline)
            .map_err(because("the VMM did not let the guest run"))
    }

    fn release(&mut self) {
        self.released = true;
    }
}

/// The guest at the destination, as the engine takes it.
#[derive(Debug)]
pub(crate) struct Coming<'a> {
    pub(crate) vmm: &'a mut dyn Vmm,
    pub(crate) memory: String,
    /// What the source's chunks are a multiple of.
    pub(crate) page: u64,
}

impl Incoming for Coming<'_> {
    fn kind(&self) -> &'static str {
        self.vmm.kind()
    }

    fn accept(&self, source: &Description) -> Result<(), SubjectError> {
        let here = self.vmm.facts();
        let find = |name: &str| here.iter().find(|(fact, _)| fact == name);
        for (name, theirs) in &source.attributes {
            match name.as_str() {
                MEMORY if *theirs == self.memory => continue,
                MEMORY => return Err(differs(name, theirs, Some(&self.memory))),
                CHUNK => {
                    self.accept_chunks(theirs)?;
                    continue;
                }
                _ => {}
            }
            let ours = find(name).map(|(_, value)| value.as_str());
            if !self.vmm.accepts(name, theirs, ours) {
                return Err(differs(name, theirs, ours));
            }
        }
        let told = |name: &str| source.attributes.iter().any(|(fact, _)| fact == name);
        let untold = here.iter().map(|(name, _)| name.as_str());
        match untold.chain([MEMORY, CHUNK]).find(|name| !told(name)) {
            None => Ok(()),
            Some(name) => Err(SubjectError::new(format!(
                "the source does not say what its {name} is, which this side has to compare: is it of another version?"
            ))),
        }
    }

    fn load(
        &mut self,
        state: &mut (dyn Read + Send),
        deadline: Instant,
    ) -> Result<(), SubjectError> {
        self.vmm
            .load(state, deadline)
            .map_err(because("the VMM could not load the guest's state"))
    }

    fn resume(&mut self, deadline: Instant) -> Result<(), SubjectError> {
        self.vmm
            .resume(deadline)
            .map_err(because("the VMM did not let the guest run"))
    }
}

impl Coming<'_> {
    fn accept_chunks(&self, theirs: &str) -> Result<(), SubjectError> {
        let chunk: u64 = theirs.parse().unwrap_or(0);
        if chunk == 0 || !chunk.is_multiple_of(self.page) {
            return Err(SubjectError::new(format!(
                "the source sends chunks of {theirs} bytes, and this guest's memory has pages of {} bytes: have the source send chunks of \
                 that size, or use memory of smaller pages here",
                self.page
            )));
        }
        Ok(())
    }
}

fn because(context: &'static str) -> impl FnOnce(VmmError) -> SubjectError {
    move |error| SubjectError::because(context, error)
}

fn differs(name: &str, source: &str, here: Option<&str>) -> SubjectError {
    let here = here.unwrap_or("nothing like it");
    SubjectError::new(format!(
        "the two machines are not alike: {name} is {source} at the source, and {here} here"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Fake(Vec<(String, String)>);

    impl Vmm for Fake {
        fn kind(&self) -> &'static str {
            "fake"
        }

        fn facts(&self) -> Vec<(String, String)> {
            self.0.clone()
        }

        fn suspend(&mut self, _: Instant) -> Result<(), VmmError> {
            Ok(())
        }

        fn save(&mut self, _: &mut dyn Write, _: Instant) -> Result<(), VmmError> {
            Ok(())
        }

        fn load(&mut self, _: &mut dyn Read, _: Instant) -> Result<(), VmmError> {
            Ok(())
        }

        fn resume(&mut self, _: Instant) -> Result<(), VmmError> {
            Ok(())
        }
    }

    fn fake(facts: &[(&str, &str)]) -> Fake {
        let facts = facts
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        Fake(facts.collect())
    }

    /// What the destination says to a source, each with its facts, memory and chunks or pages.
    fn compared(
        source: (&[(&str, &str)], &str, u64),
        here: (&[(&str, &str)], &str, u64),
    ) -> Result<(), String> {
        let description = Leaving {
            vmm: &mut fake(source.0),
            memory: source.1.to_owned(),
            chunk: source.2,
            released: false,
        }
        .describe();
        let coming = Coming {
            vmm: &mut fake(here.0),
            memory: here.1.to_owned(),
            page: here.2,
        };
        coming
            .accept(&description)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn machines_that_are_alike_are_accepted_and_what_differs_is_named() {
        let facts: &[_] = &[("state", "3"), ("clock", "2 GHz")];
        assert_eq!(compared((facts, "m", 8192), (facts, "m", 4096)), Ok(()));
        let refused = |source, here| compared(source, here).unwrap_err();
        let newer: &[_] = &[("state", "4"), ("clock", "2 GHz")];
        let error = refused((facts, "m", 4096), (newer, "m", 4096));
        assert!(
            error.contains("state is 3 at the source, and 4 here"),
            "{error}"
        );
        let error = refused((facts, "m", 4096), (facts, "n", 4096));
        assert!(error.contains("memory is m at the source"), "{error}");
        let error = refused((facts, "m", 4096), (&facts[..1], "m", 4096));
        assert!(error.contains("nothing like it"), "{error}");
        let error = refused((&facts[..1], "m", 4096), (facts, "m", 4096));
        assert!(error.contains("does not say what its clock is"), "{error}");
        let error = refused((facts, "m", 4096), (facts, "m", 2 << 20));
        assert!(error.contains("pages of 2097152 bytes"), "{error}");
    }

    #[test]
    fn a_guest_that_was_released_never_runs_here_again() {
        let mut leaving = Leaving {
            vmm: &mut fake(&[]),
            memory: String::new(),
            chunk: 4096,
            released: false,
        };
        leaving.resume(Instant::now()).unwrap();
        leaving.release();
        leaving.resume(Instant::now()).unwrap_err();
    }
}
