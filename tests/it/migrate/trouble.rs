//! Migrations that go wrong before hand-over: each is found out and told, and the source runs on.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use memferry::chunk::{ChunkBitmap, ChunkRun};
use memferry::dirty::DirtyTracker;
use memferry::migrate::{LeechError, Phase, PostCopy, Progress, SeedError, Verify};

use super::destination::{self, Destination};
use super::proxy::{Act, CONTROL, Trap, Way};
use super::rig::{Plan, Run, migrate, within, words};
use super::source::{How, LONG, PAGE, Source, Trouble};

const MIB: u64 = 1 << 20;

/// The source runs on, the destination never ran, and a new migration to a new destination works.
#[track_caller]
fn assert_unharmed(source: &mut Source, destination: &Destination) {
    source.assert_writer_goes_on();
    assert!(!source.ownership.runs_at_destination());
    source.ownership.assert_never_two();
    assert_eq!(destination.wrong(), 0);
    source.trouble = None;
    let next = Destination::of(source);
    let run = migrate(source, &next, &Plan::default().verify(Verify::After));
    assert_eq!(run.moved().0.verified.unwrap().different, 0);
    next.assert_moved();
    source.ownership.assert_never_two();
}

/// A migration that fails with `expected` in the words of the source.
#[track_caller]
fn fails(plan: Plan, prepare: fn(&mut Source, &mut Destination), expected: &'static str) {
    within(LONG, move || {
        let mut source = Source::new(&[4 * MIB]);
        let mut destination = Destination::of(&source);
        prepare(&mut source, &mut destination);
        let run = migrate(&source, &destination, &plan);
        let said = run.aborted();
        assert!(said.contains(expected), "{said}");
        run.aborted_there();
        assert!(run.took < Duration::from_secs(8), "{:?}", run.took);
        assert_unharmed(&mut source, &destination);
    });
}

/// It answers every ping, so that it is not silent, and gets nowhere.
#[test]
fn a_destination_that_never_gets_ready_does_not_keep_the_guest_suspended() {
    let mut plan = Plan::default();
    plan.seed.cut_over_deadline = Duration::from_millis(500);
    plan.leech.subject_deadline = Duration::from_secs(3);
    fails(
        plan,
        |_, destination| destination.trouble = Some(destination::Trouble::Hang),
        "the cut-over took longer than it may",
    );
}

#[test]
fn a_wish_to_stop_in_pre_copy_is_granted() {
    let plan = Plan {
        cancel_at: Some(|told| matches!(told, Progress::Update { .. })),
        ..Plan::default()
    };
    fails(plan.bandwidth(MIB), |_, _| {}, "cancelled by the user");
}

#[test]
fn a_wish_of_the_destination_to_stop_in_pre_copy_is_granted() {
    let plan = Plan {
        cancel_there_at: Some(|told| matches!(told, Progress::Update { .. })),
        ..Plan::default()
    };
    fails(plan.bandwidth(MIB), |_, _| {}, "cancelled by the user");
}

#[test]
fn a_wish_to_stop_after_hand_over_has_no_effect() {
    within(LONG, || {
        let source = Source::new(&[4 * MIB]);
        let destination = Destination::of(&source);
        let after = |told: &Progress| matches!(told, Progress::HandedOver { .. });
        let plan = Plan {
            cancel_at: Some(after),
            cancel_there_at: Some(after),
            ..Plan::default()
        };
        let plan = plan.post_copy(PostCopy::Always).bandwidth(8 * MIB);
        migrate(&source, &destination, &plan).moved();
        destination.assert_moved();
    });
}

#[test]
fn a_subject_that_writes_faster_than_the_link_is_given_up_without_post_copy() {
    fails(
        Plan::default()
            .post_copy(PostCopy::Never)
            .bandwidth(16 * MIB),
        |source, _| source.set_rate(2000),
        "does not converge",
    );
}

#[test]
fn a_subject_that_is_refused_by_the_other_side_runs_on() {
    fails(
        Plan::default(),
        |_, destination| destination.trouble = Some(destination::Trouble::Accept),
        "a round one does not fit here",
    );
}

#[test]
fn regions_of_another_size_are_refused_by_name_with_both_sizes() {
    within(LONG, || {
        let mut source = Source::new(&[MIB]);
        let other = Source::new(&[2 * MIB]);
        let destination = Destination::of(&other);
        let said = migrate(&source, &destination, &Plan::default()).aborted();
        for part in ["r0", "1048576", "2097152"] {
            assert!(said.contains(part), "{said}");
        }
        assert_unharmed(&mut source, &destination);
    });
}

#[test]
fn a_subject_that_does_not_suspend_runs_on() {
    fails(
        Plan::default(),
        |source, _| source.trouble = Some(Trouble::Suspend(How::AtOnce)),
        "the test wants suspending to fail",
    );
}

