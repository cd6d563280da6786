//! Making a userfaultfd of this process.

use std::io;
use std::os::fd::OwnedFd;

use linux_raw_sys::general as raw;
use rustix::io::Errno;
use rustix::mm::UserfaultfdFlags;

/// Whose faults a userfaultfd of this process may handle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Also those of the kernel on behalf of the process (KVM, vhost, `read` into the memory). Needs
    /// `CAP_SYS_PTRACE` or `vm.unprivileged_userfaultfd=1`.
    UserAndKernel,
    /// Only those of user code: needs no privilege. A system call that faults fails with `EFAULT`. Asynchronous
    /// write protection is not concerned: the kernel's writes are tracked all the same.
    UserModeOnly,
}

/// A userfaultfd of this process that nobody has agreed with on features: to be handed to who serves the faults, who
/// [adopts](super::Uffd::adopt) it.
///
/// # Errors
/// As [`Uffd::create`](super::Uffd::create).
pub fn unused(scope: Scope) -> io::Result<OwnedFd> {
    new_descriptor(scope).map_err(|errno| match errno {
        Errno::PERM => io::Error::new(
            io::ErrorKind::PermissionDenied,
            "userfaultfd for kernel faults needs CAP_SYS_PTRACE, or the sysctl vm.unprivileged_userfaultfd=1",
        ),
        Errno::NOSYS => io::Error::new(
            io::ErrorKind::Unsupported,
            "the kernel was built without userfaultfd (CONFIG_USERFAULTFD)",
        ),
        errno => errno.into(),
    })
}

fn new_descriptor(scope: Scope) -> Result<OwnedFd, Errno> {
    let mut flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    if scope == Scope::UserModeOnly {
        flags |= UserfaultfdFlags::from_bits_retain(raw::UFFD_USER_MODE_ONLY);
    }
    // SAFETY: the call makes a descriptor and touches no memory; what `Uffd` lets its users do with it is argued at
    // its ioctl.
    unsafe { rustix::mm::userfaultfd(flags) }
}
