//! Regions that programs use, and that move from one host to the next and back under them.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use memferry::chunk::{Caches, ChunkBitmap, ChunkSize, Storage};
use memferry::dirty::DirtyTracker;
use memferry::migrate::{
    Budget, LeechOptions, Leecher, LeecherHooks, Phase, PostCopy, Progress, Region, SeedOptions,
    SeedReport, Seeder, SeederHooks, Standing, Verify,
};

use super::application::Application;
use super::hop::{MIB, bytes, empty, fill, hop, memory, owner, plan, sessions};
use super::rig::within;
use super::source::LONG;

fn under_writers(post_copy: PostCopy) {
    within(Duration::from_secs(120), move || {
        let len = 6 * MIB + 1234;
        let a = owner(len);
        fill(&a, 1);
        let (b, c) = (empty(len), empty(len));
        let application = Application::start(&a, 2);
        for round in 0..2 {
            let mut place = a.clone();
            for next in [&b, &c, &a] {
                let (here, there, _) = sessions(None);
                let seeding = Seeder::new([("ram", place.clone())])
                    .options(plan(post_copy))
                    .open(here)
                    .unwrap();
                let leeching = Leecher::new([("ram", next.clone())]).open(there).unwrap();
                application.assert_goes_on();
                let finalized = leeching.finalize().unwrap();
                application.moves_to(next);
                application.assert_goes_on();
                application.assert_is(next);
                finalized.release().unwrap();
                let report = seeding.released().unwrap().close().unwrap();
                // A thread of its own writes while the copies are compared, but at the destination.
                assert_eq!(report.verified.unwrap().different, 0);
                application.assert_is(next);
                let first = round == 0 && !Arc::ptr_eq(next, &a);
                assert!(!first || report.traffic.kept_bytes == 0, "{report:?}");
                place = next.clone();
            }
        }
        application.end(&a);
    });
}

#[test]
fn a_region_moves_from_a_to_b_to_c_and_back_under_writers_that_never_stop() {
    under_writers(PostCopy::Auto);
}

#[test]
fn a_region_moves_from_a_to_b_to_c_and_back_with_post_copy_under_writers_that_never_stop() {
    under_writers(PostCopy::Always);
}

#[test]
fn a_region_that_comes_back_unchanged_costs_little_more_than_its_digests() {
    within(Duration::from_secs(60), || {
        let len = 32 * MIB;
        let (a, b) = (owner(len), empty(len));
        fill(&a, 2);
        let (there, _) = hop(
            &a,
            &b,
            SeedOptions {
                verify: Verify::Off,
                ..plan(PostCopy::Never)
            },
        );
        assert!(there.traffic.wire_bytes > len);
        let (back, _) = hop(
            &b,
            &a,
            SeedOptions {
                verify: Verify::Off,
                ..plan(PostCopy::Never)
            },
        );
        assert_eq!(back.traffic.kept_bytes, len);
        assert_eq!(back.traffic.memory_bytes, 0);
        let per_mille = back.traffic.wire_bytes * 1000 / len;
        assert!(per_mille < 5, "{} of {len} bytes", back.traffic.wire_bytes);
        let expected = owner(len);
        fill(&expected, 2);
        assert!(bytes(&a) == bytes(&expected));
    });
}

#[test]
fn what_was_zeroed_elsewhere_is_zero_when_it_comes_back() {
    within(Duration::from_secs(60), || {
        let len = MIB + 100;
        let (a, b) = (owner(len), empty(len));
        fill(&a, 3);
        hop(&a, &b, plan(PostCopy::Never));
        b.zero(5000..700_000).unwrap();
        b.write_all_at(&[1; 100], MIB).unwrap();
        let expected = bytes(&b);
        hop(&b, &a, plan(PostCopy::Never));
        assert!(bytes(&a) == expected);
    });
}

