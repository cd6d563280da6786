//! Where a FUSE file system is mounted: taking the place, and giving it back.

use std::ffi::{CString, OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use rustix::process::{Pid, PidfdFlags};

use super::{FuseMountError, FuseUnmountError};
use crate::sys::apart::apart;

/// How long anybody but the storage may take here: another mount to answer, a helper to end.
const PATIENCE: Duration = Duration::from_secs(5);

/// What a mount of ours is called in `/proc/self/mountinfo`.
const KIND: &str = "fuse.memferry";

/// The program with the right to mount for a user, and to unmount once its client has died.
const HELPER: &str = "fusermount3";

/// A place where a file system of ours is mounted. Dropping it unmounts nothing.
#[derive(Debug)]
pub(super) struct Mountpoint {
    /// Without symbolic links, so that it is what the kernel calls it.
    path: PathBuf,
    /// The file system's device number, as `major:minor`.
    device: String,
    by_helper: bool,
    /// The helper that unmounts if this process dies; it watches one end of the socket.
    watching: Option<(UnixStream, Child)>,
}

/// What the mount point was before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    Directory,
    File,
}

/// What the kernel is told when it mounts.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wish {
    pub(super) read_only: bool,
    pub(super) everyone: bool,
    /// That the mount goes away when this process dies, if something can be found to do it.
    pub(super) unmount_after_crash: bool,
}

/// Looks what `path` is, and removes the mount that a process has left there when it was killed.
pub(super) fn prepare(path: &Path) -> Result<(PathBuf, Shape), FuseMountError> {
    let failed = |source| FuseMountError::MountPoint {
        path: path.to_owned(),
        source,
    };
    let path = canonical(path).map_err(failed)?;
    while let Some(mounted) = mounted_at(&path, None).map_err(failed)? {
        if !mounted.kind.as_bytes().starts_with(KIND.as_bytes()) {
            break;
        }
        if answers(&path) {
            return Err(FuseMountError::Taken { path });
        }
        remove_dead(&path).map_err(failed)?;
    }
    let metadata = fs::metadata(&path).map_err(failed)?;
    if metadata.is_dir() {
        Ok((path, Shape::Directory))
    } else if metadata.is_file() {
        Ok((path, Shape::File))
    } else {
        Err(failed(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is neither a directory nor a regular file",
        )))
    }
}

impl Mountpoint {
    /// Mounts at `path`, which [`prepare`] has looked at. The descriptor is where the kernel's requests come from.
    pub(super) fn take(
        path: PathBuf,
        shape: Shape,
        wish: Wish,
    ) -> Result<(Self, OwnedFd), FuseMountError> {
        let mut mounted = None;
        if wish.unmount_after_crash {
            // Without the helper the mount works as well; it only stays, dead, when this process is killed.
            mounted = mount_by_helper(&path, wish, true).ok();
        }
        let (requests, watching, by_helper) = match mounted {
            Some((requests, watching)) => (requests, watching, true),
            None => match mount_directly(&path, shape, wish) {
                Ok(requests) => (requests, None, false),
                Err(FuseMountError::Refused { source, .. })
                    if source.kind() == io::ErrorKind::PermissionDenied =>
                {
                    let (requests, watching) = mount_by_helper(&path, wish, false)?;
                    (requests, watching, true)
                }
                Err(error) => return Err(error),
            },
        };
        let device = match mounted_at(&path, None) {
            Ok(Some(mounted)) => mounted.device,
            looked => {
                // By the number alone we can tell ours from what others mount here.
                let _ = remove_dead(&path);
                let reason = looked.err().unwrap_or_else(|| {
                    io::Error::other("the mount is not listed in /proc/self/mountinfo")
                });
                return Err(refused(&path, reason));
            }
        };
        let mountpoint = Self {
            path,
            device,
            by_helper,
            watching,
        };
        Ok((mountpoint, requests))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Lets the kernel read ahead so many bytes, where this user may say so; 128 KiB is little for a medium that is far.
    pub(super) fn set_read_ahead(&self, bytes: u64) {
        let path = format!("/sys/class/bdi/{}/read_ahead_kb", self.device);
        // Only speed depends on it.
        let _ = fs::write(path, (bytes >> 10).to_string());
    }

    fn is_mounted(&self) -> io::Result<bool> {
        Ok(mounted_at(&self.path, Some(&self.device))?.is_some())
    }

    /// Unmounts. With `lazily`, it is gone from here at once, and served until nobody has it open any more.
    pub(super) fn unmount(&self, lazily: bool) -> Result<(), FuseUnmountError> {
        let failed = |source| FuseUnmountError::Failed {
            path: self.path.clone(),
            source,
        };
        // Somebody may have done it before, and something else be mounted there by now.
        if !self.is_mounted().map_err(failed)? {
            return Ok(());
        }
        let unmounted = if lazily {
            detach(&self.path)
        } else {
            // The kernel has us write back what it has cached.
            apart(&self.path, |path| {
                Ok(rustix::mount::unmount(path, UnmountFlags::NOFOLLOW)?)
            })
        };
        match unmounted {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                Err(FuseUnmountError::Busy {
                    path: self.path.clone(),
                })
            }
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied && self.by_helper => {
                unmount_by_helper(&self.path, lazily).map_err(failed)?;
                match self.is_mounted() {
                    Ok(false) => Ok(()),
                    Ok(true) if !lazily => Err(FuseUnmountError::Busy {
                        path: self.path.clone(),
                    }),
                    Ok(true) => Err(failed(io::Error::other("it is still mounted"))),
                    Err(error) => Err(failed(error)),
                }
            }
            Err(error) => Err(failed(error)),
        }
    }

