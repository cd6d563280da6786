//! The kernel and the first file system that a guest boots.
//!
//! The kernel is Debian's for clouds, which has serial ports built in; the file system is one program, compiled
//! here. Both are kept in a cache, so that a machine which made them once boots guests without a network.

use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use crate::command;
use crate::cpio::Archive;
use crate::packages;

/// What QEMU is given to boot.
#[derive(Debug, Clone)]
pub struct Image {
    /// The kernel, as a bzImage.
    pub kernel: PathBuf,
    /// The initramfs with the page-writer as `/init`.
    pub initramfs: PathBuf,
}

/// A kernel to use in place of Debian's: needs 8250 serial ports, devtmpfs and initramfs support built in.
const KERNEL_VARIABLE: &str = "MEMFERRY_GUEST_KERNEL";
/// Covers a download over a slow line by another process that came first.
const CACHE_LOCK_LIMIT: Duration = Duration::from_secs(900);
const BUILD_LIMIT: Duration = Duration::from_secs(300);
const DOWNLOAD_LIMIT: Duration = Duration::from_secs(600);
const TARGET: &str = "x86_64-unknown-linux-gnu";

impl Image {
    /// Finds the image in the cache or makes it; says on standard error what it downloads. The page-writer is
    /// always brought up to date with its source. Safe to call from several processes.
    ///
    /// # Errors
    /// If the kernel is neither there nor to be had, or the page-writer does not compile; says what to do.
    pub fn prepare() -> Result<Self> {
        let cache = cache_directory()?;
        let _lock = lock(&cache)?;
        let kernel = match std::env::var_os(KERNEL_VARIABLE) {
            Some(path) => PathBuf::from(path),
            None => match newest_kernel(&cache)? {
                Some(kernel) => kernel,
                None => download_kernel(&cache)?,
            },
        };
        if !kernel.is_file() {
            bail!(
                "{KERNEL_VARIABLE} names {}, which is not a file",
                kernel.display()
            );
        }
        let initramfs = build_initramfs(&cache)?;
        Ok(Self { kernel, initramfs })
    }
}

/// Where kernels and other things are kept that take long to make: `$XDG_CACHE_HOME/memferry`,
/// `~/.cache/memferry`, or `target/guest-cache` where there is no home.
///
/// # Errors
/// If the directory cannot be made.
pub fn cache_directory() -> Result<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let cache = match (variable("XDG_CACHE_HOME"), variable("HOME")) {
        (Some(caches), _) => PathBuf::from(caches).join("memferry"),
        (None, Some(home)) => PathBuf::from(home).join(".cache/memferry"),
        (None, None) => workspace().join("target/guest-cache"),
    };
    fs::create_dir_all(&cache).with_context(|| format!("cannot make {}", cache.display()))?;
    Ok(cache)
}

/// The root of the workspace that this was compiled in.
#[must_use]
pub fn workspace() -> PathBuf {
    let mut root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    root.pop();
    root
}

/// Replaces a file at once: whoever opens it sees the old one or the new one, whole.
pub(crate) fn replace(path: &Path, write: impl FnOnce(File) -> Result<()>) -> Result<()> {
    let partial = path.with_extension(format!("partial-{}", std::process::id()));
    write(File::create(&partial)?)?;
    fs::rename(&partial, path)?;
    Ok(())
}

fn lock(cache: &Path) -> Result<File> {
    let lock = File::create(cache.join("lock"))?;
    let deadline = Instant::now() + CACHE_LOCK_LIMIT;
    command::poll_until(deadline, || lock.try_lock().ok()).with_context(|| {
        format!(
            "another process has held {}/lock for too long",
            cache.display()
        )
    })?;
    Ok(lock)
}

fn newest_kernel(cache: &Path) -> Result<Option<PathBuf>> {
    let mut kernels = Vec::new();
    for entry in fs::read_dir(cache)? {
        let path = entry?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if name.starts_with("vmlinuz-") && !name.contains("partial") {
            kernels.push((version(&name), path));
        }
    }
    Ok(kernels.into_iter().max().map(|(_, path)| path))
}

