//! Who reads the replies of a connection: its callers themselves, one at a time.
//!
//! ```text
//!  caller 1   send ──► read … read mine ──► done, pass the role on
//!  caller 2   send ──► wait ················ read … read mine ──► done
//!  caller 3   send ──► wait ····· delivered ──► done
//! ```
//!
//! There is no thread that only receives: a caller that nobody reads for takes the *reading role*, and so waits in the kernel for its
//! own reply; no other thread has to be woken for it. What it reads meanwhile of others' it delivers, if it is small, or it hands the
//! role to whom the bytes belong, who reads them where they are to go. Who is done passes the role on to somebody who waits, under the
//! same lock under which one begins to wait, so it cannot get lost in between.

use std::collections::HashMap;
use std::time::Instant;

#[cfg(loom)]
use loom::sync::{Arc, Condvar, Mutex, MutexGuard};
#[cfg(not(loom))]
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

/// The callers of a connection. `T` is what is known of a request, `P` the beginning of a reply whose bytes are still to be read, `M` a
/// reply that was read, and `B` why the connection has ended.
#[derive(Debug)]
pub(super) struct Desk<T, P, M, B> {
    state: Mutex<State<T, P, M, B>>,
}

#[derive(Debug)]
struct State<T, P, M, B> {
    next_cookie: u64,
    expected: HashMap<u64, Expected<T>>,
    seats: Vec<Seat<P, M>>,
    /// Seats that nobody sits on.
    free: Vec<usize>,
    /// The seat of who has the reading role.
    reader: Option<usize>,
    broken: Option<B>,
}

/// A request that was not answered yet.
#[derive(Debug, Clone, Copy)]
pub(super) struct Expected<T> {
    seat: usize,
    /// Its place among the requests of the caller.
    pub(super) index: usize,
    /// What is known of it.
    pub(super) about: T,
}

#[derive(Debug)]
struct Seat<P, M> {
    bell: Arc<Condvar>,
    waits: bool,
    /// Read by others, for who sits here.
    tray: Vec<M>,
    /// How much more may be put there.
    room: u64,
    /// Came with the reading role.
    handed: Option<P>,
}

/// What a caller has to do next.
#[derive(Debug)]
pub(super) enum Next<P, M> {
    /// Take note of what others have read, in this order; then, before anything else, read the bytes that follow this beginning, if the
    /// reading role came with one: they are what is next on the wire.
    Mail(Vec<M>, Option<P>),
    /// Read the bytes that follow this beginning; the caller has the reading role.
    Rest(P),
    /// Read the next reply; the caller has the reading role.
    Read,
    /// Nothing came in time.
    TimedOut,
}

/// What the reader has to do with a reply.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Route {
    /// Read on: it is the reader's own, or has to be delivered.
    ReadOn,
    /// Nothing: the role has gone to whom it belongs.
    HandedOver,
}

/// A caller at a desk; leaves it when it is dropped.
#[derive(Debug)]
pub(super) struct Caller<'a, T, P, M, B: Clone> {
    desk: &'a Desk<T, P, M, B>,
    seat: usize,
}

