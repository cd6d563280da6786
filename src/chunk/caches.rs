//! What sits between a program and a storage.

use std::fmt::Debug;
use std::io;

/// The caches of a front end: what the kernel keeps of a storage that it shows to programs as a file or a device.
///
/// Bytes that a program has written may wait there, and bytes that it will read may be there although the storage has changed
/// under them. Both calls may wait for requests of the front end to be answered, so that who answers them must not call.
pub trait Caches: Debug + Send + Sync {
    /// Brings everything that programs have written to the storage, mappings included.
    ///
    /// # Errors
    /// What the front end or the storage says; something may not have been brought.
    fn write_back(&self) -> io::Result<()>;

    /// Forgets everything that is cached: what is read from now on comes from the storage.
    ///
    /// # Errors
    /// What the front end says; old bytes may be read then.
    fn forget(&self) -> io::Result<()>;
}
