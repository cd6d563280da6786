//! x86-64: the registers, the gadgets, and the dead man's frame.
//!
//! The frame is what the kernel itself would push to run a signal handler, holding the thread's original state,
//! on the thread's own stack. Every state that injection gives a thread leads to `rt_sigreturn` on that frame if
//! nobody intervenes. `docs/decisions/0003-injection-survives-its-own-death.md` has the reasoning.

use std::arch::x86_64::__cpuid_count;
use std::io;

use crate::sys::ptrace::{self, Tid};

/// `AUDIT_ARCH_X86_64`, what a seccomp filter sees.
pub(in crate::attach) const SECCOMP_ARCHITECTURE: u32 = 0xc000_003e;

const NR_POLL: u64 = 7;
const NR_SEMOP: u64 = 65;
const NR_EPOLL_WAIT: u64 = 232;
const NR_EPOLL_PWAIT: u64 = 281;
const NR_EPOLL_PWAIT2: u64 = 441;

/// A system call to make in the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::attach) struct Call {
    pub(in crate::attach) name: &'static str,
    pub(in crate::attach) number: u32,
    pub(in crate::attach) argument: u64,
}

impl Call {
    /// What the dead man's frame relies on.
    pub(in crate::attach) const RETURN: Self = Self {
        name: "rt_sigreturn",
        number: 15,
        argument: 0,
    };

    pub(in crate::attach) fn userfaultfd(flags: u32) -> Self {
        Self {
            name: "userfaultfd",
            number: 323,
            argument: u64::from(flags),
        }
    }

    pub(in crate::attach) fn close(fd: u32) -> Self {
        Self {
            name: "close",
            number: 3,
            argument: u64::from(fd),
        }
    }
}

// Indices into `struct user_regs_struct`.
const R15: usize = 0;
const R14: usize = 1;
const R13: usize = 2;
const R12: usize = 3;
const RBP: usize = 4;
const RBX: usize = 5;
const R11: usize = 6;
const R10: usize = 7;
const R9: usize = 8;
const R8: usize = 9;
const RAX: usize = 10;
const RCX: usize = 11;
const RDX: usize = 12;
const RSI: usize = 13;
const RDI: usize = 14;
const ORIG_RAX: usize = 15;
const RIP: usize = 16;
const CS: usize = 17;
const EFLAGS: usize = 18;
const RSP: usize = 19;
const SS: usize = 20;
const FS: usize = 25;
const GS: usize = 26;
const COUNT: usize = 27;

const NO_CALL: u64 = u64::MAX; // orig_rax outside a system call
const CS_64_BIT: u64 = 0x33;
const TRAP_FLAG: u64 = 0x100;
const SYSCALL_LENGTH: u64 = 2;

// What the kernel leaves in rax when it means to restart the call.
const EINTR: i64 = -4;
const ERESTARTSYS: i64 = -512;
const ERESTARTNOINTR: i64 = -513;
const ERESTARTNOHAND: i64 = -514;
const ERESTART_RESTARTBLOCK: i64 = -516;

/// The general registers of a stopped thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::attach) struct Registers([u64; COUNT]);

impl Registers {
    pub(in crate::attach) fn read(tid: Tid) -> io::Result<Self> {
        let mut bytes = [0; COUNT * 8];
        let read = ptrace::get_regset(tid, ptrace::NT_PRSTATUS, &mut bytes)?;
        let mut values = [0; COUNT];
        if read == bytes.len() {
            for (value, bytes) in values.iter_mut().zip(bytes.as_chunks::<8>().0) {
                *value = u64::from_le_bytes(*bytes);
            }
        } // else a shorter set, of a 32-bit thread: cs 0 says "not 64-bit"
        Ok(Self(values))
    }

    pub(in crate::attach) fn write(&self, tid: Tid) -> io::Result<()> {
        let mut bytes = [0; COUNT * 8];
        for (value, bytes) in self.0.iter().zip(bytes.as_chunks_mut::<8>().0) {
            *bytes = value.to_le_bytes();
        }
        ptrace::set_regset(tid, ptrace::NT_PRSTATUS, &bytes)
    }

    /// Whether the thread executes 64-bit code.
    pub(in crate::attach) fn is_64_bit(&self) -> bool {
        self.0[CS] == CS_64_BIT
    }

    pub(in crate::attach) fn stack_pointer(&self) -> u64 {
        self.0[RSP]
    }

