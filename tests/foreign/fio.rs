//! fio, which verifies what it reads.

use memferry::frontend::nbd::Tls;

use crate::rig::{Rig, good};

fn check(rig: &Rig, more: &[&str]) {
    let uri = format!("--uri={}", rig.url());
    let mut arguments = vec!["--name=it", "--ioengine=nbd", &uri, "--size=16m"];
    arguments.extend(["--verify=crc32c", "--verify_fatal=1"]);
    arguments.extend(["--randrepeat=1", "--minimal"]);
    arguments.extend(more);
    good("fio", &arguments);
    rig.is_left();
}

#[test]
#[ignore = "foreign: needs fio"]
fn what_fio_writes_at_random_it_reads_back() {
    for rig in [Rig::new(16 << 20, Tls::Off), Rig::with_file(16 << 20)] {
        check(&rig, &["--rw=randwrite", "--bs=4k", "--iodepth=32"]);
        check(&rig, &["--rw=randrw", "--bsrange=512-256k", "--iodepth=16"]);
        check(
            &rig,
            &["--rw=write", "--bs=1m", "--iodepth=4", "--end_fsync=1"],
        );
        check(
            &rig,
            &[
                "--rw=randtrimwrite",
                "--bs=64k",
                "--iodepth=1",
                "--verify=0",
            ],
        );
    }
}
