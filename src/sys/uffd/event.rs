//! What a userfaultfd reports.

use std::ops::Range;
use std::os::fd::{FromRawFd, OwnedFd};

use linux_raw_sys::general as raw;

/// One thing that happened in the memory that a userfaultfd watches. Addresses are those of that process.
#[derive(Debug)]
pub enum Event {
    /// A thread waits on a page: resolve it, or wake it.
    Fault {
        /// The page (or the byte, with [`Features::EXACT_ADDRESS`](super::Features::EXACT_ADDRESS)).
        address: u64,
        /// Whether it was accessed to be written.
        write: bool,
        /// Whether the page is there and write-protected; else it is missing.
        wp: bool,
        /// Whether the page is there and only not mapped.
        minor: bool,
    },
    /// The process gave these pages back; what they held is gone.
    Remove {
        /// The addresses.
        range: Range<u64>,
    },
    /// These addresses are no longer mapped.
    Unmap {
        /// The addresses.
        range: Range<u64>,
    },
    /// A registered mapping moved.
    Remap {
        /// Where it was.
        from: u64,
        /// Where it is.
        to: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// The process forked.
    Fork {
        /// The userfaultfd of the child, already initialised with the features of the parent's.
        child: OwnedFd,
    },
    /// An event that this version does not know, by its number.
    Other(u8),
}

/// One message as the kernel writes it; zeroed before it is.
pub(super) type Message = raw::uffd_msg;

pub(super) const MESSAGE_LEN: usize = 32;

const _: () = assert!(size_of::<Message>() == MESSAGE_LEN);

/// Decodes `message`, which the kernel wrote. Takes the descriptor out of a fork event, so a message is decoded
/// once.
pub(super) fn decode(message: &Message) -> Event {
    let argument = message.arg;
    match u32::from(message.event) {
        raw::UFFD_EVENT_PAGEFAULT => {
            // SAFETY: plain integers in a union whose bytes were all initialised; any bits are valid.
            let fault = unsafe { argument.pagefault };
            let flag = |bit: u32| fault.flags & u64::from(bit) != 0;
            Event::Fault {
                address: fault.address,
                write: flag(raw::UFFD_PAGEFAULT_FLAG_WRITE),
                wp: flag(raw::UFFD_PAGEFAULT_FLAG_WP),
                minor: flag(raw::UFFD_PAGEFAULT_FLAG_MINOR),
            }
        }
        raw::UFFD_EVENT_FORK => {
            // SAFETY: as for the fault.
            let fork = unsafe { argument.fork };
            // SAFETY: the kernel put a new descriptor into our table for this message, nobody else knows it, and a
            // message is decoded once. A descriptor is never negative, so the cast keeps its value.
            let child = unsafe { OwnedFd::from_raw_fd(fork.ufd.cast_signed()) };
            Event::Fork { child }
        }
        raw::UFFD_EVENT_REMAP => {
            // SAFETY: as for the fault.
            let remap = unsafe { argument.remap };
            Event::Remap {
                from: remap.from,
                to: remap.to,
                len: remap.len,
            }
        }
        number @ (raw::UFFD_EVENT_REMOVE | raw::UFFD_EVENT_UNMAP) => {
            // SAFETY: as for the fault.
            let gone = unsafe { argument.remove };
            let range = gone.start..gone.end;
            if number == raw::UFFD_EVENT_REMOVE {
                Event::Remove { range }
            } else {
                Event::Unmap { range }
            }
        }
        _ => Event::Other(message.event),
    }
}
