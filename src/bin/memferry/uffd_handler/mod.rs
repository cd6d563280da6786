//! `memferry uffd-handler`.

mod source;
mod view;
mod vmm;

use std::fmt;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use bytesize::ByteSize;
use clap::{Args, ValueEnum};
use memferry::frontend::{RefusedSnapshot, Snapshot};
use memferry::mount::{Restore, RestoreOptions, RestoreProgress};
use rustix::event::{PollFd, PollFlags, Timespec};
use serde_json::json;

use crate::cache::Cache;
use crate::output::Output;
use crate::remote::RemoteArgs;
use crate::signals::stop_on_signal;
use crate::socket::{self, Remove};
use source::{From, Source};
use view::View;
use vmm::{Vmm, Watchdog};

pub(crate) use vmm::watch;

/// How often it is looked whether a signal has come, the VMM has ended, or all is there.
const LOOK: Duration = Duration::from_millis(50);

/// How long whoever connects may take to say what its memory is.
const HANDSHAKE: Duration = Duration::from_secs(5);

/// How long a VMM may take to go on after it was told that it may give memory back.
const LET_GO: Duration = Duration::from_secs(10);

/// A storage that has not even failed by the deadline may do so, and say why, until so much later.
const GRACE: Duration = Duration::from_secs(2);

const HELP: &str = "\
Start it before the snapshot is loaded, on the host of the VMM:

    memferry uffd-handler --socket /run/vm/uffd.sock nbd://STORAGE/vm.mem
    curl --unix-socket /run/vm/api.sock -X PUT http://localhost/snapshot/load -d '{ \"snapshot_path\": \"vm.state\",
        \"mem_backend\": { \"backend_type\": \"Uffd\", \"backend_path\": \"/run/vm/uffd.sock\" }, \"resume_vm\": true }'

Pages come when the VMM accesses them, and all others in the background. When everything is there, the VMM needs this process no more, and it ends. \
A signal before that makes it fetch the rest and then end; a second one ends it without the rest, and the VMM as --on-failure says. If this process \
is killed, a watchdog of its own kills the VMM, which could only wait, unless --on-failure is wait.

Exit codes: 0 the VMM has all of its memory, or it has ended, or none came before a signal, 1 nothing was served, 2 wrong arguments, 3 the VMM does \
not get all of its memory: the message says what becomes of it.";

#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(crate) struct UffdHandler {
    /// The snapshot's memory: a URL of a server of network block devices, for example `nbd://HOST/EXPORT` or
    /// `nbd+unix:///EXPORT?socket=PATH`, or the path of the memory file
    #[arg(value_name = "FROM")]
    from: From,
    /// Where to wait for the VMM: the `backend_path` of its snapshot/load. Only this user can open it
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// Give the socket to a user: the one of the jailer
    #[arg(long, value_name = "UID[:GID]")]
    owner: Option<Owner>,
    /// Give up if no VMM has come after so long
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    wait: Option<Duration>,
    /// Fetch only what the VMM accesses
    #[arg(long)]
    no_populate: bool,
    /// Keep what is fetched here, too, and begin with it before the VMM has come: `memory`, a file that is made for it, or a folder to make one
    /// in
    #[arg(long, value_name = "WHERE")]
    cache: Option<Cache>,
    /// How long the VMM may wait for a page that cannot be had, and the server may take to answer
    #[arg(long, value_name = "TIME", default_value = "20s", value_parser = humantime::parse_duration)]
    deadline: Duration,
    /// What becomes of a VMM that cannot have a page
    #[arg(long, value_enum, default_value_t = OnFailure::Kill)]
    on_failure: OnFailure,
    /// The most bytes under way at once in the background; without it, what the link needs
    #[arg(long, value_name = "SIZE")]
    window: Option<ByteSize>,
    #[command(flatten)]
    remote: RemoteArgs,
    /// One JSON event a line on standard output
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum OnFailure {
    /// It is killed if it has waited for longer than --deadline; its snapshot can be restored again
    Kill,
    /// It waits, for ever if need be
    Wait,
}

/// Who gets the socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Owner {
    uid: u32,
    gid: Option<u32>,
}

impl FromStr for Owner {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (uid, gid) = match text.split_once(':') {
            Some((uid, gid)) => (uid, Some(gid)),
            None => (text, None),
        };
        let number = |text: &str| {
            text.parse()
                .map_err(|_| "write the number of a user, or UID:GID".to_owned())
        };
        Ok(Self {
            uid: number(uid)?,
            gid: gid.map(number).transpose()?,
        })
    }
}

/// A VMM does not get all of its memory.
#[derive(Debug)]
pub(crate) struct Deprived {
    missing: u64,
    why: String,
    fate: Fate,
}

/// What becomes of a VMM.
#[derive(Debug)]
enum Fate {
    Killed,
    /// It could not be killed.
    Spared(std::io::Error),
    Waits,
}

