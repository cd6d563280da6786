use std::io;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

fn bitmap(chunks: u64, runs: &[ChunkRun]) -> ChunkBitmap {
    let mut set = ChunkBitmap::empty(chunks);
    for &run in runs {
        set.insert_run(run);
    }
    set
}

fn fetch(residency: &Residency, run: ChunkRun) -> Vec<ChunkRun> {
    let mut landed = Vec::new();
    while let Some(claim) = residency.claim(run, u64::MAX) {
        landed.extend(claim.land().done());
    }
    landed
}

#[test]
fn a_chunk_is_claimed_once_and_is_here_when_it_has_landed() {
    let residency = Residency::new(1000);
    let claim = residency.claim(ChunkRun::new(30, 500), 100).unwrap();
    assert_eq!(claim.run(), ChunkRun::new(30, 100));
    assert_eq!(
        residency.claim(ChunkRun::new(30, 100), 1).map(|c| c.run()),
        None
    );
    let next = residency.claim(ChunkRun::new(0, 1000), 1000).unwrap();
    assert_eq!(next.run(), ChunkRun::new(0, 30));
    let writing = claim.land();
    assert_eq!(writing.runs(), [ChunkRun::new(30, 100)]);
    assert_eq!(residency.state(ChunkIndex(30)), ChunkState::Writing);
    assert_eq!(writing.done(), [ChunkRun::new(30, 100)]);
    assert!(residency.is_resident(ChunkRun::new(30, 100)));
    assert!(!residency.is_resident(ChunkRun::new(29, 2)));
    assert_eq!(
        residency.count(residency.all_chunks(), ChunkState::Resident),
        100
    );
    assert_eq!(
        residency.count(residency.all_chunks(), ChunkState::Fetching),
        30
    );
    drop(next);
    assert_eq!(
        residency.count(residency.all_chunks(), ChunkState::Fetching),
        0
    );
}

#[test]
fn a_chunk_that_comes_late_does_not_undo_a_write() {
    let residency = Residency::new(10);
    let claim = residency.claim(ChunkRun::new(0, 10), 10).unwrap();
    let writing = residency.overwrite(ChunkRun::new(3, 2), soon()).unwrap();
    assert_eq!(writing.runs(), [ChunkRun::new(3, 2)]);
    // While it is being written, and after.
    let _ = writing.done();
    let writing = residency.overwrite(ChunkRun::new(7, 1), soon()).unwrap();
    let landed = claim.land();
    assert_eq!(
        landed.runs(),
        [
            ChunkRun::new(0, 3),
            ChunkRun::new(5, 2),
            ChunkRun::new(8, 2)
        ]
    );
    let _ = landed.done();
    let _ = writing.done();
    assert!(residency.is_resident(residency.all_chunks()));
}

#[test]
fn what_was_asked_for_before_chunks_were_marked_remote_never_lands() {
    let residency = Residency::new(100);
    let old = residency.claim(ChunkRun::new(0, 50), 50).unwrap();
    residency
        .mark_remote(&bitmap(100, &[ChunkRun::new(10, 1)]), soon())
        .unwrap();
    // Somebody else asks for the same chunks again.
    let new = residency.claim(ChunkRun::new(0, 50), 50).unwrap();
    assert_eq!(old.land().runs(), []);
    assert_eq!(
        residency.count(residency.all_chunks(), ChunkState::Fetching),
        50
    );
    let _ = new.land().done();
    assert!(residency.is_resident(ChunkRun::new(0, 50)));
}

#[test]
fn a_claim_that_fails_gives_its_chunks_back_but_not_those_of_another_epoch() {
    let residency = Residency::new(100);
    let old = residency.claim(ChunkRun::new(0, 50), 50).unwrap();
    residency.mark_remote(&bitmap(100, &[]), soon()).unwrap();
    let new = residency.claim(ChunkRun::new(0, 50), 50).unwrap();
    old.fail(&io::Error::other("late"));
    assert_eq!(
        residency.count(residency.all_chunks(), ChunkState::Fetching),
        50
    );
    new.fail(&io::Error::other("broken"));
    assert_eq!(
        residency.count(residency.all_chunks(), ChunkState::Remote),
        100
    );
}

#[test]
fn marking_remote_waits_for_who_writes() {
    let residency = Residency::all_resident(100);
    residency
        .mark_remote(&bitmap(100, &[ChunkRun::new(0, 100)]), soon())
        .unwrap();
    let writing = residency.overwrite(ChunkRun::new(5, 3), soon()).unwrap();
    let late = Instant::now() + Duration::from_millis(5);
    let error = residency
        .mark_remote(&bitmap(100, &[ChunkRun::new(0, 100)]), late)
        .unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    std::thread::scope(|scope| {
        let marking =
            scope.spawn(|| residency.mark_remote(&bitmap(100, &[ChunkRun::new(0, 100)]), soon()));
        while residency.waiting() == 0 {
            std::thread::yield_now();
        }
        let _ = writing.done();
        marking.join().unwrap().unwrap();
    });
    assert_eq!(
        residency.count(residency.all_chunks(), ChunkState::Remote),
        100
    );
}

