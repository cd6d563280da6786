//! Makes one thread of the target execute a system call or two, so that the target survives our death at any
//! moment. `docs/decisions/0003-injection-survives-its-own-death.md` has the reasoning.

use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::process::{PidfdGetfdFlags, pidfd_getfd};

use super::arch::{Call, Frame, Gadgets, Registers, Search};
use super::mappings::{self, Mapping};
use super::seccomp::{self, Action};
use super::tracee::Tracee;
use super::{AttachError, process};
use crate::sys::ptrace::{self, Instruction, Resume, Tid};

const CLOEXEC_NONBLOCK: u32 = 0x8_0800;
/// Only faults of user code are reported. Needs no privilege, and write-protection that the kernel resolves by
/// itself does not report any.
const USER_MODE_ONLY: u32 = 1;

/// What was just done to the target: each is a moment at which we may die.
#[doc(hidden)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    Seized,
    Interrupted,
    Stopped,
    Inspected,
    FrameWritten,
    Armed,
    SignalsBlocked,
    RunningToEntry,
    AtEntry,
    Redirected,
    RunningToExit,
    AtExit,
    Stolen,
    CloseArmed,
    CloseRunningToEntry,
    CloseAtEntry,
    CloseRunningToExit,
    CloseAtExit,
    InterruptedAgain,
    RunningToTrap,
    Trapped,
    SignalsRestored,
    RegistersRestored,
    Detached,
}

/// What is to be done in the target.
#[derive(Debug, Clone, Copy)]
pub(super) enum Job<'a> {
    /// Create a userfaultfd and take it.
    Create {
        /// Whether the target's own descriptor stays open.
        keep: bool,
        /// Whether one that reports user faults only will do.
        user_mode_will_do: bool,
    },
    /// Close descriptors.
    Close(&'a [u32]),
}

/// What was done.
#[derive(Debug)]
pub(super) struct Outcome {
    /// The userfaultfd, if one was to be created.
    pub(super) created: Option<Created>,
    /// How long the thread did not run.
    pub(super) stopped: Duration,
}

#[derive(Debug)]
pub(super) struct Created {
    pub(super) fd: OwnedFd,
    pub(super) remote: u32,
    pub(super) user_mode_only: bool,
}

/// What injection is told of its target.
#[derive(Debug, Clone, Copy)]
pub(super) struct Site<'a> {
    pub(super) pid: u32,
    pub(super) pidfd: BorrowedFd<'a>,
    pub(super) limit: Duration,
    pub(super) overrule_seccomp: bool,
}

/// Does `job` in some thread of the target. On failure the target was let go, unharmed.
///
/// In a thread of its own: ptrace binds the target to the thread that traces it, and should we give up on a thread
/// that does not stop, the end of our thread is what lets it go.
pub(super) fn inject(
    site: Site<'_>,
    job: Job<'_>,
    on_step: &mut (dyn FnMut(Step) + Send),
) -> Result<Outcome, AttachError> {
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("memferry-inject".to_owned())
            .spawn_scoped(scope, || in_some_thread(site, job, on_step))
            .map_err(|source| AttachError::Refused {
                pid: site.pid,
                what: "start the thread that injects",
                source,
            })?
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn in_some_thread(
    site: Site<'_>,
    job: Job<'_>,
    on_step: &mut (dyn FnMut(Step) + Send),
) -> Result<Outcome, AttachError> {
    let pid = site.pid;
    let started = Instant::now();
    let threads = process::threads(pid)?;
    let mappings = mappings::of_process(pid)?; // after the threads, so that it has their stacks
    let gadgets = find_gadgets(pid, &mappings)?;
    let mut last = AttachError::Deadline {
        pid,
        tid: pid,
        state: process::state(pid, pid),
        limit: site.limit,
    };
    for tid in threads {
        let mut injection = Injection {
            tracee: Tracee {
                pid,
                tid: tid.cast_signed(),
                pidfd: site.pidfd,
                started,
                limit: site.limit,
            },
            site,
            mappings: &mappings,
            gadgets,
            on_step,
        };
        match injection.run(job) {
            Err(error) if error.depends_on_the_thread() => last = error,
            result => return result,
        }
    }
    Err(last)
}

/// Looks for the gadgets in the code of files: nothing writes there, and libraries stay.
fn find_gadgets(pid: u32, mappings: &[Mapping]) -> Result<Gadgets, AttachError> {
    const PIECE: usize = 1 << 20;

    let path = PathBuf::from(format!("/proc/{pid}/mem"));
    let memory = File::open(&path).map_err(|source| process::failed(pid, path, source))?;
    let mut code: Vec<_> = mappings
        .iter()
        .filter(|mapping| mapping.permissions.execute && mapping.inode != 0 && !mapping.shared)
        .collect();
    code.sort_by_key(|mapping| !is_c_library(mapping));
    let mut search = Search::default();
    let mut piece = vec![0; PIECE];
    for mapping in code {
        let mut at = mapping.address.start;
        while at < mapping.address.end {
            let left = mapping.address.end - at;
            let length = usize::try_from(left).map_or(PIECE, |left| left.min(PIECE));
            // What cannot be read is not looked at: the file may be shorter than its mapping.
            let Ok(read @ 1..) = memory.read_at(&mut piece[..length], at) else {
                break;
            };
            if search.look(at, &piece[..read]) {
                break;
            }
            let step = if read as u64 == left {
                read
            } else {
                read.saturating_sub(Gadgets::LONGEST - 1)
            };
            at += step.max(1) as u64;
        }
        if search.is_complete() {
            break;
        }
    }
    search.found().ok_or(AttachError::NoGadget {
        pid,
        names: Gadgets::NAMES,
    })
}

fn is_c_library(mapping: &Mapping) -> bool {
    let name = mapping
        .path
        .as_deref()
        .and_then(|path| path.file_name()?.to_str());
    name.is_some_and(|name| name.starts_with("libc") || name.starts_with("ld-musl"))
}

/// One attempt in one thread.
struct Injection<'a> {
    tracee: Tracee<'a>,
    site: Site<'a>,
    mappings: &'a [Mapping],
    gadgets: Gadgets,
    on_step: &'a mut (dyn FnMut(Step) + Send),
}

