//! `memferry serve`.

use std::fs::{File, OpenOptions};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use bytesize::ByteSize;
use clap::Args;
use memferry::backend::nbd::NbdUrl;
use memferry::backend::{DirectoryStore, FileStorage, MemoryStorage};
use memferry::chunk::{ChunkSize, Chunked, Storage};
use memferry::frontend::nbd::{Event, Export, Listener, Server, ServerOptions, Tls};
use serde_json::json;

use crate::exit::Unflushed;
use crate::output::Output;
use crate::signals::stop_on_signal;
use crate::socket::{self, Remove};

/// How long clients have for answers to what they have asked for, once the server is told to end.
const DRAIN: Duration = Duration::from_secs(10);

const HELP: &str = "\
What is served is reached by the URL that is printed: by `memferry mount`, qemu, nbdcopy, nbd-client and whatever else speaks NBD. Ctrl-C and \
SIGTERM end it: clients get the answers to what they have asked for, and what they wrote is made durable.

Exit codes: 0 ended by a signal, and all is durable, 1 nothing was served, 2 wrong arguments, 3 what clients wrote may be lost: the \
message says why.";

#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(crate) struct Serve {
    /// What to serve: the path of a file or block device, `memory:SIZE` for memory that is gone at the end, or `dir:PATH` for a folder with
    /// one file a chunk
    #[arg(value_name = "WHAT")]
    what: What,
    /// Address and port, or `unix:PATH`; port 0 takes any free one. May be given several times
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:10809")]
    listen: Vec<Address>,
    /// The export's name; clients that ask for none get it whatever it is
    #[arg(long, default_value = "")]
    name: String,
    /// Something about the export for people who list it
    #[arg(long, value_name = "TEXT", default_value = "")]
    description: String,
    /// The size of a file that is to be made, or of what the folder holds
    #[arg(long, value_name = "SIZE")]
    size: Option<ByteSize>,
    /// The size of the files in a folder, a power of two from 4 KiB to 4 MiB
    #[arg(long, value_name = "SIZE", default_value = "64KiB", value_parser = chunk_size)]
    chunk_size: ChunkSize,
    /// Refuse to be written
    #[arg(long)]
    read_only: bool,
    /// PEM file with the server's certificate and those that vouch for it; nothing is told without TLS then
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// PEM file with the certificate's key
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// PEM file with certificates one of which has to vouch for every client
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_client_ca: Option<PathBuf>,
    /// Allow an address that is not loopback without TLS: anybody there can read and write, and listen
    #[arg(long)]
    insecure: bool,
    /// The most clients at once
    #[arg(long, value_name = "N", default_value_t = 128)]
    max_clients: usize,
    /// One JSON event a line on standard output
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum What {
    Path(PathBuf),
    Memory(ByteSize),
    Directory(PathBuf),
}

impl FromStr for What {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(size) = text.strip_prefix("memory:") {
            return size.parse().map(Self::Memory);
        }
        let directory = text.strip_prefix("dir:");
        match directory.unwrap_or(text) {
            "" => Err("it is empty".to_owned()),
            path if directory.is_some() => Ok(Self::Directory(path.into())),
            path => Ok(Self::Path(path.into())),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("unix:") {
            Some("") => Err("a socket has a path: unix:PATH".to_owned()),
            Some(path) => Ok(Self::Unix(path.into())),
            None => text.parse().map(Self::Tcp).map_err(|_| {
                "write ADDRESS:PORT, with brackets around an IPv6 address, or unix:PATH".to_owned()
            }),
        }
    }
}

pub(crate) fn chunk_size(text: &str) -> Result<ChunkSize, String> {
    let size: ByteSize = text.parse()?;
    u32::try_from(size.as_u64())
        .ok()
        .and_then(ChunkSize::new)
        .ok_or_else(|| "it is no power of two from 4 KiB to 4 MiB".to_owned())
}

