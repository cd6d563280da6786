//! The kernels that guests boot: Debian's for clouds, which have serial ports, devtmpfs and initramfs support built in.
//!
//! A release is two entries of the cache: `vmlinuz-RELEASE`, and the directory `modules-RELEASE` with its modules as they
//! were packed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::command;
use crate::packages;

/// A kernel to use in place of Debian's: needs 8250 serial ports, devtmpfs and initramfs support built in.
const VARIABLE: &str = "MEMFERRY_GUEST_KERNEL";
const DOWNLOAD_LIMIT: Duration = Duration::from_secs(600);
const UNPACK_LIMIT: Duration = Duration::from_secs(120);
const IMAGE: &str = "vmlinuz-";
const MODULES: &str = "modules-";

/// A kernel with its modules.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// What the kernel calls itself.
    pub release: String,
    /// The kernel, as a bzImage.
    pub image: PathBuf,
    /// The directory that its modules are in, some of them compressed.
    pub modules: PathBuf,
}

/// Any kernel that boots: what `MEMFERRY_GUEST_KERNEL` names, the newest in the cache, or one that is downloaded. The
/// caller holds the lock of the cache.
pub(crate) fn any(cache: &Path) -> Result<PathBuf> {
    let image = match std::env::var_os(VARIABLE) {
        Some(path) => PathBuf::from(path),
        None => match newest(cache, IMAGE, "")? {
            Some(release) => cache.join(format!("{IMAGE}{release}")),
            None => download(cache, "6")?.image,
        },
    };
    ensure!(
        image.is_file(),
        "{VARIABLE} names {}, which is not a file",
        image.display()
    );
    Ok(image)
}

/// The newest kernel of a series as `6.12`, in the cache or downloaded. The caller holds the lock of the cache.
pub(crate) fn of_series(cache: &Path, series: &str) -> Result<Kernel> {
    // Modules came with the kernel or not at all: caches of older versions have kernels alone.
    match newest(cache, MODULES, series)? {
        Some(release) => Ok(Kernel {
            image: cache.join(format!("{IMAGE}{release}")),
            modules: cache.join(format!("{MODULES}{release}")),
            release,
        }),
        None => download(cache, series),
    }
}

/// The newest release of a series that the cache has something of.
fn newest(cache: &Path, prefix: &str, series: &str) -> Result<Option<String>> {
    let mut releases = Vec::new();
    for entry in fs::read_dir(cache)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let release = name.strip_prefix(prefix).unwrap_or_default();
        let whole = !release.is_empty() && !name.contains("partial");
        if whole && version(release).starts_with(&version(series)) {
            releases.push(release.to_owned());
        }
    }
    Ok(releases.into_iter().max_by_key(|release| version(release)))
}

fn download(cache: &Path, series: &str) -> Result<Kernel> {
    let advice = || {
        format!(
            "no guest kernel of series {series}: on Debian, see whether `apt-cache search cloud-amd64` lists one \
             (6.12 is in bookworm's security suite and in trixie); elsewhere, set {VARIABLE} to a bzImage with serial \
             ports built in, and leave the lab out"
        )
    };
    for tool in ["apt-get", "apt-cache", "dpkg-deb"] {
        command::find(tool).with_context(advice)?;
    }
    let package = match newest_package(series)? {
        Some(package) => package,
        None => {
            packages::refresh().with_context(advice)?;
            newest_package(series)?.with_context(advice)?
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
        UNPACK_LIMIT,
    )?;
    keep(cache, &unpacked).with_context(|| format!("the package {package}"))
}

/// Moves a kernel and its modules into the cache; the scratch directory is inside of it, and so on the same file system.
fn keep(cache: &Path, unpacked: &Path) -> Result<Kernel> {
    for entry in fs::read_dir(unpacked.join("boot"))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let Some(release) = name.strip_prefix(IMAGE) else {
            continue;
        };
        let kernel = Kernel {
            release: release.to_owned(),
            image: cache.join(&name),
            modules: cache.join(format!("{MODULES}{release}")),
        };
        fs::rename(unpacked.join("boot").join(&name), &kernel.image)?;
        if kernel.modules.exists() {
            fs::remove_dir_all(&kernel.modules)?;
        }
        // After the kernel: whoever finds modules finds their kernel.
        fs::rename(unpacked.join("lib/modules").join(release), &kernel.modules)?;
        return Ok(kernel);
    }
    bail!("it holds no kernel")
}

/// The newest kernel package of a series that the lists know.
fn newest_package(series: &str) -> Result<Option<String>> {
    let known = command::output(
        Command::new("apt-cache").args([
            "search",
            "--names-only",
            "^linux-image-6\\.[0-9.]+.*-cloud-amd64$",
        ]),
        Duration::from_secs(60),
    )?;
    Ok(newest_name(
        known
            .lines()
            .filter_map(|line| line.split_whitespace().next()),
        series,
    ))
}

fn newest_name<'a>(names: impl Iterator<Item = &'a str>, series: &str) -> Option<String> {
    names
        // Three numbers and more: with two it is a package that only names another one.
        .filter(|name| version(name).len() >= 4 && version(name).starts_with(&version(series)))
        .max_by_key(|name| version(name))
        .map(str::to_owned)
}

/// The numbers in a name in their order, so that 6.12 comes after 6.1.
fn version(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit())
        .filter_map(|digits| digits.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: [&str; 4] = [
        "linux-image-6.1.0-56-cloud-amd64",
        "linux-image-6.12-cloud-amd64",
        "linux-image-6.12.117+deb12-cloud-amd64",
        "linux-image-6.12.9+deb12-cloud-amd64",
    ];

    #[test]
    fn a_newer_kernel_is_one_with_higher_numbers() {
        let newest = |series| newest_name(NAMES.into_iter(), series);
        assert_eq!(newest("6").as_deref(), Some(NAMES[2]));
        assert_eq!(newest("6.12").as_deref(), Some(NAMES[2]));
        assert_eq!(newest("6.1").as_deref(), Some(NAMES[0]));
        assert_eq!(newest("6.6"), None);
    }

    #[test]
    fn a_kernel_without_modules_is_none_of_its_series() {
        let cache = tempfile::tempdir().unwrap();
        let at = |name: &str| cache.path().join(name);
        for name in [
            "vmlinuz-6.12.117+deb12",
            "vmlinuz-6.12.9+deb12",
            "vmlinuz-6.1.0-56",
        ] {
            fs::write(at(name), "").unwrap();
        }
        fs::create_dir(at("modules-6.12.9+deb12")).unwrap();
        let newest = |prefix, series| newest(cache.path(), prefix, series).unwrap();
        assert_eq!(newest(IMAGE, "").as_deref(), Some("6.12.117+deb12"));
        assert_eq!(newest(MODULES, "6.12").as_deref(), Some("6.12.9+deb12"));
        assert_eq!(newest(MODULES, "6.1"), None);
    }
}
