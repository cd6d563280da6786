//! Where the bytes of a region are kept.
//!
//! | back end | bytes are | survive |
//! |---|---|---|
//! | [`MemoryStorage`] | memory of this process | nothing |
//! | [`memfd_storage`] | a file in memory, which others can map | this process, while somebody has it open |
//! | [`DirectoryStore`] | a folder, one file a chunk | a crash, once flushed; a loss of power never halves a chunk |
//! | [`FileStorage`] | a file or a block device | a crash, once flushed |

mod directory;
mod file;
mod memfd;
mod memory;
pub mod nbd;

pub use directory::DirectoryStore;
pub use file::FileStorage;
pub use memfd::memfd_storage;
pub use memory::MemoryStorage;
