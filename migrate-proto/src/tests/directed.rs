//! One rule of a session each, by name.

use super::rig::*;
use crate::bitmap::ChunkBitmap;
use crate::chunk::ChunkRun;
use crate::converge::{Micros, PostCopy};
use crate::error::{AbortCode, ProtocolError};
use crate::handover::Ownership;
use crate::hello::{Hello, Role, Verify};
use crate::leecher::{self, Admission, Fault};
use crate::limits::{MAX_NAME, MAX_STATE};
use crate::message::{Chunks, Content, Message, Run};
use crate::seeder;
use alloc::vec;
use alloc::vec::Vec;

fn one(chunk: u64) -> ChunkRun {
    ChunkRun::new(chunk, 1)
}

fn one_chunk(sequence: u64, round: u32, chunk: u64) -> Chunks {
    Chunks {
        sequence,
        round,
        runs: vec![Run {
            run: one(chunk),
            content: Content::Data,
        }],
        digests: vec![9],
    }
}

#[test]
fn a_late_chunk_never_overwrites_a_newer_write() {
    let mut rig = Rig::loaded(&[4, 5]);
    assert_eq!(rig.leecher.handle_fault(4), Fault::Requested);
    rig.ask();
    let urgent = rig.seeder.poll_urgent().unwrap();
    let (chunks, payload) = frame(&urgent);
    assert_eq!(rig.install(0, &chunks, payload), [4]);
    rig.talk();
    // The guest may write chunk 4 from here on. It comes again on another lane.
    let late = one_chunk(2, 1, 4);
    let Admission::Install { parts, direct } = rig.admit(1, &late, 4096) else {
        panic!("it is read, and forgotten");
    };
    assert!(
        !direct,
        "nothing is written directly once it may be looked at"
    );
    assert_eq!(wanted(&parts), [0; 0]);
}

#[test]
fn a_chunk_of_an_older_round_is_dropped_and_asked_for_again() {
    let mut rig = Rig::finalized(Verify::Off, &[4]);
    assert_eq!(rig.leecher.handle_fault(4), Fault::Requested);
    assert_eq!(rig.ask(), [one(4)]);
    let old = rig.seeder.poll_urgent().unwrap();
    // Saving the state writes chunk 4 while its answer is on its way.
    rig.seeder.handle_saved(rig.now, 0, 0, set(&[4]));
    rig.talk();
    let (chunks, payload) = frame(&old);
    rig.leecher_events();
    assert_eq!(rig.install(0, &chunks, payload), [0; 0]);
    assert_eq!(rig.ask(), [one(4)], "its fault still waits");
    rig.talk();
    let new = rig.seeder.poll_urgent().unwrap();
    // One set led to the decision, one was left when the guest stood still, one was written by saving its state.
    assert_eq!(new.round, 3);
    let (chunks, payload) = frame(&new);
    assert_eq!(rig.install(0, &chunks, payload), [4]);
}

/// An engine made chunks absent on one thread while another installed the newest version of one of them: the chunk
/// counted as here, and its page was zeros. Frames wait now until the caller polls its next event.
#[test]
fn a_frame_waits_until_what_is_stale_was_made_absent() {
    let mut rig = Rig::finalized(Verify::Off, &[4]);
    rig.seeder.handle_saved(rig.now, 0, 0, set(&[4, 5]));
    rig.talk();
    rig.leecher.handle_fault(5);
    rig.ask();
    let (chunks, payload) = frame(&rig.seeder.poll_urgent().unwrap());
    assert_eq!(rig.admit(0, &chunks, payload), Admission::Wait);
    // Chunk 4 is absent already.
    let discard = leecher::Event::Discard { stale: set(&[5]) };
    assert_eq!(rig.leecher.poll_event(), Some(discard));
    assert_eq!(rig.admit(0, &chunks, payload), Admission::Wait);
    rig.leecher.poll_event();
    assert_eq!(rig.install(0, &chunks, payload), [5]);
}

