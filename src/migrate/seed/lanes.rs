//! The threads that read memory and send it.

use std::io;
use std::time::Duration;

use migrate_proto::limits::MAX_RUNS;
use migrate_proto::seeder::Batch;
use migrate_proto::{
    AbortCode, ChunkRun, Chunks, Content, Layout, Message, Run, Seeder, URGENT_LANE, chunk_digest,
};

use super::SourceRegion;
use super::offers::{self, Offers};
use crate::chunk::is_zeros;
use crate::migrate::clock::Clock;
use crate::migrate::monitor::Monitor;
use crate::migrate::on_panic::OnPanic;
use crate::migrate::priority::go_first;
use crate::migrate::progress::Counters;
use crate::transport::{Lane, LaneError, LaneWriter};

/// How long a thread without work sleeps at most before it looks whether the session is over.
const IDLE: Duration = Duration::from_millis(100);

/// What every sending thread needs.
#[derive(Debug)]
pub(super) struct Sending<'a> {
    pub(super) monitor: &'a Monitor<Seeder>,
    pub(super) clock: Clock,
    pub(super) regions: &'a [SourceRegion],
    pub(super) layout: &'a Layout,
    pub(super) counters: &'a Counters,
    pub(super) offers: &'a Offers,
}

impl Sending<'_> {
    /// A session of which a thread is gone is given up.
    pub(super) fn end_on_panic(&self) -> OnPanic<impl Fn()> {
        OnPanic(|| {
            let reason = "a thread of memferry has panicked; this is a bug";
            self.monitor
                .tell(|seeder| seeder.abort(AbortCode::Failed, reason.into()));
        })
    }

    /// Serves one bulk lane until the session is over.
    pub(super) fn serve_bulk(&self, index: u8, lane: &Lane) {
        let _session_ends = self.end_on_panic();
        if let Err(error) = self.try_serve_bulk(index, lane) {
            self.broke("a bulk lane", &error);
        }
    }

    fn try_serve_bulk(&self, index: u8, lane: &Lane) -> io::Result<()> {
        let (_, mut writer) = lane.split()?;
        let mut frame = Frame::default();
        while let Some(batch) = self.next_batch(index) {
            self.send(&batch, &mut frame, &mut writer)?;
        }
        Ok(())
    }

    fn next_batch(&self, lane: u8) -> Option<Batch> {
        let mut state = self.monitor.lock();
        loop {
            if state.closed {
                return None;
            }
            let now = self.clock.now();
            let patience = match state.machine.poll_batch(now, lane) {
                Ok(Some(batch)) => return Some(batch),
                Ok(None) => IDLE,
                Err(later) => self.clock.until(Some(later), IDLE),
            };
            // Finding nothing left to send may have ended the round.
            if state.machine.has_event() {
                self.monitor.wake_driver();
            }
            state = self.monitor.wait_for_work(state, patience);
        }
    }

    /// Answers fetches on the urgent lane, on the thread that reads them: no other has to wake up for a fault.
    pub(super) fn serve_urgent(&self, lane: &Lane) {
        let _session_ends = self.end_on_panic();
        go_first();
        match self.try_serve_urgent(lane) {
            Ok(()) => {}
            Err(LaneError::Io(error)) => self.broke("the urgent lane", &error),
            Err(error) => self.broke("the urgent lane", &io::Error::other(error)),
        }
    }

    fn try_serve_urgent(&self, lane: &Lane) -> Result<(), LaneError> {
        let (mut reader, mut writer) = lane.split()?;
        let mut frame = Frame::default();
        loop {
            let (message, payload) = match reader.receive() {
                Err(LaneError::Closed) if self.monitor.lock().closed => return Ok(()),
                next => next?,
            };
            if !matches!(message, Message::Fetch { .. }) || payload > 0 {
                let reason = format!(
                    "the destination sent {} on the lane for fetches",
                    message.name()
                );
                self.monitor
                    .tell(|seeder| seeder.abort(AbortCode::Protocol, reason));
                return Ok(());
            }
            self.counters.frame(reader.frame_len());
            let now = self.clock.now();
            let fetched = self.monitor.tell(|seeder| {
                // What is wrong with it has closed the session and is told as an event.
                let _ = seeder.handle_message(now, message);
                seeder.poll_urgent()
            });
            let mut next = fetched;
            while let Some(batch) = next {
                self.send(&batch, &mut frame, &mut writer)?;
                next = self.monitor.lock().machine.poll_urgent();
            }
        }
    }

    fn send(&self, batch: &Batch, frame: &mut Frame, writer: &mut LaneWriter) -> io::Result<()> {
        frame.fill(batch, self.regions, self.layout, self.offers)?;
        let now = self.clock.now();
        let memory = frame.payload_len();
        self.monitor
            .lock()
            .machine
            .handle_filled(now, batch, memory);
        // Before it is sent, or a report that the last frame leads to would be without it.
        self.counters.memory(memory, frame.zero, frame.kept);
        let message = Message::Chunks(std::mem::take(&mut frame.chunks));
        let bytes = writer.send(&message, &frame.slices())?;
        self.counters.frame(bytes);
        Ok(())
    }

    fn broke(&self, what: &str, error: &io::Error) {
        self.monitor.tell(|seeder| {
            seeder.abort(
                AbortCode::Failed,
                format!("{what} to the destination broke: {error}"),
            );
        });
    }
}

