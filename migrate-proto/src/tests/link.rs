//! A lane in one direction: ordered in itself, delayed on its own, so that lanes reorder against each other.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use super::chance::Chance;
use crate::converge::Micros;
use crate::frame::{FrameHeader, HEADER_LEN, encode_frame};
use crate::message::Message;
use crate::{DecodeError, limits};

/// What follows the fields: as many bytes, of which the test keeps a number a chunk.
#[derive(Debug, Clone, Default)]
pub(super) struct Payload {
    pub(super) len: u64,
    pub(super) contents: Vec<u64>,
}

#[derive(Debug, Clone)]
struct InFlight {
    at: Micros,
    bytes: Vec<u8>,
    payload: Payload,
}

/// One direction of one lane.
#[derive(Debug)]
pub(super) struct Lane {
    slowest: u64,
    queue: VecDeque<InFlight>,
    /// Frames that may come twice do so once in so many times.
    pub(super) twice: Option<u64>,
    /// A byte of the next frame is damaged.
    pub(super) damage: bool,
    cut: bool,
}

impl Lane {
    /// A lane whose frames take up to `slowest` microseconds.
    pub(super) fn new(slowest: u64) -> Self {
        Self {
            slowest,
            queue: VecDeque::new(),
            twice: None,
            damage: false,
            cut: false,
        }
    }

    pub(super) fn send(
        &mut self,
        now: Micros,
        chance: &mut Chance,
        message: &Message,
        payload: Payload,
    ) {
        if self.cut {
            return;
        }
        let mut bytes = Vec::new();
        let len = usize::try_from(payload.len).unwrap();
        assert!(len <= limits::MAX_PAYLOAD as usize);
        encode_frame(message, len, &mut bytes);
        if self.damage {
            self.damage = false;
            let at = usize::try_from(chance.below(bytes.len() as u64)).unwrap();
            bytes[at] ^= 1 << chance.below(8);
        }
        let mut at = now.plus(Micros(chance.below(self.slowest + 1)));
        if let Some(last) = self.queue.back() {
            at = at.max(last.at);
        }
        let frame = InFlight { at, bytes, payload };
        // A connection never repeats bytes; what a session may say twice is held to be harmless all the same.
        let repeatable = matches!(
            message,
            Message::Chunks(_) | Message::Credit { .. } | Message::Ping | Message::Pong
        );
        if repeatable && self.twice.is_some_and(|n| chance.one_in(n)) {
            self.queue.push_back(frame.clone());
        }
        self.queue.push_back(frame);
    }

    /// The next frame that has arrived, read by the real decoder.
    pub(super) fn receive(
        &mut self,
        now: Micros,
    ) -> Option<Result<(Message, Payload), DecodeError>> {
        if self.queue.front()?.at > now {
            return None;
        }
        let frame = self.queue.pop_front()?;
        Some(decode(&frame.bytes).map(|message| (message, frame.payload)))
    }

    /// What is on its way is lost, and so is all that follows.
    pub(super) fn cut(&mut self) {
        self.cut = true;
        self.queue.clear();
    }
}

fn decode(bytes: &[u8]) -> Result<Message, DecodeError> {
    let header = FrameHeader::decode(bytes[..HEADER_LEN].try_into().unwrap())?;
    let body = bytes
        .get(HEADER_LEN..HEADER_LEN + header.body_len())
        .ok_or(DecodeError::UnexpectedEnd)?;
    header.message(body)
}
