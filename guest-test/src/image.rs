//! The kernel and the first file system that a guest boots.
//!
//! The kernel is Debian's for clouds, which has serial ports built in; the file system is one program, compiled
//! here. Both are kept in a cache, so that a machine which made them once boots guests without a network.

use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::command;
use crate::cpio::Archive;
use crate::kernel;

/// What QEMU is given to boot.
#[derive(Debug, Clone)]
pub struct Image {
    /// The kernel, as a bzImage.
    pub kernel: PathBuf,
    /// The initramfs with the page-writer as `/init`.
    pub initramfs: PathBuf,
}

/// Covers a download over a slow line by another process that came first.
const CACHE_LOCK_LIMIT: Duration = Duration::from_secs(900);
const BUILD_LIMIT: Duration = Duration::from_secs(300);
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
        let kernel = kernel::any(&cache)?;
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

/// Holds the cache until the file is dropped.
pub(crate) fn lock(cache: &Path) -> Result<File> {
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

fn build_initramfs(cache: &Path) -> Result<PathBuf> {
    let program = guest_program(cache, "page-writer")?;
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

/// A program of `guest-test/guests`, brought up to date with its source, linked statically. The caller holds the lock of
/// the cache.
pub(crate) fn guest_program(cache: &Path, name: &str) -> Result<Vec<u8>> {
    let guests = workspace().join("guest-test/guests");
    let target = cache.join("guests");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let flags = "-Ctarget-feature=+crt-static"; // links libc.a of libc6-dev: no other target, no download
    command::output(
        Command::new(cargo)
            .args(["build", "--release", "--locked", "--package", name])
            .args(["--target", TARGET, "--target-dir"])
            .arg(&target)
            .current_dir(&guests)
            .env("CARGO_ENCODED_RUSTFLAGS", flags),
        BUILD_LIMIT,
    )
    .context(
        "cannot build the guest's program (needs cargo, and libc6-dev for a static C library)",
    )?;
    Ok(fs::read(target.join(TARGET).join("release").join(name))?)
}
