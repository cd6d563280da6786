//! Where the region is seen: a file, or a block device.

#[cfg(feature = "fuse")]
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

#[cfg(feature = "fuse")]
use anyhow::Context;

use super::Mount;
use super::region::Region;

/// Where the region is seen.
pub(super) enum Place {
    #[cfg(feature = "fuse")]
    File {
        file: memferry::frontend::FuseFile,
        /// What it is mounted on.
        root: PathBuf,
        /// Dropped last, so after it was unmounted.
        made: Mutex<Made>,
    },
    #[cfg(feature = "nbd-device")]
    Device(Box<Mutex<memferry::frontend::nbd::Device>>, PathBuf),
}

/// What was made to mount on, removed when it is dropped.
#[cfg(feature = "fuse")]
#[derive(Default)]
pub(super) struct Made {
    file: Option<PathBuf>,
    folder: Option<PathBuf>,
}

#[cfg(feature = "fuse")]
impl Drop for Made {
    fn drop(&mut self) {
        // What is not empty, or still mounted on, is not ours to remove.
        if let Some(file) = &self.file {
            let _ = std::fs::remove_file(file);
        }
        if let Some(folder) = &self.folder {
            let _ = std::fs::remove_dir(folder);
        }
    }
}

/// Why a region is still where it was.
#[derive(Debug)]
pub(super) enum Held {
    /// Somebody uses it.
    Busy(String),
    /// Something else, which may go well another time.
    Failed(anyhow::Error),
    /// What was written could not be saved, and that is said at every further attempt, too.
    #[cfg(feature = "nbd-device")]
    Never,
}

/// What could not be saved while a region was taken away.
#[derive(Debug, Default)]
pub(super) struct Failures {
    /// What the kernel was told, and says once. What was written over it may be here still, or nowhere.
    pub(super) told: Option<anyhow::Error>,
    /// What programs have written and is nowhere any more, as far as the last attempt found.
    pub(super) missing: Option<anyhow::Error>,
}

pub(super) fn lock(failures: &Mutex<Failures>) -> MutexGuard<'_, Failures> {
    // Each change is the replacement of one value.
    failures.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Place {
    pub(super) fn mount(args: &Mount, region: &Region) -> anyhow::Result<Self> {
        if args.nbd {
            return device(args, region);
        }
        file(args, region)
    }

    pub(super) fn path(&self) -> &Path {
        match self {
            #[cfg(feature = "fuse")]
            Self::File { file, .. } => file.path(),
            #[cfg(feature = "nbd-device")]
            Self::Device(_, path) => path,
        }
    }

    /// Whether somebody has unmounted it.
    pub(super) fn has_ended(&self) -> bool {
        match self {
            #[cfg(feature = "fuse")]
            Self::File { file, .. } => file.has_ended(),
            #[cfg(feature = "nbd-device")]
            Self::Device(..) => false,
        }
    }

    /// Has the kernel write back what it has cached, and takes the region away. What cannot be saved is added to `failures`.
    pub(super) fn unmount(&self, failures: &Mutex<Failures>) -> Result<(), Held> {
        match self {
            #[cfg(feature = "fuse")]
            Self::File { file, root, .. } => unmount_file(file, root, failures),
            #[cfg(feature = "nbd-device")]
            Self::Device(device, _) => {
                use memferry::frontend::nbd::DetachError;
                // Longer than udev looks at it; whoever else uses it is told of in between.
                let limit = std::time::Duration::from_secs(2);
                let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
                match device.detach(limit) {
                    Ok(()) | Err(DetachError::Detached { .. }) => Ok(()),
                    Err(error @ DetachError::Busy { .. }) => Err(Held::Busy(error.to_string())),
                    Err(error @ DetachError::Unsaved { .. }) => {
                        lock(failures).told.get_or_insert_with(|| error.into());
                        Err(Held::Never)
                    }
                    Err(error) => Err(Held::Failed(error.into())),
                }
            }
        }
    }

    /// Takes it away from whoever uses it.
    pub(super) fn force(&self) {
        match self {
            #[cfg(feature = "fuse")]
            Self::File { file, made, .. } => {
                // Not detached: a thread of ours that waits for the kernel to write back, which waits for us, would never end, nor would
                // the process, and whoever looks at it would wait with it.
                file.abort();
                // A thread that waits for the server may keep this value until the process ends.
                std::mem::take(&mut *made.lock().unwrap_or_else(PoisonError::into_inner));
            }
            // It is disconnected when it is dropped, or the process ends.
            #[cfg(feature = "nbd-device")]
            Self::Device(..) => {}
        }
    }
}