/// A stopped thread that is found fit, and what brings it back.
struct Prepared {
    original: Registers,
    mask: u64,
    frame: Frame,
}

impl Injection<'_> {
    fn run(&mut self, job: Job<'_>) -> Result<Outcome, AttachError> {
        self.tracee.seize()?;
        self.step(Step::Seized);
        self.tracee.interrupt()?;
        self.step(Step::Interrupted);
        self.tracee.wait_for_trap()?;
        let stopped = Instant::now();
        self.step(Step::Stopped);
        let prepared = match self.prepare(job) {
            Ok(prepared) => prepared,
            Err(error) => {
                // Nothing was changed: let it go at once, for another thread may be tried.
                self.tracee.detach()?;
                return Err(error);
            }
        };
        // From here on an error leaves the thread to its frame, which the end of our thread sets off.
        let done = self.perform(job, &prepared)?;
        self.restore(&prepared)?;
        let stopped = stopped.elapsed();
        self.step(Step::Detached);
        Ok(Outcome {
            created: done?,
            stopped,
        })
    }

    fn step(&mut self, step: Step) {
        (self.on_step)(step);
    }

    /// Looks whether the stopped thread can be brought back from anywhere, and writes what does it.
    fn prepare(&mut self, job: Job<'_>) -> Result<Prepared, AttachError> {
        let Tracee { pid, tid, .. } = self.tracee;
        let numeric = tid.unsigned_abs();
        let mut original = Registers::read(tid).map_err(self.tracee.refused("read registers"))?;
        if !original.is_64_bit() {
            return Err(AttachError::Bits32 { pid });
        }
        let status = process::Status::of(pid, numeric)?;
        let in_the_way = |mode| AttachError::Unsafe { tid: numeric, mode };
        if status.has_shadow_stack() {
            return Err(in_the_way("has a shadow stack"));
        }
        let dispatches = ptrace::dispatches_syscalls(tid)
            .map_err(self.tracee.refused("read how system calls are dispatched"))?;
        if dispatches {
            return Err(in_the_way(
                "has its system calls emulated (syscall user dispatch)",
            ));
        }
        self.consult_seccomp(job, &original, &status)?;
        self.leave_restartable_sequence(&mut original)?;
        original.hide_the_stop();
        let mask = ptrace::signal_mask(tid).map_err(self.tracee.refused("read the signal mask"))?;
        let no_stack = || AttachError::NoStack { pid, tid: numeric };
        let frame = Frame::new(tid, &original, mask, &self.gadgets)
            .map_err(self.tracee.refused("read the extended registers"))?
            .ok_or_else(no_stack)?;
        let room = mappings::stack_below(self.mappings, original.stack_pointer());
        if room.is_none_or(|room| frame.address < room.start) {
            return Err(no_stack());
        }
        self.step(Step::Inspected);
        ptrace::write_memory(tid, frame.address, &frame.bytes).map_err(|_| no_stack())?;
        self.step(Step::FrameWritten);
        Ok(Prepared {
            original,
            mask,
            frame,
        })
    }

    /// Suspends the thread's filters. Refuses if they would do harm to what the thread executes after our death.
    fn consult_seccomp(
        &self,
        job: Job<'_>,
        registers: &Registers,
        status: &process::Status,
    ) -> Result<(), AttachError> {
        let tid = self.tracee.tid;
        let numeric = tid.unsigned_abs();
        match status.seccomp() {
            0 => return Ok(()),
            2 => {}
            _ => {
                return Err(AttachError::Unsafe {
                    tid: numeric,
                    mode: "is in strict seccomp mode",
                });
            }
        }
        if !process::may_suspend_seccomp() {
            return Err(AttachError::SeccompNeedsAdmin { tid: numeric });
        }
        let filters = read_filters(tid).map_err(self.tracee.refused("read seccomp filters"))?;
        let answer = |call: Call| {
            seccomp::evaluate(
                &filters,
                &seccomp::Data {
                    number: call.number,
                    instruction_pointer: self.gadgets.after_call(),
                    arguments: registers.seccomp_arguments(call),
                },
            )
        };
        let forbids = |call: Call, action, overrulable| AttachError::SeccompForbids {
            tid: numeric,
            call: call.name,
            action,
            overrulable,
        };
        match answer(Call::RETURN) {
            Action::Allow => {}
            Action::Refuse => return Err(forbids(Call::RETURN, "returns an error", false)),
            Action::Harm(action) => return Err(forbids(Call::RETURN, action, false)),
        }
        if let Action::Harm(action) = answer(Call::close(0)) {
            return Err(forbids(Call::close(0), action, false));
        }
        if let (Job::Create { .. }, false) = (job, self.site.overrule_seccomp) {
            let create = Call::userfaultfd(CLOEXEC_NONBLOCK);
            if let Action::Harm(action) = answer(create) {
                return Err(forbids(create, action, true));
            }
        }
        ptrace::set_options(tid, ptrace::OPTION_SYSGOOD | ptrace::OPTION_SUSPEND_SECCOMP)
            .map_err(self.tracee.refused("suspend seccomp"))
    }

    /// A thread stopped within a restartable sequence may not go on with it: the kernel would abort it for a
    /// signal, and so do we. (While the thread is elsewhere the kernel forgets that it was in one.)
    fn leave_restartable_sequence(&self, original: &mut Registers) -> Result<(), AttachError> {
        let tid = self.tracee.tid;
        let area = ptrace::restartable_sequences(tid)
            .map_err(self.tracee.refused("find restartable sequences"))?;
        let Some(area) = area.filter(|_| !original.in_call()) else {
            return Ok(());
        };
        let words = |address, words: &mut [[u8; 8]]| -> Result<(), AttachError> {
            let path = PathBuf::from(format!("/proc/{tid}/mem"));
            File::open(&path)
                .and_then(|memory| memory.read_exact_at(words.as_flattened_mut(), address))
                .map_err(|source| process::failed(self.tracee.pid, path, source))
        };
        let mut pointer = [[0; 8]];
        words(area + 8, &mut pointer)?; // rseq_cs
        let descriptor = u64::from_le_bytes(pointer[0]);
        if descriptor == 0 {
            return Ok(());
        }
        let mut fields = [[0; 8]; 4]; // version and flags, start, length, where to go on abort
        words(descriptor, &mut fields)?;
        let [_, start, length, abort] = fields.map(u64::from_le_bytes);
        if original.instruction_pointer().wrapping_sub(start) < length {
            original.set_instruction_pointer(abort);
        }
        Ok(())
    }

    /// Does the job. The outer error is one after which the thread is no longer ours to restore.
    fn perform(
        &mut self,
        job: Job<'_>,
        prepared: &Prepared,
    ) -> Result<Result<Option<Created>, AttachError>, AttachError> {
        self.arm(&Registers::armed(
            &prepared.original,
            &prepared.frame,
            &self.gadgets,
        ))?;
        self.step(Step::Armed);
        // Only now: the frame unblocks them, should nobody else.
        ptrace::set_signal_mask(self.tracee.tid, u64::MAX)
            .map_err(self.tracee.refused("block signals"))?;
        self.step(Step::SignalsBlocked);
        match job {
            Job::Create {
                keep,
                user_mode_will_do,
            } => {
                let mut flags = CLOEXEC_NONBLOCK;
                let mut result = self.create(prepared, flags)?;
                if user_mode_will_do && result == -i64::from(libc::EPERM) {
                    flags |= USER_MODE_ONLY;
                    self.arm(&Registers::armed(
                        &prepared.original,
                        &prepared.frame,
                        &self.gadgets,
                    ))?;
                    result = self.create(prepared, flags)?;
                }
                self.step(Step::AtExit);
                let Some(remote) = u32::try_from(result).ok().filter(|_| result >= 0) else {
                    let code = i32::try_from(-result).unwrap_or(libc::EIO);
                    return Ok(Err(AttachError::Userfaultfd {
                        pid: self.tracee.pid,
                        source: io::Error::from_raw_os_error(code),
                    }));
                };
                let stolen = pidfd_getfd(
                    self.site.pidfd,
                    remote.cast_signed(),
                    PidfdGetfdFlags::empty(),
                );
                self.step(Step::Stolen);
                if !keep || stolen.is_err() {
                    self.close(prepared, remote)?;
                }
                Ok(match stolen {
                    Ok(fd) => Ok(Some(Created {
                        fd,
                        remote,
                        user_mode_only: flags & USER_MODE_ONLY != 0,
                    })),
                    Err(source) => Err(AttachError::Refused {
                        pid: self.tracee.pid,
                        what: "take the userfaultfd",
                        source: source.into(),
                    }),
                })
            }
            Job::Close(fds) => {
                for &fd in fds {
                    self.close(prepared, fd)?;
                }
                Ok(Ok(None))
            }
        }
    }

    fn arm(&self, registers: &Registers) -> Result<(), AttachError> {
        registers
            .write(self.tracee.tid)
            .map_err(self.tracee.refused("write registers"))
    }

    /// Runs an armed thread to the entry of its `rt_sigreturn`, and there makes it create a userfaultfd instead.
    /// The filters are asked about a call after that stop: so only from there on do they see it.
    fn create(&mut self, prepared: &Prepared, flags: u32) -> Result<i64, AttachError> {
        self.tracee.resume(Resume::ToSyscall, 0)?;
        self.step(Step::RunningToEntry);
        self.tracee.wait_for_call()?;
        self.step(Step::AtEntry);
        let mut registers =
            Registers::read(self.tracee.tid).map_err(self.tracee.refused("read registers"))?;
        registers.redirect(&prepared.frame, Call::userfaultfd(flags));
        self.arm(&registers)?;
        self.step(Step::Redirected);
        self.tracee.resume(Resume::ToSyscall, 0)?;
        self.step(Step::RunningToExit);
        self.tracee.wait_for_call()?;
        let registers =
            Registers::read(self.tracee.tid).map_err(self.tracee.refused("read registers"))?;
        Ok(registers.result())
    }

    /// Makes a thread at the exit of a call, or armed, close a descriptor: by itself, if we die.
    fn close(&mut self, prepared: &Prepared, fd: u32) -> Result<(), AttachError> {
        let close = Call::close(fd);
        self.arm(&Registers::armed_with(
            &prepared.original,
            &prepared.frame,
            &self.gadgets,
            close,
        ))?;
        self.step(Step::CloseArmed);
        self.tracee.resume(Resume::ToSyscall, 0)?;
        self.step(Step::CloseRunningToEntry);
        self.tracee.wait_for_call()?;
        self.step(Step::CloseAtEntry);
        self.tracee.resume(Resume::ToSyscall, 0)?;
        self.step(Step::CloseRunningToExit);
        self.tracee.wait_for_call()?;
        self.step(Step::CloseAtExit);
        Ok(())
    }

    /// Puts the thread back exactly as it was stopped, at the place where the kernel decides whether the call
    /// that it was in is restarted, and lets it go.
    fn restore(&mut self, prepared: &Prepared) -> Result<(), AttachError> {
        self.tracee.interrupt()?;
        self.step(Step::InterruptedAgain);
        self.tracee.resume(Resume::Run, 0)?;
        self.step(Step::RunningToTrap);
        self.tracee.wait_for_trap()?;
        self.step(Step::Trapped);
        ptrace::set_signal_mask(self.tracee.tid, prepared.mask)
            .map_err(self.tracee.refused("restore the signal mask"))?;
        self.step(Step::SignalsRestored);
        self.arm(&prepared.original)?;
        self.step(Step::RegistersRestored);
        self.tracee.detach()
    }
}

fn read_filters(tid: Tid) -> io::Result<Vec<Vec<Instruction>>> {
    let mut filters = Vec::new();
    while let Some(filter) = ptrace::seccomp_filter(tid, filters.len())? {
        filters.push(filter);
    }
    Ok(filters)
}
