//! The threads that receive chunks.

use std::io;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use migrate_proto::leecher::{Admission, Part};
use migrate_proto::{
    AbortCode, Chunks, Content, Layout, Leecher, Message, ProtocolError, chunk_digest,
};

use super::offer::kept_digests;
use crate::chunk::{ChunkRun, Install, Place, Storage};
use crate::migrate::clock::Clock;
use crate::migrate::monitor::Monitor;
use crate::migrate::on_panic::OnPanic;
use crate::migrate::progress::Counters;
use crate::transport::{Lane, LaneError, LaneReader};

/// How long a thread without work sleeps at most before it looks whether the session is over.
const IDLE: Duration = Duration::from_millis(100);

/// What every receiving thread needs.
#[derive(Debug)]
pub(super) struct Receiving<'a> {
    pub(super) monitor: &'a Monitor<Leecher>,
    pub(super) clock: Clock,
    pub(super) memory: &'a dyn Install,
    pub(super) counters: &'a Counters,
    /// What the memory holds of an earlier time, if that is kept.
    pub(super) old: Option<&'a [Arc<dyn Storage>]>,
    /// What was agreed, once a frame has come.
    pub(super) layout: OnceLock<Layout>,
}

/// Why a lane is given up.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReceiveError {
    #[error(transparent)]
    Lane(#[from] LaneError),
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("a chunk was damaged on its way, or in memory")]
    Damaged,
    #[error("the source sent {0} on a lane for chunks")]
    WrongLane(&'static str),
    /// The state machine has closed the session and told why.
    #[error("the session is over")]
    Closed,
}

impl From<ProtocolError> for ReceiveError {
    fn from(_: ProtocolError) -> Self {
        Self::Closed
    }
}

