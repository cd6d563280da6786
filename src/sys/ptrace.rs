//! The ptrace requests that injection needs, by thread id. Every call belongs to the thread that seized.

use std::io;
use std::mem::{MaybeUninit, size_of};

/// A thread id in our pid namespace.
pub type Tid = libc::pid_t;

/// Regset note types of `PTRACE_GETREGSET`.
pub const NT_PRSTATUS: libc::c_int = 1;
/// The extended (XSAVE) state, in the standard layout.
pub const NT_X86_XSTATE: libc::c_int = 0x202;

/// Syscall stops carry bit 7. Without it a tracer that dies in a syscall stop leaves its tracee a SIGTRAP.
pub const OPTION_SYSGOOD: libc::c_ulong = 1;
/// The kernel skips the tracee's seccomp filters for as long as it is traced.
pub const OPTION_SUSPEND_SECCOMP: libc::c_ulong = 1 << 21;

const GETREGSET: libc::c_uint = 0x4204;
const SETREGSET: libc::c_uint = 0x4205;
const SEIZE: libc::c_uint = 0x4206;
const INTERRUPT: libc::c_uint = 0x4207;
const GETSIGMASK: libc::c_uint = 0x420a;
const SETSIGMASK: libc::c_uint = 0x420b;
const SECCOMP_GET_FILTER: libc::c_uint = 0x420c;
const GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420f;
const GET_SYSCALL_USER_DISPATCH_CONFIG: libc::c_uint = 0x4211;
const SETOPTIONS: libc::c_uint = 0x4200;
const CONT: libc::c_uint = 7;
const DETACH: libc::c_uint = 17;
const SYSCALL: libc::c_uint = 24;
const EVENT_STOP: i32 = 128;

/// Why a traced thread stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// A trap that we asked for, or a group stop.
    Event,
    /// The entry to or the exit from a system call.
    Syscall,
    /// A signal is about to be delivered; it is lost unless it is passed on.
    Signal(i32),
}

/// How a stopped thread goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resume {
    /// Until something stops it.
    Run,
    /// Until the next entry to or exit from a system call.
    ToSyscall,
}

/// A request whose address and data are numbers.
fn plain(
    request: libc::c_uint,
    tid: Tid,
    address: libc::c_ulong,
    data: libc::c_ulong,
) -> io::Result<()> {
    // SAFETY: none of the requests that come here makes the kernel follow a pointer of ours.
    check(unsafe { libc::ptrace(request, tid, address, data) }).map(drop)
}

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

/// Starts to trace a thread without stopping it.
///
/// # Errors
/// The kernel's: EPERM (no permission, or already traced), ESRCH.
pub fn seize(tid: Tid, options: libc::c_ulong) -> io::Result<()> {
    plain(SEIZE, tid, 0, options)
}

/// Changes the options of a stopped tracee.
///
/// # Errors
/// The kernel's: EPERM for what we lack the capability for.
pub fn set_options(tid: Tid, options: libc::c_ulong) -> io::Result<()> {
    plain(SETOPTIONS, tid, 0, options)
}

/// Asks for a trap; the thread reports it as [`Stop::Event`] before its next instruction.
///
/// # Errors
/// The kernel's: ESRCH if it is gone.
pub fn interrupt(tid: Tid) -> io::Result<()> {
    plain(INTERRUPT, tid, 0, 0)
}

/// Lets a stopped tracee go on, with a signal if `signal` is not 0.
///
/// # Errors
/// The kernel's: ESRCH if it is gone or not stopped.
pub fn resume(tid: Tid, how: Resume, signal: i32) -> io::Result<()> {
    let request = match how {
        Resume::Run => CONT,
        Resume::ToSyscall => SYSCALL,
    };
    plain(request, tid, 0, libc::c_ulong::from(signal.unsigned_abs()))
}

/// Lets a stopped tracee go for good, with a signal if `signal` is not 0.
///
/// # Errors
/// The kernel's: ESRCH if it is gone or not stopped.
pub fn detach(tid: Tid, signal: i32) -> io::Result<()> {
    plain(DETACH, tid, 0, libc::c_ulong::from(signal.unsigned_abs()))
}

/// Takes a stop that happened, if one did. Does not block, and does not reap: the tracee may be our child, whose
/// end belongs to somebody else.
///
/// # Errors
/// The kernel's: ECHILD if it is not ours any more.
pub fn take_stop(tid: Tid) -> io::Result<Option<Stop>> {
    let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
    let options = libc::WSTOPPED | libc::WNOHANG | libc::__WALL;
    // SAFETY: `info` is a siginfo_t that lives through the call.
    let result =
        unsafe { libc::waitid(libc::P_PID, tid.unsigned_abs(), info.as_mut_ptr(), options) };
    check(libc::c_long::from(result))?;
    // SAFETY: all zeroes is a siginfo_t, and the kernel writes nothing else into it.
    let info = unsafe { info.assume_init() };
    // SAFETY: waitid fills the SIGCHLD member of the union, or leaves zeroes.
    if unsafe { info.si_pid() } == 0 {
        return Ok(None);
    }
    // SAFETY: as above.
    let code = unsafe { info.si_status() };
    Ok(Some(match (code >> 8, code & 0xff) {
        (EVENT_STOP, _) => Stop::Event,
        (0, 0x85) => Stop::Syscall,
        (_, signal) => Stop::Signal(signal & 0x7f),
    }))
}

/// Reads a register set of a stopped tracee as bytes; returns how many there were.
///
/// # Errors
/// The kernel's: ENODEV or EINVAL if the CPU has no such set.
pub fn get_regset(tid: Tid, note: libc::c_int, into: &mut [u8]) -> io::Result<usize> {
    let mut vector = libc::iovec {
        iov_base: into.as_mut_ptr().cast(),
        iov_len: into.len(),
    };
    // SAFETY: the vector names exactly `into`, which is ours until the call returns.
    check(unsafe { libc::ptrace(GETREGSET, tid, note, &raw mut vector) })?;
    Ok(vector.iov_len)
}

