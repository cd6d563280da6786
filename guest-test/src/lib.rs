//! Guests that Memferry is tested with: building them, booting them, and reading what they say.
//!
//! [`Image`](image::Image) makes a kernel and an initramfs whose `/init` is the page-writer (`guest-test/guests`).
//! [`Guest`](qemu::Guest) runs it in QEMU and collects its ticks and reports with the time each arrived.
//! [`ticks`] turns those into the blackout that the guest saw. [`native`] is QEMU's own migration, to compare with,
//! and [`ferry`] is ours, run as the command that users run; [`mod@bench`] measures them side by side. Nothing but [`embedded`] and
//! [`bench::mount`] calls the library that it tests.
//! [`mod@lab`] runs our tests in a Linux that has what the host lacks.

pub mod accel;
pub mod bench;
pub mod command;
mod cpio;
pub mod embedded;
pub mod ferry;
pub mod image;
pub mod interrupt;
pub mod kernel;
pub mod lab;
pub mod native;
pub mod packages;
pub mod process;
pub mod qemu;
pub mod qmp;
pub mod serial;
pub mod ticks;
pub mod tiny;