impl Receiving<'_> {
    /// A session of which a thread is gone is given up.
    pub(super) fn end_on_panic(&self) -> OnPanic<impl Fn()> {
        OnPanic(|| {
            let reason = "a thread of memferry has panicked; this is a bug";
            self.monitor
                .tell(|leecher| leecher.abort(AbortCode::Failed, reason.into()));
        })
    }

    /// Serves one bulk lane until the session is over.
    pub(super) fn serve_bulk(&self, index: u8, lane: &Lane) {
        let _session_ends = self.end_on_panic();
        if let Err(error) = self.try_serve_bulk(index, lane) {
            self.broke(&error);
        }
    }

    fn try_serve_bulk(&self, index: u8, lane: &Lane) -> Result<(), ReceiveError> {
        let (mut reader, _) = lane.split()?;
        let mut staging = Vec::new();
        loop {
            let (message, payload) = match reader.receive() {
                Err(LaneError::Closed) if self.monitor.lock().closed => return Ok(()),
                next => next?,
            };
            self.receive(index, message, payload, &mut reader, &mut staging)?;
        }
    }

    /// Ends the session because of what happened on a lane.
    pub(super) fn broke(&self, error: &ReceiveError) {
        let (code, reason) = match error {
            ReceiveError::Closed => return,
            ReceiveError::Lane(LaneError::Decode(error)) => (
                AbortCode::Protocol,
                format!("the source sent garbage: {error}"),
            ),
            ReceiveError::WrongLane(_) => (AbortCode::Protocol, error.to_string()),
            ReceiveError::Lane(error) => (
                AbortCode::Failed,
                format!("a lane from the source broke: {error}"),
            ),
            error => (
                AbortCode::Failed,
                format!("the destination failed: {error}"),
            ),
        };
        self.monitor.tell(|leecher| leecher.abort(code, reason));
    }

    /// Deals with one frame of a bulk or the urgent lane.
    pub(super) fn receive(
        &self,
        lane: u8,
        message: Message,
        payload: usize,
        reader: &mut LaneReader,
        staging: &mut Vec<u8>,
    ) -> Result<(), ReceiveError> {
        let Message::Chunks(chunks) = message else {
            return Err(ReceiveError::WrongLane(message.name()));
        };
        self.counters.frame(reader.frame_len());
        let Some((parts, direct)) = self.admit(lane, &chunks, payload as u64)? else {
            return Ok(reader.skip(payload)?);
        };
        let layout = self.layout();
        // Through a buffer that stays in the cache, so that no byte gets into memory before its checksum is right, and no
        // page has to be cleared only to be overwritten (docs/decisions/0009).
        staging.resize(payload.max(staging.len()), 0);
        let payload = &mut staging[..payload];
        reader.read_exact(payload)?;
        self.install(layout, &chunks, &parts, direct, payload)?;
        self.count(layout, &parts);
        let kept = self.look_at_kept(layout, &parts)?;
        let mut state = self.monitor.lock();
        state.machine.handle_installed(lane, &chunks, &parts);
        for (run, digests) in &kept {
            state.machine.handle_kept(*run, digests);
        }
        if reader.has_more() {
            state.machine.defer_credit(lane);
        }
        drop(state);
        if !direct {
            self.wake_for_zeros(layout, &parts)?;
        }
        self.monitor.tell(|_| ());
        Ok(())
    }

    /// The digests of what was kept, where copies are compared.
    fn look_at_kept(
        &self,
        layout: &Layout,
        parts: &[Part],
    ) -> Result<Vec<(ChunkRun, Vec<u64>)>, ReceiveError> {
        let Some(old) = self.old else {
            return Ok(Vec::new());
        };
        let mut kept = parts
            .iter()
            .filter(|part| part.install && part.content == Content::Kept)
            .peekable();
        if kept.peek().is_none() || !self.monitor.lock().machine.is_verified() {
            return Ok(Vec::new());
        }
        kept.map(|part| Ok((part.run, kept_digests(layout, old, part.run)?)))
            .collect()
    }

    /// Absent is zero. Who waits for such a chunk faults again and gets a page then: not before the chunk counts as
    /// here, or it would wait for an answer that has come.
    fn wake_for_zeros(&self, layout: &Layout, parts: &[Part]) -> Result<(), ReceiveError> {
        let zeros = parts
            .iter()
            .filter(|part| part.install && part.content == Content::Zero);
        for span in zeros.flat_map(|part| layout.spans(part.run)) {
            let place = Place {
                region: span.region,
                offset: span.offset,
            };
            self.memory.wake(place, span.len)?;
        }
        Ok(())
    }

    /// Asks what to do with a frame, and waits if its round has not begun here. `None`: forget it.
    fn admit(
        &self,
        lane: u8,
        chunks: &Chunks,
        payload: u64,
    ) -> Result<Option<(Vec<Part>, bool)>, ReceiveError> {
        let mut state = self.monitor.lock();
        loop {
            if state.closed {
                return Err(ReceiveError::Closed);
            }
            let now = self.clock.now();
            match state.machine.admit(now, lane, chunks, payload) {
                Ok(Admission::Install { parts, direct }) => return Ok(Some((parts, direct))),
                Ok(Admission::Ignore) => return Ok(None),
                Ok(Admission::Wait) => {}
                Err(error) => {
                    drop(state);
                    self.monitor.wake_driver();
                    return Err(error.into());
                }
            }
            state = self.monitor.wait_for_work(state, IDLE);
        }
    }

    /// The chunk space. To be asked only after both sides have agreed.
    pub(super) fn layout(&self) -> &Layout {
        self.layout.get_or_init(|| {
            let state = self.monitor.lock();
            let agreement = state.machine.agreement();
            agreement
                .expect("frames and faults come after greeting")
                .layout
                .clone()
        })
    }

    fn count(&self, layout: &Layout, parts: &[Part]) {
        let bytes = |content| -> u64 {
            parts
                .iter()
                .filter(|part| part.content == content)
                .map(|part| layout.bytes_in(part.run))
                .sum()
        };
        self.counters.memory(
            bytes(Content::Data),
            bytes(Content::Zero),
            bytes(Content::Kept),
        );
    }

    /// Puts the wanted parts of a frame where they belong: over what is there while nobody looks (`direct`), else in
    /// whole pages and never over a resident one.
    fn install(
        &self,
        layout: &Layout,
        chunks: &Chunks,
        parts: &[Part],
        direct: bool,
        payload: &[u8],
    ) -> Result<(), ReceiveError> {
        let size = layout.chunk_size().bytes() as usize;
        let mut digests = chunks.digests.iter();
        let mut rest = payload;
        for part in parts {
            for span in layout.spans(part.run) {
                let place = Place {
                    region: span.region,
                    offset: span.offset,
                };
                if part.content == Content::Kept {
                    continue;
                }
                if part.content == Content::Zero {
                    // In the first pass nothing is there yet, unless it is kept, and later on nothing is overwritten.
                    if part.install && direct && (chunks.round > 0 || self.old.is_some()) {
                        self.memory
                            .discard(span.region, span.offset..span.offset + span.len)?;
                    }
                    continue;
                }
                let len = usize::try_from(span.len).expect("part of a payload");
                let (bytes, more) = rest.split_at(len);
                rest = more;
                for chunk in bytes.chunks(size) {
                    if digests.next() != Some(&chunk_digest(chunk)) {
                        return Err(ReceiveError::Damaged);
                    }
                }
                match (part.install, direct) {
                    (false, _) => {}
                    (true, true) => self.memory.write(place, bytes)?,
                    (true, false) => self.memory.install(place, bytes)?,
                }
            }
        }
        Ok(())
    }
}
