//! Remote memory as a path, a file or a slice of this machine.
//!
//! | mount | what is written | what is read |
//! |---|---|---|
//! | direct: a back end given to a front end | goes to the remote end at once | comes from the remote end every time |
//! | [`Managed`] | stays here, and is pushed later | comes from the remote end once, before it is asked for if it can |

mod managed;
mod options;

pub use managed::{CloseError, Managed, MountProgress};
pub use options::{Hook, Hooks, ManagedOptions, Priority, Push};
