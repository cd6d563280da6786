//! Who may make a userfaultfd, and by which way: children without a privilege try.

use std::error::Error;
use std::fs::Permissions;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::process::Stdio;

use memferry::chunk::Storage;
use memferry::frontend::{Slice, SliceOptions};
use memferry::sys::uffd::{CreateError, Scope};
use rustix::fs::{CWD, FileType};
use rustix::mount::{MountFlags, MountPropagationFlags};
use rustix::process::DumpableBehavior;
use rustix::thread::UnshareFlags;

use crate::slice::{first_byte, read_into, region};
use crate::victim::{NOBODY, filter_userfaultfd, this_binary};

/// What a process of this binary does instead of tests: the words for the device, the filter and the scope.
pub(crate) const ROLE: &str = "MEMFERRY_USERFAULTFD";

const DEVICE: &str = "/dev/userfaultfd";

/// What a child without a privilege says: of the scope that it got, after it was served a fault of that scope; or why
/// it got none.
///
/// `device` is `open` to its group, `closed` to everybody but root, or `absent`. `filter` says how a seccomp filter
/// answers the system call, if there is one. `scope` is what is asked for, `any` for what can be had.
fn child_says(device: &str, filter: &str, scope: &str) -> String {
    let sysctl = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap();
    assert_eq!(sysctl.trim(), "0", "on this machine everybody may");
    let child = this_binary()
        .env(ROLE, format!("{device} {filter} {scope}"))
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    assert!(child.status.success(), "{}", child.status);
    String::from_utf8(child.stdout).unwrap().trim().to_owned()
}

#[expect(clippy::exit, reason = "a child without tests tells its parent so")]
pub(crate) fn try_without_privilege(role: &str) -> ! {
    // SAFETY: asks to be killed when the parent dies.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    let [device, filter, scope] = role.split(' ').collect::<Vec<_>>()[..] else {
        panic!("{role}")
    };
    see_a_device_that_is(device);
    match filter {
        "unfiltered" => {}
        "EPERM" => filter_userfaultfd(libc::SECCOMP_RET_ERRNO | libc::EPERM.unsigned_abs()),
        "ENOSYS" => filter_userfaultfd(libc::SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs()),
        other => panic!("{other}"),
    }
    become_nobody();
    let options = SliceOptions {
        scope: match scope {
            "kernel" => Some(Scope::UserAndKernel),
            "user" => Some(Scope::UserModeOnly),
            _ => None,
        },
        ..SliceOptions::default()
    };
    match Slice::new(region(), &options) {
        Ok(slice) => be_served(&slice),
        Err(error) => {
            let typed = error
                .get_ref()
                .is_some_and(|error| error.is::<CreateError>());
            println!("{:?}, typed: {typed}: {error}", error.kind());
            if let Some(source) = error.source() {
                println!("{source}");
            }
        }
    }
    std::process::exit(0)
}

/// Gives this process a `/dev` of its own, with nothing in it but that device. It ends with the process.
fn see_a_device_that_is(device: &str) {
    let number = std::fs::metadata(DEVICE).unwrap().rdev();
    // SAFETY: gives this process, which has one thread, mounts of its own; descriptors stay as they are.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).unwrap();
    rustix::mount::mount("tmpfs", "/dev", "tmpfs", MountFlags::empty(), None).unwrap();
    let mode = match device {
        "open" => 0o640,
        "closed" => 0o600,
        "absent" => return,
        other => panic!("{other}"),
    };
    let (kind, nothing) = (FileType::CharacterDevice, rustix::fs::Mode::empty());
    rustix::fs::mknodat(CWD, DEVICE, kind, nothing, number).unwrap();
    chown(DEVICE, Some(0), Some(NOBODY)).unwrap();
    std::fs::set_permissions(DEVICE, Permissions::from_mode(mode)).unwrap();
}

fn become_nobody() {
    // SAFETY: an empty list; this process has one thread.
    assert_eq!(unsafe { libc::setgroups(0, std::ptr::null()) }, 0);
    // SAFETY: takes numbers.
    assert_eq!(unsafe { libc::setresgid(NOBODY, NOBODY, NOBODY) }, 0);
    // SAFETY: takes numbers.
    assert_eq!(unsafe { libc::setresuid(NOBODY, NOBODY, NOBODY) }, 0);
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    assert!(status.contains("CapEff:\t0000000000000000"), "{status}");
    // As a program is that this user has started: its `/proc/self` is its own.
    rustix::process::set_dumpable_behavior(DumpableBehavior::Dumpable).unwrap();
}

fn be_served(slice: &Slice) {
    assert_eq!(first_byte(slice, 1), 2);
    match slice.scope() {
        Scope::UserAndKernel => {
            assert_eq!(read_into(slice, 5).unwrap(), 10);
            // What the call wrote, and what was fetched for it.
            let mut bytes = [0; 11];
            slice.read_exact_at(&mut bytes, 5 * 4096).unwrap();
            assert_eq!(bytes, [99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 6]);
            println!("the kernel is served");
        }
        Scope::UserModeOnly => {
            let refused = read_into(slice, 5).unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(libc::EFAULT));
            println!("programs alone are served");
        }
    }
}

#[test]
#[ignore = "privileged: needs root (gives up its privileges), and /dev/userfaultfd (Linux 6.1)"]
fn who_has_neither_a_privilege_nor_the_device_is_told_of_all_three_ways() {
    let ways = [
        "CAP_SYS_PTRACE",
        "vm.unprivileged_userfaultfd=1",
        "read access to /dev/userfaultfd",
    ];
    for (device, state, errno) in [
        ("closed", "may not be opened", "Permission denied"),
        ("absent", "does not exist", "No such file"),
    ] {
        let said = child_says(device, "unfiltered", "kernel");
        let beginning = "PermissionDenied, typed: true: this process may not make a userfaultfd";
        assert!(said.starts_with(beginning), "{said}");
        for part in ways.iter().chain([&state, &errno]) {
            assert!(said.contains(part), "{part} is not in: {said}");
        }
        let served = child_says(device, "unfiltered", "any");
        assert_eq!(served, "programs alone are served");
    }
}

#[test]
#[ignore = "privileged: needs root (gives up its privileges), and /dev/userfaultfd (Linux 6.1)"]
fn who_may_open_the_device_needs_no_privilege_for_the_kernels_faults() {
    for scope in ["kernel", "any"] {
        let served = child_says("open", "unfiltered", scope);
        assert_eq!(served, "the kernel is served");
    }
}

/// As in a container, whose filter may answer with either.
#[test]
#[ignore = "privileged: needs root (gives up its privileges), and /dev/userfaultfd (Linux 6.1)"]
fn where_a_filter_forbids_the_call_the_device_will_do_and_its_lack_is_told() {
    for filter in ["EPERM", "ENOSYS"] {
        for (scope, expected) in [
            ("kernel", "the kernel is served"),
            ("user", "programs alone are served"),
        ] {
            assert_eq!(child_says("open", filter, scope), expected);
            let said = child_says("closed", filter, scope);
            assert!(said.starts_with("PermissionDenied, typed: true"), "{said}");
            for part in ["seccomp filter", "may not be opened"] {
                assert!(said.contains(part), "{part} is not in: {said}");
            }
        }
    }
    let said = child_says("absent", "ENOSYS", "kernel");
    assert!(said.starts_with("Unsupported, typed: true"), "{said}");
}
