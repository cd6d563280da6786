//! Where the image of the tiny guests is in this program.

#![expect(
    unsafe_code,
    reason = "the image is assembled into this program, between two symbols"
)]

use std::arch::global_asm;

// One image for all of them: they share what they begin with and how they print. Nothing in it depends on where it is loaded, and it
// writes only to itself, to its stacks and buffers below 1 MiB and to the memory that it is told of.
global_asm!(
    ".pushsection .rodata.memferry_tiny_guests, \"a\"",
    ".balign 16",
    ".globl memferry_tiny_guests",
    "memferry_tiny_guests:",
    include_str!("guests/entry.s"),
    include_str!("guests/print.s"),
    include_str!("guests/stomper.s"),
    include_str!("guests/toucher.s"),
    include_str!("guests/marker.s"),
    include_str!("guests/registers.s"),
    include_str!("guests/timer.s"),
    ".globl memferry_tiny_guests_end",
    "memferry_tiny_guests_end:",
    ".popsection",
    options(raw)
);

unsafe extern "C" {
    static memferry_tiny_guests: u8;
    static memferry_tiny_guests_end: u8;
}

/// The image, as it is to be loaded.
#[must_use]
pub fn image() -> &'static [u8] {
    let start = &raw const memferry_tiny_guests;
    let end = &raw const memferry_tiny_guests_end;
    let len = end.addr() - start.addr();
    // SAFETY: the assembler has put both symbols around the bytes of one read-only section of this program, so that those between them are
    // initialised, never change and are never unmapped.
    unsafe { std::slice::from_raw_parts(start, len) }
}
