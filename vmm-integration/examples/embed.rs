//! The smallest VMM with live migration: one vCPU, one device, a guest of seven instructions.
//!
//! ```text
//! destination$ cargo run -p vmm-integration --example embed receive 0.0.0.0:4711
//! source$      cargo run -p vmm-integration --example embed send PAIRING
//! ```
//!
//! What migration adds is between the marks `migration {` and `}`; the rest is the VMM. Everything else that a VMM should
//! know is in `docs/embedding.md`.

use std::error::Error;
use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kvm_bindings::kvm_regs;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_integration::RamBuilder;
use vmm_integration::kvm::{Slot, Slots};

// migration {
use memferry::chunk::ChunkSize;
use memferry::transport::{Listener, Pairing, Session};
use vmm_integration::kvm::DirtyLog;
use vmm_integration::{Arrival, Departure, Vmm, VmmError, VmmWrites};
// }

/// Counts, writes the number to sixteen pages in turn, and tells it to the device at port 0x10.
const GUEST: [u8; 14] = [
    0x66, 0x40, // again: inc eax
    0x66, 0x89, 0x07, //  mov [bx], eax
    0x81, 0xc3, 0x00, 0x10, // add bx, 0x1000
    0x66, 0xe7, 0x10, //  out 0x10, eax
    0xeb, 0xf2, //        jmp again
];
const CODE: GuestAddress = GuestAddress(0x8000);
/// Where it writes first: beside its code, whatever page it comes to.
const DATA: u64 = 0x800;
const MEMORY: u64 = 64 << 20;

/// The virtual machine.
#[derive(Debug)]
pub(crate) struct Machine {
    memory: Arc<GuestMemoryMmap<AtomicBitmap>>,
    slots: Arc<Slots>,
    vcpu: Vcpu,
    pause: Arc<AtomicBool>,
    /// What the device was told last.
    pub(crate) told: Arc<AtomicU64>,
}

#[derive(Debug)]
enum Vcpu {
    Paused(VcpuFd),
    Running(JoinHandle<Result<VcpuFd, kvm_ioctls::Error>>),
    Broken,
}

impl Machine {
    pub(crate) fn new() -> Result<Self, Box<dyn Error>> {
        let vm: Arc<VmFd> = Arc::new(Kvm::new()?.create_vm()?);
        let memory = Arc::new(RamBuilder::new(MEMORY).in_memory::<AtomicBitmap>()?);
        let slots = Slot::one_a_region(&*memory, 0);
        let slots = Slots::register(Arc::clone(&vm), Arc::clone(&memory), slots)?;
        let vcpu = vm.create_vcpu(0)?;
        let mut sregs = vcpu.get_sregs()?;
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        vcpu.set_sregs(&sregs)?;
        Ok(Self {
            memory,
            slots,
            vcpu: Vcpu::Paused(vcpu),
            pause: Arc::default(),
            told: Arc::default(),
        })
    }

    /// Loads the guest's program, and runs it.
    pub(crate) fn boot(&mut self) -> Result<(), Box<dyn Error>> {
        self.memory.write_slice(&GUEST, CODE)?;
        if let Vcpu::Paused(vcpu) = &self.vcpu {
            vcpu.set_regs(&regs(0, DATA, CODE.0, 2))?;
        }
        self.run();
        Ok(())
    }

    fn run(&mut self) {
        self.vcpu = match std::mem::replace(&mut self.vcpu, Vcpu::Broken) {
            Vcpu::Paused(vcpu) => {
                self.pause.store(false, Ordering::Relaxed);
                let (pause, told) = (Arc::clone(&self.pause), Arc::clone(&self.told));
                Vcpu::Running(thread::spawn(move || run(vcpu, &pause, &told)))
            }
            other => other,
        };
    }

    fn pause(&mut self) -> Result<&VcpuFd, Box<dyn Error + Send + Sync>> {
        self.pause.store(true, Ordering::Relaxed);
        self.vcpu = match std::mem::replace(&mut self.vcpu, Vcpu::Broken) {
            // It looks at the flag each time that the guest talks to the device.
            Vcpu::Running(thread) => {
                Vcpu::Paused(thread.join().map_err(|_| "its thread panicked")??)
            }
            other => other,
        };
        match &self.vcpu {
            Vcpu::Paused(vcpu) => Ok(vcpu),
            _ => Err("the vCPU has failed".into()),
        }
    }
}

/// All the registers that the guest uses.
fn regs(rax: u64, rbx: u64, rip: u64, rflags: u64) -> kvm_regs {
    kvm_regs {
        rax,
        rbx,
        rip,
        rflags,
        ..kvm_regs::default()
    }
}

