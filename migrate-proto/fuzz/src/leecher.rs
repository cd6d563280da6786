//! A leecher whose peer says anything, and whose caller keeps its part of the contract.

use migrate_proto::leecher::{Admission, Event, Leecher, LeecherConfig, Part};
use migrate_proto::{
    AbortCode, ChunkRun, Chunks, Content, DirtyPage, Message, Micros, Ownership, Role, Run, Token,
};

use super::bytes::Bytes;
use super::{CHUNKS, our_hello};

const LANES: u8 = 2;

/// A frame that was admitted and is being installed.
type Admitted = Option<(Chunks, Vec<Part>)>;

/// A sequence of operations on a leecher.
pub fn leecher_ops(data: &[u8]) {
    let mut bytes = Bytes(data);
    let mut now = Micros(0);
    let mut leecher = Leecher::new(
        now,
        LeecherConfig {
            hello: our_hello(Role::Leecher, bytes.byte() & 0x77),
            window: 1 << 20,
            lanes: LANES,
            silence: Micros::from_millis(1000),
            key: [5; 32],
        },
    );
    let mut sequences = [0; LANES as usize + 1];
    let mut admitted: [Admitted; LANES as usize + 1] = [None, None, None];
    let mut state = 0_u64;
    let mut released = false;
    while let Some(op) = bytes.op() {
        let said = match op % 26 {
            0 => Some(Message::Hello(our_hello(Role::Seeder, bytes.byte()))),
            1 => {
                leecher.handle_prepared();
                None
            }
            2 => {
                let lane = bytes.byte() % (LANES + 1);
                let slot = usize::from(lane);
                let chunks = frame(&mut bytes, sequences[slot]);
                let payload = if bytes.byte() == 1 {
                    bytes.number()
                } else {
                    len_of(&chunks)
                };
                if admitted[slot].is_none()
                    && let Ok(admission) = leecher.admit(now, lane, &chunks, payload)
                    && let Admission::Install { parts, .. } = admission
                {
                    check_parts(&chunks, &parts);
                    sequences[slot] = chunks.sequence;
                    admitted[slot] = Some((chunks, parts));
                }
                None
            }
            3 => {
                let lane = bytes.byte() % (LANES + 1);
                if let Some((chunks, parts)) = admitted[usize::from(lane)].take() {
                    leecher.handle_installed(lane, &chunks, &parts);
                }
                None
            }
            4 => {
                let round = u32::from(bytes.byte());
                let pages = DirtyPage::pages_of(&bytes.set()).collect();
                Some(Message::Dirty { round, pages })
            }
            5 => Some(Message::Round {
                round: u32::from(bytes.byte()),
                chunks: bytes.number(),
            }),
            6 => Some(Message::Finalize),
            7 => {
                let len = bytes.number() << (bytes.byte() % 57);
                let offset = if bytes.byte() == 1 {
                    bytes.number()
                } else {
                    state
                };
                if leecher.handle_state(now, offset, len).is_ok() {
                    state = offset.saturating_add(len);
                }
                None
            }
            8 => Some(Message::StateEnd {
                len: state.wrapping_add(bytes.number()),
                digest: 0,
            }),
            9 => {
                leecher.handle_digests_sent();
                None
            }
            10 => Some(Message::Verdict {
                compared: bytes.number(),
                different: bytes.number(),
            }),
            11 => {
                leecher.handle_loaded();
                None
            }
            12 => {
                released |= leecher.phase() == "ready";
                Some(Message::Release {
                    token: Token([2; 16]),
                })
            }
            13 => {
                leecher.handle_running();
                None
            }
            14 => {
                leecher.handle_disarmed();
                None
            }
            15 => {
                leecher.handle_fault(bytes.number());
                None
            }
            16 => {
                now = now.plus(Micros(bytes.number() * 10_000));
                leecher.handle_timeout(now);
                None
            }
            17 => {
                let mut fetches = 0;
                while let Some(message) = leecher.poll_urgent() {
                    assert!(matches!(message, Message::Fetch { run } if run.count == 1));
                    fetches += 1;
                }
                assert!(fetches <= CHUNKS, "a chunk is fetched twice at once");
                None
            }
            18 => {
                let mut messages = 0;
                while leecher.poll_message().is_some() {
                    messages += 1;
                }
                assert!(messages <= 20, "messages pile up: {messages}");
                None
            }
            19 => bytes.message(),
            20 => Some(match bytes.byte() % 4 {
                0 => Message::Ping,
                1 => Message::Pong,
                2 => Message::Probe,
                _ => Message::Farewell,
            }),
            21 => {
                leecher.abort(AbortCode::Cancelled, "enough".into());
                None
            }
            22 => {
                leecher.handle_offering(ChunkRun::new(bytes.number(), bytes.number()));
                None
            }
            23 => {
                leecher.handle_offered();
                None
            }
            24 => {
                leecher.cut_over();
                None
            }
            _ => {
                leecher.handle_kept(ChunkRun::new(bytes.number(), 2), &[7, 8]);
                None
            }
        };
        if let Some(message) = said {
            released |= matches!(message, Message::Release { .. }) && leecher.phase() == "ready";
            // Its errors are its events.
            let _ = leecher.handle_message(now, message);
        }
        check(&mut leecher, released);
    }
}

fn frame(bytes: &mut Bytes<'_>, last: u64) -> Chunks {
    let mut chunks = Chunks {
        sequence: last.wrapping_add(bytes.number()),
        round: u32::from(bytes.byte()),
        ..Chunks::default()
    };
    for _ in 0..bytes.byte() % 4 {
        let content = match bytes.byte() {
            3 => Content::Kept,
            other if other.is_multiple_of(2) => Content::Data,
            _ => Content::Zero,
        };
        chunks.runs.push(Run {
            run: ChunkRun::new(bytes.number(), bytes.number()),
            content,
        });
    }
    // The decoder lets nothing through that is not so.
    chunks.digests = (0..chunks.data_chunks()).map(|n| n + 2).collect();
    chunks
}

/// How long the payload has to be: chunk 40 holds one byte.
fn len_of(chunks: &Chunks) -> u64 {
    let data = chunks
        .runs
        .iter()
        .filter(|run| run.content == Content::Data);
    data.flat_map(|run| run.run.range())
        .map(|chunk| if chunk == 40 { 1 } else { 4096 })
        .sum()
}

/// The parts are the runs, cut.
fn check_parts(chunks: &Chunks, parts: &[Part]) {
    let whole = chunks.runs.iter().flat_map(|run| run.run.range());
    assert!(whole.eq(parts.iter().flat_map(|part| part.run.range())));
}

fn check(leecher: &mut Leecher, released: bool) {
    let mut events = 0;
    while let Some(event) = leecher.poll_event() {
        events += 1;
        match event {
            Event::Finalize { remote: set } | Event::Discard { stale: set } => {
                assert_eq!(set.chunks(), CHUNKS);
            }
            Event::Run | Event::Lost { .. } | Event::Drained => assert!(released),
            Event::Aborted { .. } | Event::Undecided { .. } => assert!(!released),
            _ => {}
        }
    }
    assert!(events <= 4, "one step has many consequences");
    let expected = if released {
        Ownership::Here
    } else {
        Ownership::There
    };
    assert_eq!(leecher.ownership(), expected);
    assert_eq!(
        leecher.poll_timeout().is_none(),
        leecher.phase() == "closed"
    );
}
