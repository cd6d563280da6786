//! What there is to compare with: the same link, with nothing but a stream on it.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result};

use super::link::Shape;
use super::measure::rate;
use super::rig::{STEP, steps};
use super::route::{By, Route};

/// How fast one connection carries so many bytes, connecting included, in MB a second.
pub(super) fn stream(size: u64, shape: Shape, by: By) -> Result<f64> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let route = Route::new(listener.local_addr()?, Some(shape), by)?;
    let server = thread::spawn(move || {
        let (mut socket, _) = listener.accept()?;
        socket.read_exact(&mut [0])?;
        let piece = vec![1; STEP];
        for (_, count) in steps(size) {
            socket.write_all(&piece[..count])?;
        }
        anyhow::Ok(())
    });
    let began = Instant::now();
    let mut socket = TcpStream::connect(route.address())?;
    socket.write_all(&[1])?;
    let mut buffer = vec![0; STEP];
    let mut done = 0;
    while let count @ 1.. = socket.read(&mut buffer)? {
        done += count;
    }
    let took = began.elapsed();
    server.join().ok().context("the server panicked")??;
    Ok(rate(done, took))
}
