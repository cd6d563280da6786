//! What an engine, a device load and a guest at the destination do, a piece at a time.

use alloc::format;
use alloc::vec::Vec;

use super::{CONTROL, End, Pair, Receiving, URGENT, digest};
use crate::chunk::ChunkRun;
use crate::error::AbortCode;
use crate::handover::Ownership;
use crate::leecher::{self, Admission};
use crate::message::{Content, Message};
use crate::tests::destination::{Access, Seen};
use crate::tests::link::Payload;

impl Pair {
    /// Frames arrive at the leecher.
    pub(super) fn carry_down(&mut self) {
        for index in 0..self.down.len() {
            let bulk = index.checked_sub(1);
            if bulk.is_some_and(|lane| self.receiving[lane].is_some()) {
                continue;
            }
            let Some(frame) = self.down[index].receive(self.now) else {
                continue;
            };
            match frame {
                Err(error) => self.leecher.abort(AbortCode::Protocol, format!("{error}")),
                Ok((Message::Chunks(chunks), payload)) => {
                    self.receiving[bulk.unwrap()] = Some(Receiving::Waiting(chunks, payload));
                }
                Ok((Message::State { offset }, payload)) => {
                    let _ = self.leecher.handle_state(self.now, offset, payload.len);
                }
                Ok((message, _)) => {
                    let result = self.leecher.handle_message(self.now, message);
                    self.check_honest(result);
                }
            }
        }
        for lane in 0..self.receiving.len() {
            if self.chance.one_in(2) {
                self.receive_chunks(lane);
            }
        }
    }

    /// Each step is a moment at which another thread may come between.
    pub(super) fn receive_chunks(&mut self, index: usize) {
        let lane = u8::try_from(index).unwrap();
        self.receiving[index] = match self.receiving[index].take() {
            None => None,
            Some(Receiving::Waiting(chunks, payload)) => {
                match self.leecher.admit(self.now, lane, &chunks, payload.len) {
                    Ok(Admission::Install { parts, direct }) => {
                        Some(Receiving::Admitted(chunks, payload, parts, direct))
                    }
                    Ok(Admission::Wait) => Some(Receiving::Waiting(chunks, payload)),
                    Ok(Admission::Ignore) => None,
                    Err(error) => {
                        self.check_honest(Err(error));
                        None
                    }
                }
            }
            Some(Receiving::Admitted(chunks, payload, parts, direct)) => {
                if self.leecher_end.is_none() {
                    let mut contents = payload.contents.iter();
                    for part in &parts {
                        for chunk in part.run.range() {
                            let content = match part.content {
                                Content::Data => *contents.next().unwrap(),
                                Content::Zero => 0,
                                Content::Kept => continue,
                            };
                            if part.install {
                                self.destination.install(chunk, content, direct);
                            }
                        }
                    }
                    assert_eq!(contents.next(), None);
                }
                Some(Receiving::Written(chunks, parts))
            }
            Some(Receiving::Written(chunks, parts)) => {
                self.leecher.handle_installed(lane, &chunks, &parts);
                for part in parts {
                    if part.install && part.content == Content::Kept {
                        let digests: Vec<_> = part
                            .run
                            .range()
                            .map(|chunk| digest(self.destination.read(chunk)))
                            .collect();
                        self.leecher.handle_kept(part.run, &digests);
                    }
                }
                None
            }
        };
    }

    /// What an engine and a guest at the destination do.
    pub(super) fn drive_destination(&mut self) {
        if self.chance.one_in(3) {
            if let Some(event) = self.obeying.take() {
                self.obey_leecher(event);
            }
            self.obeying = self.leecher.poll_event();
            if let Some(event) = &self.obeying {
                self.log(|| format!("leecher: {event:?}"));
                // The faults are armed at once; making chunks absent takes a while.
                self.destination.armed |= matches!(event, leecher::Event::Finalize { .. });
                self.settled |= matches!(event, leecher::Event::Load { .. });
            }
        }
        if let Some(next) = self.offering
            && self.chance.one_in(3)
        {
            self.offer(next);
        }
        self.look();
        if let Some(accesses) = self.loading
            && self.destination.viewers[0].wants.is_none()
        {
            if accesses == 0 {
                // A load may need what the stray thread holds.
                if self.destination.viewers[2].wants.is_none() {
                    self.loading = None;
                    self.leecher.handle_loaded();
                }
            } else {
                self.loading = Some(accesses - 1);
                self.want(0);
            }
        }
        if self.chance.one_in(2) {
            while let Some(message) = self.leecher.poll_message() {
                self.log(|| format!("leecher sends {message:?}"));
                let none = Payload::default();
                self.up[CONTROL].send(self.now, &mut self.chance, &message, none);
                if self.chance.one_in(3) {
                    break;
                }
            }
        }
        if self.chance.one_in(2)
            && let Some(message) = self.leecher.poll_urgent()
        {
            self.log(|| format!("leecher sends {message:?}"));
            self.up[URGENT].send(self.now, &mut self.chance, &message, Payload::default());
        }
    }