impl Fate {
    /// Does with a VMM that lacks memory what was asked for.
    fn of(vmm: &Vmm, choice: OnFailure) -> Self {
        match choice {
            OnFailure::Kill => vmm.kill().map_or_else(Self::Spared, |()| Self::Killed),
            OnFailure::Wait => Self::Waits,
        }
    }
}

impl fmt::Display for Deprived {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { missing, why, fate } = self;
        write!(
            f,
            "{missing} bytes of the VMM's memory did not come: {why}. {fate}"
        )
    }
}

impl std::error::Error for Deprived {}

impl fmt::Display for Fate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Killed => f.write_str("The VMM was killed; its snapshot can be restored again"),
            Self::Spared(why) => write!(
                f,
                "The VMM could not be killed ({why}), and waits at its first absent page, for ever: end it"
            ),
            Self::Waits => f.write_str(
                "The VMM waits at its first absent page, for ever: end it, and restore its snapshot again",
            ),
        }
    }
}

/// Waits for a VMM, and serves its faults until it has all of its memory.
pub(crate) fn run(args: &UffdHandler, output: Output) -> anyhow::Result<()> {
    let signal = stop_on_signal(
        "ending: a VMM that is served gets the rest of its memory first; once more to force it",
        "forcing it",
    )?;
    let source = Source::open(args)?;
    let listening = Listening::open(args)?;
    output.event(
        "listening",
        &json!({ "socket": args.socket, "size": source.storage.len() }),
    );
    output.line(&args.socket.display().to_string());
    let Some((vmm, snapshot)) = listening.wait(args, &signal, output)? else {
        output.event("ended", &json!({}));
        return Ok(());
    };
    // One VMM a handler: nobody else gets in.
    drop(listening);
    let fields = json!({
        "pid": vmm.pid(),
        "mappings": snapshot.mappings().len(),
        "bytes": snapshot.mappings().iter().map(|mapping| mapping.len).sum::<u64>(),
        "page_size": snapshot.mappings().first().map(|mapping| mapping.page_size),
    });
    let restore = Restore::open(snapshot, source.storage.clone(), &options(args))
        .or_else(|refused| refuse(args, &vmm, refused))?;
    let serving = Serving {
        args,
        output,
        source: &source,
        restore,
        watchdog: watchdog(args, &vmm, output),
        vmm,
    };
    output.event("serving", &fields);
    serving.run(&signal)
}

fn options(args: &UffdHandler) -> RestoreOptions {
    RestoreOptions {
        populate: !args.no_populate,
        window: args.window.map(|window| window.as_u64()),
        ..RestoreOptions::default()
    }
}

fn watchdog(args: &UffdHandler, vmm: &Vmm, output: Output) -> Option<Watchdog> {
    if args.on_failure == OnFailure::Wait {
        return None;
    }
    Watchdog::start(vmm)
        .inspect_err(|error| {
            output.remark(&format!(
                "memferry: nobody watches over this process ({error}): if it is killed before the VMM has all of its memory, the VMM waits for \
                 ever"
            ));
        })
        .ok()
}

/// Ends a VMM that is not served, as far as that was asked for.
fn refuse<T>(args: &UffdHandler, vmm: &Vmm, refused: RefusedSnapshot) -> anyhow::Result<T> {
    let fate = Fate::of(vmm, args.on_failure);
    Err(anyhow::Error::from(refused).context(format!("the VMM is not served. {fate}")))
}

/// The socket at which a VMM is waited for.
struct Listening {
    listener: UnixListener,
    _remove: Remove,
}

impl Listening {
    fn open(args: &UffdHandler) -> anyhow::Result<Self> {
        let path = &args.socket;
        let listener = socket::bind_private(path)
            .with_context(|| format!("cannot listen at {}", path.display()))?;
        let remove = Remove(path.clone());
        if let Some(owner) = args.owner {
            std::os::unix::fs::chown(path, Some(owner.uid), owner.gid)
                .with_context(|| format!("cannot give {} to user {}", path.display(), owner.uid))?;
        }
        listener.set_nonblocking(true)?;
        Ok(Self {
            listener,
            _remove: remove,
        })
    }

