//! The thread that serves page faults: events in, fetches out, chunks in, pages installed.
//!
//! One thread polls both the userfaultfd and the urgent lane, so a fault costs no wake-up of another thread.

use std::io;
use std::os::fd::AsFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use migrate_proto::leecher::Fault;
use migrate_proto::{Layout, Message, URGENT_LANE};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::lanes::{ReceiveError, Receiving};
use crate::chunk::Place;
use crate::migrate::priority::go_first;
use crate::transport::{Lane, LaneWriter};

/// How long the thread sleeps at most: a fetch that has to be repeated is noticed then, and the end of the session.
const IDLE: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 20_000_000,
};

/// How many latencies are kept: enough for the 99th percentile of any migration, and bounded.
const SAMPLES: usize = 1 << 16;

/// What the fault thread counts.
#[derive(Debug, Default)]
pub(super) struct FaultCounters {
    fetched: AtomicU64,
    stop: AtomicBool,
    latencies: Mutex<Vec<u32>>,
}

impl FaultCounters {
    pub(super) fn fetched(&self) -> u64 {
        self.fetched.load(Ordering::Relaxed)
    }

    /// No fault can happen any more.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Median, 99th percentile and longest, in microseconds.
    pub(super) fn percentiles(&self) -> Option<[u64; 3]> {
        let mut latencies = self
            .latencies
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .clone();
        latencies.sort_unstable();
        let at =
            |per_mille: usize| latencies.get(latencies.len().saturating_sub(1) * per_mille / 1000);
        Some([*at(500)?, *at(990)?, *at(1000)?].map(u64::from))
    }
}

/// Serves faults until the session is over.
pub(super) fn serve_faults(receiving: &Receiving<'_>, counters: &FaultCounters, lane: &Lane) {
    go_first();
    let _session_ends = receiving.end_on_panic();
    let served = Service::new(receiving, counters, lane).and_then(Service::serve);
    if let Err(error) = served {
        receiving.broke(&error);
    }
}

struct Service<'a> {
    receiving: &'a Receiving<'a>,
    counters: &'a FaultCounters,
    reader: crate::transport::LaneReader,
    writer: LaneWriter,
    layout: &'a Layout,
    staging: Vec<u8>,
    faults: Vec<Place>,
    /// Places to look at again when no dirty set can name them any more.
    unsettled: Vec<Place>,
    /// When the chunks that are being fetched were asked for; as many as there are threads that wait.
    asked: Vec<(u64, Instant)>,
}

impl<'a> Service<'a> {
    fn new(
        receiving: &'a Receiving<'a>,
        counters: &'a FaultCounters,
        lane: &Lane,
    ) -> Result<Self, ReceiveError> {
        let (reader, writer) = lane.split()?;
        Ok(Self {
            receiving,
            counters,
            reader,
            writer,
            layout: receiving.layout(),
            staging: Vec::new(),
            faults: Vec::new(),
            unsettled: Vec::new(),
            asked: Vec::new(),
        })
    }

    fn serve(mut self) -> Result<(), ReceiveError> {
        loop {
            if self.receiving.monitor.lock().closed || self.counters.stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            let (fault, frame) = self.wait()?;
            self.faults.append(&mut self.unsettled);
            if fault {
                self.receiving.memory.faults(&mut self.faults)?;
            }
            self.sort_faults()?;
            self.fetch()?;
            if frame {
                self.answer()?;
            }
        }
    }

    /// Whether faults wait, and whether a frame waits.
    fn wait(&self) -> Result<(bool, bool), ReceiveError> {
        let lane = PollFd::from_borrowed_fd(self.reader.as_fd(), PollFlags::IN);
        let mut fds = vec![lane];
        if let Some(fd) = self.receiving.memory.fault_fd() {
            fds.push(PollFd::from_borrowed_fd(fd, PollFlags::IN));
        }
        match poll(&mut fds, Some(&IDLE)) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok((false, false)),
            Err(errno) => return Err(io::Error::from(errno).into()),
        }
        // Any flag, so that an error is read and told.
        let ready = |index: usize| {
            fds.get(index)
                .is_some_and(|fd: &PollFd<'_>| !fd.revents().is_empty())
        };
        Ok((ready(1), ready(0)))
    }

    fn sort_faults(&mut self) -> Result<(), ReceiveError> {
        let memory = self.receiving.memory;
        for place in self.faults.drain(..) {
            let chunk = self.layout.chunk_at(place.region, place.offset).0;
            let (fault, settled) = {
                let mut state = self.receiving.monitor.lock();
                let fault = state.machine.handle_fault(chunk);
                (fault, state.machine.is_settled())
            };
            match fault {
                Fault::Requested => {
                    self.counters.fetched.fetch_add(1, Ordering::Relaxed);
                    self.asked.push((chunk, Instant::now()));
                }
                Fault::Awaited => {}
                // Until the device state is loaded a dirty set may still name the chunk, and what is made present now
                // would pass for what is to come.
                Fault::Resident if !settled => self.unsettled.push(place),
                // The chunk is here and this page of it is not: it is zero. Unless it was installed since the fault was
                // raised, which the kernel knows; then the waiter is woken.
                Fault::Resident => {
                    memory.install_zeros(place, memory.page_size())?;
                    memory.wake(place, memory.page_size())?;
                }
                // Nobody will bring it. The waiter waits, which is better than reading zeros.
                Fault::Lost => {}
            }
        }
        Ok(())
    }

    fn fetch(&mut self) -> Result<(), ReceiveError> {
        loop {
            let message = self.receiving.monitor.lock().machine.poll_urgent();
            let Some(message) = message else {
                return Ok(());
            };
            let bytes = self.writer.send(&message, &[])?;
            self.receiving.counters.frame(bytes);
        }
    }

    fn answer(&mut self) -> Result<(), ReceiveError> {
        let (message, payload) = match self.reader.receive() {
            Err(crate::transport::LaneError::Closed) if self.receiving.monitor.lock().closed => {
                return Ok(());
            }
            next => next?,
        };
        let chunks = match &message {
            Message::Chunks(chunks) => chunks.runs.iter().map(|run| run.run).collect(),
            _ => Vec::new(),
        };
        self.receiving.receive(
            URGENT_LANE,
            message,
            payload,
            &mut self.reader,
            &mut self.staging,
        )?;
        let mut latencies = self
            .counters
            .latencies
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        self.asked.retain(|(chunk, asked)| {
            let answered = chunks.iter().any(|run| run.range().contains(chunk));
            if answered && latencies.len() < SAMPLES {
                let micros = asked.elapsed().as_micros();
                latencies.push(u32::try_from(micros).unwrap_or(u32::MAX));
            }
            !answered
        });
        // What bulk brought first was never answered here.
        if self.asked.len() > 4096 {
            self.asked.clear();
        }
        Ok(())
    }
}
