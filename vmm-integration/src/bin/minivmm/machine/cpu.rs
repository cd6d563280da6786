//! A virtual processor: a thread that runs it, and can be made to stop by a deadline.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_integration::Throttle;
use vmm_integration::kvm::DirtyRing;
use vmm_sys_util::signal::Killable;

use super::ports::{Ports, Request};
use super::slices::{Slice, Slices};
use crate::sys::{self, Kickable};

/// How long a processor may wait for room in its dirty ring. A take makes some every now and then.
const PATIENCE: Duration = Duration::from_secs(30);

/// The processors of a machine, and the threads that run them.
#[derive(Debug)]
pub(crate) struct Cpus {
    shared: Arc<Shared>,
}

struct Shared {
    /// Held by its thread while that is in the guest.
    cpus: Vec<Mutex<VcpuFd>>,
    /// Of all processors, to kick them.
    threads: Mutex<Vec<JoinHandle<()>>>,
    slices: Slices,
    ports: Arc<Ports>,
    /// Of all processors, by their numbers; each has to make room in its own.
    rings: Option<Arc<DirtyRing>>,
    table: Mutex<Table>,
    changed: Condvar,
    /// What [`Table::wish`] says, for who looks after every exit.
    leave: AtomicBool,
    exits: Vec<AtomicU64>,
    /// Told of a processor that ends.
    ended: Box<Told>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("table", &self.table)
            .finish_non_exhaustive()
    }
}

/// What is called when a processor ends.
type Told = dyn Fn(usize, &Ending) + Send + Sync;

#[derive(Debug)]
struct Table {
    wish: Wish,
    standing: Vec<Standing>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wish {
    Stand,
    Run,
    End,
}

/// What a processor does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Standing {
    /// It is not in the guest, and nothing that it began there is unfinished.
    Stands,
    /// It is in the guest, or on its way there.
    Runs,
    /// It cannot run any more.
    Ended(Ending),
}

/// Why a processor ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Ending {
    /// The guest asked for it.
    #[error("the guest asked for {0}")]
    Asked(Request),
    /// It halted where no interrupt will come.
    #[error("the guest halted")]
    Halted,
    /// It failed three times over.
    #[error("the guest failed beyond repair (triple fault)")]
    TripleFault,
    /// KVM could not run it.
    #[error("KVM cannot run this guest: {what} at {rip:#x}")]
    Unable {
        /// What it says.
        what: String,
        /// The instruction.
        rip: u64,
    },
    /// Its dirty ring is full and stays so.
    #[error("the processor's dirty ring cannot be emptied: {0}")]
    NoRoom(String),
    /// The system call failed.
    #[error("KVM_RUN failed: {0}")]
    Failed(kvm_ioctls::Error),
}

/// Some processors did not stop by the deadline.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "these processors did not stop in time: {0:?}. They wait in the kernel for a page of memory, or for the console to be read"
)]
pub(crate) struct Busy(pub(crate) Vec<usize>);

impl Cpus {
    /// Makes a thread for each processor. They stand. `ended` is told of each that ends.
    pub(crate) fn start(
        cpus: Vec<VcpuFd>,
        ports: Arc<Ports>,
        rings: Option<Arc<DirtyRing>>,
        ended: impl Fn(usize, &Ending) + Send + Sync + 'static,
    ) -> io::Result<Self> {
        sys::handle_kicks().map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        let shared = Arc::new(Shared {
            table: Mutex::new(Table {
                wish: Wish::Stand,
                standing: vec![Standing::Stands; cpus.len()],
            }),
            changed: Condvar::new(),
            leave: AtomicBool::new(true),
            exits: cpus.iter().map(|_| AtomicU64::new(0)).collect(),
            threads: Mutex::new(Vec::new()),
            slices: Slices::new(cpus.len()),
            cpus: cpus.into_iter().map(Mutex::new).collect(),
            ports,
            rings,
            ended: Box::new(ended),
        });
        let made = Self {
            shared: Arc::clone(&shared),
        };
        for index in 0..shared.cpus.len() {
            let serving = Arc::clone(&shared);
            let thread = thread::Builder::new().name(format!("cpu{index}"));
            let thread = thread.spawn(move || serving.serve(index))?;
            shared.threads().push(thread);
        }
        let slices = thread::Builder::new().name("slices".into());
        slices.spawn(move || shared.slices.keep(|index| shared.kick(index)))?;
        Ok(made)
    }

