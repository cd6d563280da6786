//! What an engine at the source does, a piece at a time.

use alloc::format;
use alloc::vec::Vec;

use super::{CONTROL, End, Pair, digest};
use crate::chunk::ChunkRun;
use crate::error::AbortCode;
use crate::handover::Ownership;
use crate::limits::MAX_RUNS;
use crate::message::{Chunks, Content, Message, Run};
use crate::seeder::{self, Batch};
use crate::tests::link::Payload;

impl Pair {
    /// What an engine at the source does.
    pub(super) fn drive_source(&mut self) {
        while let Some(event) = self.seeder.poll_event() {
            self.log(|| format!("seeder: {event:?}"));
            self.todo.push_back(event);
        }
        if self.chance.one_in(3)
            && let Some(event) = self.todo.pop_front()
        {
            self.obey_seeder(event);
        }
        if let Some(steps) = self.saving {
            self.saving = steps.checked_sub(1);
            if steps == 0 {
                self.finish_saving();
            }
        }
        if self.chance.one_in(2) {
            self.send_control_down();
        }
        if self.chance.one_in(2)
            && let Some(batch) = self.seeder.poll_urgent()
        {
            self.fill_and_send(&batch);
        }
        for lane in 1..=self.plan.lanes {
            let slot = usize::from(lane);
            if let Some(batch) = self.filling[slot].take() {
                self.fill_and_send(&batch);
            } else if self.chance.one_in(2)
                && let Ok(Some(batch)) = self.seeder.poll_batch(self.now, lane)
            {
                if self.chance.one_in(2) {
                    self.fill_and_send(&batch);
                } else {
                    self.filling[slot] = Some(batch);
                }
            }
        }
    }

    pub(super) fn send_control_down(&mut self) {
        while let Some(message) = self.seeder.poll_message() {
            self.log(|| format!("seeder sends {message:?}"));
            if matches!(message, Message::Release { .. }) {
                self.released = true;
                self.releases += 1;
                assert_eq!(self.seeder.ownership(), Ownership::There);
                self.check_hand_over();
            }
            self.down[CONTROL].send(self.now, &mut self.chance, &message, Payload::default());
            if self.chance.one_in(3) {
                break;
            }
        }
    }

    pub(super) fn obey_seeder(&mut self, event: seeder::Event) {
        match event {
            seeder::Event::Start if self.plan.dry_run => {
                for _ in 0..3 {
                    let payload = Payload {
                        len: 5000,
                        contents: Vec::new(),
                    };
                    let probe = &Message::Probe;
                    self.down[CONTROL].send(self.now, &mut self.chance, probe, payload);
                }
                self.seeder.handle_measured();
            }
            seeder::Event::Start => {
                self.source.dirty.clear();
                self.started = true;
                let present = self.source.present(&mut self.chance);
                self.seeder.handle_started(self.now, &present);
            }
            seeder::Event::Take => {
                let dirty = self.source.take();
                self.seeder.handle_dirty(self.now, dirty);
            }
            seeder::Event::Suspend { .. } => {
                self.source.running = false;
                let dirty = self.source.take();
                self.seeder.handle_suspended(self.now, &dirty);
                self.saving = Some(self.chance.below(40));
            }
            seeder::Event::Released => assert!(self.released),
            seeder::Event::Running => assert!(self.destination.running),
            seeder::Event::Complete => self.check_complete(),
            seeder::Event::Compare => {
                let differ = |chunk: u64, theirs: u64| {
                    theirs != 0 && theirs != digest(self.source.content(chunk))
                };
                let compared = self.digests.iter().filter(|&&theirs| theirs != 0).count() as u64;
                let different = (0..)
                    .zip(&self.digests)
                    .filter(|&(chunk, &theirs)| differ(chunk, theirs))
                    .count() as u64;
                assert_eq!(different, 0, "the copies differ");
                self.seeder.handle_compared(compared, different);
            }
            seeder::Event::Done => {
                assert!(self.seeder_end.is_none());
                self.seeder_end = Some(End::Done);
            }
            seeder::Event::Aborted { error, restore } => {
                assert!(!self.released, "taken back after Release was sent");
                self.restored.union_with(&restore);
                self.source.dirty.union_with(&restore);
                self.source.running = true;
                self.saving = None;
                self.seeder_end.get_or_insert(End::Aborted(error));
                if self.todo.is_empty() {
                    self.check_restored();
                }
            }
            seeder::Event::Lost {
                missing, running, ..
            } => {
                assert!(self.released);
                self.seeder_end = Some(End::Lost { missing, running });
            }
        }
    }

