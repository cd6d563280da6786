//! The client against servers that do what they are told to.

#![allow(
    clippy::cast_possible_truncation,
    reason = "sizes of tests are small, and bytes of patterns are meant to be cut"
)]

mod fake;
mod garbage;
mod lanes;
mod losses;
mod measure;
mod roles;
