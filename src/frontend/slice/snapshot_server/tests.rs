use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::sync::{Condvar, Mutex};

use super::*;
use crate::backend::MemoryStorage;
use crate::frontend::slice::snapshot::MemoryMapping;
use crate::sys::memory::Memory;
use crate::sys::uffd::Scope;

const PATIENCE: Duration = Duration::from_secs(20);
const PAGE: u64 = 4096;

fn storage(pages: u64) -> Arc<MemoryStorage> {
    let storage = Arc::new(MemoryStorage::new(pages * PAGE));
    for page in 0..pages {
        storage
            .write_all_at(&[byte_of(page); 4096], page * PAGE)
            .unwrap();
    }
    storage
}

fn byte_of(page: u64) -> u8 {
    u8::try_from(page % 255).unwrap() + 1
}

/// A VMM in this process.
struct Vmm {
    memory: Memory,
    uffd: Uffd,
}

impl Vmm {
    fn new(pages: u64) -> Self {
        let memory = Memory::reserve(pages * PAGE).unwrap();
        let uffd = Uffd::create(Scope::UserModeOnly, Features::EVENT_REMOVE).unwrap();
        let missing = Mode {
            missing: true,
            ..Mode::default()
        };
        uffd.register(memory.addresses(), missing).unwrap();
        Self { memory, uffd }
    }

    fn served(&self, storage: Arc<dyn Storage>) -> SnapshotServer {
        let options = SnapshotOptions {
            read_ahead: 0,
            ..SnapshotOptions::default()
        };
        SnapshotServer::serve(self.snapshot(), storage, &options, None).unwrap()
    }

    fn snapshot(&self) -> Snapshot {
        let addresses = self.memory.addresses();
        Snapshot {
            descriptor: self.uffd.as_fd().try_clone_to_owned().unwrap(),
            mappings: vec![MemoryMapping {
                address: addresses.start,
                len: addresses.end - addresses.start,
                offset: 0,
                page_size: PAGE,
            }],
        }
    }

    fn byte(&self, page: u64) -> u8 {
        let mut byte = [0];
        self.memory.load(page * PAGE + 9, &mut byte).unwrap();
        byte[0]
    }

    fn give_back(&self, page: u64) {
        self.memory.discard(page * PAGE..(page + 1) * PAGE).unwrap();
    }
}

/// A storage whose reads wait until they are let.
#[derive(Debug)]
struct Held {
    storage: Arc<MemoryStorage>,
    /// How many reads have begun, and whether they may go on.
    state: Mutex<(u64, bool)>,
    changed: Condvar,
}

