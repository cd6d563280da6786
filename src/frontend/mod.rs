//! How a program sees a region.
//!
//! | front end | the program | remote pages |
//! |---|---|---|
//! | [`FileRam`] | has the region's file mapped, shared | faults through a userfaultfd of the program |
//! | [`FuseFile`] | opens, reads, writes or maps a file that is ours | requests of the kernel, answered by threads of ours |
//! | [`nbd`] | is a client of a network block device, or has it as a device | requests that are answered when the page is there |
//! | [`Slice`] | is this process: loads and stores, or reads and writes | faults through a userfaultfd of our own |
//! | [`FaultServer`] | [hands over](hand_over()) the faults of its own memory | faults through its userfaultfd |
//! | [`SnapshotServer`] | is a VMM that restores a snapshot, as Firecracker does | faults through its userfaultfd |

mod file_ram;
#[cfg(feature = "fuse")]
mod fuse;
pub mod nbd;
mod slice;

pub use file_ram::{FaultArea, FileRam, Watch};
#[cfg(feature = "fuse")]
pub use fuse::{Cache, FuseFile, FuseMountError, FuseOptions, FuseUnmountError};
pub use slice::{
    Failure, FaultServer, FaultTimes, HandOverError, HandedOver, HandedRange, MOST_MAPPINGS,
    MemoryMapping, RefusedSnapshot, Slice, SliceOptions, Snapshot, SnapshotError, SnapshotOptions,
    SnapshotProgress, SnapshotServer, Waiting, hand_over, parse_hand_over, parse_mappings,
};
