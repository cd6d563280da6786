//! What the kernel shows of its network block devices.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// One of the kernel's devices, as its files show it.
#[derive(Debug, Clone)]
pub(super) struct Shown {
    folder: PathBuf,
    pub(super) index: u32,
}

/// `/sys/block`, but for tests.
#[derive(Debug, Clone)]
pub(super) struct Sysfs {
    root: PathBuf,
}

impl Default for Sysfs {
    fn default() -> Self {
        Self::at("/sys/block")
    }
}

/// The kernel counts in sectors, whatever the size of a block.
const SECTOR: u64 = 512;

impl Sysfs {
    pub(super) fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    pub(super) fn device(&self, index: u32) -> Shown {
        Shown {
            folder: self.root.join(format!("nbd{index}")),
            index,
        }
    }

    /// All there are, by number.
    pub(super) fn devices(&self) -> io::Result<Vec<Shown>> {
        let mut devices = Vec::new();
        for entry in fs::read_dir(&self.root)? {
            let name = entry?.file_name();
            let index = name
                .to_str()
                .and_then(|name| name.strip_prefix("nbd"))
                .and_then(|index| index.parse().ok());
            devices.extend(index.map(|index| self.device(index)));
        }
        devices.sort_by_key(|device| device.index);
        Ok(devices)
    }
}

impl Shown {
    pub(super) fn exists(&self) -> bool {
        self.folder.exists()
    }

    /// Zero for a device that is not connected, and for one that has gone away.
    pub(super) fn size(&self) -> io::Result<u64> {
        let Some(sectors) = self.read("size")? else {
            return Ok(0);
        };
        let sectors: u64 = self.parse("size", &sectors)?;
        Ok(sectors.saturating_mul(SECTOR))
    }

    /// The thread that connected the device, numbered as the first PID namespace numbers it.
    pub(super) fn pid(&self) -> io::Result<Option<u32>> {
        let Some(pid) = self.read("pid")? else {
            return Ok(None);
        };
        self.parse("pid", &pid).map(Some)
    }

    /// Whose device it says it is; Linux 5.14 and later.
    pub(super) fn backend(&self) -> io::Result<Option<String>> {
        self.read("backend")
    }

    pub(super) fn is_read_only(&self) -> io::Result<bool> {
        Ok(self.read("ro")?.as_deref() == Some("1"))
    }

    /// How many reads and writes are under way.
    pub(super) fn in_flight(&self) -> io::Result<u64> {
        let Some(text) = self.read("inflight")? else {
            return Ok(0);
        };
        let mut sum = 0_u64;
        for number in text.split_whitespace() {
            sum = sum.saturating_add(self.parse("inflight", number)?);
        }
        Ok(sum)
    }

    /// Other block devices that are made of it.
    pub(super) fn stacked(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.folder.join("holders")) else {
            return Vec::new();
        };
        entries
            .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
            .collect()
    }

    /// The number of the device as the kernel has it, `MAJOR:MINOR`.
    pub(super) fn number(&self) -> io::Result<Option<(u32, u32)>> {
        let Some(text) = self.read("dev")? else {
            return Ok(None);
        };
        let (major, minor) = text
            .split_once(':')
            .ok_or_else(|| self.nonsense("dev", &text))?;
        Ok(Some((self.parse("dev", major)?, self.parse("dev", minor)?)))
    }

    /// How far the kernel reads ahead, in bytes.
    pub(super) fn set_read_ahead(&self, bytes: u64) -> io::Result<()> {
        fs::write(
            self.folder.join("queue/read_ahead_kb"),
            (bytes >> 10).to_string(),
        )
    }

    pub(super) fn read_ahead(&self) -> io::Result<Option<u64>> {
        let Some(text) = self.read("queue/read_ahead_kb")? else {
            return Ok(None);
        };
        let kilobytes: u64 = self.parse("queue/read_ahead_kb", &text)?;
        Ok(Some(kilobytes.saturating_mul(1 << 10)))
    }

    /// `None` where there is no such file: not in this kernel, or not now.
    fn read(&self, name: &str) -> io::Result<Option<String>> {
        match fs::read_to_string(self.folder.join(name)) {
            Ok(text) => Ok(Some(text.trim().to_owned())),
            // A file that goes away while it is read answers with the other one.
            Err(error)
                if error.kind() == io::ErrorKind::NotFound
                    || error.raw_os_error() == Some(libc_enodev()) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn parse<T: std::str::FromStr>(&self, name: &str, text: &str) -> io::Result<T> {
        text.parse().map_err(|_| self.nonsense(name, text))
    }

    fn nonsense(&self, name: &str, text: &str) -> io::Error {
        let path = self.folder.join(name);
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{} says {text:?}", path.display()),
        )
    }
}

fn libc_enodev() -> i32 {
    rustix::io::Errno::NODEV.raw_os_error()
}

/// Where the node of a device is.
pub(super) fn node(index: u32) -> PathBuf {
    Path::new("/dev").join(format!("nbd{index}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_of_a_device_are_read() {
        let root = tempfile::tempdir().unwrap();
        let sysfs = Sysfs::at(root.path());
        for name in ["nbd10", "nbd2", "nbdx", "sda", "nbd"] {
            fs::create_dir(root.path().join(name)).unwrap();
        }
        let found: Vec<u32> = sysfs
            .devices()
            .unwrap()
            .iter()
            .map(|device| device.index)
            .collect();
        assert_eq!(found, [2, 10]);
        let device = sysfs.device(2);
        let write =
            |name: &str, text: &str| fs::write(root.path().join("nbd2").join(name), text).unwrap();
        write("size", "8\n");
        write("inflight", "       3        4\n");
        write("dev", "43:64\n");
        write("ro", "1\n");
        assert_eq!(device.size().unwrap(), 4096);
        assert_eq!(device.in_flight().unwrap(), 7);
        assert_eq!(device.number().unwrap(), Some((43, 64)));
        assert!(device.is_read_only().unwrap());
        assert_eq!(device.pid().unwrap(), None);
        assert_eq!(device.backend().unwrap(), None);
        write("pid", "123\n");
        write("backend", "somebody\n");
        assert_eq!(device.pid().unwrap(), Some(123));
        assert_eq!(device.backend().unwrap().as_deref(), Some("somebody"));
        write("pid", "none");
        assert_eq!(device.pid().unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert_eq!(sysfs.device(3).size().unwrap(), 0);
        assert!(!sysfs.device(3).exists());
    }
}
