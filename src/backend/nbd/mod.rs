//! The exports of any NBD server as [`Storage`](crate::chunk::Storage).

mod url;

pub use url::{NbdPlace, NbdUrl, NbdUrlError};
