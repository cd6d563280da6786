//! The reference VMM, as a program: machines in processes of their own, whose guests check themselves.

#![allow(clippy::unwrap_used, reason = "a test may panic, helpers too")]

mod failures;
mod lifecycle;
mod linux;
mod migration;
mod namespaces;
mod refusals;
mod throttling;
mod vmm;