    /// The device load (viewer 0), the guest's processors (1) and a stray thread of the machine (2).
    pub(super) fn look(&mut self) {
        if self.destination.running && self.leecher_end.is_none() && self.chance.one_in(3) {
            self.want(1);
        }
        let finalizing = self.destination.armed && self.leecher.phase() == "finalizing";
        if (finalizing || self.destination.running) && self.chance.one_in(6) {
            self.want(2);
        }
        for viewer in 0..self.destination.viewers.len() {
            let Some(access) = self.destination.viewers[viewer].wants else {
                continue;
            };
            let before = self.destination.written[usize::try_from(access.chunk).unwrap()];
            let seen = self.destination.step(viewer, &mut self.leecher);
            if let Seen::Value(value) = seen
                && self.settled
                && !self.source.running
                && self.leecher_end.is_none()
            {
                let expected = before.unwrap_or_else(|| self.source.content(access.chunk));
                assert_eq!(
                    value, expected,
                    "a look at chunk {} was stale",
                    access.chunk
                );
            }
        }
    }

    pub(super) fn want(&mut self, viewer: usize) {
        if self.destination.viewers[viewer].wants.is_none() {
            self.last_write += 1;
            let write = viewer < 2 && self.chance.one_in(2);
            self.destination.viewers[viewer].wants = Some(Access {
                chunk: self.chance.below(self.source.chunks()),
                write: write.then_some(self.last_write),
            });
        }
    }

    pub(super) fn obey_leecher(&mut self, event: leecher::Event) {
        match event {
            leecher::Event::Finalize { remote: set } | leecher::Event::Discard { stale: set } => {
                for run in set.runs() {
                    self.destination.discard(run);
                }
            }
            leecher::Event::Prepare => {
                let agreement = self.leecher.agreement().unwrap();
                let (keep, dry_run) = (agreement.keep, agreement.dry_run);
                if keep {
                    self.offering = Some(0);
                } else if !dry_run {
                    self.destination.memory.fill(None);
                }
                self.leecher.handle_prepared();
            }
            leecher::Event::Digests => self.send_digests(),
            leecher::Event::Load { len, digest } => {
                assert_eq!((len, digest), (self.state_sent, 77));
                self.loading = Some(self.chance.below(5));
            }
            leecher::Event::Run => {
                if self.leecher.ownership() == Ownership::Here {
                    self.destination.running = true;
                    self.leecher.handle_running();
                }
            }
            leecher::Event::Drained => {
                assert_eq!(self.leecher.missing(), 0);
                self.leecher.handle_disarmed();
            }
            leecher::Event::Verdict {
                compared,
                different,
            } => self.verdict = Some((compared, different)),
            leecher::Event::Done => self.leecher_end = Some(End::Done),
            leecher::Event::Aborted { error } => self.leecher_end = Some(End::Aborted(error)),
            leecher::Event::Undecided { .. } => self.leecher_end = Some(End::Undecided),
            leecher::Event::Lost { missing, .. } => {
                let running = self.destination.running;
                self.leecher_end = Some(End::Lost { missing, running });
            }
        }
    }

    /// Offers a few chunks from `next` on, or passes over them.
    fn offer(&mut self, next: u64) {
        let chunks = self.source.chunks();
        let count = self.chance.between(1, 9).min(chunks - next);
        let run = ChunkRun::new(next, count);
        if self.chance.one_in(2) && self.leecher.handle_offering(run) {
            let payload = Payload {
                len: count * 16,
                contents: run.range().map(|c| self.destination.read(c)).collect(),
            };
            while let Some(message) = self.leecher.poll_message() {
                let none = Payload::default();
                self.up[CONTROL].send(self.now, &mut self.chance, &message, none);
            }
            let message = Message::Offer { first: next };
            self.up[CONTROL].send(self.now, &mut self.chance, &message, payload);
        }
        self.offering = (run.end() < chunks).then_some(run.end());
        if self.offering.is_none() {
            self.leecher.handle_offered();
        }
    }

    pub(super) fn send_digests(&mut self) {
        let chunks = self.source.chunks();
        let step = self.chance.between(1, chunks);
        let mut first = 0;
        while first < chunks {
            let count = step.min(chunks - first);
            let digests = self.leecher.digests(ChunkRun::new(first, count)).to_vec();
            let payload = Payload {
                len: count * 8,
                contents: digests,
            };
            let message = Message::Digests { first };
            while let Some(message) = self.leecher.poll_message() {
                let none = Payload::default();
                self.up[CONTROL].send(self.now, &mut self.chance, &message, none);
            }
            self.up[CONTROL].send(self.now, &mut self.chance, &message, payload);
            first += count;
        }
        self.leecher.handle_digests_sent();
    }
}
