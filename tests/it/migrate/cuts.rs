//! Connections that break, each at many points of its stream: before Release the source runs on, after it both sides say
//! what is where, and never do two run.

use std::time::Duration;

use memferry::migrate::{LeechError, LeechOutcome, PostCopy, SeedError, SeedOutcome, Verify};

use super::destination::Destination;
use super::proxy::{Act, CONTROL, Trap, URGENT, Way};
use super::rig::{Plan, Run, migrate, within};
use super::source::Source;

const LEN: u64 = 600 << 10;

fn plan(post_copy: PostCopy) -> Plan {
    let mut plan = Plan::default().post_copy(post_copy).verify(Verify::After);
    // A subject that waits for memory while it is loaded is given up then.
    plan.leech.subject_deadline = Duration::from_secs(1);
    plan
}

/// What became of a migration whose network broke somewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum End {
    /// Nothing was given away.
    Aborted,
    /// Ownership had passed or may have, and memory is missing.
    Lost,
    /// It was broken too late to matter.
    Moved,
}

/// Checks that both sides tell one story, and that it is true.
#[track_caller]
fn settled(source: &Source, destination: &Destination, run: &Run) -> End {
    source.ownership.assert_never_two();
    assert_eq!(destination.wrong(), 0, "{run:?}");
    match (&run.seed, &run.leech) {
        (
            None | Some(Err(SeedError::Aborted { .. })),
            None | Some(Err(LeechError::Aborted { .. } | LeechError::Undecided { .. })),
        ) => {
            assert!(!source.ownership.runs_at_destination(), "{run:?}");
            source.assert_writer_goes_on();
            let next = Destination::of(source);
            migrate(source, &next, &Plan::default()).moved();
            next.assert_moved();
            source.ownership.assert_never_two();
            End::Aborted
        }
        (Some(Err(SeedError::Lost { .. })), Some(Err(LeechError::Undecided { .. }))) => {
            assert!(!source.ownership.runs_at_destination(), "{run:?}");
            source.assert_writer_stands();
            End::Lost
        }
        (Some(Err(SeedError::Lost { .. })), Some(Err(LeechError::Lost { missing, .. }))) => {
            assert!(*missing > 0);
            source.assert_writer_stands();
            End::Lost
        }
        (
            Some(
                Ok(SeedOutcome::Moved(_))
                | Err(SeedError::Unverified { .. } | SeedError::Lost { .. }),
            ),
            Some(Ok(LeechOutcome::Moved(_))),
        ) => {
            source.assert_writer_stands();
            destination.assert_moved();
            End::Moved
        }
        other => panic!("two stories: {other:?}"),
    }
}

/// Cuts `lane` at the bytes that `points` makes of the length of an unharmed stream.
fn cut_everywhere(lane: u8, way: Way, post_copy: PostCopy, points: fn(u64) -> Vec<u64>) {
    let ends = break_everywhere(lane, way, Act::Cut, &plan(post_copy), points);
    assert!(ends.contains(&End::Aborted), "{ends:?}");
}

fn break_everywhere(
    lane: u8,
    way: Way,
    act: Act,
    plan: &Plan,
    points: fn(u64) -> Vec<u64>,
) -> Vec<End> {
    let plan = plan.clone();
    within(Duration::from_secs(90), move || {
        let source = Source::new(&[LEN]);
        let destination = Destination::of(&source);
        let count = Plan {
            count: true,
            ..plan.clone()
        };
        let run = migrate(&source, &destination, &count);
        run.moved();
        let passed = run.proxy.unwrap().passed(lane, way);
        let mut ends = Vec::new();
        for at in points(passed) {
            let trap = Trap { lane, way, at, act };
            let source = Source::new(&[LEN]);
            let destination = Destination::of(&source);
            let run = migrate(&source, &destination, &plan.clone().trap(trap));
            assert!(run.took < Duration::from_secs(10), "at {at}: {run:?}");
            let end = settled(&source, &destination, &run);
            println!("{lane} {way:?} {at} of {passed}: {end:?} in {:?}", run.took);
            ends.push(end);
        }
        ends
    })
}