fn download_kernel(cache: &Path) -> Result<PathBuf> {
    let advice = || {
        format!(
            "no guest kernel: on a system that is not Debian, set {KERNEL_VARIABLE} to a bzImage with serial ports built in"
        )
    };
    for tool in ["apt-get", "apt-cache", "dpkg-deb"] {
        command::find(tool).with_context(advice)?;
    }
    let package = match newest_package()? {
        Some(package) => package,
        None => {
            packages::refresh().with_context(advice)?;
            newest_package()?.with_context(advice)?
        }
    };
    eprintln!(
        "downloading the guest's kernel, {package} (about 35 MB), into {}",
        cache.display()
    );
    let scratch = tempfile::tempdir_in(cache)?;
    let download = || {
        command::output(
            Command::new("apt-get")
                .args(["-q", "download", &package])
                .current_dir(scratch.path()),
            DOWNLOAD_LIMIT,
        )
    };
    // Lists that are out of date name files that the mirror has dropped.
    if let Err(first) = download() {
        packages::refresh().context(first)?;
        download()?;
    }
    let archive = fs::read_dir(scratch.path())?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .with_context(|| anyhow!("apt-get downloaded {package} but left no file"))?;
    let unpacked = scratch.path().join("unpacked");
    command::output(
        Command::new("dpkg-deb")
            .arg("--extract")
            .args([&archive, &unpacked]),
        Duration::from_secs(120),
    )?;
    for entry in fs::read_dir(unpacked.join("boot"))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_owned();
        if name.to_string_lossy().starts_with("vmlinuz-") {
            let kernel = cache.join(name);
            fs::rename(&path, &kernel)?; // the scratch directory is inside the cache: the same file system
            return Ok(kernel);
        }
    }
    bail!("{package} holds no kernel")
}

/// The newest kernel package that the lists know: 6.12 where bookworm's security suite is on, else 6.1.
fn newest_package() -> Result<Option<String>> {
    let known = command::output(
        Command::new("apt-cache").args([
            "search",
            "--names-only",
            "^linux-image-6\\.[0-9.]+.*-cloud-amd64$",
        ]),
        Duration::from_secs(60),
    )?;
    Ok(known
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        // Three numbers and more: with two it is a package that only names another one.
        .filter(|name| version(name).len() >= 4)
        .max_by_key(|name| version(name))
        .map(str::to_owned))
}

/// The numbers in a name in their order, so that 6.12 comes after 6.1.
fn version(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit())
        .filter_map(|digits| digits.parse().ok())
        .collect()
}

fn build_initramfs(cache: &Path) -> Result<PathBuf> {
    let guests = workspace().join("guest-test/guests");
    let target = cache.join("guests");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let flags = "-Ctarget-feature=+crt-static"; // links libc.a of libc6-dev: no other target, no download
    command::output(
        Command::new(cargo)
            .args([
                "build",
                "--release",
                "--locked",
                "--target",
                TARGET,
                "--target-dir",
            ])
            .arg(&target)
            .current_dir(&guests)
            .env("CARGO_ENCODED_RUSTFLAGS", flags),
        BUILD_LIMIT,
    )
    .context(
        "cannot build the guest's program (needs cargo, and libc6-dev for a static C library)",
    )?;
    let program = fs::read(target.join(TARGET).join("release/page-writer"))?;
    let initramfs = cache.join("page-writer.cpio");
    replace(&initramfs, |file| {
        let mut archive = Archive::new(BufWriter::new(file));
        for directory in ["dev", "proc", "sys"] {
            archive.directory(directory)?;
        }
        archive.program("init", &program)?;
        archive.finish()?;
        Ok(())
    })?;
    Ok(initramfs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_newer_kernel_is_one_with_higher_numbers() {
        let newest = [
            "linux-image-6.1.0-56-cloud-amd64",
            "linux-image-6.12.117+deb12-cloud-amd64",
            "linux-image-6.12.9+deb12-cloud-amd64",
        ]
        .into_iter()
        .max_by_key(|name| version(name));
        assert_eq!(newest, Some("linux-image-6.12.117+deb12-cloud-amd64"));
    }
}
