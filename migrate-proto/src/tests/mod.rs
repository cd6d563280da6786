//! Whole sessions over a virtual link, in virtual time: no thread, no clock, every run repeatable from its seed.

mod capabilities;
mod chance;
mod destination;
mod directed;
mod link;
mod pair;
mod recorded;
mod rig;
mod schedules;
mod source;
mod wire;
