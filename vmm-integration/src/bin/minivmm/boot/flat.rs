//! A bare program: its bytes at 1 MiB, and a page that says what machine it is on.
//!
//! Every processor enters it at its first byte, in long mode, with every address mapped to itself, its code segment 0x10, interrupts off, its
//! number in `rdi` and the address of the page in `rsi`.
//! The page has 64-bit words: a magic number, how many processors there are, how fast the time stamp counter counts in kHz, how many words
//! follow; from 0x20 on those words; from 0x100 on how many regions of memory there are, then the start and the length of each.

use kvm_bindings::kvm_regs;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::BootError;
use crate::machine::Memory;

/// Where the program is.
const PROGRAM: u64 = 0x10_0000;
/// Where the page is.
const PARAMETERS: u64 = 0x7000;
const MAGIC: u64 = u64::from_le_bytes(*b"minivmm\x01");
/// How many words there is room for.
pub(super) const MOST_WORDS: usize = (0x100 - 0x20) / 8;

/// Loads the program; the registers to enter it with.
pub(super) fn load(
    memory: &Memory,
    image: &[u8],
    words: &[u64],
    cpus: u64,
    tsc_khz: u32,
) -> Result<kvm_regs, BootError> {
    if words.len() > MOST_WORDS {
        return Err(BootError::TooManyWords(words.len()));
    }
    memory
        .write_slice(image, GuestAddress(PROGRAM))
        .map_err(|_| BootError::NoRoom {
            what: "a program",
            len: image.len() as u64,
        })?;
    let mut page = vec![MAGIC, cpus, tsc_khz.into(), words.len() as u64];
    page.extend_from_slice(words);
    page.resize(0x100 / 8, 0);
    page.push(memory.num_regions() as u64);
    for region in memory.iter() {
        page.extend([region.start_addr().0, region.len()]);
    }
    let page: Vec<u8> = page.iter().flat_map(|word| word.to_le_bytes()).collect();
    memory
        .write_slice(&page, GuestAddress(PARAMETERS))
        .map_err(|_| BootError::NoRoom {
            what: "the page of parameters",
            len: page.len() as u64,
        })?;
    Ok(kvm_regs {
        rip: PROGRAM,
        rsi: PARAMETERS,
        // The bit that is always set.
        rflags: 2,
        ..kvm_regs::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::bitmap::AtomicBitmap;
    use vmm_integration::RamBuilder;

    #[test]
    fn the_page_says_what_machine_it_is() {
        let memory = RamBuilder::new(2 << 20)
            .in_memory::<AtomicBitmap>()
            .unwrap();
        let regs = load(&memory, b"program", &[7, 8], 3, 2_000).unwrap();
        assert_eq!((regs.rip, regs.rsi), (PROGRAM, PARAMETERS));
        let word = |offset: u64| {
            let mut bytes = [0; 8];
            memory
                .read_slice(&mut bytes, GuestAddress(PARAMETERS + offset))
                .unwrap();
            u64::from_le_bytes(bytes)
        };
        let told: Vec<u64> = [0, 8, 0x10, 0x18, 0x20, 0x28, 0x100, 0x108, 0x110]
            .map(word)
            .to_vec();
        assert_eq!(told, [MAGIC, 3, 2_000, 2, 7, 8, 1, 0, 2 << 20]);
    }

    #[test]
    fn a_program_that_does_not_fit_is_refused() {
        let memory = RamBuilder::new(1 << 20)
            .in_memory::<AtomicBitmap>()
            .unwrap();
        let error = load(&memory, b"program", &[], 1, 1).unwrap_err();
        assert!(matches!(error, BootError::NoRoom { len: 7, .. }), "{error}");
        let error = load(&memory, b"", &[0; MOST_WORDS + 1], 1, 1).unwrap_err();
        assert!(matches!(error, BootError::TooManyWords(_)), "{error}");
    }
}
