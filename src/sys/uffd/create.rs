//! Making a userfaultfd of this process: by the system call or, where that is refused, by the kernel's device for it.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use linux_raw_sys::general as raw;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::opcode;
use rustix::mm::UserfaultfdFlags;

/// Whose faults a userfaultfd of this process may handle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Also those of the kernel on behalf of the process (KVM, vhost, `read` into the memory). Needs one of
    /// `CAP_SYS_PTRACE`, the sysctl `vm.unprivileged_userfaultfd=1`, and read access to `/dev/userfaultfd`
    /// (Linux 6.1).
    UserAndKernel,
    /// Only those of user code: needs no privilege. A system call that faults fails with `EFAULT`. Asynchronous
    /// write protection is not concerned: the kernel's writes are tracked all the same.
    UserModeOnly,
}

/// Why this process may not make a userfaultfd, and what would allow it. Inside an [`io::Error`] of kind
/// [`PermissionDenied`](io::ErrorKind::PermissionDenied), but for [`Absent`](Self::Absent).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CreateError {
    /// The system call takes a privilege for the kernel's faults, and the device is out of reach.
    #[error(
        "this process may not make a userfaultfd that handles the kernel's faults, and {}; grant CAP_SYS_PTRACE, set \
         the sysctl vm.unprivileged_userfaultfd=1, or give read access to {DEVICE}",
        state_of_the_device(.device)
    )]
    Privilege {
        /// What came of the device.
        #[source]
        device: io::Error,
    },
    /// The system call is refused whatever it is asked for, and the device is out of reach.
    #[error(
        "the system call userfaultfd is forbidden to this process, as a container's seccomp filter does it, and {}; \
         give read access to {DEVICE}, or let the filter pass the call{}",
        state_of_the_device(.device),
        privilege_besides(*.scope)
    )]
    Filtered {
        /// What was asked for.
        scope: Scope,
        /// What the system call returned.
        system_call: io::Error,
        /// What came of the device.
        #[source]
        device: io::Error,
    },
    /// There is neither the system call nor the device. Inside an [`io::Error`] of kind
    /// [`Unsupported`](io::ErrorKind::Unsupported).
    #[error(
        "there is neither the system call userfaultfd nor {DEVICE}: use a kernel that was built with \
         CONFIG_USERFAULTFD; in a container, let its seccomp filter pass the call, or give it the device"
    )]
    Absent,
}

/// A userfaultfd of this process that nobody has agreed with on features: to be handed to who serves the faults, who
/// [adopts](super::Uffd::adopt) it.
///
/// # Errors
/// As [`Uffd::create`](super::Uffd::create).
pub fn unused(scope: Scope) -> io::Result<OwnedFd> {
    match by_system_call(scope) {
        Err(refused) if is_refusal(refused) => by_device(scope).map_err(|device| {
            let filtered = || by_system_call(Scope::UserModeOnly).is_err_and(is_refusal);
            why(scope, refused, filtered, device)
        }),
        made => Ok(made?),
    }
}

fn by_system_call(scope: Scope) -> Result<OwnedFd, Errno> {
    // SAFETY: the call makes a descriptor and touches no memory; what `Uffd` lets its users do with it is argued at
    // its ioctl.
    unsafe { rustix::mm::userfaultfd(flags(scope)) }
}

/// Here the permissions of a file decide, in place of the process's privileges.
fn by_device(scope: Scope) -> io::Result<OwnedFd> {
    // Reading is enough for an ioctl.
    let device = rustix::fs::open(DEVICE, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let flags = libc::c_ulong::from(flags(scope).bits());
    // SAFETY: the argument is a number; the ioctl makes a descriptor, of this process's memory, and touches no memory.
    let made = unsafe {
        libc::ioctl(
            device.as_raw_fd(),
            USERFAULTFD_IOC_NEW as libc::Ioctl,
            flags,
        )
    };
    if made < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the ioctl has just made this descriptor for its caller, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(made) })
}

fn flags(scope: Scope) -> UserfaultfdFlags {
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    match scope {
        Scope::UserAndKernel => flags,
        Scope::UserModeOnly => flags | UserfaultfdFlags::from_bits_retain(raw::UFFD_USER_MODE_ONLY),
    }
}

/// Whether an answer of the system call forbids it, to the process or by a filter, which can give any answer and in
/// practice gives one of these.
fn is_refusal(errno: Errno) -> bool {
    matches!(errno, Errno::PERM | Errno::ACCESS | Errno::NOSYS)
}

/// `filtered` tells whether a call that needs no privilege is refused as well.
fn why(
    scope: Scope,
    system_call: Errno,
    filtered: impl FnOnce() -> bool,
    device: io::Error,
) -> io::Error {
    let denied = io::ErrorKind::PermissionDenied;
    if system_call == Errno::NOSYS && device.kind() == io::ErrorKind::NotFound {
        io::Error::new(io::ErrorKind::Unsupported, CreateError::Absent)
    } else if scope == Scope::UserModeOnly || filtered() {
        let system_call = system_call.into();
        io::Error::new(
            denied,
            CreateError::Filtered {
                scope,
                system_call,
                device,
            },
        )
    } else {
        io::Error::new(denied, CreateError::Privilege { device })
    }
}

