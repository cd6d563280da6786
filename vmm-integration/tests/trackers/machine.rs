//! A KVM guest of a few instructions, which writes what it is told or as fast as it can.

use std::fs::File;
use std::mem;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use memferry::chunk::ChunkSize;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_integration::kvm::{DirtyRing, Slot, Slots};

pub(crate) const PAGE: u64 = 4096;
pub(crate) const LONG: Duration = Duration::from_secs(30);
pub(crate) type Memory = GuestMemoryMmap<AtomicBitmap>;

/// Where the code is: a region of its own, behind all others, which nobody tracks.
const CODE: u64 = 0xc000_0000;
/// Where what is to be written lies, behind the code.
const MAILBOX: u64 = CODE + PAGE;
/// Where page tables are, behind the mailbox: one of each of the two highest levels, and four that map 1 GiB each.
const TABLES: u64 = CODE + 2 * PAGE;
/// Code, mailbox and tables.
const OWN: u64 = 8 * PAGE;
/// Regions lie at multiples of this.
const APART: u64 = 0x2000_0000;
/// Where a writer asks what to do: there is no memory.
const COMMAND: u64 = 0x7000_0000;
/// Where a stamper says that it has done a part.
const PART: u64 = 0x7001_0000;
/// Stamps a part.
pub(crate) const STAMPS: u64 = 1024;

/// Copies from the mailbox at `ebx` to where it is told, on and on.
const WRITER: [u8; 25] = [
    0x8b, 0x04, 0x25, 0x00, 0x00, 0x00, 0x70, // again: mov eax, [COMMAND]
    0x89, 0xc7, // mov edi, eax: the address
    0x8b, 0x04, 0x25, 0x00, 0x00, 0x00, 0x70, // mov eax, [COMMAND]
    0x89, 0xc1, // mov ecx, eax: the length
    0x89, 0xde, // mov esi, ebx
    0xfc, // cld
    0xf3, 0xa4, // rep movsb
    0xeb, 0xe7, // jmp again
];

/// Stamps words at `ebp + edi`, `edi` going on by `eax` within the mask `ecx`, and tells after each `esi` of them.
const STAMPER: [u8; 37] = [
    0xff, 0xc3, // again: inc ebx
    0x89, 0x5c, 0x3d, 0x00, // mov [ebp + edi], ebx
    0x01, 0xc7, // add edi, eax
    0x21, 0xcf, // and edi, ecx
    0xba, 0x01, 0x00, 0x00, 0x00, // mov edx, 1: the pause
    0xff, 0xca, // rest: dec edx
    0x75, 0xfc, // jnz rest
    0xff, 0xce, // dec esi
    0x75, 0xe9, // jnz again
    0xbe, 0x00, 0x04, 0x00, 0x00, // mov esi, STAMPS
    0x89, 0x04, 0x25, 0x00, 0x00, 0x01, 0x70, // mov [PART], eax
    0xeb, 0xdb, // jmp again
];
/// Where the pause is in it, in pairs of instructions after each stamp.
const PAUSE: usize = 11;

/// How a guest's processors run. The code is the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// 32-bit mode without paging. A KVM without virtualisation of the processor emulates it, and then writes itself what
    /// the guest writes.
    Flat,
    /// 64-bit mode, all addresses mapped to themselves in large pages.
    Long,
    /// The same with the rights of a program only. A KVM that emulates system code runs this on the processor, so that
    /// pages are protected and faults taken as anywhere.
    User,
}

/// How a machine is made.
#[derive(Debug, Clone)]
pub(crate) struct Shape {
    /// The bytes of each region, whole pages.
    pub(crate) regions: Vec<u64>,
    /// How many slots show each region, in parts of equal size.
    pub(crate) slots_a_region: u64,
    /// Entries of each vCPU's dirty ring, if it is to have them.
    pub(crate) rings: Option<u32>,
    /// What trackers call a chunk.
    pub(crate) chunk_size: ChunkSize,
    pub(crate) mode: Mode,
}

impl Shape {
    pub(crate) fn of(len: u64) -> Self {
        Self {
            regions: vec![len],
            slots_a_region: 1,
            rings: None,
            chunk_size: ChunkSize::PAGE,
            mode: Mode::User,
        }
    }
}

/// A vCPU, and the number of its ring.
struct Vcpu {
    vcpu: VcpuFd,
    number: usize,
}

/// A VM with memory and no vCPU yet.
pub(crate) struct Machine {
    pub(crate) vm: Arc<VmFd>,
    pub(crate) memory: Arc<Memory>,
    pub(crate) slots: Arc<Slots>,
    pub(crate) rings: Option<Arc<DirtyRing>>,
    mode: Mode,
    vcpus: AtomicU64,
}

