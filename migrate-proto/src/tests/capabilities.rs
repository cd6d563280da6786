//! One rule of a capability each, by name.

use super::rig::*;
use crate::bitmap::ChunkBitmap;
use crate::chunk::ChunkRun;
use crate::converge::{Decision, Micros};
use crate::error::ProtocolError;
use crate::hello::{Role, Verify, capability};
use crate::leecher::{self, ZERO_DIGEST};
use crate::message::{Chunks, Content, Message, Run};
use crate::seeder;
use alloc::vec;
use alloc::vec::Vec;

const KEEPS: Options = Options {
    verify: Verify::After,
    dry_run: false,
    post_copy: crate::converge::PostCopy::Never,
    optional: capability::KEEP | capability::CUT_OVER,
};

/// The leecher offers `run`.
fn offer(rig: &mut Rig, first: u64, count: u64) {
    assert!(rig.leecher.handle_offering(ChunkRun::new(first, count)));
    rig.talk();
    rig.seeder.handle_offer(rig.now, first, count).unwrap();
}

fn batch(rig: &mut Rig) -> Option<Vec<ChunkRun>> {
    rig.seeder
        .poll_batch(rig.now, 1)
        .unwrap()
        .map(|batch| batch.runs)
}

fn kept(sequence: u64, round: u32, run: ChunkRun) -> Chunks {
    Chunks {
        sequence,
        round,
        runs: vec![Run {
            run,
            content: Content::Kept,
        }],
        digests: Vec::new(),
    }
}

#[test]
fn a_chunk_is_sent_when_it_was_offered_or_passed_over() {
    let mut rig = Rig::greeted(KEEPS);
    rig.seeder
        .handle_started(rig.now, &ChunkBitmap::full(CHUNKS));
    assert_eq!(batch(&mut rig), None, "it may be there already");
    offer(&mut rig, 2, 3);
    assert_eq!(batch(&mut rig), Some(vec![ChunkRun::new(0, 5)]));
    assert_eq!(batch(&mut rig), None);
    rig.leecher.handle_offered();
    rig.talk();
    assert_eq!(batch(&mut rig), Some(vec![ChunkRun::new(5, 5)]));
}

#[test]
fn a_leecher_that_has_told_before_the_seeder_tracks_is_heard() {
    let mut rig = Rig::greeted(KEEPS);
    offer(&mut rig, 0, 4);
    rig.leecher.handle_offered();
    rig.talk();
    rig.seeder
        .handle_started(rig.now, &ChunkBitmap::full(CHUNKS));
    assert_eq!(batch(&mut rig), Some(vec![ChunkRun::new(0, CHUNKS)]));
}

#[test]
fn the_first_pass_does_not_end_while_the_leecher_may_still_offer() {
    let mut rig = Rig::greeted(KEEPS);
    // All of it holes: nothing waits for an offer, and yet a late one must find its round.
    rig.seeder
        .handle_started(rig.now, &ChunkBitmap::empty(CHUNKS));
    rig.push();
    assert_eq!(rig.seeder_events(), []);
    offer(&mut rig, 0, CHUNKS);
    rig.leecher.handle_offered();
    rig.talk();
    rig.push();
    assert_eq!(rig.seeder_events(), [seeder::Event::Take]);
}

#[test]
fn a_kept_chunk_is_here_and_a_dirty_set_makes_it_remote() {
    let mut rig = Rig::greeted(KEEPS);
    offer(&mut rig, 0, 4);
    assert_eq!(
        rig.install(1, &kept(1, 0, ChunkRun::new(1, 2)), 0),
        [1, 2],
        "they count as installed"
    );
    rig.leecher.handle_kept(ChunkRun::new(1, 2), &[7, 8]);
    assert_eq!(rig.leecher.digests(ChunkRun::new(0, 4)), [0, 7, 8, 0]);
    assert!(rig.leecher.is_resident(1));
    let pages = crate::DirtyPage::pages_of(&set(&[2])).collect();
    let dirty = Message::Dirty { round: 1, pages };
    rig.leecher.handle_message(rig.now, dirty).unwrap();
    let round = Message::Round {
        round: 1,
        chunks: 1,
    };
    rig.leecher.handle_message(rig.now, round).unwrap();
    assert!(!rig.leecher.is_resident(2));
    rig.leecher.handle_kept(ChunkRun::new(2, 1), &[8]);
    assert_eq!(rig.leecher.digests(ChunkRun::new(1, 2)), [7, 0]);
    assert_ne!(7, ZERO_DIGEST);
}

#[test]
fn a_chunk_that_was_not_offered_is_not_kept() {
    let refused = |mut rig: Rig, chunks: &Chunks| {
        let error = rig.leecher.admit(rig.now, 1, chunks, 0).unwrap_err();
        assert!(matches!(error, ProtocolError::Violation { .. }), "{error}");
    };
    let mut rig = Rig::greeted(KEEPS);
    offer(&mut rig, 0, 4);
    refused(rig, &kept(1, 0, ChunkRun::new(3, 2)));
    refused(
        Rig::greeted(Options::default()),
        &kept(1, 0, ChunkRun::new(0, 1)),
    );
    let mut rig = Rig::greeted(KEEPS);
    offer(&mut rig, 0, CHUNKS);
    let round = Message::Round {
        round: 1,
        chunks: 0,
    };
    rig.leecher.handle_message(rig.now, round).unwrap();
    refused(rig, &kept(1, 1, ChunkRun::new(0, 1)));
}

