//! What a thread's seccomp filters would say to a call: the classic BPF that they are written in, evaluated here.
//!
//! Injection suspends filters, but the suspension ends with us. So a call that a filter answers by killing must
//! not be pending in the target at a moment at which we may die.

use super::arch::SECCOMP_ARCHITECTURE;
use crate::sys::ptrace::Instruction;

/// What a filter does with a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    /// The call is made.
    Allow,
    /// The call is not made, and returns an error.
    Refuse,
    /// The process or thread dies, is sent a signal, or waits for a supervisor.
    Harm(&'static str),
}

/// `struct seccomp_data`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Data {
    pub(super) number: u32,
    pub(super) instruction_pointer: u64,
    pub(super) arguments: [u64; 6],
}

impl Data {
    /// The 32-bit word at a byte offset.
    fn word(&self, offset: u32) -> Option<u32> {
        let half = |value: u64| {
            let bytes = value.to_le_bytes();
            let start = (offset % 8) as usize;
            bytes
                .get(start..)?
                .first_chunk()
                .copied()
                .map(u32::from_le_bytes)
        };
        match offset {
            _ if !offset.is_multiple_of(4) => None,
            0 => Some(self.number),
            4 => Some(SECCOMP_ARCHITECTURE),
            8 | 12 => half(self.instruction_pointer),
            16..64 => half(self.arguments[(offset as usize - 16) / 8]),
            _ => None,
        }
    }
}

const LENGTH: u32 = 64;

/// What all `filters` together do with a call: the harshest answer wins, as in the kernel.
pub(super) fn evaluate(filters: &[Vec<Instruction>], data: &Data) -> Action {
    let answers = filters
        .iter()
        .map(|filter| run(filter, data).unwrap_or(0x8000_0000));
    // Compared as signed numbers, KILL_PROCESS (0x8000_0000) is the smallest.
    let answer = answers
        .map(|answer| (answer & 0xffff_0000).cast_signed())
        .min()
        .map_or(0x7fff_0000, i32::cast_unsigned);
    match answer {
        0x7fff_0000 | 0x7ffc_0000 => Action::Allow,
        0x0005_0000 | 0x7ff0_0000 => Action::Refuse, // errno; trace, which is ENOSYS without a tracer
        0x7fc0_0000 => Action::Harm("hands it to a supervisor"),
        0x0003_0000 => Action::Harm("answers it with SIGSYS"),
        0 => Action::Harm("kills the thread for it"),
        _ => Action::Harm("kills the process for it"),
    }
}

/// Runs one filter. `None` for what the kernel would not have accepted.
fn run(filter: &[Instruction], data: &Data) -> Option<u32> {
    let mut accumulator = 0_u32;
    let mut index = 0_u32;
    let mut scratch = [0_u32; 16];
    let mut at = 0_usize;
    loop {
        let Instruction {
            code,
            jump_true,
            jump_false,
            operand,
        } = *filter.get(at)?;
        at += 1;
        let source = if code & 0x08 == 0 { operand } else { index };
        match code {
            0x20 => accumulator = data.word(operand)?, // ld [k]
            0x00 => accumulator = operand,
            0x80 => accumulator = LENGTH,
            0x60 => accumulator = *scratch.get(operand as usize)?,
            0x01 => index = operand,
            0x81 => index = LENGTH,
            0x61 => index = *scratch.get(operand as usize)?,
            0x02 => *scratch.get_mut(operand as usize)? = accumulator,
            0x03 => *scratch.get_mut(operand as usize)? = index,
            0x04 | 0x0c => accumulator = accumulator.wrapping_add(source),
            0x14 | 0x1c => accumulator = accumulator.wrapping_sub(source),
            0x24 | 0x2c => accumulator = accumulator.wrapping_mul(source),
            0x34 | 0x3c => accumulator = accumulator.checked_div(source)?,
            0x44 | 0x4c => accumulator |= source,
            0x54 | 0x5c => accumulator &= source,
            0x64 | 0x6c => accumulator = accumulator.checked_shl(source)?,
            0x74 | 0x7c => accumulator = accumulator.checked_shr(source)?,
            0xa4 | 0xac => accumulator ^= source,
            0x84 => accumulator = accumulator.wrapping_neg(),
            0x07 => index = accumulator,
            0x87 => accumulator = index,
            0x05 => at += operand as usize,
            0x15 | 0x1d | 0x25 | 0x2d | 0x35 | 0x3d | 0x45 | 0x4d => {
                let holds = match code & 0xf0 {
                    0x10 => accumulator == source,
                    0x20 => accumulator > source,
                    0x30 => accumulator >= source,
                    _ => accumulator & source != 0,
                };
                at += usize::from(if holds { jump_true } else { jump_false });
            }
            0x06 => return Some(operand),
            0x16 => return Some(accumulator),
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instruction(code: u16, jump_true: u8, jump_false: u8, operand: u32) -> Instruction {
        Instruction {
            code,
            jump_true,
            jump_false,
            operand,
        }
    }

    /// Answers `answer` to call 323, and allows the others.
    fn answering(answer: u32) -> Vec<Instruction> {
        vec![
            instruction(0x20, 0, 0, 0),
            instruction(0x15, 0, 1, 323),
            instruction(0x06, 0, 0, answer),
            instruction(0x06, 0, 0, 0x7fff_0000),
        ]
    }

    fn call(number: u32) -> Data {
        Data {
            number,
            instruction_pointer: 0x1_0000_0002,
            arguments: [0x2_0000_0003, 0, 0, 0, 0, 0],
        }
    }

    #[test]
    fn the_harshest_filter_wins() {
        let filters = [
            answering(0x7fff_0000),
            answering(0x8000_0000),
            answering(0x0005_0001),
        ];
        assert_eq!(
            evaluate(&filters, &call(323)),
            Action::Harm("kills the process for it")
        );
        assert_eq!(evaluate(&filters, &call(3)), Action::Allow);
    }

    #[test]
    fn a_refusal_by_error_does_no_harm() {
        assert_eq!(
            evaluate(&[answering(0x0005_0001)], &call(323)),
            Action::Refuse
        );
    }

    #[test]
    fn both_halves_of_an_argument_are_readable() {
        assert_eq!(call(0).word(16), Some(3));
        assert_eq!(call(0).word(20), Some(2));
        assert_eq!(call(0).word(12), Some(1));
        assert_eq!(call(0).word(64), None);
    }

    #[test]
    fn a_filter_that_runs_off_its_end_counts_as_a_kill() {
        let broken = vec![instruction(0x05, 0, 0, 9)];
        assert_eq!(
            evaluate(&[broken], &call(1)),
            Action::Harm("kills the process for it")
        );
    }
}
