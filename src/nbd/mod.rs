//! What is said to a network block device, after the NBD protocol specification; no input or output.
//!
//! ```text
//!            client                                server
//! handshake         ◄── Greeting ───────────────────
//!                   ─── ClientFlags ───────────────►
//!                   ─── ClientOption ──────────────►   as often as the client likes
//!                   ◄── OptionReply, one or more ───
//!                   ─── Go, or ExportName ─────────►   ends the handshake
//! transmission      ─── Request, bytes of a write ─►   many at a time
//!                   ◄── SimpleReply, bytes ─────────   in any order; or
//!                   ◄── ChunkHeader, payload ───────   one or more, of which the last is marked
//! ```
//!
//! Everything is big-endian. Headers have fixed lengths and are read from, and written to, arrays; what a length in a header
//! announces is checked against [`limits`] by whoever reads the header, before anything is allocated. Both ends use the same types.

mod errno;
mod error;
mod export;
mod fields;
mod flags;
mod handshake;
pub mod limits;
mod option;
mod option_reply;
mod reply;
mod request;
mod status;

pub use errno::Errno;
pub use error::DecodeError;
pub use export::{BlockSizes, Export, Info, InfoKind};
pub use flags::{ChunkFlags, ClientFlags, CommandFlags, HandshakeFlags, TransmissionFlags};
pub use handshake::{GREETING_LEN, Greeting, OLD_EXPORT_LEN, OldExport};
pub use option::{ClientOption, InfoQuery, MetaQuery, OPTION_HEADER_LEN, OptionCode, OptionHeader};
pub use option_reply::{OPTION_REPLY_HEADER_LEN, OptionError, OptionReply, OptionReplyHeader};
pub use reply::{
    CHUNK_HEADER_LEN, ChunkHeader, ChunkKind, EXTENDED_CHUNK_HEADER_LEN, ErrorChunk,
    ExtendedChunkHeader, HOLE_LEN, Hole, ReplyHeader, SIMPLE_REPLY_LEN, SimpleReply,
};
pub use request::{
    Command, EXTENDED_REQUEST_LEN, REQUEST_LEN, Request, decode_status_payload,
    encode_status_payload,
};
pub use status::{ALLOCATION, BlockStatus, DIRTY, Extent, StatusFlags};
