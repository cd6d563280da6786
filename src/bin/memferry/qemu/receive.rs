//! `memferry qemu receive`.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use bytesize::ByteSize;
use memferry::migrate::{self, Cancel, LeechOptions, LeechOutcome, LeechReport};
use memferry::subject::qemu::{IncomingQemu, Machine, Qmp};
use memferry::transport::{ConnectError, Listener, Pairing, Session};
use serde_json::json;

use super::{check_encryption, ram};
use crate::args::Receive;
use crate::exit::{Different, Ended};
use crate::output::{Output, seconds};
use crate::signals::cancel_on_signal;

/// How long the other connections of a session may take once the first stands.
const GATHER: Duration = Duration::from_secs(10);

/// Receives a guest.
pub(crate) fn run(args: &Receive, output: Output) -> anyhow::Result<()> {
    check_encryption(args.listen, args.insecure)?;
    let cancel = cancel_on_signal()?;
    let patience = args.patience.guest_timeout;
    let deadline = Instant::now() + patience;
    let mut qmp = Qmp::connect(&args.qmp, deadline)?;
    if let Some(pid) = args.pid {
        qmp = qmp.with_peer_pid(pid);
    }
    let machine = Machine::inspect(&mut qmp, deadline)?;
    let mut subject = IncomingQemu::new(qmp, machine.clone(), deadline)?;
    subject.prepare(deadline)?;
    let ram = ram::destination(&machine)?;
    if let Some(error) = &ram.no_post_copy {
        output.remark(&format!(
            "memferry: cannot attach to QEMU, so there will be no post-copy: {error:#}"
        ));
    }
    let options = LeechOptions {
        silence: args.patience.peer_timeout,
        subject_deadline: patience,
        ..LeechOptions::default()
    };
    let listener =
        Listener::bind(args.listen).with_context(|| format!("cannot listen at {}", args.listen))?;
    let pairing = Pairing::new(advertised(args, listener.local_addr()?))?;
    tell_pairing(&pairing, output);
    loop {
        let session = accept(&listener, &pairing, args, &cancel, output)?;
        let (progress, shown) = output.progress();
        let over = AtomicBool::new(false);
        let result = thread::scope(|scope| {
            // A listener that fails meanwhile is told by the next accept, if there is one.
            let _ = scope.spawn(|| listener.turn_away(&pairing, || !over.load(Ordering::Relaxed)));
            let _until_the_end = Raise(&over);
            migrate::leech(
                &session,
                &ram.names,
                &ram.memory,
                &mut subject,
                &options,
                Some(progress),
                &cancel,
            )
        });
        let _ = shown.join();
        match result? {
            LeechOutcome::Moved(report) => {
                // It may have ended while the rest of the memory came, which no page fault tells.
                subject.answers(Instant::now() + patience).map_err(Ended)?;
                return conclude(&report, output);
            }
            LeechOutcome::DryRun => {
                output.event("dry-run", &json!({}));
                output.remark("A dry run has ended; nothing was changed. Still waiting, the string above is still good.");
            }
        }
    }
}

/// Raises a flag at the end of a scope, also of one that panics.
struct Raise<'a>(&'a AtomicBool);

impl Drop for Raise<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What the pairing string names: an address that listens everywhere is no address to connect to.
fn advertised(args: &Receive, listening: SocketAddr) -> String {
    match &args.advertise {
        Some(host) if host.contains(':') && !host.starts_with('[') => {
            format!("[{host}]:{}", listening.port())
        }
        Some(host) => format!("{host}:{}", listening.port()),
        None if listening.ip().is_unspecified() => {
            let name = rustix::system::uname();
            let host = name.nodename().to_string_lossy();
            format!("{host}:{}", listening.port())
        }
        None => listening.to_string(),
    }
}

fn tell_pairing(pairing: &Pairing, output: Output) {
    let string = pairing.to_string();
    output.event("pairing", &json!({ "string": string }));
    output.line(&format!(
        "On the source, run:\n\n  memferry qemu send --qmp SOCKET '{string}'\n"
    ));
    output.remark("Waiting for the source. Whoever has this string can send a guest here, once.");
}

fn accept(
    listener: &Listener,
    pairing: &Pairing,
    args: &Receive,
    cancel: &Cancel,
    output: Output,
) -> anyhow::Result<Session> {
    let give_up = args.wait.map(|wait| Instant::now() + wait);
    let late = || give_up.is_some_and(|give_up| Instant::now() >= give_up);
    loop {
        let session = listener.accept(
            pairing,
            args.patience.peer_timeout,
            GATHER,
            || !cancel.is_cancelled() && !late(),
            |from, error| output.remark(&format!("memferry: turned {from} away: {error}")),
        );
        match session {
            Ok(session) => return Ok(session),
            Err(ConnectError::Incomplete) if cancel.is_cancelled() => {
                bail!("cancelled by the user; nothing was migrated")
            }
            Err(ConnectError::Incomplete) if late() => {
                bail!("no source has come; nothing was migrated")
            }
            Err(ConnectError::Incomplete) => {
                output.remark(
                    "memferry: a source has come and gone before it was connected; still waiting",
                );
            }
            Err(error) => return Err(error.into()),
        }
    }
}

fn conclude(report: &LeechReport, output: Output) -> anyhow::Result<()> {
    output.event("report", report);
    output.line("The guest runs here, and all of its memory is here.");
    output.line(&format!("  total        {}", seconds(report.total)));
    output.line(&format!(
        "  received     {} ({} of memory, {} of zeros for nothing), device state {}",
        ByteSize(report.traffic.wire_bytes),
        ByteSize(report.traffic.memory_bytes),
        ByteSize(report.traffic.zero_bytes),
        ByteSize(report.state_bytes)
    ));
    if let Some([median, tail, longest]) = report.fault_micros {
        output.line(&format!(
            "  faults       {}, median {median} µs, 99th percentile {tail} µs, longest {longest} µs",
            report.faults
        ));
    }
    match report.verified {
        Some(verdict) => {
            output.line(&format!(
                "  verified     {} chunks compared, {} differ",
                verdict.compared, verdict.different
            ));
            if verdict.different > 0 {
                return Err(Different {
                    different: verdict.different,
                    compared: verdict.compared,
                }
                .into());
            }
            Ok(())
        }
        None => Ok(()),
    }
}
