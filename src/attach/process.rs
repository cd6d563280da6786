//! What `/proc` says about a process and its threads.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::AttachError;

const PF_KTHREAD: u64 = 0x0020_0000;
const CAP_SYS_ADMIN: u32 = 21;

/// Reads a file of `/proc`; a process that is gone is its own error.
pub(super) fn read(pid: u32, path: impl Into<PathBuf>) -> Result<Vec<u8>, AttachError> {
    let path = path.into();
    fs::read(&path).map_err(|source| failed(pid, path, source))
}

pub(super) fn failed(pid: u32, path: PathBuf, source: io::Error) -> AttachError {
    match (source.kind(), source.raw_os_error()) {
        (io::ErrorKind::NotFound, _) | (_, Some(libc::ESRCH)) => AttachError::Exited { pid },
        (io::ErrorKind::PermissionDenied, _) => AttachError::Permission { pid, source },
        _ => AttachError::Proc { path, source },
    }
}

/// `status` of one thread, of which the leader stands for the process.
#[derive(Debug)]
pub(super) struct Status(String);

impl Status {
    pub(super) fn of(pid: u32, tid: u32) -> Result<Self, AttachError> {
        let bytes = read(pid, format!("/proc/{pid}/task/{tid}/status"))?;
        Ok(Self(String::from_utf8_lossy(&bytes).into_owned()))
    }

    fn field(&self, name: &str) -> Option<&str> {
        self.0
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .map(str::trim)
    }

    fn number(&self, name: &str) -> u32 {
        self.field(name)
            .and_then(|field| field.parse().ok())
            .unwrap_or(0)
    }

    pub(super) fn tracer(&self) -> Option<u32> {
        Some(self.number("TracerPid")).filter(|&tracer| tracer != 0)
    }

    pub(super) fn process(&self) -> u32 {
        self.number("Tgid")
    }

    /// 0 for none, 1 for strict, 2 for filters.
    pub(super) fn seccomp(&self) -> u32 {
        self.number("Seccomp")
    }

    /// Whether returns are checked against a shadow stack, which a borrowed `ret` would not match.
    pub(super) fn has_shadow_stack(&self) -> bool {
        self.field("x86_Thread_features")
            .is_some_and(|features| features.split_whitespace().any(|name| name == "shstk"))
    }

    fn has_capability(&self, bit: u32) -> bool {
        self.field("CapEff")
            .and_then(|field| u64::from_str_radix(field, 16).ok())
            .is_some_and(|set| set >> bit & 1 == 1)
    }
}

/// Whether the calling thread may suspend the seccomp filters of another.
pub(super) fn may_suspend_seccomp() -> bool {
    fs::read_to_string("/proc/thread-self/status")
        .map(Status)
        .is_ok_and(|ours| ours.seccomp() == 0 && ours.has_capability(CAP_SYS_ADMIN))
}

/// The state letter and the kernel's flags of a thread.
fn stat(pid: u32, tid: u32) -> Result<(char, u64), AttachError> {
    let bytes = read(pid, format!("/proc/{pid}/task/{tid}/stat"))?;
    let text = String::from_utf8_lossy(&bytes);
    // The name is in parentheses and may hold anything, parentheses too.
    let mut fields = text
        .rsplit_once(')')
        .map_or("", |(_, fields)| fields)
        .split_whitespace();
    let state = fields
        .next()
        .and_then(|field| field.chars().next())
        .unwrap_or('?');
    let flags = fields
        .nth(5)
        .and_then(|field| field.parse().ok())
        .unwrap_or(0);
    Ok((state, flags))
}

/// The state letter of a thread, `?` if it cannot be told.
pub(super) fn state(pid: u32, tid: u32) -> char {
    stat(pid, tid).map_or('?', |(state, _)| state)
}

pub(super) fn is_kernel_thread(pid: u32) -> Result<bool, AttachError> {
    Ok(stat(pid, pid)?.1 & PF_KTHREAD != 0)
}

/// Whether the program is a 32-bit ELF file.
pub(super) fn is_32_bit(pid: u32) -> Result<bool, AttachError> {
    use std::io::Read;

    let path = PathBuf::from(format!("/proc/{pid}/exe"));
    let mut head = [0; 5];
    fs::File::open(&path)
        .and_then(|mut file| file.read_exact(&mut head))
        .map_err(|source| failed(pid, path, source))?;
    Ok(head == *b"\x7fELF\x01")
}

/// The name of a process, for messages.
pub(super) fn name(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm"))
        .map_or_else(|_| "unknown".to_owned(), |name| name.trim_end().to_owned())
}

/// The threads that could be stopped now, the leader first if it is one of them.
pub(super) fn threads(pid: u32) -> Result<Vec<u32>, AttachError> {
    let path = PathBuf::from(format!("/proc/{pid}/task"));
    let entries = fs::read_dir(&path).map_err(|source| failed(pid, path, source))?;
    let mut threads: Vec<u32> = entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|&tid| !matches!(state(pid, tid), 'Z' | 'X' | 'D' | '?'))
        .collect();
    threads.sort_by_key(|&tid| (tid != pid, tid));
    Ok(threads)
}

/// The descriptors of a process that are userfaultfds.
pub(super) fn userfaultfds(pid: u32) -> Result<Vec<u32>, AttachError> {
    let path = PathBuf::from(format!("/proc/{pid}/fd"));
    let entries = fs::read_dir(&path).map_err(|source| failed(pid, path, source))?;
    let mut found: Vec<u32> = entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let fd = entry.file_name().to_str()?.parse().ok()?;
            is_userfaultfd_link(&entry.path()).then_some(fd)
        })
        .collect();
    found.sort_unstable();
    Ok(found)
}

/// Whether a descriptor of a process is a userfaultfd now.
pub(super) fn is_userfaultfd(pid: u32, fd: u32) -> bool {
    is_userfaultfd_link(Path::new(&format!("/proc/{pid}/fd/{fd}")))
}

fn is_userfaultfd_link(link: &Path) -> bool {
    fs::read_link(link).is_ok_and(|to| to.as_os_str() == "anon_inode:[userfaultfd]")
}
