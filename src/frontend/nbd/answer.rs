//! How answers are put into bytes, which depends on what was agreed on.

use super::export::{Context, Refused};
use crate::nbd::{
    BlockStatus, ChunkFlags, ChunkHeader, ChunkKind, EXTENDED_REQUEST_LEN, ErrorChunk,
    ExtendedChunkHeader, Hole, REQUEST_LEN, Request, SimpleReply,
};

/// What client and server agreed on in the handshake, or without one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Agreed {
    pub(super) structured: bool,
    /// Implies `structured`.
    pub(super) extended: bool,
    pub(super) contexts: Vec<Context>,
}

impl Agreed {
    pub(super) const fn request_len(&self) -> usize {
        if self.extended {
            EXTENDED_REQUEST_LEN
        } else {
            REQUEST_LEN
        }
    }

    /// All went well, and that is all there is to say.
    pub(super) fn done(&self, request: &Request, out: &mut Vec<u8>) {
        if self.extended {
            self.chunk(request, ChunkKind::None, 0, true, out);
        } else {
            let reply = SimpleReply {
                error: None,
                cookie: request.cookie,
            };
            out.extend_from_slice(&reply.encode());
        }
    }

    pub(super) fn refused(&self, request: &Request, refused: &Refused, out: &mut Vec<u8>) {
        if self.structured {
            let error = ErrorChunk {
                error: refused.errno,
                message: refused.message.clone(),
                offset: None,
            };
            let payload = error.encode();
            self.chunk(request, error.kind(), payload.len(), true, out);
            out.extend_from_slice(&payload);
        } else {
            let reply = SimpleReply {
                error: Some(refused.errno),
                cookie: request.cookie,
            };
            out.extend_from_slice(&reply.encode());
        }
    }

    /// What goes before `len` bytes that were read from `offset` on; without structured replies these are all.
    pub(super) fn data(
        &self,
        request: &Request,
        offset: u64,
        len: usize,
        last: bool,
        out: &mut Vec<u8>,
    ) {
        if self.structured {
            self.chunk(request, ChunkKind::OffsetData, len + 8, last, out);
            out.extend_from_slice(&offset.to_be_bytes());
        } else {
            self.done(request, out);
        }
    }

    /// Zeros in place of bytes that were read; only with structured replies.
    pub(super) fn hole(&self, request: &Request, hole: Hole, last: bool, out: &mut Vec<u8>) {
        let payload = hole.encode();
        self.chunk(request, ChunkKind::OffsetHole, payload.len(), last, out);
        out.extend_from_slice(&payload);
    }

    /// What the contexts say; only with structured replies.
    pub(super) fn statuses(&self, request: &Request, statuses: &[BlockStatus], out: &mut Vec<u8>) {
        for (at, status) in statuses.iter().enumerate() {
            let last = at + 1 == statuses.len();
            let (kind, payload) = if self.extended {
                (ChunkKind::BlockStatusExtended, status.encode_extended())
            } else {
                (ChunkKind::BlockStatus, status.encode())
            };
            self.chunk(request, kind, payload.len(), last, out);
            out.extend_from_slice(&payload);
        }
        if statuses.is_empty() {
            self.chunk(request, ChunkKind::None, 0, true, out);
        }
    }

    fn chunk(&self, request: &Request, kind: ChunkKind, len: usize, last: bool, out: &mut Vec<u8>) {
        let flags = ChunkFlags::NONE.with_if(last, ChunkFlags::DONE);
        if self.extended {
            let header = ExtendedChunkHeader {
                flags,
                kind,
                cookie: request.cookie,
                offset: request.offset,
                len: len as u64,
            };
            out.extend_from_slice(&header.encode());
        } else {
            let header = ChunkHeader {
                flags,
                kind,
                cookie: request.cookie,
                len: u32::try_from(len).expect("reads and statuses are limited to far less"),
            };
            out.extend_from_slice(&header.encode());
        }
    }
}
