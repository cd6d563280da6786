use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::thread;

use proptest::prelude::*;
use rustix::fs::MemfdFlags;

use super::*;

const SIZE: u64 = 256;
/// What KVM keeps free.
const RESERVE: u64 = 64;

/// KVM's side of a ring: what `virt/kvm/dirty_ring.c` does with one.
struct Kernel {
    file: File,
    ring: Ring,
    filled: AtomicU64,
    reset: AtomicU64,
}

impl Kernel {
    fn new() -> Self {
        let file = rustix::fs::memfd_create("ring", MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(file);
        file.set_len(SIZE * 16).unwrap();
        let ring = Ring::map(file.as_fd(), 0, u32::try_from(SIZE).unwrap()).unwrap();
        Self {
            file,
            ring,
            filled: AtomicU64::new(0),
            reset: AtomicU64::new(0),
        }
    }

    fn map(&self) -> Ring {
        Ring::map(self.file.as_fd(), 0, u32::try_from(SIZE).unwrap()).unwrap()
    }

    /// Fills an entry, and does not look whether it may.
    fn push(&self, slot: u32, page: u64) {
        let index = self.filled();
        self.ring.fill(wrapped(index), Entry { slot, page });
        self.filled.store(index + 1, SeqCst);
    }

    /// Whether it would stop the vCPU.
    fn is_full(&self) -> bool {
        self.filled() - self.reset() >= SIZE - RESERVE
    }

    fn filled(&self) -> u64 {
        self.filled.load(SeqCst)
    }

    fn reset(&self) -> u64 {
        self.reset.load(SeqCst)
    }

    fn reset_all(&self) -> u64 {
        self.reset_some(u64::MAX)
    }

    /// The same, up to `most` entries.
    fn reset_some(&self, most: u64) -> u64 {
        let mut count = 0;
        while count < most && self.ring.reset(wrapped(self.reset())) {
            self.reset.fetch_add(1, SeqCst);
            count += 1;
        }
        count
    }
}

/// An index as KVM has it.
fn wrapped(index: u64) -> u32 {
    u32::try_from(index & u64::from(u32::MAX)).unwrap()
}

fn rings(kernel: &Kernel) -> Rings {
    let mut rings = Rings::default();
    assert_eq!(rings.add(kernel.map()), 0);
    rings
}

fn harvest(rings: &mut Rings, kernel: &Kernel) -> Vec<u64> {
    let mut pages = Vec::new();
    rings
        .harvest(|_, entry| pages.push(entry.page), || Ok(kernel.reset_all()))
        .unwrap();
    pages
}

#[test]
fn an_entry_is_read_once_and_only_when_it_was_filled() {
    let kernel = Kernel::new();
    let ring = kernel.map();
    assert_eq!(ring.collect(0), None);
    kernel.push(7, 99);
    let entry = Entry { slot: 7, page: 99 };
    assert_eq!(ring.collect(0), Some(entry));
    assert_eq!(ring.look(0), Mark::Read, "it is KVM's again");
    assert_eq!(ring.collect(0), None, "until KVM fills it again");
    assert_eq!(ring.collect(1), None);
}

#[test]
fn entries_are_read_in_order_round_and_round() {
    let kernel = Kernel::new();
    let mut rings = rings(&kernel);
    for start in (0..3 * SIZE).step_by(50) {
        (start..start + 50).for_each(|page| kernel.push(1, page));
        let expected: Vec<u64> = (start..start + 50).collect();
        assert_eq!(harvest(&mut rings, &kernel), expected);
    }
    assert!(!rings.lost());
    assert_eq!(harvest(&mut rings, &kernel), [0_u64; 0]);
}

#[test]
fn a_ring_whose_count_is_no_power_of_two_is_refused() {
    let kernel = Kernel::new();
    assert!(Ring::map(kernel.file.as_fd(), 0, 100).is_err());
    assert!(Ring::map(kernel.file.as_fd(), 0, 0).is_err());
}

/// A signal stops KVM half-way: it is delivered between two calls.
#[test]
fn resetting_goes_on_until_all_that_was_read_is_reset() {
    let kernel = Kernel::new();
    let mut rings = rings(&kernel);
    (0..10).for_each(|page| kernel.push(0, page));
    let calls = Cell::new(0);
    let reset = || {
        calls.set(calls.get() + 1);
        match calls.get() {
            1 => Ok(0),
            2 => Err(io::ErrorKind::Interrupted.into()),
            _ => Ok(kernel.reset_all()),
        }
    };
    rings.harvest(|_, _| {}, reset).unwrap();
    assert_eq!((calls.get(), kernel.reset()), (3, 10));
}

#[test]
fn a_kvm_that_resets_nothing_is_an_error_and_the_next_harvest_makes_up_for_it() {
    let kernel = Kernel::new();
    let mut rings = rings(&kernel);
    (0..10).for_each(|page| kernel.push(0, page));
    let error = rings.harvest(|_, _| {}, || Ok(0)).unwrap_err();
    let told = error.downcast::<TrackError>().unwrap();
    assert!(
        matches!(told, TrackError::NotReset { left: 10 }),
        "{told:?}"
    );
    let failed = || Err(io::Error::other("no VM"));
    assert_eq!(
        rings.harvest(|_, _| {}, failed).unwrap_err().to_string(),
        "no VM"
    );
    kernel.push(0, 10);
    assert_eq!(harvest(&mut rings, &kernel), [10]);
    assert_eq!(kernel.reset(), 11);
    assert!(!rings.lost());
}

/// KVM emulated a vCPU for a while before it looked whether its ring was full, and overwrote entries. Once that has
/// happened, it counts entries that are not there, and would call the ring full for ever.
#[test]
fn a_ring_that_is_overrun_is_noticed_and_works_again() {
    for overrun in [0, 1, 100, SIZE - 1, SIZE, 5 * SIZE + 77] {
        let kernel = Kernel::new();
        let mut rings = rings(&kernel);
        (0..SIZE + overrun).for_each(|page| kernel.push(0, page));
        for attempt in 0.. {
            assert!(attempt < 100, "{overrun}: the vCPU never runs again");
            if !kernel.is_full() {
                break;
            }
            rings
                .make_room(0, |_, _| {}, || Ok(kernel.reset_all()))
                .unwrap();
        }
        assert!(rings.lost(), "{overrun}");
        // From here on all is told, exactly, but for what comes at once where KVM has lost count.
        for round in 0..20 {
            let pages = 1000 * round..1000 * round + 10;
            pages.clone().for_each(|page| kernel.push(0, page));
            assert_eq!(harvest(&mut rings, &kernel), pages.collect::<Vec<_>>());
        }
        assert!(!kernel.is_full());
    }
}

/// The vCPU goes on while entries are read and reset, and overwrites some that were read and not reset.
#[test]
fn what_is_overwritten_before_it_is_reset_is_noticed() {
    let kernel = Kernel::new();
    let mut rings = rings(&kernel);
    (0..100).for_each(|page| kernel.push(0, page));
    let pushed = Cell::new(false);
    let reset = || {
        if !pushed.replace(true) {
            (1000..1000 + SIZE - 100 + 30).for_each(|page| kernel.push(0, page));
        }
        Ok(kernel.reset_all())
    };
    rings.harvest(|_, _| {}, reset).unwrap();
    assert!(rings.lost());
    rings.found_again();
    harvest(&mut rings, &kernel);
    kernel.push(0, 7);
    assert!(harvest(&mut rings, &kernel).contains(&7));
}

#[test]
fn a_vcpu_that_is_not_there_has_no_room_made_for_it() {
    let kernel = Kernel::new();
    let mut rings = rings(&kernel);
    rings
        .make_room(7, |_, _| {}, || Ok(kernel.reset_all()))
        .unwrap();
}

/// Who reads the ring of a vCPU whose pages are written in order, each once.
struct Reader<'a> {
    kernel: &'a Kernel,
    rings: Rings,
    told: BTreeSet<u64>,
    /// All pages before this one were told, or written when something was lost.
    settled: u64,
    overruns: u64,
}