    /// Lets every processor run that has not ended.
    pub(crate) fn run(&self) {
        self.shared.wish(Wish::Run);
    }

    /// Stops every processor.
    ///
    /// # Errors
    /// Those that did not stop by `deadline`. They stop when they can, unless [`run`](Self::run) is called.
    pub(crate) fn stand(&self, deadline: Instant) -> Result<(), Busy> {
        self.shared.wish(Wish::Stand);
        self.shared.kick_all();
        let mut table = self.shared.table();
        while table.standing.contains(&Standing::Runs) {
            let now = Instant::now();
            if now >= deadline {
                let runs = |(index, standing): (usize, &Standing)| {
                    (*standing == Standing::Runs).then_some(index)
                };
                return Err(Busy(
                    table.standing.iter().enumerate().filter_map(runs).collect(),
                ));
            }
            let waited = self.shared.changed.wait_timeout(table, deadline - now);
            table = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// Slows each of them down so far from now on. Those that stand go on to stand.
    pub(crate) fn throttle(&self, throttles: &[Throttle]) {
        self.shared.slices.set(throttles);
        // One that is in the guest has no slice that ends.
        self.shared.kick_all();
    }

    /// How far each of them is slowed down.
    pub(crate) fn throttles(&self) -> Vec<Throttle> {
        self.shared.slices.throttles()
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.shared.cpus.len()
    }

    /// What each of them does.
    pub(crate) fn standing(&self) -> Vec<Standing> {
        self.shared.table().standing.clone()
    }

    /// How often each of them has left the guest.
    pub(crate) fn exits(&self) -> Vec<u64> {
        let exits = self.shared.exits.iter();
        exits.map(|exits| exits.load(Ordering::Relaxed)).collect()
    }

    /// The processors themselves, one after the other. They stand: a processor that runs is waited for.
    pub(crate) fn each(&self) -> impl Iterator<Item = MutexGuard<'_, VcpuFd>> {
        let cpus = self.shared.cpus.iter();
        cpus.map(|cpu| cpu.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Cpus {
    /// Ends the threads; one that is held up in the kernel is left behind, and ends with what holds it up.
    fn drop(&mut self) {
        self.shared.wish(Wish::End);
        self.shared.slices.end();
        self.shared.kick_all();
    }
}

impl Shared {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wish(&self, wish: Wish) {
        self.table().wish = wish;
        self.leave.store(wish != Wish::Run, Ordering::SeqCst);
        self.changed.notify_all();
        self.slices.interrupt();
    }

    fn threads(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a processor leave the guest and look what is wished.
    fn kick(&self, index: usize) {
        if let Some(thread) = self.threads().get(index) {
            // It fails for a thread that has ended, which needs no kick.
            let _ = thread.kill(sys::kick_signal());
        }
    }

    fn kick_all(&self) {
        (0..self.cpus.len()).for_each(|index| self.kick(index));
    }

    /// What a processor's thread does.
    fn serve(&self, index: usize) {
        loop {
            let mut table = self.table();
            loop {
                match table.wish {
                    Wish::End => return,
                    Wish::Run if table.standing[index] == Standing::Stands => break,
                    Wish::Run | Wish::Stand => {}
                }
                let woken = self.changed.wait(table);
                table = woken.unwrap_or_else(PoisonError::into_inner);
            }
            table.standing[index] = Standing::Runs;
            drop(table);
            let ended = {
                let cpu = self.cpus[index].lock();
                let mut cpu = cpu.unwrap_or_else(PoisonError::into_inner);
                self.run(index, &mut cpu)
            };
            let standing = ended.clone().map_or(Standing::Stands, Standing::Ended);
            self.table().standing[index] = standing;
            self.changed.notify_all();
            if let Some(ending) = ended {
                (self.ended)(index, &ending);
            }
        }
    }

    /// Runs until somebody wants it to stand, or it ends.
    fn run(&self, index: usize, cpu: &mut VcpuFd) -> Option<Ending> {
        let mut kickable = Kickable::new(cpu);
        // A guest that reads KVM's clock is told that it stood still, lest its watchdog think that it hung; another one cannot be.
        let _ = kickable.cpu().kvmclock_ctrl();
        let mut full_since = None;
        let mut slice = Slice::default();
        loop {
            self.slices.rest(index, &mut slice, &self.leave);
            let leave = self.leave.load(Ordering::SeqCst);
            if leave {
                // KVM finishes what the last exit began, a read from a port for example, when the guest is entered again: it has to,
                // or that would be in nobody's state. Then it leaves at once.
                kickable.cpu().set_kvm_immediate_exit(1);
            }
            let exit = kickable.cpu().run();
            self.exits[index].fetch_add(1, Ordering::Relaxed);
            match exit {
                Ok(exit) => {
                    let made = self
                        .rings
                        .as_ref()
                        .map(|rings| rings.make_room(index, &exit));
                    match made.transpose() {
                        Ok(Some(true)) => {
                            full_since = None;
                            continue;
                        }
                        Ok(_) => {}
                        // It may pass, once others have stopped or there was a take; a guest is worth waiting for.
                        Err(error) => {
                            let since = full_since.get_or_insert_with(Instant::now);
                            if since.elapsed() < PATIENCE {
                                thread::yield_now();
                                continue;
                            }
                            return Some(Ending::NoRoom(error.to_string()));
                        }
                    }
                    if let Err(ending) = self.handle(exit) {
                        return Some(ending.of(kickable.cpu()));
                    }
                }
                Err(error) if error.errno() == libc::EINTR => {
                    if leave {
                        return None;
                    }
                    kickable.cpu().set_kvm_immediate_exit(0);
                }
                Err(error) if error.errno() == libc::EAGAIN => {}
                Err(error) => return Some(Ending::Failed(error)),
            }
        }
    }

    fn handle(&self, exit: VcpuExit<'_>) -> Result<(), Unfinished> {
        match exit {
            VcpuExit::IoOut(port, data) => {
                self.ports.write(port, data).map_err(Unfinished::Asked)?;
            }
            VcpuExit::IoIn(port, data) => self.ports.read(port, data),
            // Nothing is there: what a bus without an answer reads as.
            VcpuExit::MmioRead(_, data) => data.fill(0xff),
            VcpuExit::MmioWrite(..) | VcpuExit::IoapicEoi(_) | VcpuExit::IrqWindowOpen => {}
            VcpuExit::Hlt => return Err(Unfinished::Halted),
            VcpuExit::Shutdown => return Err(Unfinished::TripleFault),
            VcpuExit::InternalError => {
                return Err(Unfinished::Unable(
                    "it cannot emulate the instruction".into(),
                ));
            }
            VcpuExit::FailEntry(reason, _) => {
                return Err(Unfinished::Unable(format!(
                    "the processor refused to enter it ({reason:#x})"
                )));
            }
            other => return Err(Unfinished::Unable(format!("{other:?} has no meaning here"))),
        }
        Ok(())
    }
}

/// An [`Ending`], before it is known where.
enum Unfinished {
    Asked(Request),
    Halted,
    TripleFault,
    Unable(String),
}

impl Unfinished {
    fn of(self, cpu: &VcpuFd) -> Ending {
        match self {
            Self::Asked(request) => Ending::Asked(request),
            Self::Halted => Ending::Halted,
            Self::TripleFault => Ending::TripleFault,
            Self::Unable(what) => Ending::Unable {
                what,
                rip: cpu.get_regs().map_or(0, |regs| regs.rip),
            },
        }
    }
}

impl fmt::Display for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stands => f.write_str("stands"),
            Self::Runs => f.write_str("runs"),
            Self::Ended(ending) => write!(f, "ended: {ending}"),
        }
    }
}
