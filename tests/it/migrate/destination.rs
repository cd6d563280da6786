//! The destination: memory that fills up, and a thread that looks at it as soon as it may.

use std::fs::File;
use std::io::Read;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::Instant;

use memferry::chunk::Place;
use memferry::frontend::{FaultArea, FileRam, Watch};
use memferry::subject::{Description, Incoming, SubjectError};
use memferry::sys::mapping::Mapping;
use memferry::sys::memfd::memfd;
use memferry::sys::uffd::{Features, Scope, Uffd};

use super::source::{LONG, Ownership, PAGE, Source, allocated, device_state, scramble};

/// Memory for a source's, and the thread that will run there.
#[derive(Debug)]
pub(crate) struct Destination {
    ram: Option<FileRam>,
    /// What the subject has mapped: its accesses fault.
    pub(crate) memory: Vec<Arc<Mapping>>,
    source: Vec<Arc<Mapping>>,
    ownership: Arc<Ownership>,
    look: Arc<Look>,
    thread: Arc<Mutex<Option<JoinHandle<()>>>>,
    /// Fails to load, or to run.
    pub(crate) trouble: Option<Trouble>,
}

/// What the subject fails at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Trouble {
    Accept,
    Load,
    /// Loading takes for ever.
    Hang,
    Run,
}

/// What the thread has seen.
#[derive(Debug, Default)]
struct Look {
    wrong: AtomicU64,
    looked: AtomicU64,
    /// The memory was given up: what is read from now on means nothing.
    given_up: AtomicBool,
    ended: Mutex<bool>,
    changed: Condvar,
}

/// What the subject writes to a page once it has looked at it.
fn own_stamp(page: u64) -> [u8; 8] {
    scramble(!page).to_le_bytes()
}

/// Whether the subject writes to that page.
fn writes(page: u64) -> bool {
    page.is_multiple_of(3)
}

impl Destination {
    /// One that can fault.
    pub(crate) fn of(source: &Source) -> Self {
        let files = source
            .memory
            .iter()
            .map(|memory| memfd("memferry-test", memory.len()).unwrap())
            .collect();
        Self::in_files(source, files, true)
    }

    /// One whose kernel knows no userfaultfd.
    pub(crate) fn without_faults(source: &Source) -> Self {
        let files = source
            .memory
            .iter()
            .map(|memory| memfd("memferry-test", memory.len()).unwrap())
            .collect();
        Self::in_files(source, files, false)
    }

    pub(crate) fn in_files(source: &Source, files: Vec<File>, faults: bool) -> Self {
        let memory: Vec<_> = files
            .iter()
            .map(|file| {
                let len = file.metadata().unwrap().len();
                Arc::new(Mapping::new(file.try_clone().unwrap(), len).unwrap())
            })
            .collect();
        let areas = memory
            .iter()
            .enumerate()
            .map(|(region, memory)| FaultArea {
                addresses: memory.addresses(),
                place: Place { region, offset: 0 },
            })
            .collect();
        let watch = faults.then(|| Watch {
            uffd: Uffd::create(Scope::UserModeOnly, Features::MISSING_SHMEM).unwrap(),
            areas,
            release: Box::new(|| Ok(())),
        });
        Self {
            ram: Some(FileRam::new(files, watch).unwrap()),
            memory,
            source: source.memory.clone(),
            ownership: source.ownership.clone(),
            look: Arc::default(),
            thread: Arc::default(),
            trouble: None,
        }
    }

    pub(crate) fn ram(&self) -> &FileRam {
        self.ram.as_ref().unwrap()
    }

    pub(crate) fn names(&self) -> Vec<String> {
        (0..self.memory.len())
            .map(|index| format!("r{index}"))
            .collect()
    }

    pub(crate) fn subject(&self) -> Newcomer {
        Newcomer {
            memory: self.memory.clone(),
            source: self.source.clone(),
            ownership: self.ownership.clone(),
            look: self.look.clone(),
            thread: self.thread.clone(),
            trouble: self.trouble,
        }
    }

    /// Waits until the subject has looked at everything, and checks that all it saw was the source's memory as it was
    /// when it was suspended, and that nothing came over what it wrote.
    #[track_caller]
    pub(crate) fn assert_moved(&self) {
        let ended = self.look.ended.lock().unwrap();
        let (ended, _) = self
            .look
            .changed
            .wait_timeout_while(ended, LONG, |ended| !*ended)
            .unwrap();
        assert!(*ended, "the subject has not seen all of its memory");
        drop(ended);
        assert_eq!(self.wrong(), 0, "pages were not what they were");
        for (memory, source) in self.memory.iter().zip(&self.source) {
            for page in 0..memory.len().div_ceil(PAGE) {
                let (mut theirs, ours) = (read(source, page), read(memory, page));
                if writes(page) && theirs.len() >= 8 {
                    theirs[..8].copy_from_slice(&own_stamp(page));
                }
                assert!(theirs == ours, "page {page} is not what it should be");
            }
        }
    }

