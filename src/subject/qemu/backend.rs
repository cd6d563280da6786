//! A piece of guest RAM: the file behind it, opened by what QEMU really has mapped.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

/// A `memory-backend-file,share=on` of a QEMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backend {
    /// The id it was given with `-object`.
    pub id: String,
    /// What `mem-path` says: a file, or a folder where QEMU made a file without a name. As QEMU sees it, which may be
    /// another mount namespace.
    pub path: PathBuf,
    /// Bytes of RAM.
    pub len: u64,
    /// Whether writes reach the file. Always true in a [`Machine`](super::Machine); others are refused.
    pub shared: bool,
}

impl Backend {
    /// Opens the file that the process `pid` has mapped for this backend, to read and write.
    ///
    /// The path is not trusted: the file may have been deleted or replaced, and it may belong to another mount
    /// namespace. The mapping decides, and the opened file is compared with it.
    ///
    /// # Errors
    /// If `pid` maps no such file, if it cannot be opened (root, or the same user with ptrace rights, is needed) or
    /// if it is shorter than the RAM.
    pub fn open(&self, pid: u32) -> Result<File, BackendError> {
        let maps = format!("/proc/{pid}/maps");
        let text = std::fs::read_to_string(&maps).map_err(|source| BackendError::Maps {
            path: maps.into(),
            source,
        })?;
        let mapping = self
            .mapping(pid, &text)
            .ok_or_else(|| BackendError::NotMapped {
                id: self.id.clone(),
                path: self.path.clone(),
                pid,
            })?;
        let file = open_mapped(pid, &mapping, &self.path).map_err(|source| BackendError::Open {
            id: self.id.clone(),
            path: self.path.clone(),
            source,
        })?;
        let len = file
            .metadata()
            .map_err(|source| BackendError::Open {
                id: self.id.clone(),
                path: self.path.clone(),
                source,
            })?
            .len();
        if len < self.len {
            return Err(BackendError::Short {
                id: self.id.clone(),
                len,
                expected: self.len,
            });
        }
        Ok(file)
    }

    /// Names the file, so that no other on any host has the same name: this boot of this host, device and inode.
    ///
    /// # Errors
    /// If it cannot be looked at.
    pub(super) fn identify(&self, file: &File) -> Result<String, BackendError> {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
        let identity = boot.and_then(|boot| {
            let metadata = file.metadata()?;
            Ok(format!(
                "{}:{}:{}",
                boot.trim(),
                metadata.dev(),
                metadata.ino()
            ))
        });
        identity.map_err(|source| BackendError::Open {
            id: self.id.clone(),
            path: self.path.clone(),
            source,
        })
    }

    /// The first mapping of this backend's file.
    fn mapping(&self, pid: u32, maps: &str) -> Option<Mapping> {
        let by_inode = inode_of(&seen_by(pid, &self.path));
        let mut by_name = None;
        for mapping in maps.lines().filter_map(Mapping::parse) {
            if !mapping.shared {
                continue;
            }
            if Some((mapping.device, mapping.inode)) == by_inode {
                return Some(mapping);
            }
            if by_name.is_none() && self.is_named(&mapping.name) {
                by_name = Some(mapping);
            }
        }
        by_name
    }

    /// Whether a name in `maps` is that of this backend's file, deleted or in the folder `mem-path`.
    fn is_named(&self, name: &str) -> bool {
        let name = Path::new(name.strip_suffix(" (deleted)").unwrap_or(name));
        if name == self.path {
            return true;
        }
        // In a folder QEMU makes qemu_back_mem.ID.XXXXXX; old machine types write /objects/ID, a slash as _.
        name.parent() == Some(&self.path)
            && name
                .file_name()
                .and_then(|name| name.to_str())
                .and_then(|name| name.strip_prefix("qemu_back_mem."))
                .map(|name| name.strip_prefix("_objects_").unwrap_or(name))
                .and_then(|name| name.strip_prefix(self.id.as_str()))
                .is_some_and(|rest| rest.len() == 7 && rest.starts_with('.'))
    }
}

/// Why the file behind guest RAM cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// The process cannot be looked into.
    #[error("cannot read {}: QEMU has exited, or this process lacks the right to look into it (run as root)", path.display())]
    Maps {
        /// The file in /proc.
        path: PathBuf,
        /// What the kernel says.
        source: io::Error,
    },
    /// The process has no such mapping.
    #[error(
        "process {pid} does not map {} for the RAM {id:?}: if something else than QEMU opened the QMP socket, as libvirt \
         does, name QEMU's process id",
        path.display()
    )]
    NotMapped {
        /// The backend's id.
        id: String,
        /// Its `mem-path`.
        path: PathBuf,
        /// The process.
        pid: u32,
    },
    /// The file is mapped and cannot be opened.
    #[error("cannot open {}, the RAM {id:?}, to read and write (run as root)", path.display())]
    Open {
        /// The backend's id.
        id: String,
        /// Its `mem-path`.
        path: PathBuf,
        /// What the kernel says.
        source: io::Error,
    },
    /// The file was truncated.
    #[error("the file behind the RAM {id:?} has {len} bytes and needs {expected}")]
    Short {
        /// The backend's id.
        id: String,
        /// Bytes in the file.
        len: u64,
        /// Bytes of RAM.
        expected: u64,
    },
}

