//! A first access through a slice, and the least that it can cost: one thread that reads the event, sends 16 bytes, receives a page
//! and installs it.

use std::fmt;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use memferry::chunk::Storage;
use memferry::frontend::{Slice, SliceOptions};
use memferry::sys::memory::Memory;
use memferry::sys::uffd::{Event, Features, Mode, Scope, Uffd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use super::measure::milliseconds;
use super::pattern::Pattern;
use super::rig::Far;
use super::route::By;

/// Latencies in milliseconds, each way in the same run.
#[derive(Debug, Default)]
pub(super) struct Faults {
    pub(super) bare: Vec<f64>,
    pub(super) slice: Vec<f64>,
}

/// Where the threads may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Processors {
    /// All of them on one, which is then awake whenever another one waits.
    One,
    /// As it comes.
    All,
}

impl fmt::Display for Processors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::One => "pinned",
            Self::All => "unpinned",
        })
    }
}

const PAGE: usize = 4096;
/// Who does not answer within this time has failed.
const LIMIT: Timespec = Timespec {
    tv_sec: 20,
    tv_nsec: 0,
};
/// Both are measured in turns, so that what drifts hits both.
const TURNS: u64 = 4;

/// Measures `count` first accesses each way to the pages of a region that holds a pattern.
pub(super) fn measure(
    region: &Arc<dyn Storage>,
    pattern: Pattern,
    count: u64,
    processors: Processors,
) -> Result<Faults> {
    let region = Arc::clone(region);
    // Threads inherit where they may run, so what is measured is set up by one that is bound already.
    let measured = thread::spawn(move || {
        if processors == Processors::One {
            bind()?;
        }
        let mut faults = Faults::default();
        for turn in 0..TURNS {
            let pages = || scattered(region.len(), count / TURNS, turn);
            faults.bare.extend(bare(&region, pattern, pages())?);
            faults.slice.extend(slice(&region, pattern, pages())?);
        }
        Ok(faults)
    });
    measured
        .join()
        .ok()
        .context("the measuring thread panicked")?
}

fn bind() -> Result<()> {
    let allowed = sched_getaffinity(None)?;
    let first = (0..CpuSet::MAX_CPU).find(|&cpu| allowed.is_set(cpu));
    let mut one = CpuSet::new();
    one.set(first.context("no processor")?);
    sched_setaffinity(None, &one)?;
    Ok(())
}

/// Offsets of pages far from each other, of which no two are the same.
fn scattered(size: u64, count: u64, turn: u64) -> impl Iterator<Item = u64> {
    let pages = size / PAGE as u64;
    // A prime steps over any number of pages that it does not divide without repeating one.
    (0..count).map(move |index| (index * 7919 + turn) % pages * PAGE as u64)
}

/// Accesses through a slice of ours, whose server is next door.
fn slice(
    region: &Arc<dyn Storage>,
    pattern: Pattern,
    pages: impl Iterator<Item = u64>,
) -> Result<Vec<f64>> {
    let far = Far::serve(Arc::clone(region), None, By::Proxy)?;
    let slice = Slice::new(Arc::new(far.connect()?), &SliceOptions::default())?;
    touch(pattern, pages, |page, offset| Ok(slice.load(page, offset)?))
}

/// Accesses to memory that the least possible loop serves.
fn bare(
    region: &Arc<dyn Storage>,
    pattern: Pattern,
    pages: impl Iterator<Item = u64>,
) -> Result<Vec<f64>> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let mut client = TcpStream::connect(listener.local_addr()?)?;
    let (server, _) = listener.accept()?;
    for socket in [&client, &server] {
        socket.set_nodelay(true)?;
    }
    let region = Arc::clone(region);
    let server = thread::spawn(move || serve(server, &*region));

    // Before the userfaultfd, which wakes who waits when it is closed.
    let memory = Memory::reserve(1 << 30)?;
    let uffd = Uffd::create(Scope::UserModeOnly, Features::none())?;
    let missing = Mode {
        missing: true,
        ..Mode::default()
    };
    uffd.register(memory.addresses(), missing)?;
    let start = memory.addresses().start;
    let handler = thread::spawn(move || resolve(&uffd, start, &mut client));
    let touched = touch(
        pattern,
        pages,
        |page, offset| Ok(memory.load(offset, page)?),
    );
    // A page at the end, which the server does not have, ends both threads.
    let _zeros = memory.load((1 << 30) - PAGE as u64, &mut [0]);
    for thread in [server, handler] {
        thread
            .join()
            .ok()
            .context("a thread of the bare loop panicked")??;
    }
    touched
}

fn touch(
    pattern: Pattern,
    pages: impl Iterator<Item = u64>,
    load: impl Fn(&mut [u8], u64) -> Result<()>,
) -> Result<Vec<f64>> {
    let mut page = [0; PAGE];
    let mut latencies = Vec::new();
    for offset in pages {
        // The first word only: the time is that of the fault.
        let began = Instant::now();
        load(&mut page[..8], offset)?;
        latencies.push(milliseconds(began.elapsed()));
        load(&mut page, offset)?;
        pattern.check(&page, offset)?;
    }
    Ok(latencies)
}

/// Answers 16 bytes, of which the first 8 say where, with a page; until it is asked for one that it does not have.
fn serve(mut socket: TcpStream, region: &dyn Storage) -> Result<()> {
    socket.set_read_timeout(Some(Duration::from_secs(20)))?;
    let mut question = [0; 16];
    let mut page = [0; PAGE];
    loop {
        socket.read_exact(&mut question)?;
        let offset = u64::from_le_bytes(*question.first_chunk().context("8 of 16 bytes")?);
        if offset >= region.len() {
            return Ok(());
        }
        region.read_exact_at(&mut page, offset)?;
        socket.write_all(&page)?;
    }
}

/// Resolves one fault after the other, until the server ends.
fn resolve(uffd: &Uffd, start: u64, socket: &mut TcpStream) -> Result<()> {
    let mut events = Vec::new();
    let mut page = [0; PAGE];
    loop {
        let ready = poll(&mut [PollFd::new(uffd, PollFlags::IN)], Some(&LIMIT))?;
        ensure!(ready > 0, "no page was accessed for {} s", LIMIT.tv_sec);
        uffd.read_events(&mut events)?;
        for event in events.drain(..) {
            let Event::Fault { address, .. } = event else {
                continue;
            };
            let mut question = [0; 16];
            question[..8].copy_from_slice(&(address - start).to_le_bytes());
            socket.write_all(&question)?;
            if socket.read_exact(&mut page).is_err() {
                uffd.zero(address..address + PAGE as u64, PAGE as u64)?;
                return Ok(());
            }
            uffd.install(address, &page, PAGE as u64)?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::rig::region;
    use super::*;

    #[test]
    #[ignore = "privileged: needs CAP_SYS_PTRACE, or vm.unprivileged_userfaultfd"]
    fn both_ways_bring_the_right_pages() {
        let pattern = Pattern::new(3);
        let region: Arc<dyn Storage> = region(8 << 20, pattern).unwrap();
        let faults = measure(&region, pattern, 64, Processors::One).unwrap();
        assert_eq!((faults.bare.len(), faults.slice.len()), (64, 64));
    }
}