    /// How many pages were seen that the source does not have.
    pub(crate) fn wrong(&self) -> u64 {
        self.look.wrong.load(Ordering::SeqCst)
    }

    /// How many pages the subject has looked at.
    pub(crate) fn looked(&self) -> u64 {
        self.look.looked.load(Ordering::SeqCst)
    }

    pub(crate) fn allocated(&self) -> u64 {
        allocated(&self.memory)
    }
}

impl Drop for Destination {
    fn drop(&mut self) {
        // Closing the userfaultfd lets who waits read zeros, so that the thread ends.
        self.look.given_up.store(true, Ordering::SeqCst);
        self.ram = None;
        if let Some(thread) = self.thread.lock().unwrap().take() {
            let _ = thread.join();
        }
    }
}

/// The bytes of a page, without touching it.
fn read(memory: &Mapping, page: u64) -> Vec<u8> {
    let range = page * PAGE..((page + 1) * PAGE).min(memory.len());
    let mut bytes = vec![0; usize::try_from(range.end - range.start).unwrap()];
    memory.read(range, &mut bytes).unwrap();
    bytes
}

/// The bytes of a page as a program gets them: waits until it is there.
fn touch(memory: &Mapping, page: u64) -> Vec<u8> {
    let range = page * PAGE..((page + 1) * PAGE).min(memory.len());
    memory.digest(range).unwrap();
    read(memory, page)
}

/// The subject where it will run.
#[derive(Debug)]
pub(crate) struct Newcomer {
    memory: Vec<Arc<Mapping>>,
    source: Vec<Arc<Mapping>>,
    ownership: Arc<Ownership>,
    look: Arc<Look>,
    thread: Arc<Mutex<Option<JoinHandle<()>>>>,
    trouble: Option<Trouble>,
}

impl Newcomer {
    fn look_at_everything(memory: &[Arc<Mapping>], source: &[Arc<Mapping>], look: &Look) {
        for (memory, source) in memory.iter().zip(source) {
            let pages = memory.len().div_ceil(PAGE);
            let mut order: Vec<u64> = (0..pages).collect();
            order.sort_by_key(|&page| scramble(page));
            for page in order {
                let seen = touch(memory, page);
                if look.given_up.load(Ordering::SeqCst) {
                    return;
                }
                look.looked.fetch_add(1, Ordering::SeqCst);
                if seen != read(source, page) {
                    look.wrong.fetch_add(1, Ordering::SeqCst);
                }
                if writes(page) && seen.len() >= 8 {
                    memory.write(page * PAGE, &own_stamp(page)).unwrap();
                }
            }
        }
    }
}

impl Incoming for Newcomer {
    fn kind(&self) -> &'static str {
        "test"
    }

    fn accept(&self, source: &Description) -> Result<(), SubjectError> {
        assert_eq!(source.attributes.len(), 1);
        match self.trouble {
            Some(Trouble::Accept) => Err(SubjectError::new("a round one does not fit here")),
            _ => Ok(()),
        }
    }

    fn load(
        &mut self,
        state: &mut (dyn Read + Send),
        deadline: Instant,
    ) -> Result<(), SubjectError> {
        let mut bytes = Vec::new();
        state.read_to_end(&mut bytes).unwrap();
        assert!(bytes == device_state(), "the state is not what was saved");
        if self.trouble == Some(Trouble::Hang) {
            while Instant::now() < deadline {
                std::thread::park_timeout(deadline.saturating_duration_since(Instant::now()));
            }
            return Err(SubjectError::new("it was not loaded in time"));
        }
        if self.trouble == Some(Trouble::Load) {
            return Err(SubjectError::new("the test wants loading to fail"));
        }
        // Devices look at memory while they are loaded, and wait where it is absent.
        let (memory, source) = (self.memory.clone(), self.source.clone());
        let (done, looked) = mpsc::channel();
        std::thread::spawn(move || {
            let wrong = memory.iter().zip(&source).map(|(memory, source)| {
                let last = memory.len().div_ceil(PAGE) - 1;
                let differs = |page: &u64| touch(memory, *page) != read(source, *page);
                [0, last / 2, last]
                    .iter()
                    .filter(|&page| differs(page))
                    .count()
            });
            // Nobody listens any more if it came too late.
            let _ = done.send(wrong.sum::<usize>());
        });
        match looked.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(wrong) => {
                self.look.wrong.fetch_add(wrong as u64, Ordering::SeqCst);
                Ok(())
            }
            Err(_) => Err(SubjectError::new("the memory did not come in time")),
        }
    }

    fn resume(&mut self, _deadline: Instant) -> Result<(), SubjectError> {
        if self.trouble == Some(Trouble::Run) {
            return Err(SubjectError::new("the test wants it not to run"));
        }
        self.ownership.destination_runs();
        let (memory, source) = (self.memory.clone(), self.source.clone());
        let look = self.look.clone();
        let thread = std::thread::spawn(move || {
            Self::look_at_everything(&memory, &source, &look);
            *look.ended.lock().unwrap() = true;
            look.changed.notify_all();
        });
        *self.thread.lock().unwrap() = Some(thread);
        Ok(())
    }
}
