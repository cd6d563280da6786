//! A userfaultfd that another process has made, initialised, and registered its memory with.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use linux_raw_sys::general as raw;
use rustix::fs::OFlags;

use super::{Features, Mode, Uffd};

/// What kind of pages a mapping has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pages {
    /// The system's own.
    Base,
    /// Those of hugetlbfs, which cannot be made zeros without their bytes.
    Huge,
}

/// The kernel notes in a userfaultfd's features that there are some.
const INITIALISED: u64 = 1 << 31;

impl Uffd {
    /// Takes over a userfaultfd whose features another process has agreed on with the kernel; they are read from `/proc`.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] if nobody has agreed on features yet; [`io::ErrorKind::InvalidData`] if `/proc` does not say
    /// what they are.
    pub fn initialised(fd: OwnedFd) -> io::Result<Self> {
        let bits = features_of(fd.as_fd())?;
        if bits & INITIALISED == 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "nobody has agreed on its features (UFFDIO_API)",
            ));
        }
        let features = Features::from_bits(bits & !INITIALISED);
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
        Ok(Self { fd, features })
    }

    /// As [`register`](Self::register); says what kind of pages there are: huge ones if any is.
    ///
    /// # Errors
    /// As [`register`](Self::register).
    pub fn register_and_look(&self, range: Range<u64>, mode: Mode) -> io::Result<Pages> {
        let offered = self.registered(range, mode)?;
        let zeroes = offered & 1 << raw::_UFFDIO_ZEROPAGE != 0;
        Ok(if zeroes { Pages::Base } else { Pages::Huge })
    }
}

fn features_of(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?;
    features_in(&text).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            "/proc says nothing of its features",
        )
    })
}

/// In the line `API:\taa:FEATURES:OFFERED`, in hexadecimal.
fn features_in(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("API:"))?;
    let bits = line.trim().split(':').nth(1)?;
    u64::from_str_radix(bits, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::mapping::page_size;
    use crate::sys::memory::Memory;
    use crate::sys::uffd::{Scope, unused};

    #[test]
    fn what_another_has_agreed_on_is_known() {
        let unused = unused(Scope::UserModeOnly).unwrap();
        let refused = Uffd::initialised(unused).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
        let wanted = Features::EVENT_REMOVE;
        let theirs = Uffd::create(Scope::UserModeOnly, wanted).unwrap();
        let ours = Uffd::initialised(theirs.as_fd().try_clone_to_owned().unwrap()).unwrap();
        assert_eq!(ours.features(), wanted);
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(Uffd::initialised(file.into()).is_err());
    }

    #[test]
    fn memory_that_is_registered_already_is_looked_at() {
        let memory = Memory::reserve(4 * page_size()).unwrap();
        let uffd = Uffd::create(Scope::UserModeOnly, Features::none()).unwrap();
        let mode = Mode {
            missing: true,
            ..Mode::default()
        };
        uffd.register(memory.addresses(), mode).unwrap();
        let pages = uffd.register_and_look(memory.addresses(), mode).unwrap();
        assert_eq!(pages, Pages::Base);
        let nothing = 1 << 46..(1 << 46) + page_size();
        assert!(uffd.register_and_look(nothing, mode).is_err());
    }

    #[test]
    fn the_features_are_found_in_what_proc_says() {
        let text = "pos:\t0\nflags:\t02004002\npending:\t0\ntotal:\t0\nAPI:\taa:80000008:1ffff\n";
        assert_eq!(features_in(text), Some(0x8000_0008));
        for wrong in ["", "API:", "API:\taa", "API:\taa:x:1"] {
            assert_eq!(features_in(wrong), None, "{wrong}");
        }
    }
}
