//! libnbd: nbdinfo, nbdcopy, and scripts of nbdsh.

use memferry::chunk::Storage;
use memferry::frontend::nbd::{Export, Tls};
use serde_json::Value;

use crate::rig::{Rig, good, noise, run};

const LEN: usize = 8 << 20;

#[test]
#[ignore = "foreign: needs nbdinfo"]
fn nbdinfo_tells_all_that_an_export_can_do() {
    let rig = Rig::new(LEN as u64, Tls::Off);
    let told: Value = serde_json::from_str(&good("nbdinfo", &["--json", &rig.url()])).unwrap();
    assert_eq!(told["protocol"], "newstyle-fixed");
    assert_eq!(told["structured"], true);
    let export = &told["exports"][0];
    assert_eq!(export["export-name"], "disk");
    assert_eq!(export["description"], "a disk of memory");
    assert_eq!(export["export-size"], LEN);
    assert_eq!(export["contexts"][0], "base:allocation");
    assert_eq!(export["contexts"][1], "memferry:dirty");
    for can in [
        "can_cache",
        "can_df",
        "can_fast_zero",
        "can_flush",
        "can_fua",
        "can_multi_conn",
        "can_trim",
        "can_zero",
    ] {
        assert_eq!(export[can], true, "{can}");
    }
    assert_eq!(export["is_read_only"], false);
    assert_eq!(export["block_size_minimum"], 1);
    assert_eq!(export["block_size_preferred"], 4096);
    assert_eq!(export["block_size_maximum"], 32 << 20);
    rig.is_left();
}

#[test]
#[ignore = "foreign: needs nbdinfo"]
fn nbdinfo_lists_exports_and_those_that_can_only_be_read() {
    let rig = Rig::new(LEN as u64, Tls::Off);
    let storage = std::sync::Arc::clone(&rig.storage) as _;
    let other = Export::new("other \"one\"", storage).unwrap().read_only();
    rig.server.add(other).unwrap();
    let told = good("nbdinfo", &["--list", "--json", &rig.url_of("")]);
    let told: Value = serde_json::from_str(&told).unwrap();
    let exports = told["exports"].as_array().unwrap();
    assert_eq!(exports.len(), 2);
    assert_eq!(exports[1]["export-name"], "other \"one\"");
    assert_eq!(exports[1]["is_read_only"], true);
    assert_eq!(exports[1]["can_trim"], false);
    let missing = run("nbdinfo", &[&rig.url_of("missing")]);
    assert!(!missing.success, "{missing:?}");
    rig.is_left();
}

#[test]
#[ignore = "foreign: needs nbdinfo"]
fn nbdinfo_maps_holes_and_what_is_dirty() {
    let rig = Rig::new(LEN as u64, Tls::Off);
    rig.storage.write_all_at(&[1; 8192], 1 << 20).unwrap();
    let map = |what: &str| -> Vec<(u64, u64, u64)> {
        let told = good("nbdinfo", &[what, "--json", &rig.url()]);
        let told: Value = serde_json::from_str(&told).unwrap();
        let number = |value: &Value| value.as_u64().unwrap();
        let extents = told.as_array().unwrap().iter();
        extents
            .map(|extent| {
                (
                    number(&extent["offset"]),
                    number(&extent["length"]),
                    number(&extent["type"]),
                )
            })
            .collect()
    };
    let end = (1 << 20) + 8192;
    let cut = |[between, there]: [u64; 2]| {
        [
            (0, 1 << 20, between),
            (1 << 20, 8192, there),
            (end, LEN as u64 - end, between),
        ]
    };
    assert_eq!(map("--map"), cut([3, 0]));
    assert_eq!(map("--map=memferry:dirty"), cut([0, 1]));
    rig.is_left();
}

#[test]
#[ignore = "foreign: needs nbdcopy"]
fn nbdcopy_brings_bytes_there_and_back() {
    for rig in [Rig::new(LEN as u64, Tls::Off), Rig::with_file(LEN as u64)] {
        // Noise, and holes that are no multiples of anything.
        let mut bytes = noise(LEN);
        bytes[100_000..900_000].fill(0);
        bytes[LEN - 70_000..].fill(0);
        let file = rig.file("from", &bytes);
        let back = rig.file("to", &[]);
        for size in ["--request-size=4096", "--request-size=33554432"] {
            good("nbdcopy", &["--flush", size, &file, &rig.url()]);
            assert!(rig.bytes() == bytes);
            good("nbdcopy", &[size, &rig.url(), &back]);
            assert!(std::fs::read(&back).unwrap() == bytes);
        }
        // Synchronous, one connection; zeros are written as zeros.
        let one = ["--synchronous", "--connections=1", "--allocated"];
        good("nbdcopy", &[&one[..], &[&file, &rig.url()]].concat());
        assert!(rig.bytes() == bytes);
        rig.is_left();
    }
}

fn script(rig: &Rig, script: &str) {
    // What nbdsh does, with the Python that Debian's packages are for.
    let script = format!("import errno\nuri = '{}'\n{script}", rig.url());
    let said = run("/usr/bin/python3", &["-m", "nbd", "-c", &script]);
    assert!(said.success, "{said:?}");
}

#[test]
#[ignore = "foreign: needs nbdsh"]
fn every_command_and_flag_does_what_libnbd_expects() {
    for rig in [Rig::new(LEN as u64, Tls::Off), Rig::with_file(LEN as u64)] {
        script(&rig, include_str!("commands.py"));
        rig.is_left();
    }
}

#[test]
#[ignore = "foreign: needs nbdsh"]
fn every_way_into_an_export_is_open_to_libnbd() {
    let rig = Rig::new(LEN as u64, Tls::Off);
    script(&rig, include_str!("handshakes.py"));
    rig.is_left();
}

#[test]
#[ignore = "foreign: needs nbdsh"]
fn libnbd_is_told_what_is_wrong_with_its_requests() {
    let rig = Rig::new(LEN as u64, Tls::Off);
    script(&rig, include_str!("refusals.py"));
    rig.is_left();
}

#[test]
#[ignore = "foreign: needs nbdsh"]
fn libnbd_has_many_requests_under_way_on_several_connections() {
    for rig in [Rig::new(LEN as u64, Tls::Off), Rig::with_file(LEN as u64)] {
        script(&rig, include_str!("pipelined.py"));
        rig.is_left();
    }
}