/// Making thousands of scattered chunks absent takes longer than all else in a blackout, so it is done before.
#[test]
fn with_post_copy_stale_chunks_are_made_absent_before_the_guest_stands_still() {
    let mut rig = Rig::prefetched(Options {
        verify: Verify::Off,
        post_copy: PostCopy::Always,
        ..Options::default()
    });
    rig.seeder.handle_dirty(rig.now, set(&[4, 5]));
    rig.talk();
    let remote = set(&[4, 5]);
    assert_eq!(rig.leecher_events(), [leecher::Event::Finalize { remote }]);
    rig.seeder.handle_suspended(rig.now, &set(&[5, 6]));
    rig.talk();
    let stale = set(&[6]);
    assert_eq!(rig.leecher_events(), [leecher::Event::Discard { stale }]);
}

#[test]
fn a_chunk_that_a_dirty_set_overtakes_while_it_is_installed_is_discarded_before_the_load() {
    let mut rig = Rig::finalized(Verify::Off, &[4]);
    rig.leecher.handle_fault(4);
    rig.ask();
    let (chunks, payload) = frame(&rig.seeder.poll_urgent().unwrap());
    let Admission::Install { parts, .. } = rig.admit(0, &chunks, payload) else {
        panic!("it is current when it comes");
    };
    rig.seeder.handle_saved(rig.now, 0, 0, set(&[4]));
    rig.talk();
    let discard = leecher::Event::Discard { stale: set(&[4]) };
    assert_eq!(rig.leecher_events(), [], "no Load yet");
    rig.leecher.handle_installed(0, &chunks, &parts);
    let load = leecher::Event::Load { len: 0, digest: 0 };
    assert_eq!(rig.leecher_events(), [discard, load]);
    assert!(!rig.leecher.is_resident(4));
    assert_eq!(rig.ask(), [one(4)], "whoever waits is served in the end");
}

#[test]
fn an_acknowledged_answer_from_before_the_last_set_does_not_count() {
    let mut rig = Rig::finalized(Verify::Off, &[4]);
    rig.leecher.handle_fault(4);
    rig.ask();
    let (chunks, payload) = frame(&rig.seeder.poll_urgent().unwrap());
    rig.install(0, &chunks, payload);
    rig.seeder.handle_saved(rig.now, 0, 0, set(&[4]));
    rig.talk();
    rig.seeder.abort(AbortCode::Cancelled, "enough".into());
    let [seeder::Event::Aborted { restore, .. }] = &rig.seeder_events()[..] else {
        panic!("aborted");
    };
    assert_eq!(*restore, set(&[4]));
}

/// The leecher dropped an answer that came after a set which did not name its chunk, and acknowledged it: the chunk
/// counted as there and was not restored.
#[test]
fn an_answer_that_is_dropped_for_its_round_does_not_count_even_if_its_chunk_was_not_written() {
    let mut rig = Rig::finalized(Verify::Off, &[4, 5]);
    rig.leecher.handle_fault(5);
    rig.ask();
    let (chunks, payload) = frame(&rig.seeder.poll_urgent().unwrap());
    rig.seeder.handle_saved(rig.now, 0, 0, set(&[4]));
    rig.talk();
    rig.leecher_events();
    assert_eq!(rig.install(0, &chunks, payload), [0; 0]);
    rig.talk();
    rig.seeder.abort(AbortCode::Cancelled, "enough".into());
    let [seeder::Event::Aborted { restore, .. }] = &rig.seeder_events()[..] else {
        panic!("aborted");
    };
    assert_eq!(*restore, set(&[4, 5]));
}

#[test]
fn a_fetch_overtakes_everything() {
    let mut rig = Rig::loaded(&[0, 1, 2, 3, 4, 5, 6]);
    rig.talk();
    rig.leecher.handle_running();
    rig.talk();
    assert_eq!(rig.leecher.handle_fault(5), Fault::Requested);
    assert_eq!(rig.leecher.handle_fault(5), Fault::Awaited);
    assert_eq!(rig.ask(), [one(5)]);
    assert_eq!(rig.seeder.poll_urgent().unwrap().runs, [one(5)]);
    let bulk = rig.seeder.poll_batch(rig.now, 1).unwrap().unwrap();
    let after = [ChunkRun::new(6, 1), ChunkRun::new(0, 5)];
    assert_eq!(bulk.runs, after, "its neighbours next, itself not again");
}