    pub(super) fn finish_saving(&mut self) {
        for _ in 0..self.chance.below(4) {
            self.source.write_somewhere(&mut self.chance);
        }
        // State follows what was said before it on the control lane.
        while let Some(message) = self.seeder.poll_message() {
            assert!(!matches!(message, Message::Release { .. }));
            self.down[CONTROL].send(self.now, &mut self.chance, &message, Payload::default());
        }
        for _ in 0..self.chance.below(4) {
            let len = self.chance.between(1, 3000);
            let message = Message::State {
                offset: self.state_sent,
            };
            let payload = Payload {
                len,
                contents: Vec::new(),
            };
            if self.seeder_end.is_none() {
                self.down[CONTROL].send(self.now, &mut self.chance, &message, payload);
            }
            self.state_sent += len;
        }
        let dirty = self.source.take();
        self.seeder
            .handle_saved(self.now, self.state_sent, 77, dirty);
    }

    /// Reads the chunks as they are now, and sends them.
    pub(super) fn fill_and_send(&mut self, batch: &Batch) {
        let layout = self.seeder.agreement().unwrap().layout.clone();
        let mut chunks = Chunks {
            sequence: batch.sequence,
            round: batch.round,
            ..Chunks::default()
        };
        let mut payload = Payload::default();
        for run in &batch.runs {
            if batch.hole {
                chunks.runs.push(Run {
                    run: *run,
                    content: Content::Zero,
                });
                continue;
            }
            for chunk in run.range() {
                let content = self.source.content(chunk);
                let kind = if content == 0 {
                    Content::Zero
                } else if batch.round == 0 && self.offers.get(&chunk) == Some(&content) {
                    self.kept += 1;
                    Content::Kept
                } else {
                    payload.len += layout.bytes_in(ChunkRun::new(chunk, 1));
                    payload.contents.push(content);
                    chunks.digests.push(digest(content));
                    Content::Data
                };
                match chunks.runs.last_mut() {
                    Some(last) if last.content == kind && last.run.end() == chunk => {
                        last.run.count += 1;
                    }
                    _ => chunks.runs.push(Run {
                        run: ChunkRun::new(chunk, 1),
                        content: kind,
                    }),
                }
            }
        }
        assert!(chunks.runs.len() <= MAX_RUNS);
        self.seeder.handle_filled(self.now, batch, payload.len);
        let lane = usize::from(batch.lane) + 1;
        let message = Message::Chunks(chunks);
        self.down[lane].send(self.now, &mut self.chance, &message, payload);
    }

    /// Frames arrive at the seeder.
    pub(super) fn carry_up(&mut self) {
        for index in 0..self.up.len() {
            match self.up[index].receive(self.now) {
                None => {}
                Some(Err(error)) => self.seeder.abort(AbortCode::Protocol, format!("{error}")),
                Some(Ok((message, payload))) => {
                    if let Message::Digests { first } = message {
                        let first = usize::try_from(first).unwrap();
                        let count = payload.contents.len();
                        self.digests[first..first + count].copy_from_slice(&payload.contents);
                    }
                    let result = match message {
                        Message::Offer { first } => {
                            self.offers
                                .extend((first..).zip(payload.contents.iter().copied()));
                            let count = payload.len / 16;
                            self.seeder.handle_offer(self.now, first, count)
                        }
                        message => self.seeder.handle_message(self.now, message),
                    };
                    self.check_honest(result);
                }
            }
        }
    }
}
