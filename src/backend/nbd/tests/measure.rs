//! What the client costs.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use super::fake::{Fake, Manner, data, request};
use crate::chunk::Storage;

const PAGE: usize = 4096;
const ROUNDS: usize = 20_000;

/// Percentiles of the times of a function.
fn times(mut once: impl FnMut()) -> (Duration, Duration) {
    for _ in 0..ROUNDS / 10 {
        once();
    }
    let mut times: Vec<Duration> = (0..ROUNDS)
        .map(|_| {
            let begun = Instant::now();
            once();
            begun.elapsed()
        })
        .collect();
    times.sort_unstable();
    (times[ROUNDS / 2], times[ROUNDS * 99 / 100])
}

/// Serves pages as fast as one thread can.
fn pages() -> Fake {
    Fake::new(Manner::new(1 << 30), |_, stream| {
        let page = [7; PAGE];
        loop {
            let (request, _) = request(stream)?;
            stream.write_all(&data(request.cookie, request.offset, &page, true))?;
        }
    })
}

#[test]
#[ignore = "measurement"]
fn a_page_against_a_bare_loop() {
    for round in 0..3 {
        let bare = Fake::raw(|_, stream| {
            let page = [7; 28 + PAGE];
            let mut request = [0; 28];
            loop {
                stream.read_exact(&mut request)?;
                stream.write_all(&page)?;
            }
        });
        let crate::backend::nbd::NbdPlace::Tcp { host, port } = bare.url().place().clone() else {
            panic!("it is TCP")
        };
        let mut stream = TcpStream::connect((host, port)).unwrap();
        stream.set_nodelay(true).unwrap();
        let mut page = [0; 28 + PAGE];
        let (loop_p50, loop_p99) = times(|| {
            stream.write_all(&[1; 28]).unwrap();
            stream.read_exact(&mut page).unwrap();
        });
        drop(stream);
        let server = pages();
        let remote = server.connect(Duration::from_secs(5));
        let mut page = [0; PAGE];
        let (p50, p99) = times(|| remote.read_exact_at(&mut page, 1 << 20).unwrap());
        println!(
            "{round}: bare loop p50 {loop_p50:?} p99 {loop_p99:?}; client p50 {p50:?} p99 {p99:?}; ratio {:.2}",
            p50.as_secs_f64() / loop_p50.as_secs_f64()
        );
    }
}
