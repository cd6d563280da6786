//! Telling the source what this memory holds of an earlier time.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use migrate_proto::{AbortCode, ChunkBitmap, ChunkRun, Layout, Leecher, Message, chunk_digest};

use super::lanes::Receiving;
use crate::chunk::Storage;
use crate::migrate::monitor::Monitor;
use crate::migrate::progress::Counters;
use crate::migrate::seed::offer_digest;
use crate::transport::LaneWriter;

/// How many bytes of memory are read for a frame of digests: few enough that the source waits little for the first, and
/// many enough that a frame's cost does not matter.
const BLOCK: u64 = 4 << 20;

/// What a region holds, chunk by chunk.
pub(super) type Old = [Arc<dyn Storage>];

/// Offers everything of `old` that is not a hole, until the source has no use for it any more.
pub(super) fn offer(
    receiving: &Receiving<'_>,
    old: &Old,
    writer: &Mutex<LaneWriter>,
    key: &[u8; 32],
) {
    let _session_ends = receiving.end_on_panic();
    let offering = Offering {
        monitor: receiving.monitor,
        counters: receiving.counters,
        layout: receiving.layout(),
        old,
        writer,
        key,
    };
    if let Err(error) = offering.run() {
        receiving.monitor.tell(|leecher| {
            let reason = format!("the destination cannot read what it keeps: {error}");
            leecher.abort(AbortCode::Failed, reason);
        });
    }
}

struct Offering<'a> {
    monitor: &'a Monitor<Leecher>,
    counters: &'a Counters,
    layout: &'a Layout,
    old: &'a Old,
    writer: &'a Mutex<LaneWriter>,
    key: &'a [u8; 32],
}

impl Offering<'_> {
    fn run(&self) -> io::Result<()> {
        let mut worthwhile = ChunkBitmap::empty(self.layout.chunks());
        for (region, old) in self.old.iter().enumerate() {
            for range in old.data_ranges(0..old.len())? {
                let len = range.end - range.start;
                worthwhile.insert_run(self.layout.chunks_touched(region, range.start, len));
            }
        }
        let most = (BLOCK / u64::from(self.layout.chunk_size().bytes())).max(1);
        let mut digests = Vec::new();
        let mut next = 0;
        while let Some(run) = worthwhile.run_from(next, most) {
            next = run.end();
            digests.clear();
            each_chunk(self.layout, self.old, run, |_, bytes| {
                digests.extend_from_slice(&offer_digest(self.key, bytes));
            })?;
            let wanted = self.monitor.tell(|leecher| leecher.handle_offering(run));
            if !wanted || self.monitor.lock().closed {
                return Ok(());
            }
            self.send(run.start.0, &digests)?;
        }
        self.monitor.tell(Leecher::handle_offered);
        Ok(())
    }

    /// What the machine had to say before goes before: the key, for one.
    fn send(&self, first: u64, digests: &[u8]) -> io::Result<()> {
        let mut send = |writer: &mut LaneWriter, message: &Message| {
            writer
                .send(message, &[])
                .map(|bytes| self.counters.frame(bytes))
        };
        self.monitor.flush(self.writer, &mut send)?;
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = writer.send(&Message::Offer { first }, &[digests])?;
        self.counters.frame(bytes);
        Ok(())
    }
}

/// The digests with which copies are compared, of chunks that were kept: of the bytes that are here.
pub(super) fn kept_digests(layout: &Layout, old: &Old, run: ChunkRun) -> io::Result<Vec<u64>> {
    let mut digests = Vec::new();
    each_chunk(layout, old, run, |_, bytes| {
        digests.push(chunk_digest(bytes));
    })?;
    Ok(digests)
}

/// Reads the chunks of `run`, a part of a megabyte at a time.
fn each_chunk(
    layout: &Layout,
    old: &Old,
    run: ChunkRun,
    mut see: impl FnMut(u64, &[u8]),
) -> io::Result<()> {
    let size = layout.chunk_size().bytes();
    let part = u64::from((512_u32 << 10).max(size));
    let mut buffer = Vec::new();
    for span in layout.spans(run) {
        let mut offset = 0;
        let mut chunk = span.run.start.0;
        while offset < span.len {
            let len = part.min(span.len - offset);
            buffer.resize(usize::try_from(len).map_err(io::Error::other)?, 0);
            old[span.region].read_ahead_at(&mut buffer, span.offset + offset)?;
            for bytes in buffer.chunks(size as usize) {
                see(chunk, bytes);
                chunk += 1;
            }
            offset += len;
        }
    }
    Ok(())
}