fn state_of_the_device(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => {
            format!("{DEVICE} does not exist (Linux 6.1 has it, a container if it is given it)")
        }
        io::ErrorKind::PermissionDenied => format!("{DEVICE} may not be opened"),
        _ => format!("{DEVICE} cannot be used"),
    }
}

fn privilege_besides(scope: Scope) -> &'static str {
    match scope {
        Scope::UserAndKernel => {
            ", which for the kernel's faults takes CAP_SYS_PTRACE or the sysctl vm.unprivileged_userfaultfd=1 besides"
        }
        Scope::UserModeOnly => "",
    }
}

const DEVICE: &str = "/dev/userfaultfd";

/// `_IO(0xAA, 0x00)`, which the definitions we use lack. Its argument are the flags of the system call.
const USERFAULTFD_IOC_NEW: u32 = opcode::none(0xaa, 0);

#[cfg(any(
    target_arch = "x86_64",
    target_arch = "aarch64",
    target_arch = "riscv64"
))]
const _: () = assert!(USERFAULTFD_IOC_NEW == 0xaa00);

#[cfg(test)]
mod tests {
    use std::error::Error;
    use std::io::ErrorKind;
    use std::os::fd::AsFd;

    use super::*;

    /// What is said if the system call gives the first answer, one without privilege is `filtered`, and the device
    /// gives the last answer.
    fn said(scope: Scope, system_call: Errno, filtered: bool, device: Errno) -> io::Error {
        why(scope, system_call, || filtered, device.into())
    }

    fn check(error: &io::Error, kind: ErrorKind, expected: &str) {
        assert_eq!(error.kind(), kind);
        assert_eq!(error.to_string(), expected);
    }

    #[test]
    fn who_lacks_a_privilege_is_told_of_all_three_ways_and_of_the_device() {
        let of = |device| said(Scope::UserAndKernel, Errno::PERM, false, device);
        let closed = of(Errno::ACCESS);
        check(
            &closed,
            ErrorKind::PermissionDenied,
            "this process may not make a userfaultfd that handles the kernel's faults, and /dev/userfaultfd may not be \
             opened; grant CAP_SYS_PTRACE, set the sysctl vm.unprivileged_userfaultfd=1, or give read access to \
             /dev/userfaultfd",
        );
        let source = closed.source().unwrap().to_string();
        assert!(source.contains("Permission denied"), "{source}");
        let older = of(Errno::NOENT).to_string();
        let expected = "/dev/userfaultfd does not exist (Linux 6.1 has it";
        assert!(older.contains(expected), "{older}");
        let another = of(Errno::NOTTY).to_string();
        assert!(another.contains("cannot be used"), "{another}");
    }

    #[test]
    fn a_filter_that_forbids_the_call_is_told_from_a_lack_of_privilege() {
        let (denied, forbidden) = (ErrorKind::PermissionDenied, Errno::PERM);
        let beginning = "the system call userfaultfd is forbidden to this process, as a container's seccomp filter \
                         does it, and /dev/userfaultfd may not be opened; give read access to /dev/userfaultfd, or \
                         let the filter pass the call";
        let user = said(Scope::UserModeOnly, forbidden, true, Errno::ACCESS);
        check(&user, denied, beginning);
        let kernel = said(Scope::UserAndKernel, forbidden, true, Errno::ACCESS);
        let expected = format!(
            "{beginning}, which for the kernel's faults takes CAP_SYS_PTRACE or the sysctl \
             vm.unprivileged_userfaultfd=1 besides"
        );
        check(&kernel, denied, &expected);
    }

    #[test]
    fn a_kernel_without_userfaultfd_is_no_lack_of_permission() {
        let absent = said(Scope::UserAndKernel, Errno::NOSYS, true, Errno::NOENT);
        assert_eq!(absent.kind(), ErrorKind::Unsupported);
        let message = absent.to_string();
        assert!(message.contains("CONFIG_USERFAULTFD"), "{message}");
        let hidden = said(Scope::UserAndKernel, Errno::NOSYS, true, Errno::ACCESS);
        assert_eq!(hidden.kind(), ErrorKind::PermissionDenied);
    }

    #[test]
    #[ignore = "privileged: needs read access to /dev/userfaultfd (Linux 6.1)"]
    fn the_device_makes_what_the_system_call_makes() {
        for scope in [Scope::UserAndKernel, Scope::UserModeOnly] {
            let made = by_device(scope).unwrap();
            assert!(super::super::is_userfaultfd(made.as_fd()));
            let flags = rustix::fs::fcntl_getfl(&made).unwrap();
            assert!(flags.contains(OFlags::NONBLOCK));
            let flags = rustix::io::fcntl_getfd(&made).unwrap();
            assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        }
    }
}