/// Serves until a signal comes.
pub(crate) fn run(args: &Serve, output: Output) -> anyhow::Result<()> {
    check_access(args)?;
    let signal = stop_on_signal(
        "ending: answers what was asked for, and makes durable what was written",
        "still ending: waits for the storage",
    )?;
    let storage = open(args)?;
    let export = export(args, Arc::clone(&storage))?;
    let server = Server::new(ServerOptions {
        connections: args.max_clients,
        tls: tls(args)?,
        on_event: Some(Arc::new(move |event| tell(event, output))),
        ..ServerOptions::default()
    });
    server.add(export)?;
    let mut sockets = Vec::new();
    for address in &args.listen {
        let (listener, url) = listen(args, address, &mut sockets)
            .with_context(|| format!("cannot listen at {}", shown(address)))?;
        server.listen(listener)?;
        output.event(
            "serving",
            &json!({ "url": url.to_string(), "size": storage.len() }),
        );
        output.line(&url.to_string());
    }
    // The handler keeps its end for as long as the process runs, so this ends with a signal.
    let _ = signal.recv();
    finish(args, &server, &storage, output)
}

/// Refuses to let a network read and write without asking who it is.
fn check_access(args: &Serve) -> anyhow::Result<()> {
    if args.insecure || args.tls_cert.is_some() {
        return Ok(());
    }
    for address in &args.listen {
        if let Address::Tcp(address) = address
            && !address.ip().is_loopback()
        {
            bail!(
                "{address} is not loopback, and whoever can reach it could read and write everything, unencrypted: give --tls-cert, \
                 --tls-key and --tls-client-ca, run it through a tunnel to loopback (for example `ssh -L`), or add --insecure if the \
                 network is trusted"
            );
        }
    }
    Ok(())
}

fn open(args: &Serve) -> anyhow::Result<Arc<dyn Storage>> {
    Ok(match &args.what {
        What::Memory(size) => {
            ensure!(
                args.size.is_none(),
                "the size of memory is a part of its name: leave out --size"
            );
            Arc::new(MemoryStorage::new(size.as_u64()))
        }
        What::Directory(path) => {
            let size = args
                .size
                .context("a folder does not say how much it is to hold: add --size")?;
            let store = DirectoryStore::open(path, args.chunk_size, size.as_u64())
                .with_context(|| format!("cannot use the folder {}", path.display()))?;
            Arc::new(Chunked::new(Arc::new(store)))
        }
        What::Path(path) => {
            let file = file(args, path)?;
            let storage = FileStorage::new(file)
                .with_context(|| format!("cannot serve {}", path.display()))?;
            Arc::new(storage)
        }
    })
}

fn file(args: &Serve, path: &Path) -> anyhow::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(!args.read_only);
    let existing = match options.open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && !args.read_only => None,
        opened => Some(opened.with_context(|| format!("cannot open {}", path.display()))?),
    };
    let Some(size) = args.size.map(|size| size.as_u64()) else {
        return existing.with_context(|| {
            format!("there is no {}: add --size to have it made", path.display())
        });
    };
    if let Some(file) = existing {
        let metadata = file.metadata()?;
        ensure!(
            metadata.is_file() && metadata.len() == size,
            "{} is there already, and is no file of {size} bytes: leave out --size to serve it as it is",
            path.display()
        );
        return Ok(file);
    }
    let mut make = || {
        let file = options.create_new(true).open(path)?;
        file.set_len(size)?;
        Ok::<_, io::Error>(file)
    };
    make().with_context(|| format!("cannot make {}", path.display()))
}

fn export(args: &Serve, storage: Arc<dyn Storage>) -> anyhow::Result<Export> {
    let export = Export::new(&args.name, storage)?.with_description(&args.description)?;
    let export = match args.what {
        // To forget is faster than to copy.
        What::Memory(_) => export.with_fast_zeroes(),
        What::Path(_) | What::Directory(_) => export,
    };
    Ok(if args.read_only {
        export.read_only()
    } else {
        export
    })
}

#[cfg(feature = "tls")]
fn tls(args: &Serve) -> anyhow::Result<Tls> {
    let (Some(certificate), Some(key)) = (&args.tls_cert, &args.tls_key) else {
        return Ok(Tls::Off);
    };
    let clients = args.tls_client_ca.as_deref();
    let identity = memferry::frontend::nbd::TlsIdentity::load(certificate, key, clients)?;
    Ok(Tls::Required(identity))
}

