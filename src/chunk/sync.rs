//! Locks and atomics of what is concurrent here: the standard library's, or loom's, which tries every interleaving.
//!
//! Built with `--cfg loom` they work inside of a `loom::model` only, and a wait never times out there: a wake-up that is
//! lost is a deadlock, which loom reports.
#![allow(
    unused_imports,
    reason = "one list for all, whichever of them are in use"
)]

#[cfg(loom)]
pub(crate) use loom::sync::{
    Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard, atomic,
};
#[cfg(not(loom))]
pub(crate) use std::sync::{
    Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard, atomic,
};