#[test]
fn what_is_in_the_storage_before_is_kept_only_if_it_was_said_to_be_a_copy() {
    within(Duration::from_secs(60), || {
        let len = MIB;
        for copy in [false, true] {
            let a = owner(len);
            fill(&a, 4);
            let local = memory(len);
            local.write_all_at(&bytes(&a)[..600_000], 0).unwrap();
            let make = if copy {
                Region::outdated
            } else {
                Region::empty
            };
            let b = Arc::new(make(local, ChunkSize::PAGE).unwrap());
            let expected = bytes(&a);
            let (report, _) = hop(&a, &b, plan(PostCopy::Never));
            assert_eq!(report.traffic.kept_bytes > 0, copy);
            assert!(bytes(&b) == expected);
        }
    });
}

#[test]
fn regions_of_any_size_move_as_one() {
    within(Duration::from_secs(60), || {
        for size in [4096, 65_536] {
            let size = ChunkSize::new(size).unwrap();
            let lens = [10, 4096, 4097, 300_001];
            let here: Vec<_> = (0..)
                .zip(lens)
                .map(|(seed, len)| {
                    let region = Arc::new(Region::new(memory(len), size).unwrap());
                    fill(&region, seed);
                    (format!("r{seed}"), region)
                })
                .collect();
            let there: Vec<_> = (0..)
                .zip(lens)
                .map(|(seed, len): (u64, u64)| (format!("r{seed}"), empty(len)))
                .collect();
            let expected: Vec<_> = here.iter().map(|(_, region)| bytes(region)).collect();
            let (one, other, _) = sessions(None);
            let seeding = Seeder::new(here)
                .options(plan(PostCopy::Always))
                .open(one)
                .unwrap();
            let leeching = Leecher::new(there.clone()).open(other).unwrap();
            let finalized = leeching.finalize().unwrap();
            for ((_, region), expected) in there.iter().zip(&expected) {
                assert!(bytes(region) == *expected);
            }
            finalized.release().unwrap();
            seeding.released().unwrap().close().unwrap();
        }
    });
}

#[test]
fn the_destination_decides_when_to_cut_over_if_it_wants() {
    within(Duration::from_secs(60), || {
        let len = MIB;
        let (a, b) = (owner(len), empty(len));
        fill(&a, 5);
        let application = Application::start(&a, 1);
        let (here, there, _) = sessions(None);
        let rounds = Arc::new(AtomicU64::new(0));
        let counted = rounds.clone();
        let seeding = Seeder::new([("ram", a.clone())])
            .options(plan(PostCopy::Never))
            .on_progress(move |progress| {
                if let Progress::Round { round, .. } = progress {
                    counted.store(u64::from(*round), Ordering::Relaxed);
                }
            })
            .open(here)
            .unwrap();
        let leeching = Leecher::new([("ram", b.clone())])
            .options(LeechOptions {
                hold: true,
                ..LeechOptions::default()
            })
            .open(there)
            .unwrap();
        let deadline = Instant::now() + LONG;
        while rounds.load(Ordering::Relaxed) < 4 {
            assert!(Instant::now() < deadline, "rounds do not go on");
            application.assert_goes_on();
        }
        assert_eq!(
            (a.standing(), b.standing()),
            (Standing::Owner, Standing::Receiving)
        );
        let finalized = leeching.finalize().unwrap();
        application.moves_to(&b);
        application.assert_goes_on();
        finalized.release().unwrap();
        seeding.released().unwrap().close().unwrap();
        application.end(&b);
    });
}

#[test]
fn the_source_decides_when_to_cut_over_if_it_wants() {
    within(Duration::from_secs(60), || {
        let (a, b) = (owner(MIB), empty(MIB));
        let (here, there, _) = sessions(None);
        let options = SeedOptions {
            hold: true,
            ..plan(PostCopy::Never)
        };
        let seeding = Seeder::new([("ram", a.clone())])
            .options(options)
            .open(here)
            .unwrap();
        let leeching = Leecher::new([("ram", b)]).open(there).unwrap();
        let deadline = Instant::now() + LONG;
        let round = |progress: Option<Progress>| match progress {
            Some(Progress::Update { round, .. } | Progress::Round { round, .. }) => round,
            _ => 0,
        };
        while round(seeding.progress()) < 3 {
            assert!(Instant::now() < deadline, "rounds do not go on");
            std::thread::yield_now();
        }
        assert_eq!(a.standing(), Standing::Owner);
        seeding.cut_over();
        let finalized = leeching.finalized().unwrap();
        finalized.release().unwrap();
        seeding.released().unwrap().close().unwrap();
    });
}