    pub(in crate::attach) fn instruction_pointer(&self) -> u64 {
        self.0[RIP]
    }

    pub(in crate::attach) fn set_instruction_pointer(&mut self, address: u64) {
        self.0[RIP] = address;
    }

    /// Whether the thread was stopped in a system call, and not in its own code.
    pub(in crate::attach) fn in_call(&self) -> bool {
        self.0[ORIG_RAX].cast_signed() >= 0
    }

    /// What a system call returned, at its exit.
    pub(in crate::attach) fn result(&self) -> i64 {
        self.0[RAX].cast_signed()
    }

    /// Makes calls without a timeout that the kernel does not restart by itself restart: being stopped made them
    /// return EINTR, though no signal was handled. With `ERESTARTNOHAND` it is EINTR only if one is.
    pub(in crate::attach) fn hide_the_stop(&mut self) {
        if !self.in_call() || self.result() != EINTR {
            return;
        }
        if self.waits_endlessly() {
            self.0[RAX] = ERESTARTNOHAND.cast_unsigned();
        }
    }

    /// Whether the call that the thread is in has no timeout, so that starting it again changes nothing.
    fn waits_endlessly(&self) -> bool {
        let negative = |register: usize| self.0[register] & 0x8000_0000 != 0; // an int
        match self.0[ORIG_RAX] {
            NR_POLL => negative(RDX),
            NR_SEMOP => true,
            NR_EPOLL_WAIT | NR_EPOLL_PWAIT => negative(R10),
            NR_EPOLL_PWAIT2 => self.0[R10] == 0,
            _ => false,
        }
    }

    /// The state that the thread would have had in user space, had the kernel gone on: for the frame, which
    /// cannot ask the kernel to restart a call.
    fn as_user_space_would_see(&self) -> Self {
        let mut seen = *self;
        if !self.in_call() {
            return seen;
        }
        let again = match self.result() {
            ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND => true,
            // rt_sigreturn forgets the restart block, and with it how much time is left.
            ERESTART_RESTARTBLOCK if self.waits_endlessly() => true,
            ERESTART_RESTARTBLOCK => {
                seen.0[RAX] = EINTR.cast_unsigned(); // as after a handler; better than to wait for longer
                false
            }
            _ => false,
        };
        if again {
            seen.0[RAX] = self.0[ORIG_RAX];
            seen.0[RIP] = self.0[RIP].wrapping_sub(SYSCALL_LENGTH);
        }
        seen
    }

    /// About to execute `rt_sigreturn` on the frame. Nothing is lost if nobody ever comes back.
    pub(in crate::attach) fn armed(original: &Self, frame: &Frame, gadgets: &Gadgets) -> Self {
        let mut armed = *original;
        armed.0[RIP] = gadgets.call;
        armed.0[RAX] = u64::from(Call::RETURN.number);
        armed.0[ORIG_RAX] = NO_CALL; // else the kernel may "restart" what it finds here
        armed.0[RSP] = frame.for_the_call;
        armed.0[EFLAGS] &= !TRAP_FLAG;
        armed
    }

    /// About to execute `call`, then `ret` to the frame. For calls that the thread may make by itself.
    pub(in crate::attach) fn armed_with(
        original: &Self,
        frame: &Frame,
        gadgets: &Gadgets,
        call: Call,
    ) -> Self {
        let mut armed = Self::armed(original, frame, gadgets);
        armed.0[RAX] = u64::from(call.number);
        armed.0[RDI] = call.argument;
        armed.0[RSP] = frame.for_the_return;
        armed
    }

    /// Turns the `rt_sigreturn` that is being entered into `call`, followed by `ret` to the frame.
    pub(in crate::attach) fn redirect(&mut self, frame: &Frame, call: Call) {
        self.0[ORIG_RAX] = u64::from(call.number);
        self.0[RDI] = call.argument;
        self.0[RSP] = frame.for_the_return;
    }

    /// The arguments that a seccomp filter sees if `call` is made with these registers.
    pub(in crate::attach) fn seccomp_arguments(&self, call: Call) -> [u64; 6] {
        let [_, rsi, rdx, r10, r8, r9] =
            [RDI, RSI, RDX, R10, R8, R9].map(|register| self.0[register]);
        [call.argument, rsi, rdx, r10, r8, r9]
    }
}

