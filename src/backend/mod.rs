//! Where the bytes of a region are kept.

mod file;

pub use file::FileStorage;
