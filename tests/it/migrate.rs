//! Whole migrations in one process: both drivers over loopback, memory that a thread writes, memory that a thread reads
//! while it comes, and a proxy between them that plays the network.

mod application;
mod cuts;
mod destination;
mod hop;
mod plans;
mod proxy;
mod region_failures;
mod regions;
mod rig;
mod source;
mod trouble;