impl Reader<'_> {
    /// Reads the ring; for the vCPU, if it `is_full`.
    fn read(&mut self, is_full: bool) {
        let written = self.kernel.filled();
        let found = |_: usize, entry: Entry| {
            self.told.insert(entry.page);
        };
        let reset = || Ok(self.kernel.reset_all());
        let read = match is_full {
            true => self.rings.make_room(0, found, reset),
            false => self.rings.harvest(found, reset),
        };
        read.unwrap();
        if self.rings.lost() {
            self.rings.found_again();
            self.overruns += 1;
            self.settled = self.kernel.filled();
        }
        while self.settled < written {
            assert!(self.told.contains(&self.settled), "lost unnoticed");
            self.settled += 1;
        }
        self.told = self.told.split_off(&self.settled);
        // An entry may be read before it is counted.
        assert!(self.kernel.reset() <= self.kernel.filled() + 1);
    }
}

/// One that is emulated, on a processor of its own: it goes round the ring while entries are read, skipped and reset.
#[test]
fn nothing_is_lost_unnoticed_while_a_vcpu_goes_round_its_ring() {
    const BATCHES: u64 = 5000;
    let kernel = Kernel::new();
    let reader = Mutex::new(Reader {
        kernel: &kernel,
        rings: rings(&kernel),
        told: BTreeSet::new(),
        settled: 0,
        overruns: 0,
    });
    thread::scope(|scope| {
        let vcpu = scope.spawn(|| {
            for batch in 0..BATCHES {
                while kernel.is_full() {
                    reader.lock().unwrap().read(true);
                }
                // From little to twice round the ring.
                for _ in 0..batch * batch % (2 * SIZE + 1) {
                    kernel.push(0, kernel.filled());
                }
            }
        });
        while !vcpu.is_finished() {
            reader.lock().unwrap().read(false);
            // Else the vCPU would not have its turn.
            thread::yield_now();
        }
    });
    let mut reader = reader.into_inner().unwrap();
    reader.read(false);
    assert_eq!(reader.settled, kernel.filled());
    assert!(reader.overruns > 0);
}

