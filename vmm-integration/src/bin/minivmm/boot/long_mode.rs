//! Long mode from the first instruction on: tables in the guest's memory, and the registers that say so.

use kvm_bindings::{kvm_dtable, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::BootError;
use crate::machine::Memory;

/// Where the descriptors are.
const GDT: u64 = 0x500;
/// Where the page tables begin: one of the first level, one of the second, and one for each GiB.
const TABLES: u64 = 0x9000;
/// How much of the guest's addresses is mapped: as much as the tables have room for below the stacks of flat programs.
const MOST_MAPPED: u64 = 64 << 30;
/// Mapped in any case, since the local APICs are there.
const LEAST_MAPPED: u64 = 4 << 30;

const GIB: u64 = 1 << 30;
const LARGE_PAGE: u64 = 2 << 20;
const PRESENT_WRITABLE: u64 = 3;
const LARGE: u64 = 0x80;

// The first two are what Linux' boot protocol wants.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

const CR0_PROTECTED: u64 = 1;
const CR0_MONITOR: u64 = 1 << 1;
const CR0_EXTENSION: u64 = 1 << 4;
const CR0_NATIVE_ERRORS: u64 = 1 << 5;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PHYSICAL_ADDRESS_EXTENSION: u64 = 1 << 5;
/// Fast saving of SSE's registers, and its exceptions.
const CR4_SSE: u64 = 3 << 9;
const EFER_LONG_MODE: u64 = 1 << 8 | 1 << 10;

/// The descriptor of a segment as the table has it.
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(segment.limit);
    let flags = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7
        | u64::from(segment.l) << 13
        | u64::from(segment.db) << 14
        | u64::from(segment.g) << 15;
    // A limit that is counted in pages has lost its low bits.
    let limit = if segment.g == 1 { limit >> 12 } else { limit };
    (limit & 0xffff) | flags << 40 | (limit >> 16 & 0xf) << 48
}

fn segments() -> [kvm_segment; 3] {
    let flat = kvm_segment {
        limit: u32::MAX,
        present: 1,
        s: 1,
        g: 1,
        ..kvm_segment::default()
    };
    [
        kvm_segment {
            selector: CODE,
            type_: 11,
            l: 1,
            ..flat
        },
        kvm_segment {
            selector: DATA,
            type_: 3,
            db: 1,
            ..flat
        },
        kvm_segment {
            selector: TASK,
            type_: 11,
            limit: 0xffff,
            s: 0,
            g: 0,
            ..flat
        },
    ]
}

/// Writes the descriptors and page tables that map every address to itself.
pub(super) fn write_tables(memory: &Memory) -> Result<(), BootError> {
    let put = |value: u64, at: u64| {
        memory
            .write_slice(&value.to_le_bytes(), GuestAddress(at))
            .map_err(|_| BootError::NoRoom {
                what: "a page table",
                len: 8,
            })
    };
    put(0, GDT)?;
    for segment in &segments() {
        put(descriptor(segment), GDT + u64::from(segment.selector))?;
    }
    let end = memory.last_addr().0 + 1;
    let mapped = end.clamp(LEAST_MAPPED, MOST_MAPPED);
    let (second, third) = (TABLES + 0x1000, TABLES + 0x2000);
    put(second | PRESENT_WRITABLE, TABLES)?;
    for gib in 0..mapped.div_ceil(GIB) {
        let table = third + gib * 0x1000;
        put(table | PRESENT_WRITABLE, second + gib * 8)?;
        for page in 0..GIB / LARGE_PAGE {
            let address = gib * GIB + page * LARGE_PAGE;
            put(address | LARGE | PRESENT_WRITABLE, table + page * 8)?;
        }
    }
    Ok(())
}

/// The registers of a processor in long mode, from those that it has after a reset.
pub(super) fn special_registers(mut sregs: kvm_sregs) -> kvm_sregs {
    let [code, data, task] = segments();
    sregs.cs = code;
    for segment in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *segment = data;
    }
    sregs.tr = task;
    sregs.gdt = kvm_dtable {
        base: GDT,
        limit: TASK + 8 - 1,
        ..kvm_dtable::default()
    };
    sregs.idt = kvm_dtable::default();
    sregs.cr0 = CR0_PROTECTED | CR0_MONITOR | CR0_EXTENSION | CR0_NATIVE_ERRORS | CR0_PAGING;
    sregs.cr3 = TABLES;
    sregs.cr4 = CR4_PHYSICAL_ADDRESS_EXTENSION | CR4_SSE;
    sregs.efer = EFER_LONG_MODE;
    sregs
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::ByteValued;
    use vm_memory::bitmap::AtomicBitmap;
    use vmm_integration::RamBuilder;

    fn word(memory: &Memory, at: u64) -> u64 {
        let mut bytes = [0; 8];
        memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        u64::from_slice(&bytes).copied().unwrap()
    }

    /// Follows the tables as a processor would.
    fn translate(memory: &Memory, address: u64) -> Option<u64> {
        let mut table = TABLES;
        for shift in [39, 30] {
            let entry = word(memory, table + (address >> shift & 511) * 8);
            if entry & 1 == 0 {
                return None;
            }
            table = entry & !0xfff;
        }
        let entry = word(memory, table + (address >> 21 & 511) * 8);
        (entry & 1 == 1).then(|| (entry & !0x1f_ffff) + (address & 0x1f_ffff))
    }

    #[test]
    fn every_address_of_the_guest_is_mapped_to_itself() {
        let memory = RamBuilder::new(4 << 30)
            .in_memory::<AtomicBitmap>()
            .unwrap();
        write_tables(&memory).unwrap();
        for address in [0, 0x10_0000, 0xfee0_0000, 0x1_0000_1234, 0x1_3fff_ffff] {
            assert_eq!(translate(&memory, address), Some(address));
        }
        assert_eq!(translate(&memory, 0x1_4000_0000), None);
    }

    #[test]
    fn descriptors_are_those_of_the_manual() {
        let [code, data, task] = segments();
        assert_eq!(descriptor(&code), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&data), 0x00cf_9300_0000_ffff);
        assert_eq!(descriptor(&task), 0x0000_8b00_0000_ffff);
    }
}
