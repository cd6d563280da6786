//! A virtual machine: memory, processors, and the little that is around them.

mod cpu;
mod guest;
mod meter;
mod ports;
mod save;
mod slices;
mod throttling;
mod traits;

pub(crate) use cpu::{Busy, Ending, Standing};
pub(crate) use guest::Guest;
pub(crate) use ports::{Console, Request};
pub(crate) use throttling::Throttling;
use traits::compare;

use std::io;
use std::sync::Arc;
use std::time::Instant;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_RUNNABLE, kvm_pit_config};
use kvm_ioctls::{Cap, Kvm, VmFd};
use memferry::chunk::ChunkSize;
use memferry::dirty::{DirtyTracker, Union};
use vm_memory::GuestMemoryMmap;
use vm_memory::bitmap::AtomicBitmap;
use vmm_integration::kvm::{DirtyLog, DirtyRing, Slot, Slots, SlotsError};
use vmm_integration::{MemoryError, RamBuilder, Throttle, VmmWrites, VmmWritesError};

use crate::args::Tracking;
use crate::boot::{BootError, Loaded};
use crate::state::{MachineState, StateError};
use cpu::Cpus;
use meter::Meter;
use ports::{Interrupt, Ports};

/// Where Intel processors keep what they need to run real mode; in the hole, where nothing else is.
const TASK_STATE: usize = 0xfffb_d000;
/// KVM's timer also answers at the speaker's port.
const SPEAKER: u32 = 1;
/// The interrupt line of the first serial port.
const SERIAL_LINE: u32 = 4;

/// What a machine is made of.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    /// Bytes of memory.
    pub(crate) memory: u64,
    /// How many processors.
    pub(crate) cpus: u8,
    /// How it is found out what the guest writes.
    pub(crate) tracking: Tracking,
}

/// A guest's memory: with marks of what this program writes to it.
pub(crate) type Memory = GuestMemoryMmap<AtomicBitmap>;

/// A virtual machine. Its processors stand until it is told to run.
#[derive(Debug)]
pub(crate) struct Machine {
    // First, so that the threads are told to end before anything they use is gone.
    cpus: Cpus,
    ports: Arc<Ports>,
    vm: Arc<VmFd>,
    memory: Arc<Memory>,
    /// Where KVM has it.
    slots: Arc<Slots>,
    /// The rings of the processors, if it is they that tell of writes.
    meter: Option<Arc<Meter>>,
    /// What the guest is told of each of its processors.
    told: Vec<CpuId>,
    tsc_khz: u32,
    /// The model-specific registers that this KVM has.
    msrs: Vec<u32>,
    /// Whether the kernel emulates interrupt controllers and the timer.
    chips: bool,
}