#[test]
fn offers_out_of_order_or_beyond_the_memory_end_the_session() {
    for (first, count) in [(3, 1), (8, 3), (5, 0), (u64::MAX, 2), (CHUNKS, 1)] {
        let mut rig = Rig::greeted(KEEPS);
        offer(&mut rig, 0, 4);
        let error = rig.seeder.handle_offer(rig.now, first, count).unwrap_err();
        assert!(matches!(error, ProtocolError::Violation { .. }), "{error}");
    }
    let mut rig = Rig::greeted(KEEPS);
    offer(&mut rig, 0, 4);
    let again = Message::Keep { key: [0; 32] };
    rig.seeder.handle_message(rig.now, again).unwrap_err();
    let mut rig = Rig::greeted(Options::default());
    rig.seeder.handle_offer(rig.now, 0, 1).unwrap_err();
    let mut rig = Rig::greeted(Options::default());
    let asked = rig.seeder.handle_message(rig.now, Message::CutOver);
    assert!(matches!(asked, Err(ProtocolError::Unexpected { .. })));
}

#[test]
fn a_peer_without_the_capability_is_offered_nothing() {
    let mut rig = Rig::new(Options::default());
    rig.leecher = leecher_with(hello(Role::Leecher, KEEPS));
    rig.talk();
    assert_eq!(rig.leecher_events(), [leecher::Event::Prepare]);
    assert!(!rig.leecher.agreement().unwrap().keep);
    rig.leecher.handle_prepared();
    rig.leecher.cut_over();
    assert!(!rig.leecher.handle_offering(ChunkRun::new(0, 1)));
    rig.leecher.handle_offered();
    let said: Vec<_> = core::iter::from_fn(|| rig.leecher.poll_message()).collect();
    assert_eq!(said, [Message::Accept { window: 1 << 20 }]);
}

#[test]
fn a_capability_that_the_other_side_lacks_may_not_be_required() {
    let mut rig = Rig::new(Options::default());
    let mut requires = hello(Role::Leecher, Options::default());
    requires.required = capability::CUT_OVER;
    rig.leecher = leecher_with(requires);
    let (theirs, ours) = (rig.leecher.poll_message(), rig.seeder.poll_message());
    let refused = rig.seeder.handle_message(rig.now, theirs.unwrap());
    assert!(matches!(refused, Err(ProtocolError::Unsupported { .. })));
    let refused = rig.leecher.handle_message(rig.now, ours.unwrap());
    assert!(matches!(refused, Err(ProtocolError::Unsupported { .. })));
    assert!(rig.seeder.poll_timeout().is_none() && rig.leecher.is_closed());
}

/// A held seeder, at the end of its first pass.
fn held() -> Rig {
    let mut rig = Rig::new(Options::default());
    let optional = Options {
        optional: capability::CUT_OVER,
        ..Options::default()
    };
    rig.seeder = seeder_with(hello(Role::Seeder, optional), optional.post_copy);
    let mut requires = hello(Role::Leecher, optional);
    requires.required = capability::CUT_OVER;
    rig.leecher = leecher_with(requires);
    rig.talk();
    rig.leecher_events();
    rig.leecher.handle_prepared();
    rig.talk();
    rig.seeder_events();
    rig.seeder
        .handle_started(rig.now, &ChunkBitmap::full(CHUNKS));
    rig.push();
    assert!(rig.seeder.is_held());
    rig
}

#[test]
fn a_held_seeder_goes_on_with_rounds_and_takes_its_time() {
    let mut rig = held();
    for round in 1..=40 {
        assert_eq!(rig.seeder_events(), [], "too early");
        let next = rig.seeder.poll_timeout().unwrap();
        assert!(next > rig.now);
        while rig.seeder.poll_timeout().unwrap() <= Micros::from_millis(200).plus(rig.now) {
            let next = rig.seeder.poll_timeout().unwrap();
            rig.seeder.handle_message(next, Message::Pong).unwrap();
            rig.seeder.handle_timeout(next);
            if rig.seeder.has_event() {
                rig.now = next;
                break;
            }
        }
        assert_eq!(rig.seeder_events(), [seeder::Event::Take], "round {round}");
        // A dirty set that never becomes smaller gives it no reason to end.
        rig.seeder.handle_dirty(rig.now, ChunkBitmap::full(CHUNKS));
        assert_eq!(rig.seeder.phase(), "tracking");
        rig.push();
    }
    assert_eq!(rig.seeder.round(), 40);
    rig.leecher.cut_over();
    rig.talk();
    assert!(!rig.seeder.is_held());
    assert_eq!(rig.seeder_events(), [seeder::Event::Take], "at once");
    rig.seeder.handle_dirty(rig.now, set(&[]));
    let events = rig.seeder_events();
    let [seeder::Event::Suspend { decision, .. }] = &events[..] else {
        panic!("{events:?}");
    };
    assert_eq!(*decision, Decision::StopAndCopy);
}

#[test]
fn asking_twice_or_late_has_no_effect() {
    let mut rig = Rig::finalized(Verify::Off, &[4]);
    rig.seeder.cut_over(rig.now);
    assert_eq!(rig.seeder_events(), []);
    let mut rig = held();
    rig.seeder.cut_over(rig.now);
    rig.leecher.cut_over();
    rig.leecher.cut_over();
    rig.talk();
    assert_eq!(rig.seeder_events(), [seeder::Event::Take]);
}