    /// Takes the file system away from whoever uses it: their accesses fail from now on, and so end.
    pub(super) fn abort(&self) {
        if self.is_mounted().unwrap_or(true) {
            let flags = UnmountFlags::FORCE | UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
            if rustix::mount::unmount(&self.path, flags).is_ok() {
                return;
            }
        }
        // For who is not root, and for what was detached before.
        let minor = self.device.rsplit(':').next().unwrap_or_default();
        let _ = fs::write(format!("/sys/fs/fuse/connections/{minor}/abort"), "1");
        if self.by_helper {
            let _ = unmount_by_helper(&self.path, true);
        }
    }
}

impl Drop for Mountpoint {
    fn drop(&mut self) {
        if let Some((socket, mut helper)) = self.watching.take() {
            drop(socket);
            // It looks whether something is left to be unmounted, and ends.
            let _ = wait_for(&mut helper);
        }
    }
}

fn mount_directly(path: &Path, shape: Shape, wish: Wish) -> Result<OwnedFd, FuseMountError> {
    let requests = File::options()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .map_err(|source| FuseMountError::NoDevice { source })?;
    // What is said of the root before anybody has asked us for its attributes.
    let root_mode = match shape {
        Shape::Directory => "40000",
        Shape::File => "100000",
    };
    let mut data = format!(
        "fd={},rootmode={root_mode},user_id={},group_id={},default_permissions",
        requests.as_raw_fd(),
        rustix::process::getuid().as_raw(),
        rustix::process::getgid().as_raw(),
    );
    if wish.everyone {
        data.push_str(",allow_other");
    }
    let data = CString::new(data).expect("numbers and words");
    let mut flags = MountFlags::NOSUID | MountFlags::NODEV;
    if wish.read_only {
        flags |= MountFlags::RDONLY;
    }
    rustix::mount::mount(source_name(), path, KIND, flags, data.as_c_str())
        .map_err(|errno| refused(path, errno.into()))?;
    Ok(requests.into())
}

/// Who serves the mount, for people who look at a list of mounts.
fn source_name() -> String {
    format!("memferry:{}", std::process::id())
}

/// Lets the helper mount, and send us the descriptor; with `watch` it stays, to unmount when this process dies.
fn mount_by_helper(
    path: &Path,
    wish: Wish,
    watch: bool,
) -> Result<(OwnedFd, Option<(UnixStream, Child)>), FuseMountError> {
    let mut options = format!(
        "fsname={},subtype=memferry,nosuid,nodev,default_permissions",
        source_name()
    );
    for (wanted, option) in [
        (wish.read_only, ",ro"),
        (wish.everyone, ",allow_other"),
        (watch, ",auto_unmount"),
    ] {
        if wanted {
            options.push_str(option);
        }
    }
    let io = |source| refused(path, source);
    let (ours, theirs) = UnixStream::pair().map_err(io)?;
    ours.set_read_timeout(Some(PATIENCE)).map_err(io)?;
    let mut helper = Command::new(HELPER)
        .args(["-o", &options, "--"])
        .arg(path)
        // The descriptor that it sends through: its standard input, which needs nothing inherited by number.
        .env("_FUSE_COMMFD", "0")
        .stdin(OwnedFd::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|source| FuseMountError::NoRight {
            path: path.to_owned(),
            source,
        })?;
    let received = receive_descriptor(&ours).map_err(io);
    if watch && received.is_ok() {
        return received.map(|requests| (requests, Some((ours, helper))));
    }
    drop(ours);
    let ended = wait_for(&mut helper);
    let requests = received?;
    match ended {
        Ok(()) => Ok((requests, None)),
        Err(error) => Err(io(error)),
    }
}

fn refused(path: &Path, source: io::Error) -> FuseMountError {
    FuseMountError::Refused {
        path: path.to_owned(),
        source,
    }
}

fn receive_descriptor(socket: &UnixStream) -> io::Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    rustix::net::recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut byte)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    ancillary
        .drain()
        .find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        })
        .ok_or_else(|| io::Error::other(format!("{HELPER} could not mount it")))
}

fn unmount_by_helper(path: &Path, lazily: bool) -> io::Result<()> {
    let mut helper = Command::new(HELPER)
        .args(if lazily { &["-u", "-z"][..] } else { &["-u"] })
        .arg("--")
        .arg(path)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    wait_for(&mut helper)
}

