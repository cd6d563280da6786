//! How a program sees a region.
//!
//! | front end | the program | remote pages |
//! |---|---|---|
//! | [`FileRam`] | has the region's file mapped, shared | faults through a userfaultfd of the program |
//! | [`FuseFile`] | opens, reads, writes or maps a file that is ours | requests of the kernel, answered by threads of ours |

mod file_ram;
#[cfg(feature = "fuse")]
mod fuse;

pub use file_ram::{FaultArea, FileRam, Watch};
#[cfg(feature = "fuse")]
pub use fuse::{Cache, FuseFile, FuseMountError, FuseOptions, FuseUnmountError};
