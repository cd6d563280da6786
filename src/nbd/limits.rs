//! What is too much. Both ends check against these before they allocate.

/// The longest name of an export or of a meta context, in bytes; the specification's.
pub const NAME: usize = 4096;

/// The most data of an option or of its reply, in bytes: a name and some queries, each as long as a name may be.
pub const OPTION_DATA: u32 = 64 << 10;

/// The most options of one handshake. A client that asks more often does something else than to connect.
pub const OPTIONS: u32 = 1024;

/// The most queries in one request for meta contexts.
pub const QUERIES: u32 = 128;

/// The most bytes that a read or a write may carry: what every client keeps to where no other limit was announced.
pub const PAYLOAD: u32 = 32 << 20;

/// The most extents in one reply about a block status. One reply need not tell about all that was asked for.
pub const EXTENTS: usize = 16 << 10;

/// The longest payload of a chunk that is neither data nor a status, in bytes: an error with its message.
pub const ERROR_CHUNK: u32 = 4 + 2 + 4096 + 8;
