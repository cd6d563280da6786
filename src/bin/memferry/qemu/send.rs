//! `memferry qemu send`.

use std::net::ToSocketAddrs;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use bytesize::ByteSize;
use memferry::migrate::{self, Budget, Forecast, SeedError, SeedOptions, SeedOutcome, SeedReport};
use memferry::subject::qemu::{Machine, OutgoingQemu, Qmp};
use memferry::transport::Session;

use super::watch::Watchdog;
use super::{check_encryption, ram};
use crate::args::Send;
use crate::exit::Different;
use crate::output::{Output, seconds};
use crate::signals::cancel_on_signal;

/// How long the connections to the receiver may take to stand.
const CONNECT: Duration = Duration::from_secs(10);

/// What a cut-over may take besides: dirty sets, device state and acknowledgements on a slow link.
const REST: Duration = Duration::from_secs(30);

/// Sends the guest.
pub(crate) fn run(args: &Send, output: Output) -> anyhow::Result<()> {
    check_addresses(&args.pairing.address, args.insecure)?;
    let cancel = cancel_on_signal()?;
    let patience = args.patience.guest_timeout;
    let deadline = Instant::now() + patience;
    let mut qmp = Qmp::connect(&args.qmp, deadline)?;
    if let Some(pid) = args.pid {
        qmp = qmp.with_peer_pid(pid);
    }
    let machine = Machine::inspect(&mut qmp, deadline)?;
    let mut subject = OutgoingQemu::new(qmp, machine.clone())?;
    if !args.dry_run {
        subject = match Watchdog::start(&args.qmp) {
            Ok(watchdog) => subject.with_executor(Box::new(watchdog)),
            Err(error) => {
                output.remark(&format!(
                    "memferry: nobody watches over this process ({error}): if it is killed while the guest stands still, let the \
                     guest run with `migrate_cancel` and `cont` on its QMP socket"
                ));
                subject
            }
        };
    }

    let options = SeedOptions {
        budget: Budget {
            downtime: migrate_proto::Micros(
                u64::try_from(args.downtime_limit.as_micros()).unwrap_or(u64::MAX),
            ),
            post_copy: args.post_copy.into(),
            ..Budget::default()
        },
        bandwidth: args.max_bandwidth.map(|ByteSize(bytes)| bytes.max(1)),
        verify: args.verify.into(),
        dry_run: args.dry_run,
        silence: args.patience.peer_timeout,
        subject_deadline: patience,
        // What the user allows the guest and both QEMUs to take, and room for the rest.
        cut_over_deadline: args.downtime_limit + 2 * patience + REST,
        ..SeedOptions::default()
    };
    let ram = ram::source(&machine, options.chunk_size)?;
    if let Some(remark) = &ram.remark {
        output.remark(&format!("memferry: {remark}"));
    }
    let session = Session::connect(
        &args.pairing,
        args.lanes,
        args.patience.peer_timeout,
        Instant::now() + CONNECT,
    )?;
    if !args.dry_run {
        subject.prepare(Instant::now() + patience)?;
    }
    let (progress, shown) = output.progress();
    let result = migrate::seed(
        &session,
        &ram.regions,
        &mut subject,
        &options,
        Some(progress),
        &cancel,
    );
    let _ = shown.join();
    conclude(result, output)
}

/// All addresses of a name are tried when connecting, so each has to be allowed.
fn check_addresses(name: &str, insecure: bool) -> anyhow::Result<()> {
    let addresses = name
        .to_socket_addrs()
        .with_context(|| format!("cannot resolve {name}"))?;
    let mut any = false;
    for address in addresses {
        check_encryption(address, insecure)?;
        any = true;
    }
    ensure!(any, "{name} has no address");
    Ok(())
}

fn conclude(result: Result<SeedOutcome, SeedError>, output: Output) -> anyhow::Result<()> {
    match result? {
        SeedOutcome::Forecast(forecast) => {
            output.event("forecast", &forecast);
            tell_forecast(&forecast, output);
            Ok(())
        }
        SeedOutcome::Moved(report) => {
            output.event("report", &report);
            tell_report(&report, output);
            match report.verified {
                Some(verdict) if verdict.different > 0 => Err(Different {
                    different: verdict.different,
                    compared: verdict.compared,
                }
                .into()),
                _ => Ok(()),
            }
        }
    }
}

fn tell_report(report: &SeedReport, output: Output) {
    output.line("The guest runs at the destination, and all of its memory is there.");
    output.line(&format!("  total        {}", seconds(report.total)));
    output.line(&format!("  blackout     {}", seconds(report.blackout)));
    for (what, took) in &report.blackout_parts {
        output.line(&format!("    {what:<16} {}", seconds(*took)));
    }
    let traffic = report.traffic;
    output.line(&format!(
        "  sent         {} ({} of memory, {} of zeros for nothing), device state {}",
        ByteSize(traffic.wire_bytes),
        ByteSize(traffic.memory_bytes),
        ByteSize(traffic.zero_bytes),
        ByteSize(report.state_bytes)
    ));
    output.line(&format!(
        "  rounds       {}{}",
        report.rounds,
        if report.post_copy {
            ", then post-copy"
        } else {
            ""
        }
    ));
    if report.faults > 0 {
        output.line(&format!("  faults       {}", report.faults));
    }
    if let Some(verdict) = report.verified {
        output.line(&format!(
            "  verified     {} chunks compared, {} differ",
            verdict.compared, verdict.different
        ));
    }
    if let Some(span) = report.verify_blackout {
        output.line(&format!(
            "               which took {} of the blackout",
            seconds(span)
        ));
    }
}

fn tell_forecast(forecast: &Forecast, output: Output) {
    output.line("Both sides fit together; nothing was changed.");
    output.line(&format!(
        "  memory       {}, {} of it with data",
        ByteSize(forecast.bytes),
        ByteSize(forecast.data_bytes)
    ));
    output.line(&format!(
        "  dirtied      {}/s",
        ByteSize(forecast.dirty_rate)
    ));
    output.line(&format!(
        "  link         {}/s",
        ByteSize(forecast.bandwidth)
    ));
    if forecast.gives_up {
        output
            .line("  A migration would not converge: allow post-copy or raise the downtime limit.");
        return;
    }
    output.line(&format!(
        "  expected     {} rounds{}, {} until the destination runs, {} blackout",
        forecast.rounds,
        if forecast.post_copy {
            " and post-copy"
        } else {
            ""
        },
        seconds(forecast.time),
        seconds(forecast.blackout)
    ));
}