#[cfg(not(feature = "tls"))]
fn tls(args: &Serve) -> anyhow::Result<Tls> {
    ensure!(
        args.tls_cert.is_none(),
        "this program was built without TLS: build it with the feature `tls`"
    );
    Ok(Tls::Off)
}

/// The sockets that were made, to be removed at the end.
type Sockets = Vec<Remove>;

fn listen(
    args: &Serve,
    address: &Address,
    sockets: &mut Sockets,
) -> anyhow::Result<(Listener, NbdUrl)> {
    let (listener, url) = match address {
        Address::Tcp(address) => {
            let listener = TcpListener::bind(address)?;
            let local = listener.local_addr()?;
            let host = if local.ip().is_unspecified() {
                let name = rustix::system::uname();
                name.nodename().to_string_lossy().into_owned()
            } else {
                local.ip().to_string()
            };
            let url = NbdUrl::tcp(&host, local.port(), &args.name)?;
            (Listener::Tcp(listener), url)
        }
        Address::Unix(path) => {
            let listener = socket::bind(path)?;
            sockets.push(Remove(path.clone()));
            let whole = std::path::absolute(path)?;
            (Listener::Unix(listener), NbdUrl::unix(whole, &args.name)?)
        }
    };
    Ok((listener, url.with_tls(args.tls_cert.is_some())))
}

fn shown(address: &Address) -> String {
    match address {
        Address::Tcp(address) => address.to_string(),
        Address::Unix(path) => path.display().to_string(),
    }
}

fn tell(event: &Event, output: Output) {
    match event {
        Event::Opened {
            client,
            peer,
            export,
            encrypted,
        } => {
            let fields = json!({
                "client": client, "peer": peer, "export": export, "encrypted": encrypted
            });
            output.event("client-opened", &fields);
            output.remark(&format!("client {client} is connected from {peer}"));
        }
        Event::Closed {
            client,
            peer,
            traffic,
            error,
        } => {
            let fields = json!({
                "client": client, "peer": peer, "traffic": traffic, "error": error
            });
            output.event("client-closed", &fields);
            let error = error.as_ref().map(|error| format!("; {error}"));
            output.remark(&format!(
                "client {client} is gone: {} requests, {} read, {} written{}",
                traffic.requests,
                ByteSize(traffic.read),
                ByteSize(traffic.written),
                error.unwrap_or_default()
            ));
        }
        Event::TurnedAway { peer, reason } => {
            output.event("turned-away", &json!({ "peer": peer, "reason": reason }));
            output.remark(&format!("turned {peer} away: {reason}"));
        }
        _ => {}
    }
}

fn finish(
    args: &Serve,
    server: &Server,
    storage: &Arc<dyn Storage>,
    output: Output,
) -> anyhow::Result<()> {
    if let Err(error) = server.shutdown(Instant::now() + DRAIN) {
        // They know that they got no answer.
        output.remark(&format!("memferry: {error}"));
    }
    if !args.read_only {
        storage.flush().map_err(Unflushed)?;
    }
    output.event("ended", &json!({}));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_served_and_where_is_read_from_the_arguments() {
        let check = |text: &str, expected: Option<What>| {
            assert_eq!(text.parse::<What>().ok(), expected, "{text}");
        };
        check("memory:1MiB", Some(What::Memory(ByteSize::mib(1))));
        check("memory:much", None);
        check("dir:a/b", Some(What::Directory("a/b".into())));
        check("dir:", None);
        check("disk.img", Some(What::Path("disk.img".into())));
        let check = |text: &str, expected: Option<Address>| {
            assert_eq!(text.parse::<Address>().ok(), expected, "{text}");
        };
        let address = "[::1]:0".parse().unwrap();
        check("[::1]:0", Some(Address::Tcp(address)));
        check("unix:/run/x", Some(Address::Unix("/run/x".into())));
        check("unix:", None);
        check("localhost", None);
        assert!(chunk_size("64KiB").is_ok());
        assert!(chunk_size("65000").is_err());
        assert!(chunk_size("8MiB").is_err());
    }
}