/// What the world does to rings: here and below, an index is that of a vCPU.
#[derive(Debug, Clone)]
enum Step {
    /// A vCPU writes so many pages.
    Write(usize, u64),
    /// A take; whenever KVM is called, the next of these happen first.
    Take(Vec<Meanwhile>),
    /// A take at which KVM fails.
    Failing,
}

/// What happens while entries are reset.
#[derive(Debug, Clone)]
enum Meanwhile {
    /// A vCPU writes so many pages.
    Write(usize, u64),
    /// A signal stops KVM after so many entries.
    Signal(u64),
}

fn writes() -> impl Strategy<Value = u64> {
    prop_oneof![4 => 0..40_u64, 1 => 0..700_u64]
}

fn step() -> impl Strategy<Value = Step> {
    let meanwhile = prop_oneof![
        (0..2_usize, writes()).prop_map(|(vcpu, count)| Meanwhile::Write(vcpu, count)),
        (0..300_u64).prop_map(Meanwhile::Signal),
    ];
    prop_oneof![
        5 => (0..2_usize, writes()).prop_map(|(vcpu, count)| Step::Write(vcpu, count)),
        5 => prop::collection::vec(meanwhile, 0..8).prop_map(Step::Take),
        1 => Just(Step::Failing),
    ]
}

/// Two vCPUs that KVM emulates: it looks whether a ring has room only before it begins to.
struct World {
    kernels: [Kernel; 2],
    /// Written and not told.
    untold: RefCell<BTreeSet<u64>>,
    page: Cell<u64>,
}

impl World {
    /// What KVM does of this while nobody makes room.
    fn write(&self, vcpu: usize, count: u64) {
        let kernel = &self.kernels[vcpu];
        if kernel.is_full() {
            return;
        }
        for _ in 0..count {
            self.untold.borrow_mut().insert(self.page.get());
            kernel.push(0, self.page.get());
            self.page.set(self.page.get() + 1);
        }
    }

    fn tell(&self, entry: Entry) {
        self.untold.borrow_mut().remove(&entry.page);
    }

    fn reset(&self, most: u64) -> u64 {
        let mut left = most;
        for kernel in &self.kernels {
            left -= kernel.reset_some(left);
        }
        most - left
    }

    /// No ring may be reset beyond what it was filled to, or it counts as full for ever.
    fn is_sound(&self) -> bool {
        let mut kernels = self.kernels.iter();
        kernels.all(|kernel| kernel.reset() <= kernel.filled())
    }
}

proptest! {
    #[test]
    fn what_a_vcpu_wrote_is_told_or_said_to_be_lost_and_it_always_runs_again(
        steps in prop::collection::vec(step(), 0..60),
    ) {
        let world = World {
            kernels: [Kernel::new(), Kernel::new()],
            untold: RefCell::default(),
            page: Cell::new(0),
        };
        let mut rings = Rings::default();
        for kernel in &world.kernels {
            rings.add(kernel.map());
        }
        let tell = |_: usize, entry: Entry| world.tell(entry);
        for step in steps {
            match step {
                Step::Write(vcpu, count) => {
                    let mut attempts = 0;
                    while world.kernels[vcpu].is_full() {
                        attempts += 1;
                        prop_assert!(attempts < 50, "the vCPU never runs again");
                        rings.make_room(vcpu, tell, || Ok(world.reset(u64::MAX))).unwrap();
                    }
                    world.write(vcpu, count);
                }
                Step::Take(meanwhile) => {
                    let before = world.page.get();
                    let mut meanwhile = meanwhile.into_iter();
                    let reset = || {
                        match meanwhile.next() {
                            Some(Meanwhile::Write(vcpu, count)) => world.write(vcpu, count),
                            Some(Meanwhile::Signal(most)) => return Ok(world.reset(most)),
                            None => {}
                        }
                        Ok(world.reset(u64::MAX))
                    };
                    rings.harvest(tell, reset).unwrap();
                    if rings.lost() {
                        world.untold.borrow_mut().clear();
                        rings.found_again();
                    }
                    let old = world.untold.borrow().range(..before).count();
                    prop_assert_eq!(old, 0, "written before the take and not told by it");
                }
                Step::Failing => {
                    // With nothing to reset KVM is not called.
                    let failed = || Err(io::Error::other("no VM"));
                    let _ = rings.harvest(tell, failed);
                }
            }
            prop_assert!(world.is_sound(), "reset beyond what was filled");
        }
    }
}