/// Why a machine cannot do what was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MachineError {
    /// KVM refuses.
    #[error("KVM refused {what}")]
    Kvm {
        /// What it was asked for.
        what: &'static str,
        /// What it said.
        source: kvm_ioctls::Error,
    },
    /// There is no KVM here.
    #[error("/dev/kvm cannot be used: load the kernel's module, and let this user open it")]
    NoKvm(#[source] kvm_ioctls::Error),
    /// KVM does not have what is needed.
    #[error("this KVM lacks {0}")]
    Lacks(&'static str),
    /// KVM or a device does not take a value.
    #[error("this host does not take {what}")]
    Refused {
        /// What.
        what: String,
    },
    /// The guest ran in another machine than this one.
    #[error(
        "{field} differs: {theirs} at the source, {ours} here. Start this end as the source was started, on a host of the same kind"
    )]
    Differs {
        /// What differs.
        field: String,
        /// Theirs.
        theirs: String,
        /// Ours.
        ours: String,
    },
    /// A processor cannot go on, here or elsewhere.
    #[error("processor {cpu} has ended: {ending}")]
    Ended {
        /// Which.
        cpu: usize,
        /// Why.
        ending: Ending,
    },
    /// They do not stop.
    #[error(transparent)]
    Busy(#[from] Busy),
    /// The state is refused.
    #[error(transparent)]
    State(#[from] StateError),
    /// Its memory cannot be made.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// KVM does not take its memory.
    #[error(transparent)]
    Slots(#[from] SlotsError),
    /// What this program writes is not marked.
    #[error(transparent)]
    Marks(#[from] VmmWritesError),
    /// The program cannot be booted.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The system refuses.
    #[error("{what} failed")]
    System {
        /// What was attempted.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

fn kvm<T>(what: &'static str, result: Result<T, kvm_ioctls::Error>) -> Result<T, MachineError> {
    result.map_err(|source| MachineError::Kvm { what, source })
}

fn system<T>(what: &'static str, result: io::Result<T>) -> Result<T, MachineError> {
    result.map_err(|source| MachineError::System { what, source })
}

impl Machine {
    /// Makes a machine whose memory is empty. `boot` puts a program into it, and says where processors begin; without one it waits for a
    /// state. `ended` is called for each processor that ends, on a thread of its own.
    pub(crate) fn new(
        shape: Shape,
        console: Console,
        ended: impl Fn(usize, &Ending) + Send + Sync + 'static,
        boot: impl FnOnce(&Memory, u32) -> Result<Option<Loaded>, BootError>,
    ) -> Result<Self, MachineError> {
        let host = Kvm::new().map_err(MachineError::NoKvm)?;
        for (capability, name) in [
            (Cap::UserMemory, "memory of the user's"),
            (Cap::ImmediateExit, "immediate exits (Linux 4.13)"),
            (Cap::Irqchip, "interrupt controllers of its own"),
            (Cap::PitState2, "a timer whose state can be had"),
            (Cap::AdjustClock, "a clock that can be set"),
        ] {
            if !host.check_extension(capability) {
                return Err(MachineError::Lacks(name));
            }
        }
        let vm = kvm("a virtual machine", host.create_vm())?;
        let vm = Arc::new(vm);
        let memory = Arc::new(RamBuilder::new(shape.memory).in_memory()?);
        let slots = Slot::one_a_region(&*memory, 0);
        let slots = Slots::register(Arc::clone(&vm), Arc::clone(&memory), slots)?;
        let rings = match shape.tracking {
            Tracking::Log => None,
            Tracking::Ring => {
                let entries = DirtyRing::entries_for(shape.memory, shape.cpus.into());
                let rings = DirtyRing::enable(&slots, entries, ChunkSize::PAGE);
                Some(system("giving the machine dirty rings", rings)?)
            }
        };
        kvm("a place for its task state", vm.set_tss_address(TASK_STATE))?;
        kvm("interrupt controllers", vm.create_irq_chip())?;
        let pit = kvm_pit_config {
            flags: SPEAKER,
            ..kvm_pit_config::default()
        };
        kvm("a timer", vm.create_pit2(pit))?;
        let interrupt = system("making an eventfd", Interrupt::new())?;
        kvm(
            "an interrupt line",
            vm.register_irqfd(&interrupt, SERIAL_LINE),
        )?;
        let supported = kvm(
            "what processors it can be",
            host.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES),
        )?;
        let count = shape.cpus.into();
        let told: Vec<CpuId> = (0..count)
            .map(|index| traits::cpuid_of(&supported, index, count))
            .collect();
        let mut cpus = Vec::new();
        for (index, told) in (0..).zip(&told) {
            let cpu = kvm("a processor", vm.create_vcpu(index))?;
            kvm(
                "what the guest is told of its processor",
                cpu.set_cpuid2(told),
            )?;
            if let Some(rings) = &rings {
                // They count as processors do, from zero.
                system("reading a processor's dirty ring", rings.add_vcpu(&cpu))?;
            }
            cpus.push(cpu);
        }
        let tsc_khz = kvm("the speed of the clock", cpus[0].get_tsc_khz())?;
        if let Some(loaded) = boot(&memory, tsc_khz)? {
            for (index, cpu) in (0..).zip(&cpus) {
                let reset = kvm("the special registers", cpu.get_sregs())?;
                let Some((regs, sregs)) = loaded.registers(index, reset) else {
                    continue;
                };
                kvm("the special registers", cpu.set_sregs(&sregs))?;
                kvm("the registers", cpu.set_regs(&regs))?;
                let runnable = kvm_bindings::kvm_mp_state {
                    mp_state: KVM_MP_STATE_RUNNABLE,
                };
                kvm("a processor that runs", cpu.set_mp_state(runnable))?;
            }
        }
        let msrs = kvm("its model-specific registers", host.get_msr_index_list())?;
        let ports = Arc::new(Ports::new(interrupt, console));
        Ok(Self {
            cpus: system(
                "starting the processors' threads",
                Cpus::start(cpus, Arc::clone(&ports), rings.clone(), ended),
            )?,
            told,
            tsc_khz,
            ports,
            vm,
            memory,
            slots,
            meter: rings.map(|rings| Arc::new(Meter::new(rings))),
            msrs: msrs.as_slice().to_vec(),
            chips: true,
        })
    }

    /// Its memory.
    pub(crate) fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// What tells of writes to each region of its memory, by the guest and by this program.
    pub(crate) fn trackers(&self) -> Result<Vec<Arc<dyn DirtyTracker>>, MachineError> {
        let guest: Vec<Arc<dyn DirtyTracker>> = match &self.meter {
            Some(meter) => Meter::trackers(meter),
            None => {
                let logs = DirtyLog::regions(&self.slots, ChunkSize::PAGE);
                let logs = system("reading KVM's dirty log", logs)?;
                logs.into_iter().map(|log| Arc::new(log) as _).collect()
            }
        };
        let ours = VmmWrites::regions(&self.memory, ChunkSize::PAGE)?;
        let both = guest.into_iter().zip(ours);
        Ok(both
            .map(|(guest, ours)| Arc::new(Union(guest, ours)) as _)
            .collect())
    }

    /// What is typed on its console; how much of it there was room for.
    pub(crate) fn type_in(&self, bytes: &[u8]) -> io::Result<usize> {
        self.ports.type_in(bytes)
    }

    /// What each of its processors does.
    pub(crate) fn standing(&self) -> Vec<Standing> {
        self.cpus.standing()
    }

    /// How fast its time stamp counters count.
    pub(crate) fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    /// How often each of its processors has left the guest.
    pub(crate) fn exits(&self) -> Vec<u64> {
        self.cpus.exits()
    }

    /// How far each of its processors is slowed down.
    pub(crate) fn throttles(&self) -> Vec<Throttle> {
        self.cpus.throttles()
    }

    /// Bytes a second that each of its processors writes; `None` if it has no rings to tell that, or nothing is tracked.
    pub(crate) fn dirty_rates(&self) -> Option<Vec<u64>> {
        self.meter.as_ref()?.rates()
    }

    /// Slows each of its processors down so far.
    fn throttle(&self, throttles: &[Throttle]) {
        self.cpus.throttle(throttles);
    }

    /// Lets it run.
    pub(crate) fn run(&self) {
        self.cpus.run();
    }

    /// Stops it: when this returns, neither its processors nor its devices write its memory.
    ///
    /// # Errors
    /// If some processors do not stop by the deadline; [`run`](Self::run) lets the others run on.
    pub(crate) fn stand(&self, deadline: Instant) -> Result<(), MachineError> {
        Ok(self.cpus.stand(deadline)?)
    }

    /// Its state besides its memory. It stands.
    pub(crate) fn save(&self) -> Result<MachineState, MachineError> {
        for (cpu, standing) in self.cpus.standing().into_iter().enumerate() {
            match standing {
                Standing::Stands => {}
                Standing::Runs => return Err(Busy(vec![cpu]).into()),
                Standing::Ended(ending) => return Err(MachineError::Ended { cpu, ending }),
            }
        }
        let mut cpus = Vec::with_capacity(self.cpus.len());
        for (cpu, told) in self.cpus.each().zip(&self.told) {
            cpus.push(save::save_cpu(&cpu, told, &self.msrs)?);
        }
        Ok(MachineState {
            memory: traits::regions(&self.memory),
            chips: self.chips.then(|| save::save_chips(&self.vm)).transpose()?,
            clock: save::save_clock(&self.vm)?,
            serial: self.ports.save().into(),
            runs: false,
            cpus,
        })
    }

    /// Gives it a state. It has not run, and nothing of it is changed if the state does not fit it.
    pub(crate) fn load(&self, state: &MachineState) -> Result<(), MachineError> {
        compare(&state.traits(), &self.traits())?;
        for (cpu, state) in self.cpus.each().zip(&state.cpus) {
            save::load_cpu(&cpu, state)?;
        }
        if let Some(chips) = &state.chips {
            save::load_chips(&self.vm, chips)?;
        }
        save::load_clock(&self.vm, state.clock)?;
        let loaded = self.ports.load(&state.serial.clone().into());
        system("loading the serial port", loaded)
    }
}
