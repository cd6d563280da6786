//! How a program sees a region.
//!
//! | front end | the program | remote pages |
//! |---|---|---|
//! | [`FileRam`] | has the region's file mapped, shared | faults through a userfaultfd of the program |

mod file_ram;

pub use file_ram::{FaultArea, FileRam, Watch};