impl<T: Copy, P, M, B: Clone> Desk<T, P, M, B> {
    pub(super) fn new() -> Self {
        Self {
            state: Mutex::new(State {
                next_cookie: 1,
                expected: HashMap::new(),
                seats: Vec::new(),
                free: Vec::new(),
                reader: None,
                broken: None,
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<T, P, M, B>> {
        // Nothing under the lock panics half-way; a caller that panics elsewhere leaves by its drop.
        self.state
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Sits down.
    ///
    /// # Errors
    /// Why the connection has ended, if it has.
    pub(super) fn sit(&self) -> Result<Caller<'_, T, P, M, B>, B> {
        let mut state = self.lock();
        if let Some(broken) = &state.broken {
            return Err(broken.clone());
        }
        let seat = state.free.pop().unwrap_or_else(|| {
            state.seats.push(Seat {
                bell: Arc::new(Condvar::new()),
                waits: false,
                tray: Vec::new(),
                room: 0,
                handed: None,
            });
            state.seats.len() - 1
        });
        Ok(Caller { desk: self, seat })
    }

    /// Ends the connection for all callers, those to come included. The first reason stays, and is returned.
    pub(super) fn break_off(&self, why: B) -> B {
        let mut state = self.lock();
        let why = state.broken.get_or_insert(why).clone();
        for seat in &state.seats {
            seat.bell.notify_one();
        }
        why
    }

    /// Why the connection has ended, if it has.
    pub(super) fn broken(&self) -> Option<B> {
        self.lock().broken.clone()
    }
}

impl<T: Copy, P, M, B: Clone> Caller<'_, T, P, M, B> {
    /// Announces requests, before they are sent. Their cookies count up from the one returned, their indexes from `first`. What others read
    /// for this caller may have so much `room` more.
    ///
    /// # Errors
    /// Why the connection has ended, if it has.
    pub(super) fn expect(
        &self,
        first: usize,
        requests: impl ExactSizeIterator<Item = T>,
        room: u64,
    ) -> Result<u64, B> {
        let mut state = self.desk.lock();
        if let Some(broken) = &state.broken {
            return Err(broken.clone());
        }
        let cookie = state.next_cookie;
        state.next_cookie += requests.len() as u64;
        let seat = self.seat;
        let has = &mut state.seats[seat].room;
        *has = has.saturating_add(room);
        for ((index, about), cookie) in (first..).zip(requests).zip(cookie..) {
            let expected = Expected { seat, index, about };
            state.expected.insert(cookie, expected);
        }
        Ok(cookie)
    }

    /// Waits for something to do, with or without the reading role.
    ///
    /// # Errors
    /// Why the connection has ended, if it has.
    pub(super) fn next(&self, deadline: Instant) -> Result<Next<P, M>, B> {
        let mut state = self.desk.lock();
        loop {
            let seat = &mut state.seats[self.seat];
            if !seat.tray.is_empty() {
                let mail = std::mem::take(&mut seat.tray);
                return Ok(Next::Mail(mail, seat.handed.take()));
            }
            if let Some(handed) = seat.handed.take() {
                return Ok(Next::Rest(handed));
            }
            if let Some(broken) = &state.broken {
                return Err(broken.clone());
            }
            if *state.reader.get_or_insert(self.seat) == self.seat {
                return Ok(Next::Read);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(Next::TimedOut);
            }
            let seat = &mut state.seats[self.seat];
            seat.waits = true;
            let bell = Arc::clone(&seat.bell);
            state = bell
                .wait_timeout(state, left)
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .0;
            state.seats[self.seat].waits = false;
        }
    }

    /// Takes the reading role, if nobody has it. For a caller that cannot send: the server may have stopped to receive until
    /// somebody reads what it sends.
    pub(super) fn take_role(&self) -> bool {
        let mut state = self.desk.lock();
        *state.reader.get_or_insert(self.seat) == self.seat
    }

    /// Passes the reading role on, if this caller has it. For one that is about to wait for something else than a reply.
    pub(super) fn pass_role(&self) {
        self.desk.lock().pass_role(self.seat);
    }

    /// Whose reply the reader has before it; it is forgotten if this is the `last` there will be of it.
    pub(super) fn look_up(&self, cookie: u64, last: bool) -> Option<Expected<T>> {
        let mut state = self.desk.lock();
        if last {
            state.expected.remove(&cookie)
        } else {
            state.expected.get(&cookie).copied()
        }
    }

    /// Whether a reply belongs to this caller.
    pub(super) fn owns(&self, expected: &Expected<T>) -> bool {
        expected.seat == self.seat
    }

    /// Hands the reading role and the beginning of a reply to whom it belongs, if that one waits.
    pub(super) fn hand_over(&self, to: &Expected<T>, part: P) -> (Route, Option<P>) {
        let mut state = self.desk.lock();
        let seat = &mut state.seats[to.seat];
        if !seat.waits || to.seat == self.seat {
            return (Route::ReadOn, Some(part));
        }
        seat.waits = false;
        seat.handed = Some(part);
        seat.bell.notify_one();
        state.reader = Some(to.seat);
        (Route::HandedOver, None)
    }

    /// Gives what was read to whom it belongs; `false` if there is no room for so much there.
    #[must_use]
    pub(super) fn deliver(&self, to: &Expected<T>, mail: M, weight: u64) -> bool {
        let mut state = self.desk.lock();
        let seat = &mut state.seats[to.seat];
        let Some(room) = seat.room.checked_sub(weight) else {
            return false;
        };
        seat.room = room;
        seat.tray.push(mail);
        if seat.waits {
            seat.bell.notify_one();
        }
        true
    }
}

impl<T, P, M, B> State<T, P, M, B> {
    fn pass_role(&mut self, from: usize) {
        if self.reader != Some(from) {
            return;
        }
        self.reader = self.seats.iter().position(|seat| seat.waits);
        if let Some(next) = self.reader {
            let seat = &mut self.seats[next];
            // Nobody else is to be given it on top.
            seat.waits = false;
            seat.bell.notify_one();
        }
    }
}

impl<T, P, M, B: Clone> Drop for Caller<'_, T, P, M, B> {
    fn drop(&mut self) {
        let mut state = self
            .desk
            .state
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        state.pass_role(self.seat);
        let seat = &mut state.seats[self.seat];
        seat.tray.clear();
        seat.room = 0;
        seat.handed = None;
        // What a caller leaves unanswered, it leaves on a connection that has ended.
        state.free.push(self.seat);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn who_gets_mail_and_then_the_role_reads_what_came_with_it_before_the_role_moves_on() {
        let desk: Desk<(), u8, u8, ()> = Desk::new();
        let soon = Instant::now() + Duration::from_secs(10);
        let (reads, waits) = (desk.sit().unwrap(), desk.sit().unwrap());
        let cookie = waits.expect(0, [(), ()].into_iter(), 1).unwrap();
        assert!(reads.take_role());
        // As it is while that one has not yet woken.
        desk.lock().seats[waits.seat].waits = true;
        let small = reads.look_up(cookie, true).unwrap();
        assert!(reads.deliver(&small, 1, 1));
        assert!(!reads.deliver(&small, 1, 1), "more than was asked for");
        let large = reads.look_up(cookie + 1, true).unwrap();
        assert_eq!(reads.hand_over(&large, 2), (Route::HandedOver, None));
        let next = waits.next(soon).unwrap();
        assert!(
            matches!(&next, Next::Mail(mail, Some(2)) if *mail == [1]),
            "{next:?}"
        );
        assert!(matches!(waits.next(soon).unwrap(), Next::Read));
    }
}

/// Every interleaving of callers; a role or a wake-up that is lost is a deadlock, which loom reports.
#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::thread;
    use std::collections::VecDeque;
    use std::time::Duration;

    /// A server that answers as soon as it is asked, and its connection.
    struct Server {
        desk: Desk<(), (), (), ()>,
        answers: Mutex<VecDeque<u64>>,
        came: Condvar,
    }

    impl Server {
        fn ask(&self, me: &Caller<'_, (), (), (), ()>) {
            let cookie = me.expect(0, std::iter::once(()), 1).unwrap();
            self.answers.lock().unwrap().push_back(cookie);
            self.came.notify_one();
        }

        fn read(&self) -> u64 {
            let mut answers = self.answers.lock().unwrap();
            loop {
                if let Some(cookie) = answers.pop_front() {
                    return cookie;
                }
                answers = self.came.wait(answers).unwrap();
            }
        }

        /// Asks once and returns when it is answered; answers of others are handed over or delivered.
        fn call(&self, large: bool) {
            let me = self.desk.sit().unwrap();
            self.ask(&me);
            loop {
                match me.next(Instant::now() + Duration::from_secs(1000)).unwrap() {
                    Next::Mail(..) | Next::Rest(()) => return,
                    Next::TimedOut => unreachable!("a wait never times out here"),
                    Next::Read => {
                        let owner = me.look_up(self.read(), true).unwrap();
                        if me.owns(&owner) {
                            return;
                        }
                        if !large || me.hand_over(&owner, ()).0 == Route::ReadOn {
                            assert!(me.deliver(&owner, (), 1));
                        }
                    }
                }
            }
        }
    }

    fn callers(count: usize, large: bool) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(move || {
            let server = Arc::new(Server {
                desk: Desk::new(),
                answers: Mutex::new(VecDeque::new()),
                came: Condvar::new(),
            });
            let others: Vec<_> = (1..count)
                .map(|_| {
                    let server = Arc::clone(&server);
                    thread::spawn(move || server.call(large))
                })
                .collect();
            server.call(large);
            for other in others {
                other.join().unwrap();
            }
        });
    }

    #[test]
    fn no_role_is_lost_when_answers_are_delivered() {
        callers(2, false);
        callers(3, false);
    }

    #[test]
    fn no_role_is_lost_when_it_is_handed_over() {
        callers(2, true);
        callers(3, true);
    }

    #[test]
    fn who_waits_learns_that_the_connection_has_ended() {
        loom::model(|| {
            let desk: Arc<Desk<(), (), (), ()>> = Arc::new(Desk::new());
            let waits = {
                let desk = Arc::clone(&desk);
                thread::spawn(move || {
                    let Ok(me) = desk.sit() else { return };
                    if me.expect(0, std::iter::once(()), 1).is_err() {
                        return;
                    }
                    // With the role there is a socket to wait on, which is shut down.
                    let _ = me.next(Instant::now() + Duration::from_secs(1000));
                })
            };
            let reads = desk.sit().unwrap();
            let _ = reads.take_role();
            desk.break_off(());
            drop(reads);
            waits.join().unwrap();
        });
    }
}
