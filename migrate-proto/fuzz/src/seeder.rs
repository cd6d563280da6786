//! A seeder whose peer says anything, and whose caller keeps its part of the contract.

use migrate_proto::seeder::{Batch, Event, Seeder, SeederConfig};
use migrate_proto::{
    AbortCode, Budget, ChunkRun, Hello, Message, Micros, Ownership, PostCopy, Role, Token,
};

use super::bytes::Bytes;
use super::{CHUNKS, our_hello};

const LANES: u8 = 2;

/// A sequence of operations on a seeder.
pub fn seeder_ops(data: &[u8]) {
    let mut bytes = Bytes(data);
    let flags = bytes.byte();
    let mut now = Micros(0);
    let mut seeder = Seeder::new(
        now,
        SeederConfig {
            hello: our_hello(Role::Seeder, flags),
            budget: Budget {
                post_copy: [PostCopy::Auto, PostCopy::Never, PostCopy::Always]
                    [usize::from(flags >> 4) % 3],
                ..Budget::default()
            },
            bandwidth: (flags & 128 != 0).then_some(1_000_000),
            batch: 3 * 4096,
            lanes: LANES,
            token: Token([1; 16]),
            fixed_blackout: Micros(0),
            silence: Micros::from_millis(1000),
            hold: flags & 64 != 0,
        },
    );
    let mut batches: Vec<Batch> = Vec::new();
    let mut sent = [0; LANES as usize + 1];
    let mut released = false;
    while let Some(op) = bytes.op() {
        let said = match op % 28 {
            0 => Some(Message::Hello(Hello {
                dry_run: false,
                ..our_hello(Role::Leecher, bytes.byte())
            })),
            1 => Some(Message::Accept {
                window: bytes.number() << (bytes.byte() % 57),
            }),
            2 => {
                let lane = bytes.byte() % (LANES + 2);
                let sent = sent.get(usize::from(lane)).copied();
                let sequence = match bytes.byte() {
                    u8::MAX => sent.unwrap_or(0),
                    other => u64::from(other),
                };
                Some(Message::Credit { lane, sequence })
            }
            3 => Some(Message::Fetch {
                run: ChunkRun::new(bytes.number(), bytes.number()),
            }),
            4 => Some(Message::Ready),
            5 => Some(Message::Running),
            6 => Some(Message::Complete),
            7 => Some(Message::Digests {
                first: bytes.number(),
            }),
            8 => Some(Message::DigestsEnd),
            9 => Some(Message::Ping),
            10 => Some(Message::Pong),
            11 => bytes.message(),
            12 => {
                seeder.handle_started(now, &bytes.set());
                None
            }
            13 => {
                seeder.handle_dirty(now, bytes.set());
                None
            }
            14 => {
                seeder.handle_suspended(now, &bytes.set());
                None
            }
            15 => {
                let (len, digest) = (bytes.number() << (bytes.byte() % 40), bytes.number());
                seeder.handle_saved(now, len, digest, bytes.set());
                None
            }
            16 => {
                seeder.handle_compared(bytes.number(), bytes.number());
                None
            }
            17 => {
                seeder.handle_measured();
                None
            }
            18 => {
                now = now.plus(Micros(bytes.number() * 10_000));
                seeder.handle_timeout(now);
                None
            }
            19 => {
                if let Ok(Some(batch)) = seeder.poll_batch(now, bytes.byte() % LANES + 1) {
                    batches.push(batch);
                }
                None
            }
            20 => {
                batches.extend(seeder.poll_urgent());
                None
            }
            21 => {
                if let Some(batch) = batches.pop() {
                    let last = &mut sent[usize::from(batch.lane)];
                    *last = batch.sequence.max(*last);
                    assert!(batch.runs.iter().all(|run| run.end() <= CHUNKS));
                    let chunks: u64 = batch.runs.iter().map(|run| run.count).sum();
                    let most = if batch.hole { 0 } else { chunks * 4096 };
                    seeder.handle_filled(now, &batch, most);
                }
                None
            }
            22 => {
                while let Some(message) = seeder.poll_message() {
                    if let Message::Release { .. } = message {
                        assert!(!released, "released twice");
                        released = true;
                    }
                }
                None
            }
            23 => {
                seeder.abort(AbortCode::Cancelled, "enough".into());
                None
            }
            24 => Some(Message::Keep { key: [6; 32] }),
            25 => {
                // Its errors are its events.
                let _ = seeder.handle_offer(now, bytes.number(), bytes.number());
                None
            }
            26 => Some(Message::OfferEnd),
            _ => {
                if bytes.byte().is_multiple_of(2) {
                    seeder.cut_over(now);
                    None
                } else {
                    Some(Message::CutOver)
                }
            }
        };
        if let Some(message) = said {
            // Its errors are its events.
            let _ = seeder.handle_message(now, message);
        }
        check(&mut seeder, released);
    }
}

fn check(seeder: &mut Seeder, released: bool) {
    let mut events = 0;
    while let Some(event) = seeder.poll_event() {
        events += 1;
        match event {
            Event::Aborted { restore, .. } => {
                assert!(!released, "taken back");
                assert_eq!(restore.chunks(), CHUNKS);
            }
            Event::Released | Event::Lost { .. } | Event::Running => assert!(released),
            _ => {}
        }
    }
    assert!(events <= 4, "one step has many consequences");
    let expected = if released {
        Ownership::There
    } else {
        Ownership::Here
    };
    assert_eq!(seeder.ownership(), expected);
    assert_eq!(seeder.poll_timeout().is_none(), seeder.phase() == "closed");
    assert!(seeder.missing() <= CHUNKS);
}
