//! Where the bytes of a region are kept.

mod file;
pub mod nbd;

pub use file::FileStorage;
