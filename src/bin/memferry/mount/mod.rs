//! `memferry mount`.

#[cfg(not(any(feature = "fuse", feature = "nbd-device")))]
compile_error!("the command needs a way to show regions: the feature `fuse` or `nbd-device`");

mod ending;
mod exec;
mod place;
mod region;
mod view;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use bytesize::ByteSize;
use clap::Args;
use memferry::backend::nbd::NbdUrl;
use memferry::chunk::ChunkSize;
use serde_json::json;

use crate::cache::Cache;
use crate::output::Output;
use crate::remote::RemoteArgs;
use crate::serve::chunk_size;
use crate::signals::stop_on_signal;
use ending::Ending;
use exec::Program;
use place::Place;
use region::Region;
use view::View;

pub(crate) use region::{Lost, Unsaved};

/// How often the mount is looked at: whether the program has ended, whether somebody has unmounted it, and how far it is.
const LOOK: Duration = Duration::from_millis(100);

const HELP: &str = "\
The region is a file at PATH, or with --nbd a block device, until Ctrl-C, SIGTERM or `umount` ends it: then what was written is saved and \
the mount taken away. A second signal forces it, and says what is lost.

Without --direct the mount is managed: what is read once is kept here, the rest is fetched meanwhile, and what is written is kept here and \
saved at the remote end at intervals, on fsync, and at the end.

Exit codes: 0 all that was written is saved, 1 nothing was mounted, 2 wrong arguments, 3 something that was written may be lost: the message says \
what. With --exec the program's own code, unless something is lost.";

#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(crate) struct Mount {
    /// What to mount, for example `nbd://HOST/EXPORT` or `nbd+unix:///EXPORT?socket=PATH`; `memferry list` shows what a server has
    #[arg(value_name = "URL")]
    url: NbdUrl,
    /// Where: a file, which is made if it is not there, or a folder, which will have one file in it
    #[arg(value_name = "PATH", required_unless_present_any = ["nbd", "exec"], conflicts_with = "nbd")]
    path: Option<PathBuf>,
    /// As a block device of this machine, whose path is printed
    #[arg(long)]
    nbd: bool,
    /// Run a program with the mount, unmount when it ends, and exit as it did; `{}` in its arguments and `MEMFERRY_PATH` in its environment
    /// are the path. Goes last
    #[arg(long, value_name = "PROGRAM", num_args = 1.., allow_hyphen_values = true)]
    exec: Option<Vec<String>>,
    /// Keep nothing here: every read and write goes to the server
    #[arg(long, conflicts_with_all = ["cache", "chunk_size", "pull_first", "no_pull", "push_interval"])]
    direct: bool,
    /// Where to keep what is here: `memory`, a file that is made for it, or a folder to make one in
    #[arg(long, value_name = "WHERE", default_value = "memory")]
    cache: Cache,
    /// The unit of what is here or not, a power of two from 4 KiB to 4 MiB
    #[arg(long, value_name = "SIZE", default_value = "4KiB", value_parser = chunk_size)]
    chunk_size: ChunkSize,
    /// Fetch everything before it is mounted
    #[arg(long, conflicts_with = "no_pull")]
    pull_first: bool,
    /// Fetch only what is read
    #[arg(long)]
    no_pull: bool,
    /// How often what was written is saved at the remote end; 0s for on fsync and at the end only
    #[arg(long, value_name = "TIME", default_value = "20s", value_parser = humantime::parse_duration)]
    push_interval: Duration,
    /// Refuse to be written
    #[arg(long)]
    read_only: bool,
    /// The most bytes under way at once in the background; without it, what the link needs, or 8 MiB for each large read of a direct mount
    #[arg(long, value_name = "SIZE")]
    window: Option<ByteSize>,
    #[command(flatten)]
    remote: RemoteArgs,
    /// How long the server may take to answer; then whoever waits gets an input/output error
    #[arg(long, value_name = "TIME", default_value = "20s", value_parser = humantime::parse_duration)]
    deadline: Duration,
    /// Take a server that knows no flush for one that needs none
    #[arg(long)]
    assume_durable: bool,
    /// One JSON event a line on standard output
    #[arg(long)]
    pub(crate) json: bool,
}

/// Mounts until a signal comes, the program ends, or somebody unmounts.
pub(crate) fn run(args: &Mount, output: Output) -> anyhow::Result<()> {
    let signal = stop_on_signal(
        "saving what was written, and unmounting; once more to force it",
        "forcing it",
    )?;
    let region = Arc::new(Region::open(args)?);
    region.wait_for_all(args, &signal)?;
    let place = Place::mount(args, &region)?;
    let path = place.path().to_owned();
    output.event(
        "mounted",
        &json!({ "path": path, "url": args.url.to_string(), "size": region.len(), "read_only": region.is_read_only() }),
    );
    if args.exec.is_none() {
        output.line(&path.display().to_string());
    }
    let program = args
        .exec
        .as_deref()
        .map(|words| Program::start(words, &path))
        .transpose();
    // A program that cannot be started leaves a mount that has to be ended in the proper way all the same.
    let (mut program, mut failed) = match program {
        Ok(program) => (program, None),
        Err(error) => (None, Some(error.context("the program was not run"))),
    };
    let mut view = View::new(output);
    while failed.is_none() && !place.has_ended() {
        // Where none can come any more, nothing else would end it.
        if signal.recv_timeout(LOOK) != Err(RecvTimeoutError::Timeout) {
            break;
        }
        view.show(&region);
        match program.as_mut().map(Program::ended) {
            None | Some(Ok(None)) => {}
            Some(Ok(Some(_))) => break,
            Some(Err(error)) => failed = Some(error.context("cannot wait for the program")),
        }
    }
    view.end();
    output.event("ending", &json!({}));
    let ending = Ending::new(Arc::clone(&region), place, output);
    ending.run(&signal, program.as_mut(), args.deadline)?;
    output.event("ended", &json!({}));
    if let Some(error) = failed {
        return Err(error);
    }
    if let Some(program) = &mut program {
        // After a signal it may have gone on until its file went.
        return exec::pass_on(program.ended()?);
    }
    Ok(())
}
