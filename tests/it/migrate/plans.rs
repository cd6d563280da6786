//! Migrations that go well, by every plan.

use std::time::Duration;

use memferry::chunk::ChunkSize;
use memferry::migrate::{Phase, PostCopy, Progress, SeedOutcome, Verify};

use super::destination::Destination;
use super::rig::{Plan, migrate, within};
use super::source::{Fill, LONG, PAGE, Source};

const MIB: u64 = 1 << 20;

/// Migrates by `plan` and checks all that must be so after any migration.
#[track_caller]
fn moves(lens: &[u64], plan: Plan) {
    let lens = lens.to_vec();
    within(LONG, move || {
        let source = Source::new(&lens);
        let destination = Destination::of(&source);
        let run = migrate(&source, &destination, &plan);
        let (seed, _) = run.moved();
        if plan.seed.verify == Verify::Off {
            assert_eq!(seed.verified, None);
        } else {
            let verdict = seed.verified.unwrap();
            assert_eq!(verdict.different, 0, "{verdict:?}");
            assert!(verdict.compared > 0);
        }
        destination.assert_moved();
        source.assert_writer_stands();
        source.ownership.assert_never_two();
    });
}

#[test]
fn memory_that_is_written_moves_without_post_copy() {
    moves(&[8 * MIB], Plan::default().post_copy(PostCopy::Never));
}

#[test]
fn memory_that_is_written_moves_with_post_copy_where_it_pays() {
    moves(&[8 * MIB], Plan::default().post_copy(PostCopy::Auto));
}

#[test]
fn memory_that_is_written_moves_with_post_copy_always() {
    moves(&[8 * MIB], Plan::default().post_copy(PostCopy::Always));
}

#[test]
fn a_comparison_after_hand_over_finds_both_copies_equal() {
    for post_copy in [PostCopy::Never, PostCopy::Always] {
        let plan = Plan::default().post_copy(post_copy);
        moves(&[4 * MIB], plan.verify(Verify::After));
    }
}

#[test]
fn a_comparison_before_hand_over_finds_both_copies_equal() {
    for post_copy in [PostCopy::Never, PostCopy::Always] {
        let plan = Plan::default().post_copy(post_copy);
        moves(&[4 * MIB], plan.verify(Verify::Before));
    }
}

#[test]
fn four_lanes_move_what_one_does() {
    for post_copy in [PostCopy::Never, PostCopy::Always] {
        let plan = Plan {
            lanes: 4,
            ..Plan::default()
        };
        moves(&[16 * MIB], plan.post_copy(post_copy).verify(Verify::After));
    }
}

#[test]
fn lengths_that_are_no_multiple_of_the_page_move() {
    for post_copy in [PostCopy::Never, PostCopy::Always] {
        let plan = Plan::default().post_copy(post_copy).verify(Verify::After);
        moves(&[MIB + 1234], plan);
    }
}

#[test]
fn several_regions_move_and_one_of_them_is_smaller_than_a_page() {
    for post_copy in [PostCopy::Never, PostCopy::Always] {
        let plan = Plan::default().post_copy(post_copy).verify(Verify::After);
        moves(&[MIB, 100, 3 * PAGE, 2 * MIB + PAGE + 7], plan);
    }
}

#[test]
fn chunks_of_many_pages_move_and_a_region_smaller_than_one() {
    within(LONG, || {
        for post_copy in [PostCopy::Never, PostCopy::Always] {
            let lens = [MIB + 5 * PAGE + 99, 2 * PAGE];
            let source = Source::with(&lens, Fill::Dense, ChunkSize::new(64 << 10).unwrap());
            let destination = Destination::of(&source);
            let plan = Plan::default().post_copy(post_copy).verify(Verify::After);
            let run = migrate(&source, &destination, &plan);
            assert_eq!(run.moved().0.verified.unwrap().different, 0);
            destination.assert_moved();
        }
    });
}

#[test]
fn memory_that_cannot_fault_moves_without_post_copy_even_if_it_was_allowed() {
    within(LONG, || {
        let source = Source::new(&[4 * MIB]);
        let destination = Destination::without_faults(&source);
        let plan = Plan::default().post_copy(PostCopy::Auto);
        let run = migrate(&source, &destination, &plan.verify(Verify::After));
        assert!(!run.moved().0.post_copy);
        destination.assert_moved();
    });
}

#[test]
fn holes_cost_neither_wire_bytes_nor_memory_on_either_side() {
    within(LONG, || {
        for post_copy in [PostCopy::Never, PostCopy::Always] {
            let source = Source::with(&[64 * MIB], Fill::OneIn(64), ChunkSize::PAGE);
            source.set_rate(0);
            let before = source.allocated();
            assert!(before <= 2 * MIB);
            let destination = Destination::of(&source);
            let run = migrate(&source, &destination, &Plan::default().post_copy(post_copy));
            let (seed, leech) = run.moved();
            let besides_state = seed.traffic.wire_bytes - seed.state_bytes;
            assert!(besides_state < before + before / 4, "{seed:?}");
            assert!(leech.traffic.memory_bytes <= before, "{leech:?}");
            assert_eq!(source.allocated(), before);
            // The subject touches every page in the end; the engine itself must not have.
            drop(run);
            destination.assert_moved();
        }
    });
}