#[test]
fn a_fault_before_finalize_is_asked_for_when_it_may_be() {
    let mut rig = Rig::prefetched(Options::default());
    rig.seeder.handle_dirty(rig.now, set(&[1]));
    rig.talk();
    rig.seeder_events();
    rig.seeder.handle_suspended(rig.now, &set(&[]));
    rig.talk();
    rig.leecher.handle_fault(1);
    assert_eq!(rig.ask(), [], "the seeder would refuse it");
}

#[test]
fn release_is_sent_once_and_only_after_ready() {
    let mut rig = Rig::loaded(&[]);
    assert_eq!(rig.seeder.poll_message(), None);
    assert_eq!(rig.seeder.ownership(), Ownership::Here);
    let ready = rig.leecher.poll_message().unwrap();
    assert_eq!(ready, Message::Ready);
    rig.seeder.handle_message(rig.now, ready).unwrap();
    let release = rig.seeder.poll_message().unwrap();
    assert!(matches!(release, Message::Release { .. }));
    assert_eq!(rig.seeder.ownership(), Ownership::There);
    assert_eq!(rig.seeder_events(), [seeder::Event::Released]);
    assert!(rig.seeder.handle_message(rig.now, Message::Ready).is_err());
    let after: Vec<_> = core::iter::from_fn(|| rig.seeder.poll_message()).collect();
    assert!(matches!(after[..], [Message::Abort { .. }]), "{after:?}");
}

#[test]
fn an_abort_before_release_restores_what_was_taken() {
    let mut rig = Rig::prefetched(Options {
        post_copy: PostCopy::Always,
        ..Options::default()
    });
    rig.seeder.handle_dirty(rig.now, set(&[2]));
    rig.seeder_events();
    rig.seeder.handle_suspended(rig.now, &set(&[3]));
    rig.seeder.handle_saved(rig.now, 0, 0, set(&[4]));
    rig.seeder
        .abort(AbortCode::Failed, "the disk is full".into());
    let [seeder::Event::Aborted { restore, .. }] = &rig.seeder_events()[..] else {
        panic!("aborted");
    };
    assert_eq!(*restore, set(&[2, 3, 4]));
    assert_eq!(rig.seeder.ownership(), Ownership::Here);
}

#[test]
fn a_set_that_is_taken_after_the_session_failed_is_restored_too() {
    let mut rig = Rig::prefetched(Options::default());
    rig.seeder.abort(AbortCode::Cancelled, "enough".into());
    rig.seeder_events();
    rig.seeder.handle_dirty(rig.now, set(&[7]));
    let [seeder::Event::Aborted { restore, .. }] = &rig.seeder_events()[..] else {
        panic!("aborted again");
    };
    assert_eq!(*restore, set(&[7]));
}

#[test]
fn a_set_to_restore_fits_the_memory_even_if_nobody_answered() {
    let mut rig = Rig::new(Options::default());
    rig.seeder.abort(AbortCode::Cancelled, "enough".into());
    let [seeder::Event::Aborted { restore, .. }] = &rig.seeder_events()[..] else {
        panic!("aborted");
    };
    assert_eq!(*restore, ChunkBitmap::empty(CHUNKS));
}