/// A frame of chunks while it is put together; its buffers are kept from one to the next.
#[derive(Debug, Default)]
struct Frame {
    chunks: Chunks,
    buffer: Vec<u8>,
    /// The parts of the buffer that are sent: all but zeros.
    parts: Vec<std::ops::Range<usize>>,
    zero: u64,
    kept: u64,
    /// What the destination has offered of the chunks of a run.
    offered: Vec<Option<[u8; 16]>>,
}

impl Frame {
    fn fill(
        &mut self,
        batch: &Batch,
        regions: &[SourceRegion],
        layout: &Layout,
        offers: &Offers,
    ) -> io::Result<()> {
        self.chunks = Chunks {
            sequence: batch.sequence,
            round: batch.round,
            runs: Vec::new(),
            digests: Vec::new(),
        };
        self.parts.clear();
        self.zero = 0;
        self.kept = 0;
        if batch.hole {
            for &run in &batch.runs {
                self.push(run, Content::Zero);
                self.zero += layout.bytes_in(run);
            }
            return Ok(());
        }
        let size = layout.chunk_size().bytes() as usize;
        let mut used = 0;
        for span in batch.runs.iter().flat_map(|&run| layout.spans(run)) {
            let len = usize::try_from(span.len).map_err(io::Error::other)?;
            if self.buffer.len() < used + len {
                self.buffer.resize(used + len, 0);
            }
            let region = &regions[span.region];
            region
                .storage
                .read_exact_at(&mut self.buffer[used..used + len], span.offset)
                .map_err(|error| {
                    io::Error::new(
                        error.kind(),
                        format!("cannot read memory region {}: {error}", region.name),
                    )
                })?;
            // What was written since it was offered is in a set of its own, so it is only the first pass that compares.
            let key = if batch.round == 0 {
                offers.take(span.run, &mut self.offered)
            } else {
                None
            };
            for (index, (chunk, start)) in span.run.range().zip((0..len).step_by(size)).enumerate()
            {
                let end = (start + size).min(len);
                let bytes = &self.buffer[used + start..used + end];
                if is_zeros(bytes) {
                    self.zero += bytes.len() as u64;
                    self.push(ChunkRun::new(chunk, 1), Content::Zero);
                } else if let Some(key) = &key
                    && let Some(theirs) = self.offered[index]
                    && theirs == offers::digest(key, bytes)
                {
                    self.kept += bytes.len() as u64;
                    self.push(ChunkRun::new(chunk, 1), Content::Kept);
                } else {
                    self.chunks.digests.push(chunk_digest(bytes));
                    self.push(ChunkRun::new(chunk, 1), Content::Data);
                    self.part(used + start..used + end);
                }
            }
            used += len;
        }
        Ok(())
    }

    /// Appends a run, to the last one if it goes on there.
    fn push(&mut self, run: ChunkRun, content: Content) {
        match self.chunks.runs.last_mut() {
            Some(last) if last.content == content && last.run.end() == run.start.0 => {
                last.run.count += run.count;
            }
            _ => self.chunks.runs.push(Run { run, content }),
        }
        debug_assert!(
            self.chunks.runs.len() <= MAX_RUNS,
            "a batch is small enough"
        );
    }

    fn part(&mut self, range: std::ops::Range<usize>) {
        match self.parts.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => self.parts.push(range),
        }
    }

    fn payload_len(&self) -> u64 {
        self.parts.iter().map(|part| part.len() as u64).sum()
    }

    fn slices(&self) -> Vec<&[u8]> {
        self.parts
            .iter()
            .map(|part| &self.buffer[part.clone()])
            .collect()
    }
}

const _: () = assert!(URGENT_LANE == 0, "bulk lanes are numbered from 1");
