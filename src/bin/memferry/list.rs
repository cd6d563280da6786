//! `memferry list`.

use std::path::PathBuf;

use bytesize::ByteSize;
use clap::Args;
use memferry::backend::nbd::{ListedExport, NbdUrl, RemoteOptions, TlsOptions, list};
use memferry::nbd::TransmissionFlags;
use serde_json::json;

use crate::output::Output;

const HELP: &str = "\
Exit codes: 0 the server has told, 1 it has not, 2 wrong arguments.";

#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(crate) struct List {
    /// The server, for example `nbd://HOST` or `nbd+unix:///?socket=PATH`
    #[arg(value_name = "URL")]
    url: NbdUrl,
    /// PEM file with certificates one of which has to vouch for the server, for nbds:// URLs
    #[arg(long, value_name = "FILE")]
    tls_ca: Option<PathBuf>,
    /// PEM file with this client's certificate
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// PEM file with the certificate's key
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// One JSON event an export on standard output
    #[arg(long)]
    pub(crate) json: bool,
}

/// Prints which exports a server has.
pub(crate) fn run(args: &List, output: Output) -> anyhow::Result<()> {
    let options = RemoteOptions {
        tls: TlsOptions {
            authorities: args.tls_ca.clone(),
            certificate: args.tls_cert.clone().zip(args.tls_key.clone()),
            name: None,
        },
        ..RemoteOptions::default()
    };
    for export in list(&args.url, &options)? {
        let url = args.url.clone().with_export(&export.name)?;
        tell(&export, &url, output);
    }
    Ok(())
}

fn tell(export: &ListedExport, url: &NbdUrl, output: Output) {
    let flags = export.export.map(|export| export.flags);
    let size = export.export.map(|export| export.size);
    let read_only = flags.map(|flags| flags.contains(TransmissionFlags::READ_ONLY));
    let blocks = export.blocks.map(|sizes| {
        json!({
            "minimum": sizes.minimum, "preferred": sizes.preferred, "maximum": sizes.maximum
        })
    });
    let fields = json!({
        "name": export.name, "url": url.to_string(), "description": export.description, "size": size,
        "read_only": read_only, "flags": flags.map(|flags| flags.0), "block_sizes": blocks,
        "contexts": export.contexts
    });
    output.event("export", &fields);
    let size = size.map_or_else(
        || "size not told".to_owned(),
        |size| format!("{} ({size} bytes)", ByteSize(size)),
    );
    let mut line = format!("{url}  {size}");
    if read_only == Some(true) {
        line.push_str(", read-only");
    }
    if !export.description.is_empty() {
        line.push_str(": ");
        line.push_str(&export.description);
    }
    output.line(&line);
}
