//! Unix sockets of ours.

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType};

/// A socket's path, removed at the end.
pub(crate) struct Remove(pub(crate) PathBuf);

impl Drop for Remove {
    fn drop(&mut self) {
        // Somebody may have removed it.
        let _ = fs::remove_file(&self.0);
    }
}

/// Listens at `path`, for whoever may open it.
pub(crate) fn bind(path: &Path) -> io::Result<UnixListener> {
    remove_stale(path)?;
    UnixListener::bind(path)
}

/// Listens at `path`, for this user alone.
pub(crate) fn bind_private(path: &Path) -> io::Result<UnixListener> {
    remove_stale(path)?;
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )?;
    // Before it has a path: there is no moment at which somebody else could open it.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, 16)?;
    Ok(socket.into())
}

/// Removes a socket that a process which was killed has left behind.
fn remove_stale(path: &Path) -> io::Result<()> {
    let is_socket =
        fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
    if is_socket
        && UnixStream::connect(path)
            .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
    {
        fs::remove_file(path)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_private_socket_is_its_owners_alone_and_replaces_a_stale_one_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = bind_private(&path).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600);
        let used = bind_private(&path).unwrap_err();
        assert_eq!(used.kind(), io::ErrorKind::AddrInUse);
        drop(listener);
        let remove = Remove(path.clone());
        drop(bind_private(&path).unwrap());
        drop(remove);
        assert!(!path.exists());
        fs::write(&path, "somebody's").unwrap();
        assert!(bind_private(&path).is_err());
        assert!(path.exists());
    }
}