/// `count` points from the first byte to the last.
fn evenly(len: u64, count: u64) -> Vec<u64> {
    (0..count).map(|point| len * point / count).collect()
}

/// The beginning and the end closely, the device state in between now and then.
fn ends_closely(len: u64) -> Vec<u64> {
    let begin = (0..700).step_by(45);
    let between = (700..len.saturating_sub(700)).step_by(60_000);
    let end = (len.saturating_sub(700)..len).step_by(25);
    begin.chain(between).chain(end).collect()
}

#[test]
fn a_cut_of_control_to_the_destination_never_makes_two_owners() {
    cut_everywhere(CONTROL, Way::ToDestination, PostCopy::Never, ends_closely);
}

#[test]
fn a_cut_of_control_to_the_destination_never_makes_two_owners_with_post_copy() {
    cut_everywhere(CONTROL, Way::ToDestination, PostCopy::Always, ends_closely);
}

#[test]
fn a_cut_of_control_to_the_source_never_makes_two_owners() {
    cut_everywhere(CONTROL, Way::ToSource, PostCopy::Never, |len| {
        evenly(len, 40)
    });
}

#[test]
fn a_cut_of_control_to_the_source_never_makes_two_owners_with_post_copy() {
    cut_everywhere(CONTROL, Way::ToSource, PostCopy::Always, |len| {
        evenly(len, 40)
    });
}

#[test]
fn a_cut_of_a_bulk_lane_never_makes_two_owners() {
    cut_everywhere(1, Way::ToDestination, PostCopy::Never, |len| {
        evenly(len, 30)
    });
}

#[test]
fn a_cut_of_a_bulk_lane_never_makes_two_owners_with_post_copy() {
    cut_everywhere(1, Way::ToDestination, PostCopy::Always, |len| {
        evenly(len, 30)
    });
}

#[test]
fn a_cut_of_the_urgent_lane_never_makes_two_owners() {
    for way in [Way::ToDestination, Way::ToSource] {
        cut_everywhere(URGENT, way, PostCopy::Always, |len| evenly(len, 20));
    }
}

#[test]
fn a_cut_in_the_handshake_of_any_lane_leaves_the_source_running() {
    for lane in [CONTROL, URGENT, 1] {
        for way in [Way::ToDestination, Way::ToSource] {
            cut_everywhere(lane, way, PostCopy::Auto, |_| vec![0, 3, 25, 53]);
        }
    }
}

#[test]
fn garbage_on_any_lane_never_makes_two_owners() {
    // Zeros may be an endless frame that is never whole.
    let plan = &plan(PostCopy::Always).silence(Duration::from_secs(2));
    std::thread::scope(|scope| {
        for lane in [CONTROL, URGENT, 1] {
            for way in [Way::ToDestination, Way::ToSource] {
                for byte in [0, 0xff] {
                    scope.spawn(move || {
                        break_everywhere(lane, way, Act::Garble(byte), plan, |len| evenly(len, 6));
                    });
                }
            }
        }
    });
}

#[test]
fn silence_at_any_point_ends_in_time_and_never_makes_two_owners() {
    let plan = &plan(PostCopy::Always).silence(Duration::from_millis(600));
    std::thread::scope(|scope| {
        for lane in [CONTROL, URGENT, 1] {
            for way in [Way::ToDestination, Way::ToSource] {
                scope.spawn(move || {
                    // In the handshake the source waits for as long as it has to connect.
                    break_everywhere(lane, way, Act::Stall, plan, |len| match len {
                        ..100 => vec![9],
                        len => (1..6).map(|point| len * point / 6).collect(),
                    });
                });
            }
        }
    });
}
