//! The client against servers that do what they are told to.

mod fake;
mod garbage;
mod measure;
mod roles;
