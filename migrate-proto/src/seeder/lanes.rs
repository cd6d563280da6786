//! What is in flight: frames that were handed out and not acknowledged, lane by lane.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use crate::bitmap::ChunkBitmap;
use crate::chunk::ChunkRun;
use crate::error::ProtocolError;
use crate::limits::MAX_WINDOW;

/// The frames in flight on all lanes; index 0 is the urgent lane, which needs no room in the window.
#[derive(Debug)]
pub(super) struct Lanes {
    lanes: Vec<Lane>,
    window: u64,
}

#[derive(Debug, Default)]
struct Lane {
    last: u64,
    in_flight: VecDeque<Frame>,
}

/// What a frame takes of the window at least, in bytes: a leecher that acknowledges nothing must not make this side
/// remember any number of frames without payload.
const LEAST: u64 = 4096;

#[derive(Debug)]
struct Frame {
    sequence: u64,
    runs: Vec<ChunkRun>,
    bytes: u64,
}

impl Lanes {
    pub(super) fn new(bulk: u8) -> Self {
        let lanes = (0..=bulk).map(|_| Lane::default()).collect();
        Self { lanes, window: 0 }
    }

    /// The leecher takes `window` bytes at once from now on, of which this side makes use up to a limit.
    pub(super) fn open(&mut self, window: u64) {
        self.window = window.min(MAX_WINDOW);
    }

    /// A round begins: a frame in flight that arrives after it is dropped there as a whole, so acknowledging it says
    /// nothing about its chunks any more.
    pub(super) fn outdate(&mut self) {
        for frame in self.lanes.iter_mut().flat_map(|lane| &mut lane.in_flight) {
            frame.runs.clear();
        }
    }

    /// Whether another frame may be handed out. The last one may exceed the window by its own size.
    pub(super) fn has_room(&self) -> bool {
        let in_flight: u64 = self.lanes[1..]
            .iter()
            .flat_map(|lane| &lane.in_flight)
            .map(|frame| frame.bytes.max(LEAST))
            .sum();
        in_flight < self.window
    }

    /// A frame is handed out; returns its number.
    ///
    /// # Panics
    /// If there is no such lane: the caller made the lanes.
    pub(super) fn send(&mut self, lane: u8, runs: Vec<ChunkRun>, bytes: u64) -> u64 {
        let lane = &mut self.lanes[usize::from(lane)];
        lane.last += 1;
        lane.in_flight.push_back(Frame {
            sequence: lane.last,
            runs,
            bytes,
        });
        lane.last
    }

    /// The frame turned out to have `bytes` of payload.
    pub(super) fn fill(&mut self, lane: u8, sequence: u64, bytes: u64) {
        let frames = &mut self.lanes[usize::from(lane)].in_flight;
        if let Some(frame) = frames.iter_mut().find(|frame| frame.sequence == sequence) {
            frame.bytes = bytes;
        }
    }

    /// Frames up to `sequence` were dealt with: their chunks are not outstanding any more.
    pub(super) fn acknowledge(
        &mut self,
        lane: u8,
        sequence: u64,
        outstanding: &mut ChunkBitmap,
    ) -> Result<(), ProtocolError> {
        let lane = self
            .lanes
            .get_mut(usize::from(lane))
            .filter(|lane| sequence <= lane.last)
            .ok_or(ProtocolError::Violation {
                reason: "it acknowledges a frame that was never sent",
            })?;
        while let Some(frame) = lane.in_flight.front()
            && frame.sequence <= sequence
        {
            for &run in &frame.runs {
                outstanding.remove_run(run);
            }
            lane.in_flight.pop_front();
        }
        Ok(())
    }

    /// How many answers to fetches are in flight.
    pub(super) fn urgent_len(&self) -> usize {
        self.lanes[usize::from(super::URGENT_LANE)].in_flight.len()
    }

    /// Whether no bulk frame is in flight.
    pub(super) fn is_drained(&self) -> bool {
        self.lanes[1..].iter().all(|lane| lane.in_flight.is_empty())
    }
}
