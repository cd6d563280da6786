//! Comparing the destination's digests with the suspended memory.

use std::io;

use migrate_proto::{ChunkBitmap, Layout, ZERO_DIGEST, chunk_digest};

use super::SourceRegion;
use super::present_chunks;
use crate::chunk::is_zeros;
use crate::migrate::progress::Verdict;

/// How many bytes are read at once: stays in the second-level cache.
const BLOCK: u64 = 512 << 10;

/// The digests that the leecher has sent, one a chunk; 0 where it has none.
#[derive(Debug)]
pub(super) struct Digests(Vec<u64>);

impl Digests {
    pub(super) fn new(chunks: u64) -> io::Result<Self> {
        let chunks = usize::try_from(chunks).map_err(io::Error::other)?;
        Ok(Self(vec![0; chunks]))
    }

    /// Takes over those of the chunks from `first` on; `bytes` is what came as payload.
    pub(super) fn put(&mut self, first: u64, bytes: &[u8]) -> Result<(), &'static str> {
        let first = usize::try_from(first).map_err(|_| "digests of chunks that do not exist")?;
        let (digests, rest) = bytes.as_chunks::<8>();
        let place = first
            .checked_add(digests.len())
            .and_then(|end| self.0.get_mut(first..end))
            .filter(|_| rest.is_empty())
            .ok_or("digests of chunks that do not exist")?;
        for (place, digest) in place.iter_mut().zip(digests) {
            *place = u64::from_le_bytes(*digest);
        }
        Ok(())
    }

    /// Reads the memory, which must stand still, and compares.
    pub(super) fn compare(&self, regions: &[SourceRegion], layout: &Layout) -> io::Result<Verdict> {
        let present = present_chunks(regions, layout)?;
        let mut verdict = Verdict {
            compared: 0,
            different: 0,
        };
        let mut judge = |chunk: u64, ours: u64| {
            let theirs = usize::try_from(chunk).ok().and_then(|at| self.0.get(at));
            if let Some(&theirs) = theirs
                && theirs != 0
            {
                verdict.compared += 1;
                verdict.different += u64::from(theirs != ours);
            }
        };
        let mut holes = ChunkBitmap::full(layout.chunks());
        holes.subtract(&present);
        for chunk in holes.runs().flat_map(|run| run.range()) {
            judge(chunk, ZERO_DIGEST);
        }
        let size = layout.chunk_size().bytes();
        let most = (BLOCK / u64::from(size)).max(1);
        let mut buffer = Vec::new();
        let mut next = 0;
        while let Some(run) = present.run_from(next, most) {
            next = run.end();
            for span in layout.spans(run) {
                buffer.resize(usize::try_from(span.len).map_err(io::Error::other)?, 0);
                regions[span.region]
                    .storage
                    .read_exact_at(&mut buffer, span.offset)?;
                for (chunk, bytes) in span.run.range().zip(buffer.chunks(size as usize)) {
                    judge(chunk, digest(bytes));
                }
            }
        }
        Ok(verdict)
    }
}

fn digest(bytes: &[u8]) -> u64 {
    if is_zeros(bytes) {
        ZERO_DIGEST
    } else {
        chunk_digest(bytes)
    }
}