#[test]
fn a_lost_release_leaves_both_sides_suspended() {
    let mut rig = Rig::loaded(&[1]);
    let ready = rig.leecher.poll_message().unwrap();
    rig.seeder.handle_message(rig.now, ready).unwrap();
    rig.seeder.poll_message().unwrap();
    rig.seeder.abort(AbortCode::Failed, "a lane broke".into());
    rig.leecher.abort(AbortCode::Failed, "a lane broke".into());
    let seeder = &rig.seeder_events()[1];
    let lost = matches!(
        seeder,
        seeder::Event::Lost {
            missing: 1,
            running: false,
            ..
        }
    );
    assert!(lost, "{seeder:?}");
    let leecher = rig.leecher_events();
    let undecided = matches!(leecher[..], [leecher::Event::Undecided { .. }]);
    assert!(undecided, "{leecher:?}");
    assert_eq!(rig.seeder.ownership(), Ownership::There);
    assert_eq!(rig.leecher.ownership(), Ownership::There);
}

#[test]
fn a_release_that_was_not_given_away_is_taken_back() {
    let mut rig = Rig::loaded(&[]);
    let ready = rig.leecher.poll_message().unwrap();
    rig.seeder.handle_message(rig.now, ready).unwrap();
    rig.seeder.abort(AbortCode::Cancelled, "enough".into());
    let events = rig.seeder_events();
    let aborted = matches!(events[..], [seeder::Event::Aborted { .. }]);
    assert!(aborted, "{events:?}");
    assert_eq!(rig.seeder.ownership(), Ownership::Here);
    let abort = rig.seeder.poll_message().unwrap();
    assert_eq!(rig.seeder.poll_message(), None);
    rig.leecher.handle_message(rig.now, abort).unwrap_err();
    let events = rig.leecher_events();
    let aborted = matches!(events[..], [leecher::Event::Aborted { .. }]);
    assert!(aborted, "the seeder said that it kept it: {events:?}");
}

#[test]
fn a_ready_that_was_not_given_away_is_never_sent() {
    let mut rig = Rig::loaded(&[]);
    rig.leecher.abort(AbortCode::Cancelled, "enough".into());
    let events = rig.leecher_events();
    let aborted = matches!(events[..], [leecher::Event::Aborted { .. }]);
    assert!(aborted, "nobody can have released: {events:?}");
    let said: Vec<_> = core::iter::from_fn(|| rig.leecher.poll_message()).collect();
    assert!(matches!(said[..], [Message::Abort { .. }]), "{said:?}");
}

#[test]
fn an_abort_that_crosses_release_runs_the_guest_nowhere() {
    let mut rig = Rig::loaded(&[]);
    let ready = rig.leecher.poll_message().unwrap();
    rig.leecher.abort(AbortCode::Cancelled, "enough".into());
    let abort = rig.leecher.poll_message().unwrap();
    rig.seeder.handle_message(rig.now, ready).unwrap();
    let release = rig.seeder.poll_message().unwrap();
    rig.seeder.handle_message(rig.now, abort).unwrap_err();
    rig.leecher.handle_message(rig.now, release).unwrap();
    let seeder = rig.seeder_events();
    let lost = matches!(seeder[1..], [seeder::Event::Lost { .. }]);
    assert!(lost, "{seeder:?}");
    let leecher = rig.leecher_events();
    let undecided = matches!(leecher[..], [leecher::Event::Undecided { .. }]);
    assert!(undecided, "{leecher:?}");
}

#[test]
fn a_dry_run_changes_nothing() {
    let options = Options {
        dry_run: true,
        ..Options::default()
    };
    let refused = |message: Message| {
        let mut rig = Rig::greeted(options);
        rig.leecher.handle_message(rig.now, message).unwrap_err();
        let events = rig.leecher_events();
        assert!(matches!(events[..], [leecher::Event::Aborted { .. }]));
    };
    refused(Message::Finalize);
    refused(Message::Round {
        round: 1,
        chunks: 0,
    });
    let mut rig = Rig::greeted(options);
    assert!(rig.leecher.handle_state(rig.now, 0, 1).is_err());
    let mut rig = Rig::greeted(options);
    assert!(
        rig.leecher
            .admit(rig.now, 1, &one_chunk(1, 0, 0), 4096)
            .is_err()
    );

    let mut rig = Rig::greeted(options);
    rig.seeder
        .handle_started(rig.now, &ChunkBitmap::full(CHUNKS));
    assert_eq!(rig.seeder.poll_batch(rig.now, 1), Ok(None));
    rig.leecher.handle_message(rig.now, Message::Probe).unwrap();
    rig.seeder.handle_measured();
    rig.talk();
    assert_eq!(rig.seeder_events(), [seeder::Event::Done]);
    assert_eq!(rig.leecher_events(), [leecher::Event::Done]);
    assert_eq!(rig.seeder.ownership(), Ownership::Here);
}

