//! The table that tells a kernel of its processors and how interrupts reach them: that of Intel's "`MultiProcessor` Specification" 1.4, which is
//! shorter than ACPI's and which Linux reads.

use vm_memory::{Bytes, GuestAddress};

use super::BootError;
use crate::machine::Memory;

/// Where it is looked for: in the last KiB below 640.
const PLACE: u64 = 0x9_fc00;
const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;
/// What KVM's local and I/O APICs say that they are.
const APIC_VERSION: u8 = 0x14;
/// Interrupt lines of a PC.
const LINES: u8 = 16;
/// KVM routes the timer's line to this input of the I/O APIC, as PCs do.
const TIMER_INPUT: u8 = 2;
const SPECIFICATION: u8 = 4;

const ENABLED: u8 = 1;
const FIRST: u8 = 2;
const EVERY_APIC: u8 = 0xff;

/// What kind an interrupt is.
#[derive(Clone, Copy)]
enum Kind {
    Vectored = 0,
    NonMaskable = 1,
    External = 3,
}

/// Writes the table for so many processors.
pub(super) fn write(memory: &Memory, cpus: u64) -> Result<(), BootError> {
    let bytes = table(u8::try_from(cpus).unwrap_or(EVERY_APIC - 1));
    memory
        .write_slice(&bytes, GuestAddress(PLACE))
        .map_err(|_| BootError::NoRoom {
            what: "the table of processors",
            len: bytes.len() as u64,
        })
}

/// What makes the sum of the bytes 0.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_sub(*byte))
}

fn table(cpus: u8) -> Vec<u8> {
    let mut entries = Vec::new();
    let mut count: u16 = 0;
    let mut add = |entry: &[u8]| {
        entries.extend_from_slice(entry);
        count += 1;
    };
    let io_apic = cpus;
    for cpu in 0..cpus {
        let flags = if cpu == 0 { ENABLED | FIRST } else { ENABLED };
        let mut entry = [0; 20];
        entry[..4].copy_from_slice(&[0, cpu, APIC_VERSION, flags]);
        // A family 6 processor that has an FPU and a local APIC; kernels ask the processor itself.
        entry[4..8].copy_from_slice(&0x600_u32.to_le_bytes());
        entry[8..12].copy_from_slice(&0x201_u32.to_le_bytes());
        add(&entry);
    }
    let mut bus = [1, 0, 0, 0, 0, 0, 0, 0];
    bus[2..].copy_from_slice(b"ISA   ");
    add(&bus);
    let mut chip = [2, io_apic, 0x11, ENABLED, 0, 0, 0, 0];
    chip[4..].copy_from_slice(&IO_APIC.to_le_bytes());
    add(&chip);
    for line in (0..LINES).filter(|&line| line != TIMER_INPUT) {
        let input = if line == 0 { TIMER_INPUT } else { line };
        add(&[3, Kind::Vectored as u8, 0, 0, 0, line, io_apic, input]);
    }
    add(&[4, Kind::External as u8, 0, 0, 0, 0, EVERY_APIC, 0]);
    add(&[4, Kind::NonMaskable as u8, 0, 0, 0, 0, EVERY_APIC, 1]);

    let mut header = b"PCMP".to_vec();
    let len = u16::try_from(44 + entries.len()).expect("there are fewer than 256 processors");
    header.extend_from_slice(&len.to_le_bytes());
    header.extend_from_slice(&[SPECIFICATION, 0]);
    header.extend_from_slice(b"MEMFERRYMINIVMM     ");
    header.extend_from_slice(&[0; 6]);
    header.extend_from_slice(&count.to_le_bytes());
    header.extend_from_slice(&LOCAL_APIC.to_le_bytes());
    header.extend_from_slice(&[0; 4]);
    header.extend_from_slice(&entries);
    header[7] = checksum(&header);

    let mut pointer = b"_MP_".to_vec();
    let after = u32::try_from(PLACE + 16).expect("it is low");
    pointer.extend_from_slice(&after.to_le_bytes());
    pointer.extend_from_slice(&[1, SPECIFICATION, 0, 0, 0, 0, 0, 0]);
    pointer[10] = checksum(&pointer);
    pointer.extend_from_slice(&header);
    pointer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_parts_sum_to_zero_and_say_their_lengths() {
        for cpus in [1, 4, 254] {
            let table = table(cpus);
            let (pointer, header) = table.split_at(16);
            assert_eq!(checksum(pointer), 0);
            assert_eq!(checksum(header), 0);
            let len = u16::from_le_bytes([header[4], header[5]]);
            assert_eq!(usize::from(len), header.len());
            let entries = u16::from_le_bytes([header[34], header[35]]);
            assert_eq!(entries, u16::from(cpus) + 1 + 1 + 15 + 2);
        }
    }

    #[test]
    fn what_few_processors_need_fits_below_640_kib() {
        assert!(PLACE + table(16).len() as u64 <= 640 << 10);
    }
}