/// What the caches of a front end are told, in order, and the application's hooks among it.
#[derive(Debug, Default)]
struct Calls(Mutex<Vec<&'static str>>);

impl Caches for Calls {
    fn write_back(&self) -> io::Result<()> {
        self.0.lock().unwrap().push("write back");
        Ok(())
    }

    fn forget(&self) -> io::Result<()> {
        self.0.lock().unwrap().push("forget");
        Ok(())
    }
}

#[test]
fn caches_are_written_back_before_the_last_take_and_forgotten_when_the_region_has_left() {
    within(Duration::from_secs(60), || {
        let (a, b) = (owner(MIB), empty(MIB));
        let calls = Arc::new(Calls::default());
        a.attach(calls.clone());
        let note = |what| {
            let calls = calls.clone();
            Box::new(move || {
                calls.0.lock().unwrap().push(what);
                Ok(())
            }) as _
        };
        let hooks = SeederHooks {
            suspend: Some(note("suspend")),
            resume: Some(note("resume")),
            released: Some(note("released")),
        };
        let (here, there, _) = sessions(None);
        let seeding = Seeder::new([("ram", a)]).subject(hooks).open(here).unwrap();
        let run = note("run");
        let leeching = Leecher::new([("ram", b)])
            .subject(LeecherHooks { run: Some(run) })
            .open(there)
            .unwrap();
        leeching.finalize().unwrap().release().unwrap();
        seeding.released().unwrap().close().unwrap();
        let calls = calls.0.lock().unwrap();
        let place = |what| calls.iter().position(|call| *call == what).unwrap();
        let suspended = place("suspend");
        assert_eq!(
            calls[suspended - 1..=suspended + 1],
            ["write back", "suspend", "write back"]
        );
        assert!(
            suspended >= 2,
            "each round looks into the caches: {calls:?}"
        );
        assert!(!calls.contains(&"resume"));
        assert!(place("run") < place("released"), "{calls:?}");
        assert!(place("forget") < place("released"), "{calls:?}");
    });
}

/// Writes that go around the region, and a tracker that sees them.
#[derive(Debug)]
struct Around(Mutex<ChunkBitmap>);

impl DirtyTracker for Around {
    fn start(&self) -> io::Result<()> {
        Ok(())
    }

    fn take(&self) -> io::Result<ChunkBitmap> {
        let mut dirty = self.0.lock().unwrap();
        let taken = dirty.clone();
        dirty.clear();
        Ok(taken)
    }

    fn restore(&self, chunks: &ChunkBitmap) -> io::Result<()> {
        self.0.lock().unwrap().union_with(chunks);
        Ok(())
    }

    fn stop(&self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn writes_that_go_around_the_region_are_found_by_a_tracker_of_the_callers() {
    within(Duration::from_secs(60), || {
        let local = memory(MIB);
        let a = Arc::new(Region::new(local.clone(), ChunkSize::PAGE).unwrap());
        let around = Arc::new(Around(Mutex::new(ChunkBitmap::empty(MIB / 4096))));
        a.track_also(around.clone());
        fill(&a, 6);
        let b = empty(MIB);
        let (here, there, _) = sessions(None);
        let seeding = Seeder::new([("ram", a.clone())])
            .options(SeedOptions {
                hold: true,
                ..plan(PostCopy::Never)
            })
            .open(here)
            .unwrap();
        let leeching = Leecher::new([("ram", b.clone())]).open(there).unwrap();
        for page in [3, 17, 255] {
            local.write_all_at(&[9; 100], page * 4096).unwrap();
            around.0.lock().unwrap().insert(page);
        }
        a.write_all_at(&[8; 100], 4 * 4096).unwrap();
        leeching.finalize().unwrap().release().unwrap();
        seeding.released().unwrap().close().unwrap();
        let mut expected = vec![0; 1 << 20];
        local.read_exact_at(&mut expected, 0).unwrap();
        assert!(bytes(&b) == expected);
    });
}

#[test]
fn every_chunk_that_comes_is_told_once_for_each_time_it_comes() {
    within(Duration::from_secs(60), || {
        let (a, b) = (owner(MIB), empty(MIB));
        fill(&a, 11);
        let told = Arc::new(AtomicU64::new(0));
        let phases = Arc::new(Mutex::new(Vec::new()));
        let (here, there, _) = sessions(None);
        let seeding = Seeder::new([("ram", a)])
            .options(plan(PostCopy::Never))
            .open(here)
            .unwrap();
        let counted = told.clone();
        let listened = phases.clone();
        let leeching = Leecher::new([("ram", b)])
            .on_chunk(move |region, range| {
                assert_eq!(region, 0);
                counted.fetch_add(range.end - range.start, Ordering::Relaxed);
            })
            .on_progress(move |progress| {
                if let Progress::Phase { phase, .. } = progress {
                    listened.lock().unwrap().push(*phase);
                }
            })
            .open(there)
            .unwrap();
        let finalized = leeching.finalize().unwrap();
        assert_eq!(finalized.missing(), 0);
        finalized.release().unwrap();
        seeding.released().unwrap().close().unwrap();
        assert_eq!(told.load(Ordering::Relaxed), MIB);
        let phases = phases.lock().unwrap();
        assert!(
            phases.ends_with(&[Phase::PostCopy, Phase::Verifying, Phase::Done]),
            "{phases:?}"
        );
    });
}

#[test]
fn a_session_with_a_region_that_cannot_move_is_refused_before_anything_happens() {
    let (here, _there, _) = sessions(None);
    let (a, b) = (owner(MIB), empty(MIB));
    let two = [("a", a.clone()), ("b", b.clone())];
    let error = Seeder::new(two).open(here).unwrap_err();
    assert!(error.to_string().contains("region b"), "{error}");
    // The other one is free again.
    hop(&a, &b, plan(PostCopy::Auto));
    let (here, there, _) = sessions(None);
    assert!(Seeder::new([("b", a)]).open(here).is_err());
    assert!(Leecher::new([("b", b)]).open(there).is_err());
}

/// What a region costs that comes back unchanged, and how long it stands still when it moves under writes.
#[test]
#[ignore = "measurement"]
fn what_a_move_costs() {
    let len = 256 * MIB;
    let (a, b) = (owner(len), empty(len));
    fill(&a, 12);
    let off = SeedOptions {
        verify: Verify::Off,
        ..plan(PostCopy::Auto)
    };
    let told = |what: &str, report: &SeedReport| {
        println!(
            "{what}: {} bytes on the wire, {:.4} of the region, {:.2} s, blackout {:.2} ms, {} rounds, {} faults",
            report.traffic.wire_bytes,
            report.traffic.wire_bytes as f64 / len as f64,
            report.total,
            report.blackout * 1000.0,
            report.rounds,
            report.faults
        );
    };
    told("a to b", &hop(&a, &b, off.clone()).0);
    told("unchanged, back", &hop(&b, &a, off.clone()).0);
    let application = Application::start(&a, 2);
    let mut place = a.clone();
    for post_copy in [PostCopy::Auto, PostCopy::Always] {
        let next = if Arc::ptr_eq(&place, &a) { &b } else { &a };
        let (here, there, _) = sessions(None);
        let options = SeedOptions {
            budget: Budget {
                post_copy,
                ..Budget::default()
            },
            ..off.clone()
        };
        let seeding = Seeder::new([("ram", place.clone())])
            .options(options)
            .open(here)
            .unwrap();
        let leeching = Leecher::new([("ram", next.clone())]).open(there).unwrap();
        let finalized = leeching.finalize().unwrap();
        application.moves_to(next);
        finalized.release().unwrap();
        let report = seeding.released().unwrap().close().unwrap();
        told(&format!("under writes, {post_copy:?}"), &report);
        place = next.clone();
    }
    application.end(&place);
}