#[test]
fn holes_cost_no_payload() {
    let mut rig = Rig::greeted(Options::default());
    rig.seeder.handle_started(rig.now, &set(&[3]));
    let batch = rig.seeder.poll_batch(rig.now, 1).unwrap().unwrap();
    assert!(batch.hole);
    assert_eq!(batch.runs, [ChunkRun::new(0, 3), ChunkRun::new(4, 6)]);
    let batch = rig.seeder.poll_batch(rig.now, 1).unwrap().unwrap();
    assert!(!batch.hole);
    assert_eq!(batch.runs, [one(3)]);
    assert_eq!(rig.seeder.poll_batch(rig.now, 1), Ok(None));
}

#[test]
fn a_silent_peer_is_given_up_in_time() {
    let mut rig = Rig::loaded(&[]);
    rig.talk();
    let mut pings = 0;
    let closed = loop {
        let due = rig.leecher.poll_timeout().unwrap();
        rig.leecher.handle_timeout(due);
        if let Some(message) = rig.leecher.poll_message() {
            if message != Message::Ping {
                break due;
            }
            pings += 1;
        }
    };
    assert_eq!(closed, SILENCE);
    assert_eq!(pings, 3);
    assert_eq!(rig.leecher.poll_timeout(), None);
    let seconds = 1;
    let error = ProtocolError::Silent { seconds };
    assert!(
        rig.leecher_events()
            .contains(&leecher::Event::Lost { error, missing: 0 })
    );
}

#[test]
fn asking_again_about_a_frame_that_waits_is_no_sign_of_life() {
    let mut rig = Rig::prefetched(Options::default());
    let frame = one_chunk(2, 1, 0);
    let step = Micros(SILENCE.0 / 10);
    for _ in 0..10 {
        rig.now = rig.now.plus(step);
        assert_eq!(rig.admit(1, &frame, 4096), Admission::Wait);
        rig.leecher.handle_timeout(rig.now);
    }
    assert_eq!(rig.leecher.phase(), "closed");
    assert_eq!(rig.admit(1, &frame, 4096), Admission::Ignore);
}

#[test]
fn a_ping_is_answered_once_however_often_it_comes() {
    let mut rig = Rig::greeted(Options::default());
    for _ in 0..1000 {
        rig.leecher.handle_message(rig.now, Message::Ping).unwrap();
        rig.seeder.handle_message(rig.now, Message::Ping).unwrap();
    }
    assert_eq!(rig.leecher.poll_message(), Some(Message::Pong));
    assert_eq!(rig.leecher.poll_message(), None);
    assert_eq!(rig.seeder.poll_message(), Some(Message::Pong));
    assert_eq!(rig.seeder.poll_message(), None);
}

#[test]
fn an_unknown_capability_is_refused() {
    let options = Options::default();
    let asks = |required, optional| {
        let theirs = Hello {
            required,
            optional,
            ..hello(Role::Leecher, options)
        };
        hello(Role::Seeder, options).agree(&theirs)
    };
    let refused = asks(1 << 63, 0).unwrap_err();
    assert_eq!(refused.code(), AbortCode::Incompatible);
    assert!(asks(0, u64::MAX).is_ok(), "an optional one is ignored");
}

#[test]
fn versions_that_do_not_meet_are_refused_and_those_that_meet_speak_the_newest_common_one() {
    let options = Options::default();
    let speaks = |oldest, newest| {
        let theirs = Hello {
            oldest,
            newest,
            ..hello(Role::Leecher, options)
        };
        hello(Role::Seeder, options).agree(&theirs)
    };
    assert!(speaks(2, 9).is_err());
    assert!(speaks(9, 1).is_err(), "a range from 9 to 1 is no range");
    assert_eq!(speaks(0, 9).unwrap().version, 1);
}