#[test]
fn holes_stay_holes_at_a_destination_that_does_not_look_at_them() {
    within(LONG, || {
        let source = Source::with(&[64 * MIB], Fill::OneIn(64), ChunkSize::PAGE);
        source.set_rate(0);
        let mut destination = Destination::of(&source);
        destination.trouble = Some(super::destination::Trouble::Run);
        let plan = Plan::default().verify(Verify::After);
        let run = migrate(&source, &destination, &plan);
        assert!(run.seed.as_ref().unwrap().is_ok(), "{run:?}");
        // Loading has looked at three pages.
        let most = source.allocated() + 3 * PAGE;
        let has = destination.allocated();
        assert!(has <= most, "{has} bytes, {most} expected");
    });
}

#[test]
fn a_bandwidth_limit_is_kept() {
    within(LONG, || {
        let source = Source::new(&[4 * MIB]);
        source.set_rate(0);
        let destination = Destination::of(&source);
        let run = migrate(&source, &destination, &Plan::default().bandwidth(8 * MIB));
        let (seed, _) = run.moved();
        let sent = 4.0;
        assert!(seed.total > sent / 8.0 * 0.9, "{seed:?}");
        assert!(seed.total < sent / 8.0 * 3.0, "{seed:?}");
        destination.assert_moved();
    });
}

#[test]
fn a_dry_run_changes_nothing_and_the_migration_after_it_works() {
    within(LONG, || {
        let source = Source::new(&[4 * MIB]);
        let destination = Destination::of(&source);
        destination.memory[0].write(77, b"as it was").unwrap();
        let mut plan = Plan::default();
        plan.seed.dry_run = true;
        let run = migrate(&source, &destination, &plan);
        let Some(Ok(SeedOutcome::Forecast(forecast))) = &run.seed else {
            panic!("{run:?}");
        };
        assert_eq!(forecast.bytes, 4 * MIB);
        assert!(forecast.dirty_rate > 0 && forecast.bandwidth > 0);
        let mut bytes = [0; 9];
        destination.memory[0].read(77..86, &mut bytes).unwrap();
        assert_eq!(&bytes, b"as it was");
        source.assert_writer_goes_on();
        assert!(!source.ownership.runs_at_destination());
        migrate(&source, &destination, &Plan::default()).moved();
        destination.assert_moved();
    });
}

#[test]
fn what_lay_in_the_destinations_memory_before_does_not_show() {
    within(LONG, || {
        for post_copy in [PostCopy::Never, PostCopy::Always] {
            let source = Source::with(&[4 * MIB], Fill::OneIn(2), ChunkSize::PAGE);
            let destination = Destination::of(&source);
            for page in 0..4 * MIB / PAGE {
                destination.memory[0].write(page * PAGE, b"old").unwrap();
            }
            migrate(&source, &destination, &Plan::default().post_copy(post_copy)).moved();
            destination.assert_moved();
        }
    });
}

#[test]
fn post_copy_ends_what_pre_copy_cannot() {
    within(LONG, || {
        let source = Source::new(&[8 * MIB]);
        source.set_rate(2000);
        let destination = Destination::of(&source);
        let run = migrate(&source, &destination, &Plan::default().bandwidth(16 * MIB));
        assert!(run.moved().0.post_copy);
        destination.assert_moved();
    });
}

/// Where each phase stands among what was told.
fn phases(told: &[Progress]) -> Vec<Phase> {
    told.iter()
        .filter_map(|told| match told {
            Progress::Phase { phase, .. } => Some(*phase),
            _ => None,
        })
        .collect()
}

#[test]
fn progress_is_told_in_the_order_of_things_on_both_sides() {
    use Phase::{CutOver, Done, Greeting, PostCopy as After, PreCopy, Verifying};
    within(LONG, || {
        let source = Source::new(&[4 * MIB]);
        let destination = Destination::of(&source);
        let plan = Plan::default()
            .bandwidth(16 * MIB)
            .verify(Verify::After)
            .post_copy(PostCopy::Always);
        let run = migrate(&source, &destination, &plan);
        let (seed, _) = run.moved();
        let all = [Greeting, PreCopy, CutOver, After, Verifying, Done];
        assert_eq!(phases(&run.told), all);
        assert_eq!(phases(&run.told_there), all);
        for told in [&run.told, &run.told_there] {
            let moments: Vec<f64> = told
                .iter()
                .filter_map(|told| match told {
                    Progress::Phase { at, .. }
                    | Progress::Update { at, .. }
                    | Progress::Round { at, .. }
                    | Progress::HandedOver { at, .. } => Some(*at),
                    _ => None,
                })
                .collect();
            assert!(moments.is_sorted(), "{moments:?}");
            let wire: Vec<u64> = told
                .iter()
                .filter_map(|told| match told {
                    Progress::Update { traffic, .. } => Some(traffic.wire_bytes),
                    _ => None,
                })
                .collect();
            assert!(!wire.is_empty() && wire.is_sorted(), "{wire:?}");
        }
        let parts: f64 = seed.blackout_parts.iter().map(|(_, took)| took).sum();
        assert!((parts - seed.blackout).abs() < 0.01, "{seed:?}");
        assert!(seed.blackout < seed.total);
    });
}

#[test]
fn an_idle_subject_moves_with_a_short_silence_limit() {
    within(LONG, || {
        let source = Source::new(&[2 * MIB]);
        let destination = Destination::of(&source);
        // Slow enough that many limits pass: each side has to be heard by the other.
        let plan = Plan::default().silence(Duration::from_millis(400));
        migrate(&source, &destination, &plan.bandwidth(MIB)).moved();
        destination.assert_moved();
    });
}
