//! Moves of regions that fail: the region is used on where it belongs, nothing is lost, and the next move works.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use memferry::chunk::{Caches, Storage};
use memferry::migrate::{
    FinalizeError, LeechError, LeechOptions, Leecher, LeecherHooks, PostCopy, SeedError,
    SeedOptions, Seeder, SeederHooks, Standing,
};
use memferry::subject::{Description, Incoming, SubjectError};

use super::application::Application;
use super::hop::{MIB, bytes, empty, fill, hop, owner, plan, sessions};
use super::proxy::{Act, CONTROL, Trap, URGENT, Way};
use super::rig::{within, words};

/// Moves between these ends, which does not work; then both sides are as they were, and it works.
fn gives_up(
    seeder: impl FnOnce(Seeder) -> Seeder,
    leecher: impl FnOnce(Leecher) -> Leecher,
    cancel: impl FnOnce(&memferry::migrate::Tracking, &memferry::migrate::Receiving),
) {
    let len = 2 * MIB;
    let (a, b) = (owner(len), empty(len));
    fill(&a, 7);
    let application = Application::start(&a, 1);
    let (here, there, _) = sessions(None);
    let seeding = Seeder::new([("ram", a.clone())]).options(plan(PostCopy::Always));
    let seeding = seeder(seeding).open(here).unwrap();
    let leeching = leecher(Leecher::new([("ram", b.clone())]))
        .open(there)
        .unwrap();
    cancel(&seeding, &leeching);
    let there = leeching.finalized().unwrap_err();
    assert!(
        matches!(&there, FinalizeError::Failed(LeechError::Aborted { .. })),
        "{there:?}"
    );
    let here = seeding.released().unwrap_err();
    assert!(matches!(here, SeedError::Aborted { .. }), "{here:?}");
    assert_eq!(
        (a.standing(), b.standing()),
        (Standing::Owner, Standing::Waiting)
    );
    application.assert_goes_on();
    application.assert_is(&a);
    let (here, there, _) = sessions(None);
    let seeding = Seeder::new([("ram", a)]).options(plan(PostCopy::Auto));
    let seeding = seeding.open(here).unwrap();
    let finalized = Leecher::new([("ram", b.clone())])
        .open(there)
        .unwrap()
        .finalize()
        .unwrap();
    application.moves_to(&b);
    application.assert_goes_on();
    finalized.release().unwrap();
    let report = seeding.released().unwrap().close().unwrap();
    assert_eq!(report.verified.unwrap().different, 0);
    application.end(&b);
}

fn fails(what: &'static str) -> Option<memferry::migrate::Hook> {
    Some(Box::new(move || Err(SubjectError::new(what))))
}

#[test]
fn a_move_that_is_cancelled_at_the_source_leaves_the_region_in_use_there() {
    within(Duration::from_secs(60), || {
        let options = SeedOptions {
            hold: true,
            ..plan(PostCopy::Always)
        };
        gives_up(
            |seeder| seeder.options(options),
            |leecher| leecher,
            |seeding, _| seeding.cancel(),
        );
    });
}

#[test]
fn a_move_that_is_cancelled_at_the_destination_leaves_the_region_in_use_at_the_source() {
    within(Duration::from_secs(60), || {
        let hold = LeechOptions {
            hold: true,
            ..LeechOptions::default()
        };
        gives_up(
            |seeder| seeder,
            |leecher| leecher.options(hold),
            |_, leeching| leeching.cancel(),
        );
    });
}

#[test]
fn an_application_that_does_not_suspend_goes_on_at_the_source() {
    within(Duration::from_secs(60), || {
        let hooks = SeederHooks {
            suspend: fails("the application is busy"),
            ..SeederHooks::default()
        };
        gives_up(|seeder| seeder.subject(hooks), |leecher| leecher, |_, _| {});
    });
}

#[derive(Debug)]
struct Stuck;

impl Caches for Stuck {
    fn write_back(&self) -> io::Result<()> {
        Err(io::Error::other("the device is gone"))
    }