impl Machine {
    pub(crate) fn new(shape: &Shape) -> Self {
        let vm = Arc::new(Kvm::new().unwrap().create_vm().unwrap());
        // Where a VM has to keep a few pages of Intel's, out of the way.
        vm.set_tss_address(0xfffb_d000).unwrap();
        let regions = shape.regions.iter().enumerate().map(|(index, &len)| {
            assert!(len <= APART);
            let address = APART * u64::try_from(index).unwrap();
            (GuestAddress(address), usize::try_from(len).unwrap())
        });
        let code = (GuestAddress(CODE), usize::try_from(OWN).unwrap());
        let ranges: Vec<_> = regions.chain([code]).collect();
        let memory = Arc::new(Memory::from_ranges(&ranges).unwrap());
        let mut slots = Vec::new();
        for whole in Slot::one_a_region(&*memory, 0) {
            let parts = if whole.region == shape.regions.len() {
                1
            } else {
                shape.slots_a_region
            };
            let len = whole.len / parts / PAGE * PAGE;
            for part in 0..parts {
                let offset = part * len;
                slots.push(Slot {
                    number: u32::try_from(slots.len()).unwrap() + 3,
                    offset,
                    len: if part + 1 == parts {
                        whole.len - offset
                    } else {
                        len
                    },
                    ..whole.clone()
                });
            }
        }
        let slots = Slots::register(vm.clone(), memory.clone(), slots).unwrap();
        let rings = shape
            .rings
            .map(|entries| DirtyRing::enable(&slots, entries, shape.chunk_size).unwrap());
        let machine = Self {
            vm,
            memory,
            slots,
            rings,
            mode: shape.mode,
            vcpus: AtomicU64::new(0),
        };
        machine.map_all_to_itself();
        machine
    }

    /// Fills the page tables.
    fn map_all_to_itself(&self) {
        let put = |table: u64, index: u64, entry: u64| {
            let at = GuestAddress(TABLES + table * PAGE + index * 8);
            self.memory.write_obj(entry, at).unwrap();
        };
        // Present, writable, for programs, accessed, dirty: nothing is left for the processor to write there.
        const THERE: u64 = 0x67;
        const LARGE: u64 = 0x80;
        put(0, 0, (TABLES + PAGE) | THERE);
        for gib in 0..4 {
            put(1, gib, (TABLES + (2 + gib) * PAGE) | THERE);
            for part in 0..512 {
                let address = (gib << 30) | (part << 21);
                put(2 + gib, part, address | THERE | LARGE);
            }
        }
    }

    /// Where a region is in the guest's addresses.
    pub(crate) fn address(&self, region: usize) -> u64 {
        self.memory.iter().nth(region).unwrap().start_addr().0
    }

    pub(crate) fn read(&self, region: usize, offset: u64, buf: &mut [u8]) {
        let address = GuestAddress(self.address(region) + offset);
        self.memory.read_slice(buf, address).unwrap();
    }

    /// Bytes of a region that have a page.
    pub(crate) fn allocated(&self, region: usize) -> u64 {
        let region = self.memory.iter().nth(region).unwrap();
        let pages = region.size().div_ceil(4096);
        let mut entries = vec![0; pages * 8];
        let at = region.as_ptr().addr() / 4096 * 8;
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let at = u64::try_from(at).unwrap();
        pagemap.read_exact_at(&mut entries, at).unwrap();
        // Present or swapped.
        let there = entries.chunks_exact(8).filter(|entry| entry[7] >> 6 != 0);
        there.count() as u64 * PAGE
    }

    /// A vCPU that runs `code`, each with code of its own.
    fn vcpu(&self, code: &[u8], mut registers: kvm_regs) -> Vcpu {
        let number = self.vcpus.fetch_add(1, Ordering::Relaxed);
        let vcpu = self.vm.create_vcpu(number).unwrap();
        let number_of_ring = self.rings.as_ref().map(|rings| rings.add_vcpu(&vcpu));
        let at = CODE + number * 64;
        self.memory.write_slice(code, GuestAddress(at)).unwrap();
        let mut system = vcpu.get_sregs().unwrap();
        let segment = |type_| kvm_segment {
            base: 0,
            limit: 0xffff_ffff,
            selector: 8,
            type_,
            present: 1,
            dpl: 0,
            db: 1,
            s: 1,
            l: 0,
            g: 1,
            ..kvm_segment::default()
        };
        system.cs = segment(11);
        let data = segment(3);
        (system.ds, system.es, system.ss) = (data, data, data);
        // Protected mode.
        system.cr0 |= 1;
        if self.mode != Mode::Flat {
            (system.cs.l, system.cs.db) = (1, 0);
            system.cr3 = TABLES;
            // Physical address extension; long mode, enabled and active; paging.
            system.cr4 |= 1 << 5;
            system.efer |= 1 << 8 | 1 << 10;
            system.cr0 |= 1 << 31;
        }
        registers.rflags = 2;
        if self.mode == Mode::User {
            for segment in [
                &mut system.cs,
                &mut system.ds,
                &mut system.es,
                &mut system.ss,
            ] {
                segment.dpl = 3;
                segment.selector |= 3;
            }
        }
        vcpu.set_sregs(&system).unwrap();
        registers.rip = at;
        vcpu.set_regs(&registers).unwrap();
        Vcpu {
            vcpu,
            number: number_of_ring.map_or(0, Result::unwrap),
        }
    }

