//! Whole migrations in one process: both drivers over loopback, memory that a thread writes, memory that a thread reads
//! while it comes, and a proxy between them that plays the network.

mod cuts;
mod destination;
mod plans;
mod proxy;
mod rig;
mod source;
mod trouble;