impl Held {
    fn new(pages: u64) -> Arc<Self> {
        Arc::new(Self {
            storage: storage(pages),
            state: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    fn wait_until(&self, holds: impl Fn(&(u64, bool)) -> bool) {
        let state = self.state.lock().unwrap();
        let waited = self
            .changed
            .wait_timeout_while(state, PATIENCE, |state| !holds(state))
            .unwrap();
        assert!(!waited.1.timed_out());
    }

    fn let_go(&self) {
        self.state.lock().unwrap().1 = true;
        self.changed.notify_all();
    }
}

impl Storage for Held {
    fn len(&self) -> u64 {
        self.storage.len()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.state.lock().unwrap().0 += 1;
        self.changed.notify_all();
        self.wait_until(|&(_, goes_on)| goes_on);
        self.storage.read_exact_at(buf, offset)
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.storage.write_all_at(buf, offset)
    }

    fn flush(&self) -> io::Result<()> {
        self.storage.flush()
    }

    fn data_ranges(&self, within: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        self.storage.data_ranges(within)
    }
}

#[test]
fn what_is_given_back_while_it_is_on_its_way_is_zeros() {
    let storage = Held::new(8);
    let vmm = Vmm::new(8);
    let server = vmm.served(storage.clone());
    thread::scope(|scope| {
        scope.spawn(|| server.bring(0..8 * PAGE, &mut Vec::new()).unwrap());
        storage.wait_until(|&(begun, _)| begun == 1);
        vmm.give_back(3);
        storage.let_go();
    });
    let bytes: Vec<u8> = (0..8).map(|page| vmm.byte(page)).collect();
    assert_eq!(bytes, [1, 2, 3, 0, 5, 6, 7, 8]);
    let progress = server.progress();
    assert_eq!((progress.resident, progress.zeros), (7 * PAGE, PAGE));
    server.finish(PATIENCE).unwrap();
}

/// The program went on as soon as the event was read, and a page that was on its way came before the event was noted.
#[test]
fn what_was_given_back_never_has_its_old_bytes_again() {
    const PAGES: u64 = 128;
    for _ in 0..60 {
        let vmm = Vmm::new(PAGES);
        let server = vmm.served(storage(PAGES));
        thread::scope(|scope| {
            for own in 0..3 {
                let vmm = &vmm;
                scope.spawn(move || {
                    for page in (own..PAGES).step_by(3) {
                        vmm.give_back(page);
                        for _ in 0..3 {
                            assert_eq!(vmm.byte(page), 0, "page {page}");
                        }
                    }
                });
            }
            for own in 0..3 {
                let server = &server;
                scope.spawn(move || {
                    let mut buffer = Vec::new();
                    for page in (own..PAGES).step_by(3) {
                        server
                            .bring(page * PAGE..(page + 1) * PAGE, &mut buffer)
                            .unwrap();
                    }
                });
            }
        });
        assert!(server.progress().is_complete());
    }
}

/// One was woken before its memory was the kernel's again, waited anew, and nobody woke it again.
#[test]
fn who_accesses_memory_while_it_is_let_go_of_goes_on() {
    for round in 0..400 {
        let vmm = Arc::new(Vmm::new(16));
        let server = vmm.served(storage(16));
        let stop = Arc::new(AtomicBool::new(false));
        let (ended, ends) = mpsc::channel();
        for own in 0..4 {
            let (vmm, stop, ended) = (Arc::clone(&vmm), Arc::clone(&stop), ended.clone());
            thread::spawn(move || {
                let mut gone = [false; 16];
                while !stop.load(Ordering::Relaxed) {
                    for page in (own..16).step_by(4) {
                        let at = usize::try_from(page).unwrap();
                        let expected = if gone[at] { 0 } else { byte_of(page) };
                        assert_eq!(vmm.byte(page), expected, "page {page}");
                        if page >= 8 {
                            vmm.give_back(page);
                            gone[at] = true;
                        }
                    }
                }
                ended.send(()).unwrap();
            });
        }
        server.bring(0..16 * PAGE, &mut Vec::new()).unwrap();
        server.finish(PATIENCE).unwrap();
        drop(server);
        stop.store(true, Ordering::Relaxed);
        for _ in 0..4 {
            let ended = ends.recv_timeout(PATIENCE);
            assert!(ended.is_ok(), "a thread hangs in round {round}");
        }
    }
}

#[test]
fn what_is_absent_is_not_let_go_of() {
    let vmm = Vmm::new(4);
    let server = vmm.served(storage(4));
    assert_eq!(vmm.byte(1), byte_of(1));
    let busy = server.finish(PATIENCE).unwrap_err();
    assert_eq!(busy.kind(), io::ErrorKind::ResourceBusy);
    assert_eq!([vmm.byte(1), vmm.byte(2)], [byte_of(1), byte_of(2)]);
}

#[test]
fn holes_are_zeros_that_are_not_fetched() {
    let storage = Arc::new(MemoryStorage::new(600 * PAGE));
    storage.write_all_at(&[7; 4096], 300 * PAGE).unwrap();
    let vmm = Vmm::new(600);
    let server = vmm.served(storage);
    let data = server.data_ranges(0..600 * PAGE).unwrap();
    let covers = |at: u64| data.iter().any(|range| range.contains(&at));
    assert!(covers(300 * PAGE) && !covers(0) && !covers(599 * PAGE));
    server.skip(0..300 * PAGE);
    server.skip(300 * PAGE + 1..600 * PAGE);
    server.bring(0..600 * PAGE, &mut Vec::new()).unwrap();
    let progress = server.progress();
    assert_eq!((progress.resident, progress.zeros), (PAGE, 599 * PAGE));
    assert!(progress.is_complete());
    assert_eq!([vmm.byte(5), vmm.byte(300)], [0, 7]);
    server.finish(PATIENCE).unwrap();
    assert_eq!([vmm.byte(6), vmm.byte(300)], [0, 7]);
}

#[test]
fn zeros_that_come_take_no_memory() {
    let storage = storage(600);
    for range in [0..PAGE, 7 * PAGE..300 * PAGE, 599 * PAGE..600 * PAGE] {
        let len = usize::try_from(range.end - range.start).unwrap();
        storage.write_all_at(&vec![0; len], range.start).unwrap();
    }
    let vmm = Vmm::new(600);
    let server = vmm.served(storage);
    server.bring(0..600 * PAGE, &mut Vec::new()).unwrap();
    let progress = server.progress();
    assert_eq!(
        (progress.resident, progress.zeros),
        (305 * PAGE, 295 * PAGE)
    );
    assert_eq!([vmm.byte(0), vmm.byte(6), vmm.byte(7)], [0, byte_of(6), 0]);
    server.finish(PATIENCE).unwrap();
    assert_eq!([vmm.byte(299), vmm.byte(300)], [0, byte_of(300)]);
}

#[test]
fn what_is_not_served_any_more_is_zeros_and_its_neighbours_are_not() {
    const PAGES: u64 = 300;
    let vmm = Vmm::new(PAGES);
    let server = vmm.served(storage(PAGES));
    let start = vmm.memory.addresses().start;
    let own = |page: u64| start + page * PAGE..start + (page + 1) * PAGE;
    for page in [0, 77, 78, 200] {
        vmm.uffd.unregister(own(page)).unwrap();
    }
    assert_eq!(vmm.byte(76), byte_of(76));
    server.bring(0..PAGES * PAGE, &mut Vec::new()).unwrap();
    let progress = server.progress();
    assert_eq!(
        (progress.resident, progress.zeros),
        ((PAGES - 4) * PAGE, 4 * PAGE)
    );
    for page in (0..PAGES).filter(|page| ![0, 77, 78, 200].contains(page)) {
        assert_eq!(vmm.byte(page), byte_of(page), "page {page}");
    }
    server.finish(PATIENCE).unwrap();
}

#[test]
fn memory_that_is_not_the_snapshots_is_refused() {
    let vmm = Vmm::new(4);
    let refused = |snapshot, pages| {
        let refused =
            SnapshotServer::serve(snapshot, storage(pages), &SnapshotOptions::default(), None);
        let refused = refused.unwrap_err();
        assert!(refused.waits);
        refused.error
    };
    let error = refused(vmm.snapshot(), 3);
    assert!(
        matches!(error, SnapshotError::Outside { number: 0, .. }),
        "{error}"
    );
    let mut elsewhere = vmm.snapshot();
    elsewhere.mappings[0].address = 1 << 46;
    let error = refused(elsewhere, 4);
    assert!(
        matches!(error, SnapshotError::Unmapped { number: 0, .. }),
        "{error}"
    );
    let mut huge = vmm.snapshot();
    huge.mappings[0].page_size = 2 << 20;
    let error = refused(huge, 4);
    assert!(
        matches!(error, SnapshotError::Unmapped { number: 0, .. }),
        "{error}"
    );
    let mut deaf = vmm.snapshot();
    let uffd = Uffd::create(Scope::UserModeOnly, Features::none()).unwrap();
    deaf.descriptor = uffd.as_fd().try_clone_to_owned().unwrap();
    assert!(matches!(refused(deaf, 4), SnapshotError::NoRemove));
    let mut unused = vmm.snapshot();
    unused.descriptor = crate::sys::uffd::unused(Scope::UserModeOnly).unwrap();
    let error = refused(unused, 4);
    assert!(matches!(error, SnapshotError::Unusable(_)), "{error}");
}
