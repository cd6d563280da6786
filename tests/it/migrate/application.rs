//! A program that uses a region and never stops, wherever the region is.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use memferry::chunk::Storage;
use memferry::migrate::Region;

use super::hop::{PAGE, bytes};
use super::source::{LONG, scramble};

/// An application that never stops: threads that write and read wherever it is, and know what must be there.
pub(crate) struct Application {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    place: Mutex<Arc<Region>>,
    moved: Condvar,
    model: Vec<Mutex<Vec<u8>>>,
    quit: AtomicBool,
    writes: AtomicU64,
}

impl Application {
    pub(crate) fn start(region: &Arc<Region>, threads: u64) -> Self {
        let all = bytes(region);
        let shared = Arc::new(Shared {
            place: Mutex::new(region.clone()),
            moved: Condvar::new(),
            model: all
                .chunks(PAGE)
                .map(|page| Mutex::new(page.to_vec()))
                .collect(),
            quit: AtomicBool::new(false),
            writes: AtomicU64::new(0),
        });
        let threads = (0..threads)
            .map(|seed| {
                let shared = shared.clone();
                std::thread::spawn(move || shared.work(seed))
            })
            .collect();
        Self { shared, threads }
    }

    /// It goes on in another place, where it went.
    pub(crate) fn moves_to(&self, region: &Arc<Region>) {
        *self.shared.place.lock().unwrap() = region.clone();
        self.shared.moved.notify_all();
    }

    /// Returns when it has written some more.
    #[track_caller]
    pub(crate) fn assert_goes_on(&self) {
        let from = self.shared.writes.load(Ordering::Relaxed);
        let deadline = Instant::now() + LONG;
        while self.shared.writes.load(Ordering::Relaxed) < from + 100 {
            assert!(Instant::now() < deadline, "the application stands still");
            std::thread::yield_now();
        }
    }

    /// Whether the region is what the application knows, while it goes on.
    #[track_caller]
    pub(crate) fn assert_is(&self, region: &Region) {
        for (number, page) in self.shared.model.iter().enumerate() {
            let page = page.lock().unwrap();
            let mut is = vec![0; page.len()];
            region
                .read_exact_at(&mut is, (number * PAGE) as u64)
                .unwrap();
            assert!(is == *page, "page {number} is not what was written");
        }
    }

    /// Ends it, and checks a last time.
    #[track_caller]
    pub(crate) fn end(mut self, region: &Region) {
        self.quit();
        self.assert_is(region);
    }

    fn quit(&mut self) {
        self.shared.quit.store(true, Ordering::Relaxed);
        self.shared.moved.notify_all();
        for thread in self.threads.drain(..) {
            thread.join().unwrap();
        }
    }
}

impl Drop for Application {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.quit();
        }
        self.shared.quit.store(true, Ordering::Relaxed);
        self.shared.moved.notify_all();
    }
}

impl Shared {
    fn work(&self, seed: u64) {
        let mut place = self.place.lock().unwrap().clone();
        let mut number = seed << 32;
        while !self.quit.load(Ordering::Relaxed) {
            number += 1;
            let random = scramble(number);
            // Most of it goes to a quarter of the pages, as programs do.
            let reach = if random.is_multiple_of(8) { 1 } else { 4 };
            let pages = (self.model.len() as u64 / reach).max(1);
            let page = usize::try_from((random >> 8) % pages).unwrap();
            let mut model = self.model[page].lock().unwrap();
            let from = usize::try_from(random >> 40).unwrap() % model.len();
            let len = match random % 3 {
                0 => model.len(),
                _ => (model.len() - from).min(64),
            };
            let from = if len == model.len() { 0 } else { from };
            let offset = (page * PAGE + from) as u64;
            loop {
                let done = if random.is_multiple_of(5) {
                    let mut is = vec![0; len];
                    place.read_exact_at(&mut is, offset).map(|()| {
                        assert!(
                            is == model[from..from + len],
                            "page {page} is not what was written"
                        );
                    })
                } else if random.is_multiple_of(7) {
                    place.zero(offset..offset + len as u64).map(|()| {
                        model[from..from + len].fill(0);
                    })
                } else {
                    let byte = u8::try_from(number % 251).unwrap();
                    place.write_all_at(&vec![byte; len], offset).map(|()| {
                        model[from..from + len].fill(byte);
                    })
                };
                match done {
                    Ok(()) => break,
                    // It has moved: so does the application.
                    Err(error) => {
                        assert!(error.to_string().contains("another host"), "{error}");
                        let new = self.place.lock().unwrap();
                        let waits = |new: &mut Arc<Region>| {
                            Arc::ptr_eq(new, &place) && !self.quit.load(Ordering::Relaxed)
                        };
                        let new = self.moved.wait_while(new, waits).unwrap();
                        if self.quit.load(Ordering::Relaxed) {
                            return;
                        }
                        let next = new.clone();
                        drop(new);
                        place = next;
                    }
                }
            }
            drop(model);
            self.writes.fetch_add(1, Ordering::Relaxed);
            if number.is_multiple_of(16) {
                std::thread::park_timeout(Duration::from_micros(300));
            }
        }
    }
}