/// How the `ret` behind the call gets to `rt_sigreturn`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Back {
    /// `mov $15, %rax; syscall`, what a C library registers as `sa_restorer`, in the encoding of that index.
    Restorer(u64, usize),
    /// `pop %rax; ret`, with 15 and the address of a `syscall` behind it on the stack.
    Pop(u64),
}

/// Instructions found in the target's own code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::attach) struct Gadgets {
    call: u64, // syscall; ret
    back: Back,
}

impl Gadgets {
    /// The longest of the patterns, so that a reader in pieces can let them overlap.
    pub(in crate::attach) const LONGEST: usize = 9;

    /// What users are told is missing.
    pub(in crate::attach) const NAMES: &str = "`syscall; ret` and a signal restorer";

    const CALL: &[u8] = &[0x0f, 0x05, 0xc3];
    const RESTORERS: [&[u8]; 2] = [
        &[0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0, 0x0f, 0x05], // mov $15, %rax; syscall
        &[0xb8, 0x0f, 0, 0, 0, 0x0f, 0x05],             // mov $15, %eax; syscall
    ];
    const POP: &[u8] = &[0x58, 0xc3];

    /// What has to be in the target, and where.
    pub(in crate::attach) fn patterns(&self) -> [(u64, &'static [u8]); 2] {
        let back = match self.back {
            Back::Restorer(address, which) => (address, Self::RESTORERS[which]),
            Back::Pop(address) => (address, Self::POP),
        };
        [(self.call, Self::CALL), back]
    }

    /// The address after the call instruction, which a seccomp filter sees.
    pub(in crate::attach) fn after_call(&self) -> u64 {
        self.call.wrapping_add(SYSCALL_LENGTH)
    }
}

/// The gadgets found so far.
#[derive(Debug, Default)]
pub(in crate::attach) struct Search {
    call: Option<u64>,
    restorer: Option<(u64, usize)>,
    pop: Option<u64>,
}

impl Search {
    /// Looks through executable bytes that are at `address` in the target. True when there is nothing better to
    /// find.
    pub(in crate::attach) fn look(&mut self, address: u64, code: &[u8]) -> bool {
        let find = |pattern: &[u8]| {
            code.windows(pattern.len())
                .position(|window| window == pattern)
                .map(|offset| address + offset as u64)
        };
        self.call = self.call.or_else(|| find(Gadgets::CALL));
        self.restorer = self.restorer.or_else(|| {
            let mut restorers = Gadgets::RESTORERS.into_iter().enumerate();
            restorers.find_map(|(which, pattern)| Some((find(pattern)?, which)))
        });
        self.pop = self.pop.or_else(|| find(Gadgets::POP));
        self.call.is_some() && self.restorer.is_some()
    }

    pub(in crate::attach) fn found(&self) -> Option<Gadgets> {
        let back = match (self.restorer, self.pop) {
            (Some((restorer, which)), _) => Back::Restorer(restorer, which),
            (None, Some(pop)) => Back::Pop(pop),
            (None, None) => return None,
        };
        Some(Gadgets {
            call: self.call?,
            back,
        })
    }
}

// `struct rt_sigframe` of the 64-bit kernel, by byte.
const UC: usize = 8; // behind the return address
const UC_STACK_FLAGS: usize = UC + 24;
const SIGCONTEXT: usize = UC + 40;
const SELECTORS: usize = SIGCONTEXT + 144;
const FPSTATE: usize = SIGCONTEXT + 184;
const SIGMASK: usize = SIGCONTEXT + 256;
const SIGFRAME: usize = SIGMASK + 8 + 128; // a siginfo ends it

const _: () = assert!(SIGFRAME == 440);

/// The extended state is saved, ss is, and ss shall be restored as it is.
const UC_FLAGS: u64 = 1 | 2 | 4;
/// No mode that sigaltstack(2) knows: the kernel then leaves the alternate stack as it is.
const INVALID_STACK_MODE: u32 = 7;

const XSTATE_SOFTWARE: usize = 464;
const XSTATE_HEADER: usize = 512;
const XSTATE_EXTENDED: usize = 576;
const XSTATE_MAGIC1: u32 = 0x4650_5853;
const XSTATE_MAGIC2: u32 = 0x4650_5845;
const XSTATE_LARGEST: usize = 16 << 10;

const RED_ZONE: u64 = 128;

/// The dead man's frame, to be written to the thread's stack before its registers are touched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::attach) struct Frame {
    /// The lowest byte of it.
    pub(in crate::attach) address: u64,
    pub(in crate::attach) bytes: Vec<u8>,
    for_the_call: u64,
    for_the_return: u64,
}

