//! Whether a stopped thread can be brought back from anywhere that injection takes it, and what does that.

use std::io;

use super::arch::{Call, Frame, Registers};
use super::code::Code;
use super::inject::{CLOEXEC_NONBLOCK, Job, Site};
use super::mappings::{self, Mapping};
use super::seccomp::{self, Action};
use super::tracee::Tracee;
use super::{AttachError, process};
use crate::sys::ptrace::{self, Instruction, Tid};

/// A stopped thread that was found fit.
#[derive(Debug)]
pub(super) struct Prepared {
    /// Its registers, and what the kernel needs to restart the call that it is in.
    pub(super) original: Registers,
    /// The signals that it blocks.
    pub(super) mask: u64,
    /// What brings it back without us. Not written yet.
    pub(super) frame: Frame,
}

/// Inspects a thread that is in the trap. Changes nothing but that its seccomp filters are suspended.
pub(super) fn inspect(
    tracee: &Tracee<'_>,
    site: Site<'_>,
    mappings: &[Mapping],
    code: &Code,
    job: Job<'_>,
) -> Result<Prepared, AttachError> {
    let Tracee { pid, tid, .. } = *tracee;
    let numeric = tid.unsigned_abs();
    if !code.is_unchanged() {
        return Err(AttachError::Replaced { pid });
    }
    let mut original = Registers::read(tid).map_err(tracee.refused("read registers"))?;
    if !original.is_64_bit() {
        return Err(AttachError::Bits32 { pid });
    }
    let status = process::Status::of(pid, numeric)?;
    let in_the_way = |mode| AttachError::Unsafe { tid: numeric, mode };
    if status.has_shadow_stack() {
        return Err(in_the_way("has a shadow stack"));
    }
    let dispatches = ptrace::dispatches_syscalls(tid)
        .map_err(tracee.refused("read how system calls are dispatched"))?;
    if dispatches {
        return Err(in_the_way(
            "has its system calls emulated (syscall user dispatch)",
        ));
    }
    match status.seccomp() {
        0 => {}
        2 => suspend_filters(tracee, site, code, job, &original)?,
        _ => return Err(in_the_way("is in strict seccomp mode")),
    }
    leave_restartable_sequence(tracee, code, &mut original)?;
    original.hide_the_stop();
    let mask = ptrace::signal_mask(tid).map_err(tracee.refused("read the signal mask"))?;
    let no_stack = || AttachError::NoStack { pid, tid: numeric };
    let frame = Frame::new(tid, &original, mask, &code.gadgets)
        .map_err(tracee.refused("read the extended registers"))?
        .ok_or_else(no_stack)?;
    let room = mappings::stack_below(mappings, original.stack_pointer());
    if room.is_none_or(|room| frame.address < room.start) {
        return Err(no_stack());
    }
    Ok(Prepared {
        original,
        mask,
        frame,
    })
}

/// Suspends the thread's filters. Refuses if they would do harm to what the thread executes after our death.
fn suspend_filters(
    tracee: &Tracee<'_>,
    site: Site<'_>,
    code: &Code,
    job: Job<'_>,
    registers: &Registers,
) -> Result<(), AttachError> {
    let tid = tracee.tid;
    let numeric = tid.unsigned_abs();
    if !process::may_suspend_seccomp() {
        return Err(AttachError::SeccompNeedsAdmin { tid: numeric });
    }
    let filters = read_filters(tid).map_err(tracee.refused("read seccomp filters"))?;
    let answer = |call: Call| {
        let data = seccomp::Data {
            number: call.number,
            instruction_pointer: code.gadgets.after_call(),
            arguments: registers.seccomp_arguments(call),
        };
        seccomp::evaluate(&filters, &data)
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
    if let (Job::Create { .. }, false) = (job, site.overrule_seccomp) {
        let create = Call::userfaultfd(CLOEXEC_NONBLOCK);
        if let Action::Harm(action) = answer(create) {
            return Err(forbids(create, action, true));
        }
    }
    ptrace::set_options(tid, ptrace::OPTION_SYSGOOD | ptrace::OPTION_SUSPEND_SECCOMP)
        .map_err(tracee.refused("suspend seccomp"))
}

fn read_filters(tid: Tid) -> io::Result<Vec<Vec<Instruction>>> {
    let mut filters = Vec::new();
    while let Some(filter) = ptrace::seccomp_filter(tid, filters.len())? {
        filters.push(filter);
    }
    Ok(filters)
}

/// A thread stopped within a restartable sequence may not go on with it: the kernel would abort it for a signal,
/// and so do we. (While the thread is elsewhere the kernel forgets that it was in one.)
fn leave_restartable_sequence(
    tracee: &Tracee<'_>,
    code: &Code,
    original: &mut Registers,
) -> Result<(), AttachError> {
    let area = ptrace::restartable_sequences(tracee.tid)
        .map_err(tracee.refused("find restartable sequences"))?;
    let Some(area) = area.filter(|_| !original.in_call()) else {
        return Ok(());
    };
    let read = |address, words: &mut [[u8; 8]]| {
        code.read_words(address, words)
            .map_err(tracee.refused("read a restartable sequence"))
    };
    let mut pointer = [[0; 8]];
    read(area.wrapping_add(8), &mut pointer)?; // rseq_cs
    let descriptor = u64::from_le_bytes(pointer[0]);
    if descriptor == 0 {
        return Ok(());
    }
    let mut fields = [[0; 8]; 4]; // version and flags, start, length, where to go on abort
    read(descriptor, &mut fields)?;
    let [_, start, length, abort] = fields.map(u64::from_le_bytes);
    if original.instruction_pointer().wrapping_sub(start) < length {
        original.set_instruction_pointer(abort);
    }
    Ok(())
}