/// One line of `/proc/PID/maps` that maps a file.
#[derive(Debug, PartialEq, Eq)]
struct Mapping {
    range: String,
    shared: bool,
    device: (u32, u32),
    inode: u64,
    name: String,
}

impl Mapping {
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.splitn(6, ' ');
        let range = fields.next()?.to_owned();
        let shared = fields.next()?.ends_with('s');
        let _offset = fields.next()?;
        let (major, minor) = fields.next()?.split_once(':')?;
        let inode = fields.next()?.parse().ok()?;
        if inode == 0 {
            return None;
        }
        Some(Self {
            range,
            shared,
            device: (
                u32::from_str_radix(major, 16).ok()?,
                u32::from_str_radix(minor, 16).ok()?,
            ),
            inode,
            name: fields.next().unwrap_or_default().trim_start().to_owned(),
        })
    }
}

/// Opens the mapped file by the surest way that the kernel allows.
fn open_mapped(pid: u32, mapping: &Mapping, path: &Path) -> io::Result<File> {
    // map_files leads to the very inode, whatever became of its name, but needs a capability.
    let range: Vec<&str> = mapping
        .range
        .split('-')
        .map(|end| end.trim_start_matches('0'))
        .collect();
    let link = format!("/proc/{pid}/map_files/{}", range.join("-"));
    let mut failure = match read_write(Path::new(&link)) {
        Ok(file) => return Ok(file),
        Err(error) => error,
    };
    // QEMU keeps the descriptor that it mapped.
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter();
    let descriptors = descriptors
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()));
    for candidate in descriptors.chain([seen_by(pid, path)]) {
        if inode_of(&candidate) != Some((mapping.device, mapping.inode)) {
            continue;
        }
        match read_write(&candidate) {
            Ok(file) if is_inode(&file, mapping)? => return Ok(file),
            Ok(_) => {}
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

fn read_write(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    // A sealed memfd opens and cannot be written; ask with a write of nothing.
    file.write_at(&[], 0)?;
    Ok(file)
}

/// `path` as the process sees it.
fn seen_by(pid: u32, path: &Path) -> PathBuf {
    let inner = path.strip_prefix("/").unwrap_or(path);
    if path.is_relative() {
        return Path::new(&format!("/proc/{pid}/cwd")).join(inner);
    }
    Path::new(&format!("/proc/{pid}/root")).join(inner)
}

fn inode_of(path: &Path) -> Option<((u32, u32), u64)> {
    let metadata = std::fs::metadata(path).ok()?;
    metadata
        .is_file()
        .then(|| (device(metadata.dev()), metadata.ino()))
}

fn is_inode(file: &File, mapping: &Mapping) -> io::Result<bool> {
    let metadata = file.metadata()?;
    Ok((device(metadata.dev()), metadata.ino()) == (mapping.device, mapping.inode))
}

fn device(number: u64) -> (u32, u32) {
    (rustix::fs::major(number), rustix::fs::minor(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backend(id: &str, path: &str) -> Backend {
        Backend {
            id: id.into(),
            path: path.into(),
            len: 4096,
            shared: true,
        }
    }

    #[test]
    fn a_line_of_maps_is_read_with_its_name() {
        let line = "7fcec3fff000-7fcec7fff000 rw-s 00000000 00:1b 5                          /dev/shm/a b (deleted)";
        assert_eq!(
            Mapping::parse(line),
            Some(Mapping {
                range: "7fcec3fff000-7fcec7fff000".into(),
                shared: true,
                device: (0, 0x1b),
                inode: 5,
                name: "/dev/shm/a b (deleted)".into()
            })
        );
    }

    #[test]
    fn anonymous_memory_is_no_mapping_of_a_file() {
        assert_eq!(
            Mapping::parse("7ffe0000-7fff0000 rw-p 00000000 00:00 0   [stack]"),
            None
        );
    }

    #[test]
    fn a_file_that_qemu_made_in_a_folder_is_known_by_the_id() {
        let name = "/dev/shm/qemu_back_mem.m0.KkCD8E (deleted)";
        assert!(backend("m0", "/dev/shm").is_named(name));
        assert!(!backend("m", "/dev/shm").is_named(name));
    }

    #[test]
    fn a_deleted_file_is_known_by_its_path() {
        assert!(backend("m0", "/dev/shm/ram").is_named("/dev/shm/ram (deleted)"));
    }

    #[test]
    fn a_process_that_does_not_map_it_is_named_in_the_error() {
        let error = backend("m0", "/nonexistent/ram")
            .open(std::process::id())
            .unwrap_err();
        assert!(matches!(error, BackendError::NotMapped { pid, .. } if pid == std::process::id()));
    }
}
