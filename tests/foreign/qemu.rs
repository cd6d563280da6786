//! qemu-img and qemu-io.

use memferry::chunk::Storage;
use memferry::frontend::nbd::Tls;
use serde_json::Value;

use crate::rig::{Rig, good, noise, run};

const LEN: usize = 8 << 20;

#[test]
#[ignore = "foreign: needs qemu-img"]
fn an_image_is_converted_there_and_back_and_compares_equal() {
    for rig in [Rig::new(LEN as u64, Tls::Off), Rig::with_file(LEN as u64)] {
        let mut bytes = noise(LEN);
        bytes[1 << 20..3 << 20].fill(0);
        let file = rig.file("image", &bytes);
        let back = rig.file("back", &[]);
        let (raw, url) = (["-f", "raw"], rig.url());
        let convert = ["convert", "-n", "-O", "raw", "-W", "-m", "8"];
        // Whatever was there before is overwritten, also where the image has zeros.
        rig.storage.write_all_at(&[1; LEN], 0).unwrap();
        let target = [&convert[..], &raw, &[&file, &url]].concat();
        good("qemu-img", &target);
        assert!(rig.bytes() == bytes);
        good(
            "qemu-img",
            &[&["compare"], &raw[..], &["-F", "raw", &file, &url]].concat(),
        );
        let convert = ["convert", "-O", "raw"];
        good("qemu-img", &[&convert[..], &raw, &[&url, &back]].concat());
        assert!(std::fs::read(&back).unwrap() == bytes);
        // A difference is found.
        rig.storage.write_all_at(&[0], 5 << 20).unwrap();
        let differs = run(
            "qemu-img",
            &[&["compare"], &raw[..], &["-F", "raw", &file, &url]].concat(),
        );
        assert!(
            !differs.success && differs.out.contains("mismatch"),
            "{differs:?}"
        );
        rig.is_left();
    }
}

#[test]
#[ignore = "foreign: needs qemu-img"]
fn qemu_maps_holes_and_what_is_dirty() {
    let rig = Rig::new(LEN as u64, Tls::Off);
    rig.storage.write_all_at(&[1; 65536], 1 << 20).unwrap();
    let url = rig.url();
    let info = good("qemu-img", &["info", "--output=json", "-f", "raw", &url]);
    let info: Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["virtual-size"], LEN);
    let map = |more: &str| -> Vec<(u64, bool, bool)> {
        let image = format!(
            "driver=raw,file.driver=nbd,file.server.type=unix,file.server.path={},file.export=disk{more}",
            rig.socket().display()
        );
        let arguments = ["map", "--output=json", "--image-opts", &image];
        let map: Value = serde_json::from_str(&good("qemu-img", &arguments)).unwrap();
        let extents = map.as_array().unwrap().iter();
        extents
            .map(|extent| {
                (
                    extent["start"].as_u64().unwrap(),
                    extent["zero"].as_bool().unwrap(),
                    extent["data"].as_bool().unwrap(),
                )
            })
            .collect()
    };
    let end = (1 << 20) + 65536;
    assert_eq!(
        map(""),
        [(0, true, false), (1 << 20, false, true), (end, true, false)]
    );
    // With a bitmap QEMU shows what is dirty as what has no data.
    let dirty = map(",file.x-dirty-bitmap=memferry:dirty");
    let starts: Vec<u64> = dirty.iter().map(|(start, ..)| *start).collect();
    assert_eq!(starts, [0, 1 << 20, end], "{dirty:?}");
    assert_ne!(dirty[0].2, dirty[1].2);
    rig.is_left();
}

#[test]
#[ignore = "foreign: needs qemu-io"]
fn qemu_io_reads_writes_zeroes_discards_and_flushes() {
    for rig in [Rig::new(LEN as u64, Tls::Off), Rig::with_file(LEN as u64)] {
        let commands = [
            "write -P 0xaa 0 1M",
            "read -P 0xaa 0 1M",
            "write -f -P 0xbb 4096 64k",
            "write -z 8192 4096",
            "write -z -u 16384 4096",
            "discard 512k 64k",
            "flush",
            "read -P 0xbb 4096 4096",
            "read -P 0 8192 4096",
            "read -P 0 16384 4096",
            "read -P 0xaa 72k 400k",
            "aio_write -P 0xcc 2M 2M",
            "aio_write -P 0xdd 4M 2M",
            "aio_flush",
            "aio_read -P 0xcc 2M 2M",
            "aio_read -P 0xdd 4M 2M",
            "aio_flush",
            "map",
        ];
        let mut arguments = vec!["-f", "raw", "-t", "none"];
        for command in commands {
            arguments.extend(["-c", command]);
        }
        let url = rig.url();
        arguments.push(&url);
        let out = good("qemu-io", &arguments);
        assert!(!out.contains("Pattern verification failed"), "{out}");
        let bytes = rig.bytes();
        assert_eq!((bytes[0], bytes[4096], bytes[8192]), (0xaa, 0xbb, 0));
        assert_eq!((bytes[3 << 20], bytes[5 << 20]), (0xcc, 0xdd));
        rig.is_left();
    }
}