#[test]
fn a_hello_beyond_the_limits_ends_the_session_before_it_begins() {
    let options = Options::default();
    let long = Hello {
        kind: "k".repeat(MAX_NAME + 1),
        ..hello(Role::Seeder, options)
    };
    let mut crowded = hello(Role::Seeder, options);
    let text = "t".repeat(MAX_NAME);
    crowded.attributes = vec![(text.clone(), text); 128];
    for hello in [long, crowded] {
        let mut seeder = seeder_with(hello, PostCopy::Auto);
        assert!(matches!(
            seeder.poll_event(),
            Some(seeder::Event::Aborted { .. })
        ));
        let said = seeder.poll_message();
        assert!(matches!(said, Some(Message::Abort { .. })), "{said:?}");
    }
}

#[test]
fn a_window_of_nothing_is_refused() {
    let mut rig = Rig::new(Options::default());
    rig.talk();
    let nothing = Message::Accept { window: 0 };
    assert!(rig.seeder.handle_message(rig.now, nothing).is_err());
}

#[test]
fn ready_does_not_come_before_the_comparison_that_was_asked_for() {
    let mut rig = Rig::finalized(Verify::Before, &[]);
    rig.seeder.handle_saved(rig.now, 0, 0, set(&[]));
    rig.talk();
    assert_eq!(rig.leecher_events(), [leecher::Event::Digests]);
    assert!(rig.seeder.handle_message(rig.now, Message::Ready).is_err());
    assert_eq!(rig.seeder.ownership(), Ownership::Here);
}

#[test]
fn a_difference_before_hand_over_rolls_back() {
    let mut rig = Rig::finalized(Verify::Before, &[]);
    rig.seeder.handle_saved(rig.now, 0, 0, set(&[]));
    rig.talk();
    assert_eq!(rig.leecher_events(), [leecher::Event::Digests]);
    rig.leecher.handle_digests_sent();
    rig.talk();
    assert_eq!(rig.seeder_events(), [seeder::Event::Compare]);
    rig.seeder.handle_compared(10, 1);
    let events = rig.seeder_events();
    let different = matches!(
        events[..],
        [seeder::Event::Aborted {
            error: ProtocolError::Different { different: 1 },
            ..
        }]
    );
    assert!(different, "{events:?}");
    let verdict = rig.seeder.poll_message().unwrap();
    rig.leecher.handle_message(rig.now, verdict).unwrap();
    let abort = rig.seeder.poll_message().unwrap();
    rig.leecher.handle_message(rig.now, abort).unwrap_err();
    let events = rig.leecher_events();
    let aborted = matches!(
        events[..],
        [
            leecher::Event::Verdict { .. },
            leecher::Event::Aborted { .. }
        ]
    );
    assert!(aborted, "it is never told to load: {events:?}");
}

#[test]
fn complete_is_refused_while_chunks_were_never_sent() {
    let mut rig = Rig::loaded(&[1]);
    rig.talk();
    rig.leecher.handle_running();
    rig.talk();
    assert!(
        rig.seeder
            .handle_message(rig.now, Message::Complete)
            .is_err()
    );
}

#[test]
fn fetches_that_nobody_acknowledges_are_bounded() {
    let mut rig = Rig::loaded(&[1]);
    let fetch = || Message::Fetch { run: one(1) };
    let mut fetches = 0_u64;
    while rig.seeder.handle_message(rig.now, fetch()).is_ok() {
        rig.seeder.poll_urgent();
        fetches += 1;
        assert!(fetches <= 1 << 20);
    }
}

#[test]
fn a_frame_that_names_a_chunk_again_and_again_is_refused() {
    let mut rig = Rig::greeted(Options::default());
    let zeros = Run {
        run: ChunkRun::new(0, CHUNKS),
        content: Content::Zero,
    };
    let frame = Chunks {
        sequence: 1,
        round: 0,
        runs: vec![zeros; 2],
        digests: Vec::new(),
    };
    assert!(rig.leecher.admit(rig.now, 1, &frame, 0).is_err());
}