    /// Waits for a VMM; `None` if a signal came first. Who connects and is none is turned away.
    fn wait(
        &self,
        args: &UffdHandler,
        signal: &Receiver<()>,
        output: Output,
    ) -> anyhow::Result<Option<(Vmm, Snapshot)>> {
        let until = args.wait.map(|wait| Instant::now() + wait);
        loop {
            if signal.try_recv().is_ok() {
                return Ok(None);
            }
            if until.is_some_and(|until| Instant::now() >= until) {
                bail!(
                    "no VMM has come in time: is {} the backend_path of its snapshot/load?",
                    args.socket.display()
                );
            }
            let mut polled = [PollFd::from_borrowed_fd(
                self.listener.as_fd(),
                PollFlags::IN,
            )];
            let look = Timespec::try_from(LOOK).expect("a part of a second");
            // A signal may interrupt it.
            let _ = rustix::event::poll(&mut polled, Some(&look));
            let Ok((socket, _)) = self.listener.accept() else {
                continue;
            };
            socket.set_nonblocking(false)?;
            let vmm = Vmm::new(socket);
            match Snapshot::receive(&vmm.socket, HANDSHAKE) {
                Ok(snapshot) => return Ok(Some((vmm, snapshot))),
                Err(refused) if refused.waits => return refuse(args, &vmm, refused),
                Err(refused) => {
                    let reason = refused.to_string();
                    output.event(
                        "turned-away",
                        &json!({ "pid": vmm.pid(), "reason": reason }),
                    );
                    output.remark(&format!("memferry: turned somebody away: {reason}"));
                }
            }
        }
    }
}

/// A VMM that is served.
struct Serving<'a> {
    args: &'a UffdHandler,
    output: Output,
    source: &'a Source,
    restore: Restore,
    watchdog: Option<Watchdog>,
    vmm: Vmm,
}

impl Serving<'_> {
    fn run(mut self, signal: &Receiver<()>) -> anyhow::Result<()> {
        let begun = Instant::now();
        let mut view = View::new(self.output);
        let mut signals = 0;
        let (progress, ended) = loop {
            std::thread::park_timeout(LOOK);
            if signal.try_recv() != Err(TryRecvError::Empty) {
                signals += 1;
                self.output.event("ending", &json!({}));
                self.restore.populate()?;
            }
            let progress = self.restore.progress();
            let why = self.why(&progress);
            view.show(&progress, why.as_deref());
            if self.vmm.has_ended() {
                break (progress, Ok("vmm-ended"));
            }
            if progress.memory.is_complete() {
                let finished = self
                    .restore
                    .finish(LET_GO)
                    .context("all of the VMM's memory has come, and it could not be let go of");
                // It has ended at this moment.
                let finished = finished.or_else(|error| match self.vmm.has_ended() {
                    true => Ok(()),
                    false => Err(error),
                });
                finished?;
                break (progress, Ok("complete"));
            }
            let lost = self.is_lost(&progress);
            if signals > 1 || lost {
                let memory = &progress.memory;
                let otherwise = if lost {
                    "nobody answered in time"
                } else {
                    "it was ended before"
                };
                let lacks = Deprived {
                    missing: memory.bytes - memory.resident - memory.zeros,
                    why: why.unwrap_or_else(|| otherwise.to_owned()),
                    fate: Fate::of(&self.vmm, self.args.on_failure),
                };
                break (progress, Err(lacks));
            }
        };
        if let Some(watchdog) = self.watchdog.take() {
            watchdog.release();
        }
        view.end(&progress, begun.elapsed());
        // Its threads may wait for a storage that does not answer, and nobody needs them: they end with this process.
        std::mem::forget(self.restore);
        self.output
            .event(ended.as_ref().copied().unwrap_or("deprived"), &json!({}));
        ended.map(|_| ()).map_err(Into::into)
    }

    /// Why memory does not come at this moment.
    fn why(&self, progress: &RestoreProgress) -> Option<String> {
        let waiting = progress.memory.waiting.as_ref();
        self.source
            .outage()
            .or_else(|| waiting.map(|waiting| waiting.error.clone()))
    }

    /// Whether somebody has waited for too long.
    fn is_lost(&self, progress: &RestoreProgress) -> bool {
        if self.args.on_failure == OnFailure::Wait {
            return false;
        }
        let memory = &progress.memory;
        let over = |since: Instant, grace| since.elapsed() >= self.args.deadline + grace;
        let in_vain = memory.waiting.as_ref().map(|waiting| waiting.since);
        in_vain.is_some_and(|since| over(since, Duration::ZERO))
            || memory.oldest.is_some_and(|since| over(since, GRACE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_owner_is_a_number_or_two() {
        let check = |text: &str, expected: Option<(u32, Option<u32>)>| {
            let parsed = text.parse::<Owner>().ok();
            assert_eq!(
                parsed.map(|owner| (owner.uid, owner.gid)),
                expected,
                "{text}"
            );
        };
        check("123", Some((123, None)));
        check("123:100", Some((123, Some(100))));
        check("root", None);
        check("1:", None);
    }

    #[test]
    fn what_becomes_of_a_vmm_is_said() {
        let deprived = Deprived {
            missing: 4096,
            why: "the server is away".to_owned(),
            fate: Fate::Waits,
        };
        let words = deprived.to_string();
        assert!(words.starts_with("4096 bytes"), "{words}");
        assert!(
            words.contains("the server is away") && words.contains("end it"),
            "{words}"
        );
    }
}