    /// A vCPU that writes what it is told.
    pub(crate) fn writer(&self) -> Writer {
        let registers = kvm_regs {
            rbx: MAILBOX,
            ..kvm_regs::default()
        };
        let mut vcpu = self.vcpu(&WRITER, registers);
        let (commands, next) = mpsc::channel::<(u64, u64)>();
        let (tell, done) = mpsc::channel();
        let rings = self.rings.clone();
        let thread =
            thread::spawn(move || write_as_told(&mut vcpu, rings.as_deref(), &next, &tell));
        let writer = Writer {
            memory: self.memory.clone(),
            lane: Mutex::new(Lane { commands, done }),
            thread: Some(thread),
        };
        // It asks for its first command.
        writer.lane.lock().unwrap().wait();
        writer
    }

    /// A vCPU that stamps the words of a region until it is stopped.
    pub(crate) fn stamper(&self, region: usize, how: Stamping) -> Stamper {
        let there = self.memory.iter().nth(region).unwrap().len();
        let len = how.len.unwrap_or(there);
        assert!(len.is_power_of_two() && len <= there);
        let registers = kvm_regs {
            rax: how.step,
            rbx: how.stamp,
            rcx: (len - 1) & !3,
            rsi: STAMPS,
            rdi: how.first,
            rbp: self.address(region),
            ..kvm_regs::default()
        };
        let mut code = STAMPER;
        code[PAUSE] = how.pause;
        let mut stamper = self.stamper_of(self.vcpu(&code, registers));
        stamper.start(u64::MAX);
        stamper
    }

    fn stamper_of(&self, vcpu: Vcpu) -> Stamper {
        Stamper {
            progress: Arc::default(),
            rings: self.rings.clone(),
            state: Stamps::Waits(vcpu),
        }
    }
}

fn made_room(rings: Option<&DirtyRing>, number: usize, exit: &VcpuExit<'_>) -> bool {
    rings.is_some_and(|rings| rings.make_room(number, exit).unwrap())
}

fn write_as_told(
    vcpu: &mut Vcpu,
    rings: Option<&DirtyRing>,
    next: &Receiver<(u64, u64)>,
    tell: &Sender<()>,
) {
    let mut len = None;
    loop {
        let exit = vcpu.vcpu.run().unwrap();
        if made_room(rings, vcpu.number, &exit) {
            continue;
        }
        match exit {
            VcpuExit::MmioRead(COMMAND, answer) => {
                let value = match len.take() {
                    Some(len) => len,
                    None => {
                        // What it was told before is written now.
                        if tell.send(()).is_err() {
                            return;
                        }
                        let Ok((address, bytes)) = next.recv() else {
                            return;
                        };
                        len = Some(bytes);
                        address
                    }
                };
                let value = u32::try_from(value).unwrap();
                answer.copy_from_slice(&value.to_le_bytes());
            }
            other => panic!("the guest stopped: {other:?}"),
        }
    }
}

/// A vCPU that writes what it is told. Ended on drop.
pub(crate) struct Writer {
    memory: Arc<Memory>,
    lane: Mutex<Lane>,
    thread: Option<JoinHandle<()>>,
}

struct Lane {
    commands: Sender<(u64, u64)>,
    done: Receiver<()>,
}

impl Lane {
    fn wait(&self) {
        self.done.recv_timeout(LONG).expect("the guest answers");
    }
}

