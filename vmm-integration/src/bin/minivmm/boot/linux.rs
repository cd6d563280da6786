//! A Linux kernel, by its 64-bit boot protocol.

use std::io::{Seek, SeekFrom};
use std::path::Path;

use kvm_bindings::kvm_regs;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::{BzImage, Elf, Error as LoaderError, KernelLoader, bzimage};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{BootError, open};
use crate::machine::Memory;

/// Where the kernel expects what it is told ("the zero page").
const ZERO_PAGE: u64 = 0x7000;
const COMMAND_LINE: u64 = 0x2_0000;
/// The end of memory that firmware leaves alone, below which the tables of processors are.
const LOW_END: u64 = 0x9_fc00;
/// Memory proper begins here.
const HIGH_START: u64 = 0x10_0000;
/// The stack that the entry may use.
const STACK: u64 = 0x8ff0;
/// Where in a bzImage the 64-bit entry is.
const LONG_MODE_ENTRY: u64 = 0x200;
/// That it has one: bit 0 of `xloadflags`.
const HAS_LONG_MODE: u16 = 1;
/// Memory that may be used, in the list of regions.
const USABLE: u32 = 1;
/// "Some other boot loader".
const OTHER_LOADER: u8 = 0xff;
const PAGE: u64 = 4096;

/// Loads the kernel at `path`; the registers to enter it with.
pub(super) fn load(
    memory: &Memory,
    path: &Path,
    command_line: &str,
    initramfs: Option<&[u8]>,
    cpus: u64,
) -> Result<kvm_regs, BootError> {
    let mut file = open(path)?;
    let above = Some(GuestAddress(HIGH_START));
    let failed = |source| BootError::Kernel {
        path: path.to_owned(),
        source,
    };
    let mut params = boot_params::default();
    let entry = match BzImage::load(memory, None, &mut file, above) {
        Ok(kernel) => {
            let header = kernel.setup_header.expect("a bzImage has a header");
            if { header.xloadflags } & HAS_LONG_MODE == 0 {
                return Err(BootError::NoLongMode(path.to_owned()));
            }
            params.hdr = header;
            kernel.kernel_load.0 + LONG_MODE_ENTRY
        }
        Err(LoaderError::Bzimage(bzimage::Error::InvalidBzImage)) => {
            let rewound = file.seek(SeekFrom::Start(0));
            rewound.map_err(|source| BootError::File {
                path: path.to_owned(),
                source,
            })?;
            match Elf::load(memory, None, &mut file, above) {
                Ok(kernel) => {
                    // What a boot loader says that has no header to copy.
                    params.hdr.boot_flag = 0xaa55;
                    params.hdr.header = u32::from_le_bytes(*b"HdrS");
                    params.hdr.kernel_alignment = 0x0100_0000;
                    params.hdr.initrd_addr_max = 0x7fff_ffff;
                    kernel.kernel_load.0
                }
                Err(LoaderError::Elf(linux_loader::loader::elf::Error::InvalidElfMagicNumber)) => {
                    return Err(BootError::NoKernel(path.to_owned()));
                }
                Err(error) => return Err(failed(error)),
            }
        }
        Err(error) => return Err(failed(error)),
    };
    params.hdr.type_of_loader = OTHER_LOADER;
    write_command_line(memory, &mut params, command_line)?;
    if let Some(initramfs) = initramfs {
        write_initramfs(memory, &mut params, initramfs)?;
    }
    list_memory(memory, &mut params);
    super::mp_table::write(memory, cpus)?;
    memory
        .write_slice(params.as_slice(), GuestAddress(ZERO_PAGE))
        .map_err(|_| no_room("the zero page", PAGE))?;
    Ok(kvm_regs {
        rip: entry,
        rsp: STACK,
        rbp: STACK,
        rsi: ZERO_PAGE,
        // The bit that is always set.
        rflags: 2,
        ..kvm_regs::default()
    })
}

fn no_room(what: &'static str, len: u64) -> BootError {
    BootError::NoRoom { what, len }
}

fn write_command_line(
    memory: &Memory,
    params: &mut boot_params,
    command_line: &str,
) -> Result<(), BootError> {
    let mut bytes = command_line.as_bytes().to_vec();
    bytes.push(0);
    // Up to the memory that firmware uses; kernels take 2 KiB or more.
    let len = bytes.len() as u64;
    let most = match params.hdr.cmdline_size {
        0 => 2048,
        size => size.into(),
    };
    if len > most {
        return Err(no_room("the command line", len));
    }
    memory
        .write_slice(&bytes, GuestAddress(COMMAND_LINE))
        .map_err(|_| no_room("the command line", len))?;
    params.hdr.cmd_line_ptr = u32::try_from(COMMAND_LINE).expect("it is low");
    Ok(())
}

/// Puts the initramfs as high as the kernel allows in the first region.
fn write_initramfs(
    memory: &Memory,
    params: &mut boot_params,
    initramfs: &[u8],
) -> Result<(), BootError> {
    let len = initramfs.len() as u64;
    let full = || no_room("the initramfs", len);
    let region = memory.iter().next().ok_or_else(full)?;
    let end = region.len().min(u64::from(params.hdr.initrd_addr_max) + 1);
    let start = end.checked_sub(len).ok_or_else(full)? / PAGE * PAGE;
    if start < HIGH_START {
        return Err(full());
    }
    memory
        .write_slice(initramfs, GuestAddress(start))
        .map_err(|_| full())?;
    params.hdr.ramdisk_image = u32::try_from(start).map_err(|_| full())?;
    params.hdr.ramdisk_size = u32::try_from(len).map_err(|_| full())?;
    Ok(())
}

/// Tells the kernel which memory it may use.
fn list_memory(memory: &Memory, params: &mut boot_params) {
    let mut entries = vec![(0, LOW_END)];
    for region in memory.iter() {
        let (start, end) = (region.start_addr().0, region.start_addr().0 + region.len());
        entries.push((start.max(HIGH_START), end));
    }
    let entries = entries.into_iter().filter(|(start, end)| start < end);
    let mut count = 0;
    for ((start, end), entry) in entries.zip(params.e820_table.iter_mut()) {
        *entry = boot_e820_entry {
            addr: start,
            size: end - start,
            r#type: USABLE,
        };
        count += 1;
    }
    params.e820_entries = count;
}
