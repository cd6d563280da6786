//! Many callers on one lane that has no connection yet.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::fake::{Fake, Manner, request};
use crate::backend::nbd::connection::Connection;
use crate::backend::nbd::hello::agree;
use crate::backend::nbd::lane::Lane;

#[test]
fn of_many_callers_one_connects_and_all_get_its_connection() {
    let server = &Fake::new(Manner::new(1 << 20), |_, stream| {
        loop {
            request(stream)?;
        }
    });
    let deadline = Instant::now() + Duration::from_secs(20);
    for _ in 0..50 {
        let lane = &Lane::default();
        let dialled = &AtomicUsize::new(0);
        let dial = || {
            dialled.fetch_add(1, Ordering::SeqCst);
            let (wire, inbox, agreed) = agree(&server.url(), None, deadline)?;
            Ok(Connection::new(wire, inbox, agreed, 1))
        };
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| lane.get(deadline, dial, |_| true).unwrap());
            }
        });
        assert_eq!(dialled.load(Ordering::SeqCst), 1);
        lane.close();
    }
}
