//! What a userfaultfd may be asked to do, as a set.

use std::fmt;
use std::ops::BitOr;

use linux_raw_sys::general as raw;

/// A set of userfaultfd features, as `UFFDIO_API` negotiates them.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Features(u64);

impl Features {
    /// Faults on write-protected pages. Linux 5.7.
    pub const WRITE_PROTECT: Self = Self::of(raw::UFFD_FEATURE_PAGEFAULT_FLAG_WP);
    /// An event when the process forks; needs `CAP_SYS_PTRACE`.
    pub const EVENT_FORK: Self = Self::of(raw::UFFD_FEATURE_EVENT_FORK);
    /// An event when a registered mapping moves.
    pub const EVENT_REMAP: Self = Self::of(raw::UFFD_FEATURE_EVENT_REMAP);
    /// An event when the process gives pages back (`MADV_DONTNEED`, `MADV_REMOVE`).
    pub const EVENT_REMOVE: Self = Self::of(raw::UFFD_FEATURE_EVENT_REMOVE);
    /// An event when a registered mapping goes away.
    pub const EVENT_UNMAP: Self = Self::of(raw::UFFD_FEATURE_EVENT_UNMAP);
    /// Faults on missing pages of hugetlbfs.
    pub const MISSING_HUGETLBFS: Self = Self::of(raw::UFFD_FEATURE_MISSING_HUGETLBFS);
    /// Faults on missing pages of shared memory: memfds, tmpfs files.
    pub const MISSING_SHMEM: Self = Self::of(raw::UFFD_FEATURE_MISSING_SHMEM);
    /// Faults on pages of hugetlbfs that exist and are not mapped yet. Linux 5.13.
    pub const MINOR_HUGETLBFS: Self = Self::of(raw::UFFD_FEATURE_MINOR_HUGETLBFS);
    /// Faults on pages of shared memory that exist and are not mapped yet. Linux 5.14.
    pub const MINOR_SHMEM: Self = Self::of(raw::UFFD_FEATURE_MINOR_SHMEM);
    /// Faults name the byte that was accessed, not its page. Linux 5.18.
    pub const EXACT_ADDRESS: Self = Self::of(raw::UFFD_FEATURE_EXACT_ADDRESS);
    /// Write protection of shared memory and hugetlbfs. Linux 5.19.
    pub const WRITE_PROTECT_SHARED: Self = Self::of(raw::UFFD_FEATURE_WP_HUGETLBFS_SHMEM);
    /// Write protection of pages that do not exist yet. Linux 6.4.
    pub const WRITE_PROTECT_ABSENT: Self = Self::of(raw::UFFD_FEATURE_WP_UNPOPULATED);
    /// Pages that can be made to kill who accesses them. Linux 6.6.
    pub const POISON: Self = Self::of(raw::UFFD_FEATURE_POISON);
    /// The kernel lifts write protection by itself and remembers the page. Linux 6.7.
    pub const WRITE_PROTECT_ASYNC: Self = Self::of(raw::UFFD_FEATURE_WP_ASYNC);

    /// All that tracking of writes by `PAGEMAP_SCAN` needs. Linux 6.7.
    pub const TRACKING: Self = Self(
        Self::WRITE_PROTECT.0
            | Self::WRITE_PROTECT_SHARED.0
            | Self::WRITE_PROTECT_ABSENT.0
            | Self::WRITE_PROTECT_ASYNC.0,
    );

    /// As [`TRACKING`](Self::TRACKING), for private memory alone.
    pub const TRACKING_PRIVATE: Self =
        Self(Self::WRITE_PROTECT.0 | Self::WRITE_PROTECT_ABSENT.0 | Self::WRITE_PROTECT_ASYNC.0);

    const fn of(bit: u32) -> Self {
        Self(bit as u64)
    }

    pub(super) const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    pub(super) const fn bits(self) -> u64 {
        self.0
    }

    /// No feature at all: faults on missing pages of private anonymous memory need none.
    #[must_use]
    pub const fn none() -> Self {
        Self(0)
    }

    /// Whether every feature of `other` is in this set.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// What is in this set and in `other`.
    #[must_use]
    pub const fn intersection(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// What is in this set and not in `other`.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
}

impl BitOr for Features {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// The kernel's own names, so that they can be searched for.
impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut first = true;
        for (bit, name) in NAMES.iter().enumerate() {
            if self.0 >> bit & 1 == 1 {
                if !first {
                    f.write_str(", ")?;
                }
                f.write_str(name)?;
                first = false;
            }
        }
        let unnamed = self.0 >> NAMES.len() << NAMES.len();
        match (unnamed, first) {
            (0, true) => f.write_str("none"),
            (0, false) => Ok(()),
            (bits, true) => write!(f, "{bits:#x}"),
            (bits, false) => write!(f, ", {bits:#x}"),
        }
    }
}

impl fmt::Debug for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Features({self})")
    }
}

/// `UFFD_FEATURE_…`, by bit.
const NAMES: [&str; 17] = [
    "PAGEFAULT_FLAG_WP",
    "EVENT_FORK",
    "EVENT_REMAP",
    "EVENT_REMOVE",
    "MISSING_HUGETLBFS",
    "MISSING_SHMEM",
    "EVENT_UNMAP",
    "SIGBUS",
    "THREAD_ID",
    "MINOR_HUGETLBFS",
    "MINOR_SHMEM",
    "EXACT_ADDRESS",
    "WP_HUGETLBFS_SHMEM",
    "WP_UNPOPULATED",
    "POISON",
    "WP_ASYNC",
    "MOVE",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_is_printed_by_the_names_of_the_kernel() {
        assert_eq!(
            Features::TRACKING.to_string(),
            "PAGEFAULT_FLAG_WP, WP_HUGETLBFS_SHMEM, WP_UNPOPULATED, WP_ASYNC"
        );
        assert_eq!(Features::none().to_string(), "none");
        assert_eq!(Features::from_bits(1 << 17).to_string(), "0x20000");
    }
}
