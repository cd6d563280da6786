//! Ferries the memory of running virtual machines and processes from one Linux host to another while they run.

pub mod attach;
pub mod backend;
pub mod chunk;
pub mod dirty;
pub mod frontend;
pub mod migrate;
pub mod mount;
pub mod nbd;
pub mod subject;
#[allow(unsafe_code, reason = "the one folder that may; see its docs")]
pub mod sys;
pub mod transport;