#[cfg(feature = "fuse")]
fn unmount_file(
    file: &memferry::frontend::FuseFile,
    root: &Path,
    failures: &Mutex<Failures>,
) -> Result<(), Held> {
    use memferry::frontend::FuseUnmountError;
    let synced = file.sync();
    lock(failures).missing = None;
    if let Err(error) = synced {
        let (kind, is_of_the_kernel) = (error.kind(), error.raw_os_error().is_some());
        let error = anyhow::Error::new(error).context("cannot save what was written to the file");
        if kind == std::io::ErrorKind::NotConnected {
            // Somebody has unmounted it; what could not be saved then is told when it has ended.
            return match file.has_ended() {
                true => Ok(()),
                false => Err(Held::Failed(error)),
            };
        }
        if is_of_the_kernel {
            let why = anyhow::anyhow!("{error:#}");
            lock(failures).told.get_or_insert(error);
            return Err(Held::Failed(why));
        }
        // The file's own word: trying again does not help, unless a program that has it open writes again.
        lock(failures).missing = Some(error);
    }
    match file.unmount() {
        Ok(()) => Ok(()),
        Err(error @ FuseUnmountError::Busy { .. }) => {
            let holders = holders(root);
            let who = if holders.is_empty() {
                String::new()
            } else {
                format!(" ({})", holders.join(", "))
            };
            Err(Held::Busy(format!("{error}{who}")))
        }
        Err(error) => Err(Held::Failed(error.into())),
    }
}

/// The processes that can be seen to have what is below `root` open or mapped, or to be there.
#[cfg(feature = "fuse")]
fn holders(root: &Path) -> Vec<String> {
    let mut holders = Vec::new();
    let Ok(processes) = std::fs::read_dir("/proc") else {
        return holders;
    };
    for process in processes.flatten() {
        let folder = process.path();
        let is_process = process
            .file_name()
            .to_str()
            .is_some_and(|name| name.bytes().all(|byte| byte.is_ascii_digit()));
        if !is_process {
            continue;
        }
        let links = ["fd", "map_files"]
            .into_iter()
            .filter_map(|links| std::fs::read_dir(folder.join(links)).ok())
            .flatten()
            .flatten()
            .map(|link| link.path())
            .chain([folder.join("cwd")]);
        let has_it = links
            .filter_map(|link| std::fs::read_link(link).ok())
            .any(|target| target.starts_with(root));
        if has_it {
            let name = std::fs::read_to_string(folder.join("comm")).unwrap_or_default();
            let number = process.file_name();
            holders.push(format!("{} {}", name.trim(), number.to_string_lossy()));
        }
    }
    holders
}

#[cfg(feature = "fuse")]
fn file(args: &Mount, region: &Region) -> anyhow::Result<Place> {
    use memferry::frontend::{FuseFile, FuseOptions};
    let mut made = Made::default();
    let at = match &args.path {
        Some(path) => path.clone(),
        None => {
            let folder =
                std::env::temp_dir().join(format!("memferry-mount-{}", std::process::id()));
            std::fs::create_dir(&folder)
                .with_context(|| format!("cannot make {}", folder.display()))?;
            made.folder = Some(folder.clone());
            folder
        }
    };
    let missing = std::fs::symlink_metadata(&at)
        .is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound);
    if missing {
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&at)
            .with_context(|| format!("cannot make {} to mount on", at.display()))?;
        made.file = Some(at.clone());
    }
    let options = FuseOptions {
        read_only: region.is_read_only(),
        ..FuseOptions::default()
    };
    let root = absolute(&at);
    let file = FuseFile::mount(region.storage(), &root, &options)?;
    Ok(Place::File {
        file,
        root,
        made: made.into(),
    })
}

/// The whole path, also of what cannot be looked at because a mount there was left behind.
#[cfg(feature = "fuse")]
fn absolute(at: &Path) -> PathBuf {
    let beside = || {
        let parent = at.parent().filter(|parent| !parent.as_os_str().is_empty());
        let parent = parent
            .unwrap_or_else(|| Path::new("."))
            .canonicalize()
            .ok()?;
        Some(parent.join(at.file_name()?))
    };
    at.canonicalize()
        .ok()
        .or_else(beside)
        .unwrap_or_else(|| at.to_owned())
}

#[cfg(not(feature = "fuse"))]
fn file(_: &Mount, _: &Region) -> anyhow::Result<Place> {
    anyhow::bail!(
        "this program was built without FUSE: build it with the feature `fuse`, or use --nbd"
    )
}

#[cfg(feature = "nbd-device")]
fn device(args: &Mount, region: &Region) -> anyhow::Result<Place> {
    use memferry::frontend::nbd::{Device, DeviceOptions};
    let options = DeviceOptions {
        read_only: region.is_read_only(),
        // The storage's own error comes before.
        timeout: args.deadline * 2,
        ..DeviceOptions::default()
    };
    let device = Device::attach(region.storage(), &options)?;
    let path = device.path().to_owned();
    Ok(Place::Device(Box::new(Mutex::new(device)), path))
}

#[cfg(not(feature = "nbd-device"))]
fn device(_: &Mount, _: &Region) -> anyhow::Result<Place> {
    anyhow::bail!(
        "this program was built without block devices: build it with the feature `nbd-device`"
    )
}