impl Frame {
    /// A frame that brings back `original`, the signal mask and the extended state that the thread has now.
    /// `None` if the stack pointer is nowhere near a stack.
    pub(in crate::attach) fn new(
        tid: Tid,
        original: &Registers,
        mask: u64,
        gadgets: &Gadgets,
    ) -> io::Result<Option<Self>> {
        let mut xstate = vec![0; XSTATE_LARGEST];
        let size = ptrace::get_regset(tid, ptrace::NT_X86_XSTATE, &mut xstate)?;
        xstate.truncate(size);
        Ok(Self::build(original, mask, &xstate, gadgets))
    }

    fn build(original: &Registers, mask: u64, xstate: &[u8], gadgets: &Gadgets) -> Option<Self> {
        let extended = for_a_signal_frame(xstate)?;
        let chain: &[u64] = match gadgets.back {
            Back::Restorer(restorer, _) => &[restorer],
            Back::Pop(pop) => &[pop, Call::RETURN.number as u64, gadgets.call],
        };
        // The last link is the return address that a sigframe begins with.
        let chain_before = (chain.len() - 1) * 8;

        let top = original.stack_pointer().checked_sub(RED_ZONE)?;
        let fpstate = top.checked_sub(extended.len() as u64)? & !63;
        let sigframe = fpstate.checked_sub(SIGFRAME as u64)? & !15;
        let address = sigframe.checked_sub(chain_before as u64)?;

        let seen = original.as_user_space_would_see();
        let length = usize::try_from(fpstate - address).ok()? + extended.len();
        let mut bytes = vec![0; length];
        for (slot, link) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(chain) {
            *slot = link.to_le_bytes();
        }
        let mut put = |at: usize, value: u64| {
            let at = chain_before + at;
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        };
        put(UC, UC_FLAGS);
        put(UC_STACK_FLAGS, u64::from(INVALID_STACK_MODE));
        // The order of `struct sigcontext_64`.
        let order = [
            R8, R9, R10, R11, R12, R13, R14, R15, RDI, RSI, RBP, RBX, RDX, RAX, RCX, RSP, RIP,
            EFLAGS,
        ];
        for (position, register) in order.into_iter().enumerate() {
            put(SIGCONTEXT + position * 8, seen.0[register]);
        }
        put(
            SELECTORS,
            seen.0[CS]
                | (seen.0[GS] & 0xffff) << 16
                | (seen.0[FS] & 0xffff) << 32
                | seen.0[SS] << 48,
        );
        put(FPSTATE, fpstate);
        put(SIGMASK, mask);
        bytes[length - extended.len()..].copy_from_slice(&extended);
        Some(Self {
            address,
            bytes,
            for_the_call: sigframe + 8, // as if the return address had been popped
            for_the_return: address,
        })
    }
}

/// The extended state as ptrace gives it, made into what `rt_sigreturn` takes: cut behind the last component in
/// use, with the two magic numbers.
///
/// Cut, because the kernel refuses a size above what this thread may use, which ptrace does not tell (AMX).
fn for_a_signal_frame(xstate: &[u8]) -> Option<Vec<u8>> {
    let word = |at: usize| Some(u64::from_le_bytes(*xstate.get(at..)?.first_chunk()?));
    let enabled = word(XSTATE_SOFTWARE)?;
    let in_use = word(XSTATE_HEADER)?;
    let mut size = XSTATE_EXTENDED;
    for component in (2..63).filter(|component| in_use >> component & 1 == 1) {
        let leaf = __cpuid_count(0xd, component);
        size = size.max(leaf.ebx as usize + leaf.eax as usize);
    }
    let mut bytes = xstate.get(..size)?.to_vec();
    let size = u32::try_from(size).ok()?;
    let mut software = [0; 48];
    software[0..4].copy_from_slice(&XSTATE_MAGIC1.to_le_bytes());
    software[4..8].copy_from_slice(&(size + 4).to_le_bytes());
    software[8..16].copy_from_slice(&enabled.to_le_bytes());
    software[16..20].copy_from_slice(&size.to_le_bytes());
    bytes[XSTATE_SOFTWARE..XSTATE_HEADER].copy_from_slice(&software);
    bytes.extend_from_slice(&XSTATE_MAGIC2.to_le_bytes());
    Some(bytes)
}