/// Writes a register set of a stopped tracee.
///
/// The kernel finishes this even if we are killed meanwhile: the bytes are in our memory already.
///
/// # Errors
/// The kernel's: EIO or EINVAL for values that it refuses.
pub fn set_regset(tid: Tid, note: libc::c_int, from: &[u8]) -> io::Result<()> {
    let mut vector = libc::iovec {
        iov_base: from.as_ptr().cast_mut().cast(),
        iov_len: from.len(),
    };
    // SAFETY: this request only reads through the vector, which names exactly `from`.
    check(unsafe { libc::ptrace(SETREGSET, tid, note, &raw mut vector) }).map(drop)
}

/// The signals that a stopped tracee blocks: its own mask, not one that a `ppoll` set for its duration.
///
/// # Errors
/// The kernel's.
pub fn signal_mask(tid: Tid) -> io::Result<u64> {
    let mut mask = 0_u64;
    // SAFETY: the kernel writes 8 bytes, the size passed, into `mask`.
    check(unsafe { libc::ptrace(GETSIGMASK, tid, size_of::<u64>(), &raw mut mask) })?;
    Ok(mask)
}

/// Sets the signals that a stopped tracee blocks.
///
/// # Errors
/// The kernel's.
pub fn set_signal_mask(tid: Tid, mask: u64) -> io::Result<()> {
    // SAFETY: the kernel reads 8 bytes, the size passed, from `mask`.
    check(unsafe { libc::ptrace(SETSIGMASK, tid, size_of::<u64>(), &raw const mask) }).map(drop)
}

/// One classic BPF instruction, as `struct sock_filter`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Instruction {
    /// What to do.
    pub code: u16,
    /// How many instructions to skip if a test holds.
    pub jump_true: u8,
    /// How many to skip if it does not.
    pub jump_false: u8,
    /// The operand.
    pub operand: u32,
}

const _: () = assert!(size_of::<Instruction>() == 8);

/// The most instructions that the kernel lets one filter have.
const LONGEST_FILTER: usize = 4096;

/// A seccomp filter of a stopped tracee by index, 0 being the newest; none past the last.
///
/// # Errors
/// The kernel's: EACCES without `CAP_SYS_ADMIN` or under a filter of our own; EINVAL if the thread has no
/// filters.
pub fn seccomp_filter(tid: Tid, index: usize) -> io::Result<Option<Vec<Instruction>>> {
    let mut program = vec![Instruction::default(); LONGEST_FILTER];
    // SAFETY: the kernel writes at most BPF_MAXINSNS (4096) instructions, and `program` has room for them.
    let count =
        check(unsafe { libc::ptrace(SECCOMP_GET_FILTER, tid, index, program.as_mut_ptr()) });
    match count {
        Ok(count) => {
            program.truncate(usize::try_from(count).unwrap_or(0));
            Ok(Some(program))
        }
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Where a stopped tracee's restartable-sequence area is; none if it has none or the kernel cannot say.
///
/// # Errors
/// The kernel's, but for "no such request".
pub fn restartable_sequences(tid: Tid) -> io::Result<Option<u64>> {
    let mut configuration = [0_u64; 3]; // address; size and signature; flags and padding
    // SAFETY: the kernel writes at most the size passed.
    let result = check(unsafe {
        libc::ptrace(
            GET_RSEQ_CONFIGURATION,
            tid,
            size_of::<[u64; 3]>(),
            configuration.as_mut_ptr(),
        )
    });
    absent_is_none(result.map(|_| configuration[0]))
}

/// Whether a stopped tracee has its system calls turned into signals (`PR_SET_SYSCALL_USER_DISPATCH`).
///
/// # Errors
/// The kernel's, but for "no such request".
pub fn dispatches_syscalls(tid: Tid) -> io::Result<bool> {
    let mut configuration = [0_u64; 4]; // mode; selector; offset; length
    // SAFETY: the kernel writes at most the size passed.
    let result = check(unsafe {
        libc::ptrace(
            GET_SYSCALL_USER_DISPATCH_CONFIG,
            tid,
            size_of::<[u64; 4]>(),
            configuration.as_mut_ptr(),
        )
    });
    Ok(absent_is_none(result.map(|_| configuration[0]))?.is_some())
}

/// Older kernels answer EIO to a request that they do not know.
fn absent_is_none(result: io::Result<u64>) -> io::Result<Option<u64>> {
    match result {
        Ok(0) => Ok(None),
        Ok(value) => Ok(Some(value)),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EIO | libc::EINVAL)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Writes into another process's memory where that process could itself.
///
/// # Errors
/// EFAULT if not all of it is writable; some of it may have been written then.
pub fn write_memory(pid: Tid, address: u64, bytes: &[u8]) -> io::Result<()> {
    let local = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    let remote = libc::iovec {
        iov_base: std::ptr::without_provenance_mut(
            usize::try_from(address).map_err(|_| io::ErrorKind::InvalidInput)?,
        ),
        iov_len: bytes.len(),
    };
    // SAFETY: the call reads exactly `bytes`; the remote address is in the other process, which checks it.
    let written =
        unsafe { libc::process_vm_writev(pid, &raw const local, 1, &raw const remote, 1, 0) };
    if written < 0 {
        return Err(io::Error::last_os_error());
    }
    if written.unsigned_abs() != bytes.len() {
        return Err(io::Error::from_raw_os_error(libc::EFAULT));
    }
    Ok(())
}
