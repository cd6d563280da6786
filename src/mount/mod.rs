//! Remote memory as a path, a file or a slice of this machine: a storage joined with a front end.
//!
//! | storage | what is written | what is read |
//! |---|---|---|
//! | [`Direct`] | goes to the remote end at once | comes from the remote end every time |
//! | [`Managed`] | stays here, and is pushed later | comes from the remote end once, before it is asked for if it can |
//!
//! ```text
//!  program ──► front end (file, device, memory) ──► Direct | Managed ──► back end
//!              └──────────────── Mount: let go, save, close ──┘
//! ```
//!
//! A VMM that [restores](Restore) a snapshot is a mount without a way back: its memory is filled, and then let go of.

mod joined;
mod managed;
mod options;
mod restore;

pub use joined::{Direct, FrontEnd, Mount, Mounted, UnmountError};
pub use managed::{CloseError, Managed, MountProgress};
pub use options::{Hook, Hooks, ManagedOptions, Priority, Push};
pub use restore::{Restore, RestoreOptions, RestoreProgress};
