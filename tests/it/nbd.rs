//! The server of network block devices, as its clients see it.

mod client;
mod limits;
mod transmission;