#[test]
fn two_who_overwrite_overlapping_runs_take_turns() {
    let residency = Residency::new(256);
    let barrier = Barrier::new(4);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (residency, barrier) = (&residency, &barrier);
            scope.spawn(move || {
                barrier.wait();
                for round in 0..200_u64 {
                    let start = (thread * 37 + round * 11) % 100;
                    let run = ChunkRun::new(start, 150);
                    drop(residency.overwrite(run, soon()).unwrap());
                }
            });
        }
    });
    assert_eq!(
        residency.count(residency.all_chunks(), ChunkState::Remote),
        256
    );
}

#[test]
fn a_waiter_is_woken_by_what_comes_and_told_what_fails() {
    let residency = Residency::new(100);
    std::thread::scope(|scope| {
        let claim = residency.claim(ChunkRun::new(0, 10), 10).unwrap();
        let waiter = scope.spawn(|| residency.wait(ChunkIndex(4), soon()));
        while residency.waiting() == 0 {
            std::thread::yield_now();
        }
        claim.fail(&io::Error::from_raw_os_error(5));
        assert_eq!(waiter.join().unwrap().unwrap_err().raw_os_error(), Some(5));

        let waiter = scope.spawn(|| residency.wait(ChunkIndex(4), soon()));
        while residency.waiting() == 0 {
            std::thread::yield_now();
        }
        fetch(&residency, ChunkRun::new(4, 1));
        waiter.join().unwrap().unwrap();
    });
    // Nobody is told of a failure before his time, and nothing is left in the table.
    residency.wait(ChunkIndex(4), soon()).unwrap();
    assert_eq!(residency.waiting(), 0);
}

#[test]
fn nobody_waits_longer_than_the_deadline() {
    let residency = Residency::new(1);
    let error = residency
        .wait(ChunkIndex(0), Instant::now() + Duration::from_millis(2))
        .unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    let _claim = residency.claim(ChunkRun::new(0, 1), 1);
    let error = residency.settle(ChunkIndex(0), Instant::now()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
}

#[test]
#[cfg_attr(miri, ignore = "polls a descriptor, which miri cannot")]
fn a_fault_is_reported_once_for_all_who_wait_and_again_if_it_did_not_help() {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let residency = Residency::new(100).reporting_faults().unwrap();
    let ready = || {
        let mut fds = [PollFd::from_borrowed_fd(
            residency.fault_fd().unwrap(),
            PollFlags::IN,
        )];
        poll(&mut fds, Some(&Timespec::default())).unwrap() == 1
    };
    let mut faults = Vec::new();
    std::thread::scope(|scope| {
        let wait = || residency.wait(ChunkIndex(70), soon());
        let waiters = [scope.spawn(wait), scope.spawn(wait)];
        while residency.waiting() < 2 {
            std::thread::yield_now();
        }
        assert!(ready());
        residency.take_faults(&mut faults);
        assert_eq!(faults, [ChunkIndex(70)]);
        assert!(!ready());
        residency.mark_remote(&bitmap(100, &[]), soon()).unwrap();
        faults.clear();
        while faults.is_empty() {
            residency.take_faults(&mut faults);
        }
        assert_eq!(faults, [ChunkIndex(70)]);
        let _ = residency.fill(ChunkRun::new(64, 10)).done();
        for waiter in waiters {
            waiter.join().unwrap().unwrap();
        }
    });
}

#[test]
fn when_chunks_are_refused_nobody_goes_on_waiting() {
    let residency = Residency::new(100);
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| residency.wait(ChunkIndex(1), soon()));
        while residency.waiting() == 0 {
            std::thread::yield_now();
        }
        residency.refuse(Some(io::Error::new(io::ErrorKind::ConnectionReset, "gone")));
        let error = waiter.join().unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    });
    assert!(residency.wait(ChunkIndex(2), soon()).is_err());
    let _ = residency.fill(ChunkRun::new(2, 1)).done();
    residency.wait(ChunkIndex(2), soon()).unwrap();
}

#[test]
fn what_gave_up_half_way_leaves_nothing_behind() {
    let residency = Residency::new(100);
    drop(residency.claim(ChunkRun::new(0, 40), 40));
    drop(residency.overwrite(ChunkRun::new(20, 40), soon()).unwrap());
    drop(residency.fill(ChunkRun::new(50, 50)));
    assert_eq!(
        residency.count(residency.all_chunks(), ChunkState::Remote),
        100
    );
}

#[test]
#[cfg_attr(
    miri,
    ignore = "walks a table of a million entries, which takes miri hours"
)]
fn a_region_of_a_tebibyte_takes_no_memory_until_chunks_come() {
    let chunks = (1 << 40) / 4096;
    let residency = Residency::new(chunks);
    assert_eq!(residency.table.allocated(), 0);
    let _ = residency.fill(ChunkRun::new(chunks - 1, 1)).done();
    assert_eq!(
        residency.find(residency.all_chunks(), u64::MAX, ChunkState::Resident),
        Some(ChunkRun::new(chunks - 1, 1))
    );
    assert_eq!(residency.table.allocated(), 1);
}

