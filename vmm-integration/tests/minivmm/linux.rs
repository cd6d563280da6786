//! A stock Linux: it boots where KVM can run one, and elsewhere is told to be too much for it.

use std::process::Stdio;

use guest_test::accel::{self, Accel};
use guest_test::image::Image;

use crate::vmm::{Vmm, until};

#[test]
#[ignore = "kvm: needs /dev/kvm, and QEMU to find out what it can do"]
fn a_stock_linux_boots_where_kvm_can_run_one_and_is_told_to_be_too_much_elsewhere() {
    let image = Image::prepare().unwrap();
    let place = tempfile::tempdir().unwrap();
    let console = place.path().join("console");
    let mut command = Vmm::command();
    command.args(["boot", "--memory", "512M", "--cpus", "2", "--kernel"]);
    command
        .arg(&image.kernel)
        .arg("--initramfs")
        .arg(&image.initramfs);
    command.arg("--console").arg(&console);
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    if accel::accel().unwrap() == Accel::Kvm {
        until("Linux and its first program print", || {
            let printed = std::fs::read(&console).unwrap_or_default();
            String::from_utf8_lossy(&printed).contains("Linux version")
        });
        child.kill().unwrap();
        child.wait().unwrap();
        return;
    }
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(3));
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(error.contains("KVM cannot run this guest"), "{error}");
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn what_is_no_kernel_is_refused_by_name() {
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("text");
    for content in [&b"this is no kernel"[..], &[0; 4096]] {
        std::fs::write(&file, content).unwrap();
        let mut command = Vmm::command();
        let output = command
            .args(["boot", "--kernel"])
            .arg(&file)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1));
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(error.contains("text"), "{error}");
    }
}
