//! The largest things that may travel; checked on both sides before anything is allocated.

/// The longest body of a frame in bytes: the fields of a message, without its payload.
///
/// 64 KiB holds the checksums of a 4 MiB payload in 4 KiB chunks (8 KiB) many times over, and 15 pages of a
/// dirty set that do not compress.
pub const MAX_BODY: u32 = 64 << 10;

/// The longest payload of a frame in bytes: one chunk of the largest size.
pub const MAX_PAYLOAD: u32 = 4 << 20;

/// The largest window that is made use of in bytes: 100 Gbit/s over 80 ms. So what is in flight is bounded whatever
/// a leecher accepts.
pub const MAX_WINDOW: u64 = 1 << 30;

/// The most regions a session may have.
pub const MAX_REGIONS: usize = 256;

/// The longest name or kind in bytes.
pub const MAX_NAME: usize = 255;

/// The longest value of an attribute in bytes: a guest's list of devices takes hundreds. All of them together have to
/// fit a body.
pub const MAX_VALUE: usize = 16 << 10;

/// The longest reason that is carried to the peer in bytes; longer ones are cut.
pub const MAX_REASON: usize = 1024;

/// The most attributes that a subject may be described with.
pub const MAX_ATTRIBUTES: usize = 128;

/// The longest device state in bytes. A guest with a large framebuffer carries tens of MiB.
pub const MAX_STATE: u64 = 1 << 30;

/// The most runs in one frame of chunks.
pub const MAX_RUNS: usize = 2048;

/// The most chunks in one frame: so many 4 KiB chunks fill the largest payload.
pub const MAX_CHUNKS_IN_FRAME: u64 = 1024;

/// The most chunks a session may have: 64 TiB in 4 KiB chunks, 2 GiB of bits.
pub const MAX_CHUNKS: u64 = 1 << 34;
