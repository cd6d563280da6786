//! Where the snapshot's memory is.

use std::fs::File;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use memferry::backend::FileStorage;
use memferry::backend::nbd::{NbdUrl, Remote, RemoteOptions};
use memferry::chunk::Storage;
use memferry::mount::{Managed, ManagedOptions, Push};

use super::UffdHandler;
use crate::cache::CacheFile;

/// What was named on the command line.
#[derive(Debug, Clone)]
pub(crate) enum From {
    Url(Box<NbdUrl>),
    Path(PathBuf),
}

impl FromStr for From {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.contains("://") {
            return text
                .parse()
                .map(|url| Self::Url(Box::new(url)))
                .map_err(|error| format!("{error}"));
        }
        match text {
            "" => Err("write a path or a URL".to_owned()),
            path => Ok(Self::Path(path.into())),
        }
    }
}

/// The snapshot's memory.
pub(super) struct Source {
    pub(super) storage: Arc<dyn Storage>,
    remote: Option<Arc<Remote>>,
    /// Removed when nobody reads it any more.
    _file: Option<CacheFile>,
}

impl Source {
    pub(super) fn open(args: &UffdHandler) -> anyhow::Result<Self> {
        let (storage, remote, file) = match &args.from {
            From::Path(path) => {
                ensure!(
                    args.cache.is_none(),
                    "what is in a file of this machine needs no --cache"
                );
                let file =
                    File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
                let storage = FileStorage::new(file)
                    .with_context(|| format!("cannot read {}", path.display()))?;
                (Arc::new(storage) as Arc<dyn Storage>, None, None)
            }
            From::Url(url) => {
                let remote = connect(args, url)?;
                let (storage, file) = cached(args, &remote)?;
                (storage, Some(remote), file)
            }
        };
        ensure!(
            !storage.is_empty(),
            "the snapshot's memory is empty: there is nothing to serve"
        );
        Ok(Self {
            storage,
            remote,
            _file: file,
        })
    }

    /// Why it cannot be reached at this moment.
    pub(super) fn outage(&self) -> Option<String> {
        self.remote.as_ref().and_then(|remote| remote.outage())
    }
}

fn connect(args: &UffdHandler, url: &NbdUrl) -> anyhow::Result<Arc<Remote>> {
    let options = RemoteOptions {
        read_only: true,
        ..args.remote.options(args.deadline)
    };
    Ok(Arc::new(Remote::connect(url, &options)?))
}

fn cached(
    args: &UffdHandler,
    remote: &Arc<Remote>,
) -> anyhow::Result<(Arc<dyn Storage>, Option<CacheFile>)> {
    let remote = Arc::clone(remote);
    let Some(cache) = args.cache.as_ref().filter(|_| !remote.is_empty()) else {
        return Ok((remote, None));
    };
    let (local, file) = cache.open(remote.len())?;
    let options = ManagedOptions {
        pull: !args.no_populate,
        window: args.window.map(|window| window.as_u64()),
        push: Push::Never,
        read_only: true,
        // The server's own deadline, whose error says more, comes before.
        deadline: args.deadline + args.deadline / 2 + Duration::from_secs(1),
        ..ManagedOptions::default()
    };
    let managed =
        Managed::open(remote, local, &options).context("cannot fetch the snapshot's memory")?;
    Ok((Arc::new(managed), file))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_a_url_or_a_path() {
        let check = |text: &str, expected: Option<bool>| {
            let is_url = text
                .parse::<From>()
                .ok()
                .map(|from| matches!(from, From::Url(_)));
            assert_eq!(is_url, expected, "{text}");
        };
        check("nbd://h/mem", Some(true));
        check("nbd+unix:///mem?socket=/run/s", Some(true));
        check("http://h/mem", None);
        check("vm.mem", Some(false));
        check("", None);
    }
}