#[test]
fn a_subject_that_does_not_suspend_in_time_runs_on() {
    let mut plan = Plan::default();
    plan.seed.subject_deadline = Duration::from_millis(300);
    fails(
        plan,
        |source, _| source.trouble = Some(Trouble::Suspend(How::AtItsDeadline)),
        "the test wants suspending to fail",
    );
}

#[test]
fn a_subject_that_cannot_be_saved_runs_on() {
    for post_copy in [PostCopy::Never, PostCopy::Always] {
        fails(
            Plan::default().post_copy(post_copy),
            |source, _| source.trouble = Some(Trouble::Save(How::AtOnce)),
            "the test wants saving to fail",
        );
    }
}

#[test]
fn a_subject_that_is_not_saved_in_time_runs_on_and_silence_is_not_mistaken_for_death() {
    // It takes longer than the peer may be silent; both sides go on answering each other meanwhile.
    let mut plan = Plan::default().silence(Duration::from_millis(300));
    plan.seed.subject_deadline = Duration::from_millis(1000);
    fails(
        plan,
        |source, _| source.trouble = Some(Trouble::Save(How::AtItsDeadline)),
        "the test wants saving to fail",
    );
}

#[test]
fn a_state_that_the_destination_does_not_load_leaves_the_source_running() {
    for post_copy in [PostCopy::Never, PostCopy::Always] {
        fails(
            Plan::default().post_copy(post_copy),
            |_, destination| destination.trouble = Some(destination::Trouble::Load),
            "the test wants loading to fail",
        );
    }
}

#[test]
fn a_subject_that_does_not_run_at_the_destination_is_told_there_and_stays_there() {
    within(LONG, || {
        let source = Source::new(&[MIB]);
        let mut destination = Destination::of(&source);
        destination.trouble = Some(destination::Trouble::Run);
        let run = migrate(&source, &destination, &Plan::default());
        assert!(run.seed.unwrap().is_ok());
        let Some(Err(error @ LeechError::NotRunning { .. })) = run.leech else {
            panic!("{:?}", run.leech);
        };
        assert!(words(&error).contains("start it by hand"), "{error}");
        source.assert_writer_stands();
    });
}

/// Leaves chunk 5 out of what it names, and does not name it by itself.
#[derive(Debug)]
struct Liar {
    inner: Arc<dyn DirtyTracker>,
    /// Lies only until a rollback.
    lies: AtomicBool,
    memory: Arc<memferry::sys::mapping::Mapping>,
}

const LIE: u64 = 5;

impl DirtyTracker for Liar {
    fn start(&self) -> io::Result<()> {
        self.inner.start()
    }

    fn take(&self) -> io::Result<ChunkBitmap> {
        if !self.lies.load(Ordering::Relaxed) {
            return self.inner.take();
        }
        // What was copied in the first pass is changed now.
        self.memory.write(LIE * PAGE + 100, b"unseen")?;
        let mut taken = self.inner.take()?;
        taken.remove_run(ChunkRun::new(LIE, 1));
        Ok(taken)
    }

    fn restore(&self, chunks: &ChunkBitmap) -> io::Result<()> {
        self.lies.store(false, Ordering::Relaxed);
        self.inner.restore(chunks)
    }

    fn stop(&self) -> io::Result<()> {
        self.inner.stop()
    }
}

fn source_with_a_lying_tracker() -> Source {
    let mut source = Source::new(&[MIB]);
    // A stamp on that page in between would be named.
    source.set_rate(0);
    let memory = source.memory[0].clone();
    source.wrap_tracker(|inner| {
        Arc::new(Liar {
            inner,
            lies: AtomicBool::new(true),
            memory,
        })
    });
    source
}

#[test]
fn a_write_that_the_tracker_missed_is_found_after_hand_over() {
    for post_copy in [PostCopy::Never, PostCopy::Always] {
        within(LONG, move || {
            let source = source_with_a_lying_tracker();
            let destination = Destination::of(&source);
            let plan = Plan::default().verify(Verify::After).post_copy(post_copy);
            let run = migrate(&source, &destination, &plan);
            let (seed, leech) = run.moved();
            assert_eq!(seed.verified.unwrap().different, 1);
            assert_eq!(leech.verified, seed.verified);
        });
    }
}

#[test]
fn a_write_that_the_tracker_missed_rolls_back_if_the_copies_are_compared_before() {
    for post_copy in [PostCopy::Never, PostCopy::Always] {
        within(LONG, move || {
            let mut source = source_with_a_lying_tracker();
            let destination = Destination::of(&source);
            let plan = Plan::default().verify(Verify::Before).post_copy(post_copy);
            let said = migrate(&source, &destination, &plan).aborted();
            assert!(said.contains("differ"), "{said}");
            source.set_rate(3);
            source.assert_writer_goes_on();
            assert_unharmed(&mut source, &destination);
        });
    }
}