fn run(
    mut vcpu: VcpuFd,
    pause: &AtomicBool,
    told: &AtomicU64,
) -> Result<VcpuFd, kvm_ioctls::Error> {
    while !pause.load(Ordering::Relaxed) {
        match vcpu.run()? {
            VcpuExit::IoOut(0x10, bytes) => {
                let number = bytes
                    .iter()
                    .rev()
                    .fold(0, |all, byte| all << 8 | u64::from(*byte));
                let before = told.swap(number, Ordering::Relaxed);
                assert_eq!(number, before + 1, "the guest counts by one");
            }
            other => panic!("the guest does not do that: {other:?}"),
        }
    }
    // An instruction that has left the guest is completed when it enters again, which it does not do this time.
    vcpu.set_kvm_immediate_exit(1);
    let interrupted = vcpu.run().is_err();
    vcpu.set_kvm_immediate_exit(0);
    assert!(interrupted, "the guest was told to leave at once");
    Ok(vcpu)
}

// migration {
impl Machine {
    /// Sends the guest away. An error says where it runs.
    pub(crate) fn send(&mut self, pairing: &Pairing) -> Result<(), Box<dyn Error>> {
        let guest = DirtyLog::regions(&self.slots, ChunkSize::PAGE)?;
        let vmm = VmmWrites::regions(&self.memory, ChunkSize::PAGE)?;
        let departure = Departure::new(Arc::clone(&self.memory), guest).and(vmm);
        let limit = Duration::from_secs(10);
        let session = Session::connect(pairing, 2, limit, Instant::now() + limit)?;
        departure.mapped_shared().run(&session, self)?;
        Ok(())
    }

    /// Receives a guest, and runs it.
    pub(crate) fn receive(
        &mut self,
        listener: &Listener,
        pairing: &Pairing,
    ) -> Result<(), Box<dyn Error>> {
        let limit = Duration::from_secs(10);
        let session = listener.accept(pairing, limit, limit, || true, |_, _| {})?;
        Arrival::new(Arc::clone(&self.memory))?.run(&session, self)?;
        Ok(())
    }
}

impl Vmm for Machine {
    fn kind(&self) -> &'static str {
        "embed"
    }

    fn facts(&self) -> Vec<(String, String)> {
        vec![("state version".to_owned(), "1".to_owned())]
    }

    fn suspend(&mut self, _: Instant) -> Result<(), VmmError> {
        self.pause().map(drop)
    }

    fn save(&mut self, state: &mut dyn Write, _: Instant) -> Result<(), VmmError> {
        let regs = self.pause()?.get_regs()?;
        let told = self.told.load(Ordering::Relaxed);
        for word in [regs.rax, regs.rbx, regs.rip, regs.rflags, told] {
            state.write_all(&word.to_le_bytes())?;
        }
        Ok(())
    }

    fn load(&mut self, state: &mut dyn Read, _: Instant) -> Result<(), VmmError> {
        let mut words = [[0; 8]; 5];
        words
            .iter_mut()
            .try_for_each(|word| state.read_exact(word))?;
        let [rax, rbx, rip, rflags, told] = words.map(u64::from_le_bytes);
        self.pause()?.set_regs(&regs(rax, rbx, rip, rflags))?;
        self.told.store(told, Ordering::Relaxed);
        Ok(())
    }

    fn resume(&mut self, _: Instant) -> Result<(), VmmError> {
        self.run();
        Ok(())
    }
}
// }

#[allow(
    dead_code,
    reason = "a test includes this file and calls what is above"
)]
fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let mut machine = Machine::new()?;
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[1..] {
        ["send", pairing] => {
            machine.boot()?;
            machine.send(&pairing.parse()?)?;
            println!(
                "the guest has left at {}",
                machine.told.load(Ordering::Relaxed)
            );
        }
        ["receive", address] => {
            let listener = Listener::bind(address.parse()?)?;
            let pairing = Pairing::new(listener.local_addr()?.to_string())?;
            println!("{pairing}");
            machine.receive(&listener, &pairing)?;
            let (_ctrl_c, forever) = mpsc::channel::<()>();
            while forever.recv_timeout(Duration::from_secs(1)).is_err() {
                println!("the guest is at {}", machine.told.load(Ordering::Relaxed));
            }
        }
        _ => return Err("usage: embed send PAIRING | embed receive ADDRESS:PORT".into()),
    }
    Ok(())
}