/// Waits until `child` has ended, and no longer than [`PATIENCE`].
fn wait_for(child: &mut Child) -> io::Result<()> {
    let pid = Pid::from_child(child);
    let process = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
    let patience = Timespec::try_from(PATIENCE).expect("a few seconds");
    let mut polled = [PollFd::from_borrowed_fd(process.as_fd(), PollFlags::IN)];
    while matches!(
        rustix::event::poll(&mut polled, Some(&patience)),
        Err(Errno::INTR)
    ) {}
    child.try_wait()?.map_or_else(
        || Err(io::Error::new(io::ErrorKind::TimedOut, "a helper hangs")),
        |_| Ok(()),
    )
}

/// Removes the mount at `path`, whose server has died.
fn remove_dead(path: &Path) -> io::Result<()> {
    match detach(path) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            unmount_by_helper(path, true)
        }
        // Somebody else was quicker.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
        detached => detached,
    }
}

fn detach(path: &Path) -> io::Result<()> {
    let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
    Ok(rustix::mount::unmount(path, flags)?)
}

/// Whether the file system that is mounted at `path` has a server that may answer some time.
fn answers(path: &Path) -> bool {
    let (answer, answers) = mpsc::channel();
    let path = path.to_owned();
    // A server that hangs would hang whoever asks, so this is asked by a thread that may be left behind.
    let asked = thread::Builder::new().spawn(move || {
        let _ = answer.send(rustix::fs::statfs(&path));
    });
    if asked.is_err() {
        return true;
    }
    !matches!(
        answers.recv_timeout(PATIENCE),
        Ok(Err(Errno::NOTCONN | Errno::CONNABORTED))
    )
}

/// `path` without symbolic links. Only the folder that it is in is looked at: a dead mount answers no question.
fn canonical(path: &Path) -> io::Result<PathBuf> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return fs::canonicalize(path);
    };
    let parent = if parent.as_os_str().is_empty() {
        Path::new(".")
    } else {
        parent
    };
    let joined = fs::canonicalize(parent)?.join(name);
    // A link is not mounted on, what it leads to is.
    if fs::symlink_metadata(&joined).is_ok_and(|it| it.is_symlink()) {
        return fs::canonicalize(joined);
    }
    Ok(joined)
}

#[derive(Debug, PartialEq, Eq)]
struct Mounted {
    device: String,
    kind: OsString,
}

/// What is mounted at `path`, the uppermost; with `device` only that one counts.
fn mounted_at(path: &Path, device: Option<&str>) -> io::Result<Option<Mounted>> {
    let list = fs::read("/proc/self/mountinfo")?;
    Ok(find(&list, path, device))
}

fn find(list: &[u8], path: &Path, device: Option<&str>) -> Option<Mounted> {
    // 36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
    let mut found = list.split(|&byte| byte == b'\n').filter_map(|line| {
        let mut words = line.split(|&byte| byte == b' ');
        let number = str::from_utf8(words.nth(2)?).ok()?;
        let mount_point = words.nth(1)?;
        let kind = words.skip_while(|word| *word != b"-").nth(1)?;
        let same = unescaped(mount_point) == path.as_os_str()
            && device.is_none_or(|device| device == number);
        same.then(|| Mounted {
            device: number.to_owned(),
            kind: OsStr::from_bytes(kind).to_owned(),
        })
    });
    found.next_back()
}

/// Undoes what the kernel does to blanks and the like: a backslash and three octal digits.
fn unescaped(word: &[u8]) -> OsString {
    let mut bytes = Vec::with_capacity(word.len());
    let mut rest = word;
    while let [first, more @ ..] = rest {
        let digits = more.get(..3).filter(|_| *first == b'\\');
        let octal = digits
            .and_then(|digits| str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        bytes.push(octal.unwrap_or(*first));
        rest = if octal.is_some() { &more[3..] } else { more };
    }
    OsString::from_vec(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_uppermost_mount_of_a_place_is_found_whatever_its_name() {
        let list = b"22 1 0:20 / /proc rw - proc proc rw\n\
            30 22 0:31 / /mnt/a\\040b rw,nosuid shared:1 master:2 - fuse.memferry memferry:7 rw\n\
            31 30 0:32 / /mnt/a\\040b rw - tmpfs none rw\n";
        let at = |path: &str, device| {
            find(list, Path::new(path), device)
                .map(|mounted| (mounted.device, mounted.kind.into_string().unwrap()))
        };
        let tmpfs = ("0:32".to_owned(), "tmpfs".to_owned());
        assert_eq!(at("/mnt/a b", None), Some(tmpfs));
        let ours = ("0:31".to_owned(), KIND.to_owned());
        assert_eq!(at("/mnt/a b", Some("0:31")), Some(ours));
        assert_eq!(at("/mnt/a", None), None);
        assert_eq!(at("/proc", Some("0:31")), None);
    }

    #[test]
    fn a_line_that_is_cut_short_is_no_mount() {
        for list in [
            &b"22 1 0:20"[..],
            b"22 1 0:20 / /proc rw",
            b"",
            b"\n\n",
            b"22 1 0:20 / /proc rw -",
        ] {
            assert_eq!(find(list, Path::new("/proc"), None), None);
        }
    }
}