#[test]
fn a_tracker_that_fails_leaves_the_source_running() {
    #[derive(Debug)]
    struct Broken(Arc<dyn DirtyTracker>, AtomicBool);
    impl DirtyTracker for Broken {
        fn start(&self) -> io::Result<()> {
            self.0.start()
        }
        fn take(&self) -> io::Result<ChunkBitmap> {
            if self.1.swap(false, Ordering::Relaxed) {
                return Err(io::Error::other("the test wants tracking to fail"));
            }
            self.0.take()
        }
        fn restore(&self, chunks: &ChunkBitmap) -> io::Result<()> {
            self.0.restore(chunks)
        }
        fn stop(&self) -> io::Result<()> {
            self.0.stop()
        }
    }
    fails(
        Plan::default(),
        |source, _| {
            source.wrap_tracker(|inner| Arc::new(Broken(inner, AtomicBool::new(true))));
        },
        "the test wants tracking to fail",
    );
}

/// Damages a byte of the stream; nothing is handed over.
#[track_caller]
fn is_found(lane: u8, way: Way, at: u64) -> Run {
    within(LONG, move || {
        let mut source = Source::new(&[2 * MIB]);
        let destination = Destination::of(&source);
        let trap = Trap {
            lane,
            way,
            at,
            act: Act::Flip,
        };
        let run = migrate(&source, &destination, &Plan::default().trap(trap));
        assert!(run.proxy.as_ref().unwrap().sprung());
        run.aborted();
        assert_unharmed(&mut source, &destination);
        run
    })
}

#[test]
fn a_chunk_that_was_damaged_on_its_way_is_found_and_nothing_is_handed_over() {
    let said = is_found(1, Way::ToDestination, 100_000).aborted_there();
    assert!(said.contains("damaged"), "{said}");
}

#[test]
fn a_device_state_that_was_damaged_on_its_way_is_found_and_nothing_is_handed_over() {
    // The control lane carries little else than the state, whose 320 kB end with the stream.
    let run = is_found(CONTROL, Way::ToDestination, 200_000);
    let said = run.aborted_there();
    assert!(said.contains("damaged"), "{said}");
}

#[test]
fn a_peer_that_stalls_in_pre_copy_is_given_up_within_the_limit() {
    for lane in [1, CONTROL] {
        within(LONG, move || {
            let mut source = Source::new(&[4 * MIB]);
            let destination = Destination::of(&source);
            let trap = Trap {
                lane,
                way: Way::ToDestination,
                at: if lane == 1 { MIB } else { 400 },
                act: Act::Stall,
            };
            let plan = Plan::default()
                .bandwidth(4 * MIB)
                .silence(Duration::from_secs(1))
                .trap(trap);
            let run = migrate(&source, &destination, &plan);
            assert!(run.proxy.as_ref().unwrap().sprung());
            run.aborted();
            run.aborted_there();
            assert!(run.took < Duration::from_secs(6), "{:?}", run.took);
            assert_unharmed(&mut source, &destination);
        });
    }
}

#[test]
fn a_peer_that_stalls_in_cut_over_is_given_up_within_the_limit() {
    within(LONG, || {
        let mut source = Source::new(&[2 * MIB]);
        let destination = Destination::of(&source);
        let trap = Trap {
            lane: CONTROL,
            way: Way::ToDestination,
            at: 200_000,
            act: Act::Stall,
        };
        let plan = Plan::default().silence(Duration::from_secs(1)).trap(trap);
        let run = migrate(&source, &destination, &plan);
        assert!(run.proxy.as_ref().unwrap().sprung());
        let told = |told: &Progress| {
            matches!(
                told,
                Progress::Phase {
                    phase: Phase::CutOver,
                    ..
                }
            )
        };
        assert!(run.told.iter().any(told));
        run.aborted();
        assert!(run.took < Duration::from_secs(6), "{:?}", run.took);
        assert_unharmed(&mut source, &destination);
    });
}

#[test]
fn a_peer_that_stalls_in_post_copy_is_told_as_lost_on_both_sides_and_no_zeros_are_seen() {
    within(LONG, || {
        let source = Source::new(&[8 * MIB]);
        source.set_rate(2000);
        let destination = Destination::of(&source);
        let trap = Trap {
            lane: 0,
            way: Way::ToSource,
            at: 2000,
            act: Act::Stall,
        };
        let plan = Plan::default()
            .post_copy(PostCopy::Always)
            .bandwidth(16 * MIB)
            .silence(Duration::from_secs(1))
            .trap(trap);
        let run = migrate(&source, &destination, &plan);
        let (Some(Err(SeedError::Lost { missing, .. })), Some(Err(there))) =
            (&run.seed, &run.leech)
        else {
            panic!("{run:?}");
        };
        assert!(*missing > 0);
        assert!(matches!(there, LeechError::Lost { missing, .. } if *missing > 0));
        source.assert_writer_stands();
        assert_eq!(destination.wrong(), 0);
        assert!(destination.looked() < 2048, "it waits");
    });
}