impl Writer {
    /// Has the guest write so, and waits until it has.
    pub(crate) fn write(&self, address: u64, bytes: &[u8]) {
        let lane = self.lane.lock().unwrap();
        let most = usize::try_from(PAGE).unwrap();
        let places = (0..).step_by(most);
        for (part, place) in bytes.chunks(most).zip(places) {
            self.memory
                .write_slice(part, GuestAddress(MAILBOX))
                .unwrap();
            let len = u64::try_from(part.len()).unwrap();
            lane.commands.send((address + place, len)).unwrap();
            lane.wait();
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // Without a sender, the vCPU's thread ends.
        let (nobody, _) = mpsc::channel();
        self.lane.lock().unwrap().commands = nobody;
        let ended = self.thread.take().unwrap().join();
        assert!(ended.is_ok() || thread::panicking());
    }
}

/// How a vCPU stamps.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stamping {
    /// How many bytes of the region it stamps, a power of two; all of them if nothing is said.
    pub(crate) len: Option<u64>,
    /// Where in the region it begins.
    pub(crate) first: u64,
    /// How far from one word to the next.
    pub(crate) step: u64,
    /// What the first stamp is less than, by one.
    pub(crate) stamp: u64,
    /// How long it rests after each, in pairs of instructions; at least one.
    pub(crate) pause: u8,
}

impl Stamping {
    /// The pages of a region, one after the other.
    pub(crate) fn pages() -> Self {
        Self {
            len: None,
            first: 0,
            step: PAGE,
            stamp: 0,
            pause: 1,
        }
    }
}

#[derive(Default)]
struct Progress {
    stop: AtomicBool,
    parts: AtomicU64,
    full: AtomicU64,
}

/// A vCPU that writes as fast as it can. Ended on drop.
pub(crate) struct Stamper {
    progress: Arc<Progress>,
    rings: Option<Arc<DirtyRing>>,
    state: Stamps,
}

enum Stamps {
    /// Out of the guest.
    Waits(Vcpu),
    Runs(JoinHandle<Vcpu>),
    /// Failed.
    Ended,
}

impl Stamper {
    /// How many words it has stamped, in parts of [`STAMPS`].
    pub(crate) fn stamps(&self) -> u64 {
        self.progress.parts.load(Ordering::Relaxed) * STAMPS
    }

    /// How often its ring was full.
    pub(crate) fn times_full(&self) -> u64 {
        self.progress.full.load(Ordering::Relaxed)
    }

    /// Waits until it has stamped so many words more.
    pub(crate) fn wait(&self, more: u64) {
        let goal = self.stamps() + more;
        let deadline = Instant::now() + LONG;
        while self.stamps() < goal {
            assert!(Instant::now() < deadline, "the guest writes");
            assert!(self.is_running());
            thread::yield_now();
        }
    }

    /// Lets the vCPU run, for so many parts at most.
    pub(crate) fn start(&mut self, parts: u64) {
        let Stamps::Waits(vcpu) = mem::replace(&mut self.state, Stamps::Ended) else {
            panic!("it runs already");
        };
        self.progress.stop.store(false, Ordering::Relaxed);
        let (progress, rings) = (self.progress.clone(), self.rings.clone());
        let thread = thread::spawn(move || stamp(vcpu, rings.as_deref(), &progress, parts));
        self.state = Stamps::Runs(thread);
    }

    /// Has the vCPU stamp so many words, in whole parts, and brings it out of the guest again.
    pub(crate) fn run(&mut self, stamps: u64) {
        self.start(stamps.div_ceil(STAMPS));
        self.join();
    }

    /// Whether it is in the guest still, or on its way out.
    pub(crate) fn is_running(&self) -> bool {
        matches!(&self.state, Stamps::Runs(thread) if !thread.is_finished())
    }

    /// Brings the vCPU out of the guest.
    pub(crate) fn stop(&mut self) {
        self.progress.stop.store(true, Ordering::Relaxed);
        self.join();
    }

    fn join(&mut self) {
        match mem::replace(&mut self.state, Stamps::Ended) {
            Stamps::Runs(thread) => match thread.join() {
                Ok(vcpu) => self.state = Stamps::Waits(vcpu),
                Err(_) => assert!(thread::panicking(), "the vCPU failed"),
            },
            other => self.state = other,
        }
    }
}

impl Drop for Stamper {
    fn drop(&mut self) {
        self.stop();
    }
}

fn stamp(mut vcpu: Vcpu, rings: Option<&DirtyRing>, progress: &Progress, mut parts: u64) -> Vcpu {
    while parts > 0 && !progress.stop.load(Ordering::Relaxed) {
        let exit = vcpu.vcpu.run().unwrap();
        if made_room(rings, vcpu.number, &exit) {
            progress.full.fetch_add(1, Ordering::Relaxed);
            continue;
        }
        match exit {
            VcpuExit::MmioWrite(PART, _) => {
                progress.parts.fetch_add(1, Ordering::Relaxed);
                parts -= 1;
            }
            other => panic!("the guest stopped: {other:?}"),
        }
    }
    vcpu
}