#[test]
fn an_answer_that_nobody_asked_for_is_refused_while_memory_is_written_directly() {
    let mut rig = Rig::greeted(Options::default());
    let unasked = one_chunk(1, 0, 0);
    assert!(rig.leecher.admit(rig.now, 0, &unasked, 4096).is_err());
}

#[test]
fn a_leecher_that_lost_its_source_still_owns_the_guest() {
    let mut rig = Rig::loaded(&[1]);
    rig.talk();
    rig.leecher.abort(AbortCode::Failed, "a lane broke".into());
    let events = rig.leecher_events();
    let lost = matches!(events[1..], [leecher::Event::Lost { missing: 1, .. }]);
    assert!(lost, "{events:?}");
    assert_eq!(rig.leecher.ownership(), Ownership::Here);
    assert_eq!(rig.leecher.handle_fault(1), Fault::Lost);
    assert_eq!(rig.leecher.handle_fault(2), Fault::Resident);
}

#[test]
fn finalize_is_refused_while_chunks_are_received_straight_into_memory() {
    let mut rig = Rig::greeted(Options::default());
    rig.admit(1, &one_chunk(1, 0, 0), 4096);
    assert!(
        rig.leecher
            .handle_message(rig.now, Message::Finalize)
            .is_err()
    );
}

#[test]
fn a_state_that_is_too_long_is_given_up_where_it_was_saved() {
    let mut rig = Rig::finalized(Verify::Off, &[]);
    rig.seeder
        .handle_saved(rig.now, MAX_STATE + 1, 0, set(&[6]));
    let [seeder::Event::Aborted { restore, .. }] = &rig.seeder_events()[..] else {
        panic!("aborted");
    };
    assert_eq!(*restore, set(&[6]));
}

#[test]
fn a_closed_session_answers_nothing_and_waits_for_nothing() {
    let mut rig = Rig::loaded(&[]);
    rig.talk();
    rig.leecher.handle_running();
    rig.leecher.handle_disarmed();
    rig.talk();
    assert_eq!(rig.seeder_events().last(), Some(&seeder::Event::Done));
    assert_eq!(rig.leecher_events().last(), Some(&leecher::Event::Done));
    for message in [Message::Ping, Message::Farewell, Message::Ready] {
        rig.leecher
            .handle_message(rig.now, message.clone())
            .unwrap();
        rig.seeder.handle_message(rig.now, message).unwrap();
    }
    rig.seeder.handle_timeout(Micros(u64::MAX));
    rig.leecher.handle_timeout(Micros(u64::MAX));
    rig.seeder.abort(AbortCode::Failed, "too late".into());
    rig.leecher.abort(AbortCode::Failed, "too late".into());
    assert_eq!(rig.talk(), [""; 0]);
    assert_eq!(
        (rig.seeder_events(), rig.leecher_events()),
        (vec![], vec![])
    );
    assert_eq!(rig.seeder.poll_timeout(), None);
    assert_eq!(rig.leecher.poll_timeout(), None);
    assert_eq!(rig.leecher.handle_fault(1), Fault::Resident);
}

#[test]
fn a_guest_without_data_still_converges() {
    let mut rig = Rig::greeted(Options {
        post_copy: PostCopy::Never,
        ..Options::default()
    });
    rig.seeder.handle_started(rig.now, &set(&[]));
    rig.push();
    for _ in 0..5 {
        rig.now = rig.now.plus(Micros(1000));
        rig.push();
        for event in rig.seeder_events() {
            match event {
                seeder::Event::Take => rig.seeder.handle_dirty(rig.now, set(&[1])),
                seeder::Event::Suspend { .. } => return,
                event => panic!("{event:?}"),
            }
        }
    }
    panic!("one dirty chunk is never worth so many rounds");
}