    fn forget(&self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_cache_that_cannot_be_written_back_ends_the_move_and_not_the_data() {
    within(Duration::from_secs(60), || {
        let (a, b) = (owner(MIB), empty(MIB));
        fill(&a, 8);
        let stuck: Arc<dyn Caches> = Arc::new(Stuck);
        a.attach(stuck.clone());
        let (here, there, _) = sessions(None);
        let seeding = Seeder::new([("ram", a.clone())]).open(here).unwrap();
        let leeching = Leecher::new([("ram", b.clone())]).open(there).unwrap();
        let error = words(&seeding.released().unwrap_err());
        assert!(error.contains("the device is gone"), "{error}");
        leeching.finalized().unwrap_err();
        let expected = bytes(&a);
        a.detach(&stuck);
        hop(&a, &b, plan(PostCopy::Auto));
        assert!(bytes(&b) == expected);
    });
}

/// A destination that refuses what it is to load.
#[derive(Debug)]
struct Refuses;

impl Incoming for Refuses {
    fn kind(&self) -> &'static str {
        "regions"
    }

    fn accept(&self, _source: &Description) -> Result<(), SubjectError> {
        Ok(())
    }

    fn load(
        &mut self,
        _state: &mut (dyn io::Read + Send),
        _deadline: Instant,
    ) -> Result<(), SubjectError> {
        Err(SubjectError::new("it does not fit"))
    }

    fn resume(&mut self, _deadline: Instant) -> Result<(), SubjectError> {
        panic!("it never belongs here");
    }
}

#[test]
fn a_destination_that_cannot_load_leaves_the_region_in_use_at_the_source() {
    within(Duration::from_secs(60), || {
        gives_up(
            |seeder| seeder,
            |leecher| leecher.subject(Refuses),
            |_, _| {},
        );
    });
}

#[test]
fn a_destination_that_looks_while_it_loads_and_fails_leaves_nothing_to_look_at() {
    within(Duration::from_secs(60), || {
        gives_up(
            |seeder| seeder,
            |leecher| leecher.subject(Refuses).looking_while_loading(),
            |_, _| {},
        );
    });
}

/// Cuts a lane at points of its stream, and settles what has become of the regions as an operator would.
fn cut(lane: u8, way: Way, points: &[u64]) -> Vec<Standing> {
    let mut ends = Vec::new();
    for &at in points {
        let len = MIB;
        let (a, b) = (owner(len), empty(len));
        fill(&a, 9);
        let expected = bytes(&a);
        let (here, there, proxy) = sessions(Some(Trap {
            lane,
            way,
            at,
            act: Act::Cut,
        }));
        let seeding = Seeder::new([("ram", a.clone())]).options(plan(PostCopy::Always));
        let seeding = seeding.open(here).unwrap();
        let leeching = Leecher::new([("ram", b.clone())]).open(there).unwrap();
        let writer = {
            let a = a.clone();
            std::thread::spawn(move || {
                // Until the region has left for good.
                for round in 0_u64.. {
                    let byte = u8::try_from(round % 251).unwrap();
                    if a.write_all_at(&[byte; 512], 4096).is_err() {
                        return;
                    }
                    std::thread::park_timeout(Duration::from_micros(50));
                }
            })
        };
        let there = leeching.finalized();
        let there = match there {
            Ok(finalized) => finalized.release().map(|_| ()),
            Err(FinalizeError::Failed(error)) => Err(error),
            Err(error) => panic!("{error}"),
        };
        let here = seeding.released().and_then(|released| released.close());
        let standing = (a.standing(), b.standing());
        ends.push(standing.1);
        match standing {
            (Standing::Owner, Standing::Waiting) => {
                assert!(here.is_err() && there.is_err());
                // The writer goes on for as long as it may.
                hop(&a, &b, plan(PostCopy::Auto));
            }
            (Standing::Moved, Standing::Owner) => {}
            (Standing::Moved, Standing::Undecided) => {
                b.give_up().unwrap();
                a.take_back().unwrap();
                hop(&a, &b, plan(PostCopy::Auto));
            }
            // The source says that nothing was handed over.
            (Standing::Owner, Standing::Undecided) => {
                b.give_up().unwrap();
                hop(&a, &b, plan(PostCopy::Auto));
            }
            (Standing::Moved, Standing::Lost) => {
                assert!(b.missing() > 0, "{here:?} {there:?}");
                let began = Instant::now();
                let mut all = vec![0; 1 << 20];
                let error = b.read_exact_at(&mut all, 0).unwrap_err();
                assert!(error.to_string().contains("at the source alone"), "{error}");
                assert!(began.elapsed() < Duration::from_secs(5), "it waited");
                b.give_up().unwrap();
                a.take_back().unwrap();
                hop(&a, &b, plan(PostCopy::Auto));
            }
            other => panic!("two stories: {other:?} {here:?} {there:?}"),
        }
        writer.join().unwrap();
        drop(proxy);
        let mut is = bytes(&b);
        is[4096..4608].copy_from_slice(&expected[4096..4608]);
        assert!(is == expected, "cut of {lane} at {at}");
    }
    ends
}

#[test]
fn a_cut_of_any_lane_at_any_point_is_settled_and_the_region_moves_again() {
    within(Duration::from_secs(180), || {
        let mut ends = cut(
            CONTROL,
            Way::ToDestination,
            &[150, 300, 420, 440, 460, 480, 500, 520, 560, 600],
        );
        ends.extend(cut(CONTROL, Way::ToSource, &[150, 250, 400, 500]));
        ends.extend(cut(1, Way::ToDestination, &[100, 30_000, 300_000]));
        ends.extend(cut(URGENT, Way::ToSource, &[60, 90]));
        println!("{ends:?}");
        assert!(ends.contains(&Standing::Waiting), "{ends:?}");
    });
}

#[test]
fn what_is_missing_when_the_source_is_lost_is_an_error_and_the_source_can_take_the_region_back() {
    within(Duration::from_secs(60), || {
        // Enough that it takes a while after the hand-over, over a slow link that is cut there.
        let len = 8 * MIB;
        let (a, b) = (owner(len), empty(len));
        fill(&a, 10);
        let (here, there, proxy) = sessions(Some(Trap {
            lane: 1,
            way: Way::ToDestination,
            at: 1 << 40,
            act: Act::Cut,
        }));
        let stop = Arc::new(AtomicBool::new(false));
        let dirty = {
            let (a, stop) = (a.clone(), stop.clone());
            std::thread::spawn(move || {
                let mut page = 0;
                while !stop.load(Ordering::Relaxed)
                    && a.write_all_at(&[1; 4096], page * 4096).is_ok()
                {
                    page = (page + 1) % (len / 4096);
                }
            })
        };
        let mut options = plan(PostCopy::Always);
        options.bandwidth = Some(4 << 20);
        let seeding = Seeder::new([("ram", a.clone())])
            .options(options)
            .open(here)
            .unwrap();
        let leeching = Leecher::new([("ram", b.clone())]).open(there).unwrap();
        let finalized = leeching.finalized().unwrap();
        drop(proxy);
        let error = finalized.release().unwrap_err();
        assert!(matches!(error, LeechError::Lost { .. }), "{error}");
        let error = seeding.released().unwrap().close().unwrap_err();
        assert!(matches!(error, SeedError::Lost { .. }), "{error}");
        stop.store(true, Ordering::Relaxed);
        dirty.join().unwrap();
        assert_eq!(
            (a.standing(), b.standing()),
            (Standing::Moved, Standing::Lost)
        );
        assert!(b.missing() > 0);
        b.give_up().unwrap();
        a.take_back().unwrap();
        let expected = bytes(&a);
        hop(&a, &b, plan(PostCopy::Auto));
        assert!(bytes(&b) == expected);
    });
}

/// The destination was told only when the application's hook had returned, and not at all when that took long.
#[test]
fn an_application_that_takes_long_to_end_does_not_keep_its_region_from_moving() {
    within(Duration::from_secs(60), || {
        let (a, b) = (owner(MIB), empty(MIB));
        fill(&a, 12);
        let expected = bytes(&a);
        let ended = Arc::new(AtomicBool::new(false));
        let ends = ended.clone();
        let hooks = SeederHooks {
            released: Some(Box::new(move || {
                // Longer than the last messages of a session may take.
                let end = Instant::now() + Duration::from_secs(3);
                while let Some(left) = end.checked_duration_since(Instant::now()) {
                    std::thread::park_timeout(left);
                }
                ends.store(true, Ordering::Relaxed);
                panic!("this is the application's own");
            })),
            ..SeederHooks::default()
        };
        let (here, there, _) = sessions(None);
        let seeding = Seeder::new([("ram", a)])
            .options(plan(PostCopy::Always))
            .subject(hooks)
            .open(here)
            .unwrap();
        let leeching = Leecher::new([("ram", b.clone())]).open(there).unwrap();
        leeching.finalize().unwrap().release().unwrap();
        seeding.released().unwrap().close().unwrap();
        assert!(ended.load(Ordering::Relaxed), "the session's end waits");
        assert!(bytes(&b) == expected);
    });
}

#[test]
fn callbacks_that_panic_at_the_destination_cost_nothing_of_the_region() {
    within(Duration::from_secs(60), || {
        for at_hand_over in [false, true] {
            let (a, b) = (owner(4 * MIB), empty(4 * MIB));
            fill(&a, 13);
            let expected = bytes(&a);
            let (here, there, _) = sessions(None);
            let seeding = Seeder::new([("ram", a.clone())])
                .options(plan(PostCopy::Always))
                .open(here)
                .unwrap();
            let mut leeching = Leecher::new([("ram", b.clone())]);
            leeching = if at_hand_over {
                leeching.subject(LeecherHooks {
                    run: Some(Box::new(|| panic!("it cannot run"))),
                })
            } else {
                leeching.on_chunk(|_, range| panic!("it cannot count {range:?}"))
            };
            let finalized = leeching.open(there).unwrap().finalize().unwrap();
            let result = finalized.release();
            let fits = match &result {
                Ok(_) => !at_hand_over,
                Err(error) => at_hand_over && matches!(error, LeechError::NotRunning { .. }),
            };
            assert!(fits, "{result:?}");
            seeding.released().unwrap().close().unwrap();
            assert_eq!(
                (a.standing(), b.standing()),
                (Standing::Moved, Standing::Owner)
            );
            assert!(bytes(&b) == expected);
        }
    });
}