#[derive(Debug, Clone)]
enum Step {
    Claim(ChunkRun, u64),
    Land(usize),
    Fail(usize),
    Overwrite(ChunkRun, bool),
    Fill(ChunkRun),
    MarkRemote(ChunkRun),
}

fn steps(chunks: u64) -> impl Strategy<Value = Vec<Step>> {
    let run = (0..chunks, 0..chunks)
        .prop_map(move |(start, count)| ChunkRun::new(start, count.min(chunks - start)));
    let step = prop_oneof![
        3 => (run.clone(), 1..80_u64).prop_map(|(run, longest)| Step::Claim(run, longest)),
        2 => any::<usize>().prop_map(Step::Land),
        1 => any::<usize>().prop_map(Step::Fail),
        2 => (run.clone(), any::<bool>()).prop_map(|(run, good)| Step::Overwrite(run, good)),
        1 => run.clone().prop_map(Step::Fill),
        1 => run.prop_map(Step::MarkRemote),
    ];
    proptest::collection::vec(step, 0..60)
}

proptest! {
    /// Against a vector of states, which is too simple to be wrong.
    #[test]
    fn the_table_does_what_a_vector_of_states_does(chunks in 1..400_u64, steps in (1..400_u64).prop_flat_map(steps)) {
        let residency = Residency::new(chunks);
        let mut model = vec![ChunkState::Remote; usize::try_from(chunks).unwrap()];
        let fit = |run: ChunkRun| {
            let start = run.start.0.min(chunks);
            ChunkRun::new(start, run.count.min(chunks - start))
        };
        let span = |run: ChunkRun| usize::try_from(run.start.0).unwrap()..usize::try_from(run.end()).unwrap();
        let mut claims: Vec<(Claim<'_>, bool)> = Vec::new();
        for step in steps {
            match step {
                Step::Claim(run, longest) => {
                    let run = fit(run);
                    let claim = residency.claim(run, longest);
                    let first = span(run).find(|&at| model[at] == ChunkState::Remote);
                    let expected = first.map(|first| {
                        let count = (first..span(run).end)
                            .take_while(|&at| model[at] == ChunkState::Remote)
                            .count() as u64;
                        ChunkRun::new(first as u64, count.min(longest))
                    });
                    prop_assert_eq!(claim.as_ref().map(Claim::run), expected);
                    if let Some(claim) = claim {
                        model[span(claim.run())].fill(ChunkState::Fetching);
                        claims.push((claim, true));
                    }
                }
                Step::Land(which) | Step::Fail(which) if !claims.is_empty() => {
                    let which = which % claims.len();
                    let (claim, valid) = claims.swap_remove(which);
                    let good = matches!(step, Step::Land(_));
                    if valid {
                        for at in span(claim.run()) {
                            if model[at] == ChunkState::Fetching {
                                model[at] = if good { ChunkState::Resident } else { ChunkState::Remote };
                            }
                        }
                    }
                    if good {
                        let _ = claim.land().done();
                    } else {
                        claim.fail(&io::Error::other("no"));
                    }
                }
                Step::Land(_) | Step::Fail(_) => {}
                Step::Overwrite(run, good) => {
                    let run = fit(run);
                    let writing = residency.overwrite(run, soon()).unwrap();
                    let taken: u64 = writing.runs().iter().map(|run| run.count).sum();
                    let absent = span(run).filter(|&at| model[at] != ChunkState::Resident).count();
                    prop_assert_eq!(taken, absent as u64);
                    for at in span(run) {
                        if model[at] != ChunkState::Resident {
                            model[at] = if good { ChunkState::Resident } else { ChunkState::Remote };
                        }
                    }
                    if good {
                        let _ = writing.done();
                    }
                }
                Step::Fill(run) => {
                    let run = fit(run);
                    let _ = residency.fill(run).done();
                    model[span(run)].fill(ChunkState::Resident);
                }
                Step::MarkRemote(run) => {
                    let run = fit(run);
                    residency.mark_remote(&bitmap(chunks, &[run]), soon()).unwrap();
                    for state in &mut model {
                        if *state == ChunkState::Fetching {
                            *state = ChunkState::Remote;
                        }
                    }
                    model[span(run)].fill(ChunkState::Remote);
                    for claim in &mut claims {
                        claim.1 = false;
                    }
                }
            }
            for (at, &state) in model.iter().enumerate() {
                prop_assert_eq!(residency.state(ChunkIndex(at as u64)), state, "chunk {}", at);
            }
            let all = residency.all_chunks();
            for state in [ChunkState::Remote, ChunkState::Fetching, ChunkState::Writing, ChunkState::Resident] {
                let here = model.iter().filter(|&&other| other == state).count() as u64;
                prop_assert_eq!(residency.count(all, state), here);
            }
        }
    }
}
