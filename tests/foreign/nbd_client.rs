//! Our client against servers of others.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use memferry::backend::nbd::{ConnectError, DoubtfulWrites, NbdUrl, Remote, RemoteOptions, list};
use memferry::chunk::Storage;
use memferry::chunk::conformance::storage;

use crate::nbd_servers::Foreign;

fn options() -> RemoteOptions {
    RemoteOptions {
        deadline: Duration::from_secs(20),
        ..RemoteOptions::default()
    }
}

fn connect(server: &Foreign) -> Remote {
    Remote::connect(&server.url(), &options()).unwrap()
}

/// Every promise of a storage, each on a server of its own.
fn keeps_all_promises(make: impl Fn(u64) -> Foreign) {
    let servers = Mutex::new(Vec::new());
    storage::run_all(&|len| {
        let server = make(len);
        let remote = connect(&server);
        assert_eq!(remote.len(), len);
        servers.lock().unwrap().push(server);
        Arc::new(remote)
    });
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at / 7 + at / 4096) as u8).collect()
}

#[test]
#[ignore = "foreign: needs nbdkit"]
fn nbdkit_is_a_storage() {
    keeps_all_promises(|len| Foreign::nbdkit(&["memory", &len.to_string()]));
}

#[test]
#[ignore = "foreign: needs nbdkit"]
fn nbdkit_that_knows_nothing_but_reading_and_writing_is_a_storage() {
    keeps_all_promises(|len| {
        let len = len.to_string();
        Foreign::nbdkit(&[
            "--no-sr",
            "--filter=nozero",
            "--filter=noextents",
            "--filter=noparallel",
            "memory",
            &len,
        ])
    });
}

#[test]
#[ignore = "foreign: needs nbdkit"]
fn a_server_of_the_old_kind_of_negotiation_is_a_storage() {
    // Without FIXED_NEWSTYLE: no option but the name of the export.
    keeps_all_promises(|len| Foreign::nbdkit(&["--mask-handshake=0", "memory", &len.to_string()]));
    keeps_all_promises(|len| Foreign::nbdkit(&["--mask-handshake=1", "memory", &len.to_string()]));
}

#[test]
#[ignore = "foreign: needs qemu-nbd"]
fn qemu_nbd_is_a_storage() {
    // It rounds lengths to sectors, so that a length that is none is not what was asked for.
    let server = Foreign::qemu_nbd(8 << 20, &["--shared=8"]);
    let remote = connect(&server);
    assert_eq!(remote.len(), 8 << 20);
    assert!(remote.knows_holes());
    assert_eq!(remote.data_ranges(0..8 << 20).unwrap(), []);
    let bytes = pattern(3 << 20);
    remote.write_all_at(&bytes, 12345).unwrap();
    remote.flush().unwrap();
    let mut read = vec![0; bytes.len()];
    remote.read_exact_at(&mut read, 12345).unwrap();
    assert!(read == bytes);
    remote.zero(0..8 << 20).unwrap();
    remote.read_ahead_at(&mut read, 12345).unwrap();
    assert!(read.iter().all(|&byte| byte == 0));
}

#[test]
#[ignore = "foreign: needs nbdkit"]
fn a_server_that_takes_only_blocks_is_read_and_written_by_the_byte() {
    let policy = [
        "--filter=blocksize-policy",
        "memory",
        "4194304",
        "blocksize-minimum=4096",
        "blocksize-preferred=4096",
        "blocksize-maximum=65536",
        "blocksize-error-policy=error",
    ];
    let server = Foreign::nbdkit(&policy);
    let remote = connect(&server);
    assert_eq!(remote.block_sizes().minimum, 4096);
    let mut model = vec![0; 4 << 20];
    for (offset, len) in [
        (0, 1),
        (4095, 2),
        (5000, 100),
        (1, 300_000),
        (4096, 4096),
        (8191, 4098),
        ((4 << 20) - 1, 1),
        (70_001, 65536),
    ] {
        let bytes = pattern(len);
        remote.write_all_at(&bytes, offset as u64).unwrap();
        model[offset..offset + len].copy_from_slice(&bytes);
        let mut read = vec![1; len];
        remote.read_exact_at(&mut read, offset as u64).unwrap();
        assert!(read == bytes, "{offset}+{len}");
    }
    remote.zero(100..9000).unwrap();
    model[100..9000].fill(0);
    remote.zero(20_000..20_001).unwrap();
    model[20_000] = 0;
    let mut read = vec![1; 4 << 20];
    remote.read_ahead_at(&mut read, 0).unwrap();
    assert!(read == model);
    for range in remote.data_ranges(50..4_000_001).unwrap() {
        assert!(range.start >= 50 && range.end <= 4_000_001);
    }
}

#[test]
#[ignore = "foreign: needs nbdkit"]
fn an_error_of_the_medium_fails_the_operation_alone() {
    let server = Foreign::nbdkit(&[
        "--filter=error",
        "memory",
        "1M",
        "error-pwrite=ENOSPC",
        "error-pwrite-rate=100%",
        "error-pread=EIO",
        "error-pread-file=/nonexistent/file",
    ]);
    let remote = connect(&server);
    let error = remote.write_all_at(&[1; 4096], 0).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull, "{error}");
    let mut buf = [1; 4096];
    remote.read_exact_at(&mut buf, 0).unwrap();
    assert_eq!(buf, [0; 4096]);
}

#[test]
#[ignore = "foreign: needs nbdkit"]
fn a_read_only_server_is_not_written_to() {
    let server = Foreign::nbdkit(&["-r", "memory", "1M"]);
    let remote = connect(&server);
    assert!(remote.is_read_only());
    let error = remote.write_all_at(&[1], 0).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
    assert!(remote.zero(0..1).is_err());
    remote.flush().unwrap();
}

#[test]
#[ignore = "foreign: needs nbdkit"]
fn an_export_that_is_not_there_is_named() {
    let server = Foreign::nbdkit(&[
        "--filter=exportname",
        "memory",
        "1M",
        "exportname=here",
        "exportname-strict=true",
    ]);
    let url = |name| NbdUrl::unix(server.socket(), name).unwrap();
    let error = Remote::connect(&url("elsewhere"), &options()).unwrap_err();
    assert!(
        matches!(&error, ConnectError::NoExport(name) if name == "elsewhere"),
        "{error:?}"
    );
    Remote::connect(&url("here"), &options()).unwrap();
}

#[test]
#[ignore = "foreign: needs nbdkit"]
fn a_server_lists_what_it_has() {
    let server = Foreign::nbdkit(&[
        "--filter=exportname",
        "memory",
        "1M",
        "exportname=one",
        "exportname=two",
        "exportname-list=explicit",
        "exportname-strict=true",
        "exportdesc=fixed:for people",
    ]);
    let exports = list(&server.url(), &options()).unwrap();
    let names: Vec<_> = exports.iter().map(|export| export.name.as_str()).collect();
    assert_eq!(names, ["one", "two"]);
    for export in exports {
        assert_eq!(export.export.unwrap().size, 1 << 20);
        assert_eq!(export.description, "for people");
        assert_eq!(export.contexts, ["base:allocation"]);
    }
    let old = Foreign::nbdkit(&["--mask-handshake=0", "memory", "1M"]);
    list(&old.url(), &options()).unwrap_err();
}

#[test]
#[ignore = "foreign: needs qemu-nbd"]
fn qemu_nbd_lists_what_it_has() {
    let server = Foreign::qemu_nbd(1 << 20, &["-x", "disk", "-D", "for people"]);
    let [export] = &list(&server.url(), &options()).unwrap()[..] else {
        panic!("one export")
    };
    assert_eq!(
        (export.name.as_str(), export.description.as_str()),
        ("disk", "for people")
    );
    assert_eq!(export.export.unwrap().size, 1 << 20);
    assert!(export.blocks.is_some());
}

#[test]
#[ignore = "foreign: needs nbdkit"]
fn what_a_server_that_was_killed_may_have_lost_is_told_once() {
    let mut server = Foreign::nbdkit(&["memory", "1M"]);
    let remote = connect(&server);
    remote.write_all_at(&[1; 100], 0).unwrap();
    remote.flush().unwrap();
    remote.write_all_at(&[2; 100], 50).unwrap();
    server.kill();
    server.start_again();
    // It is found again by itself.
    let mut buf = [9; 4];
    remote.read_exact_at(&mut buf, 0).unwrap();
    assert_eq!(buf, [0; 4]);
    let error = remote.flush().unwrap_err();
    let doubtful: &DoubtfulWrites = error.get_ref().unwrap().downcast_ref().unwrap();
    assert_eq!(doubtful.ranges, [50..150]);
    remote.flush().unwrap();
    assert_eq!(remote.take_doubtful(), [50..150]);
    remote.write_all_at(&[2; 100], 50).unwrap();
    remote.flush().unwrap();
    assert_eq!(remote.take_doubtful(), []);
}

#[test]
#[ignore = "foreign: needs nbdkit"]
fn an_export_that_comes_back_with_another_size_is_refused() {
    let mut server = Foreign::nbdkit(&["memory", "1M"]);
    let remote = connect(&server);
    server.kill();
    let other = Foreign::nbdkit(&["memory", "2M"]);
    std::fs::rename(other.socket(), server.socket()).unwrap();
    let error = remote.read_exact_at(&mut [0; 4], 0).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
    assert!(error.to_string().contains("2097152"), "{error}");
    drop(other);
    // The right one again is taken again.
    server.start_again();
    remote.read_exact_at(&mut [0; 4], 0).unwrap();
}

#[test]
#[ignore = "foreign: needs qemu-nbd"]
fn a_server_that_stands_still_costs_the_deadline_and_no_more() {
    // Not nbdkit, which now and then ends when many of those that have connected meanwhile have gone.
    let server = Foreign::qemu_nbd(64 << 20, &["--shared=0"]);
    let deadline = Duration::from_millis(700);
    let remote = Remote::connect(
        &server.url(),
        &RemoteOptions {
            deadline,
            ..options()
        },
    )
    .unwrap();
    remote.read_exact_at(&mut [0; 4], 0).unwrap();
    server.stop();
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for len in [4, 4096, 8 << 20] {
            let remote = &remote;
            scope.spawn(move || {
                let error = remote.read_exact_at(&mut vec![0; len], 0).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
            });
        }
        scope.spawn(|| {
            let error = remote.write_all_at(&vec![0; 8 << 20], 0).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
        });
    });
    let took = begun.elapsed();
    assert!(took < 4 * deadline, "{took:?}");
    server.go_on();
    remote.read_exact_at(&mut vec![0; 8 << 20], 0).unwrap();
}

#[test]
#[ignore = "foreign: needs qemu-nbd"]
fn a_server_that_lets_further_connections_wait_in_silence_is_spoken_to_over_those_there_are() {
    let server = Foreign::qemu_nbd(32 << 20, &["--shared=2"]);
    let remote = connect(&server);
    let mut buf = vec![1; 32 << 20];
    let begun = Instant::now();
    // Which of them opens another connection, and finds out, depends on who comes first.
    for _ in 0..4 {
        buf.fill(1);
        remote.read_ahead_at(&mut buf, 0).unwrap();
        assert!(buf.iter().all(|&byte| byte == 0));
        remote.write_all_at(&buf, 0).unwrap();
    }
    // What one connection costs that is not taken, and not what every one would.
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(6), "{took:?}");
}

#[test]
#[ignore = "foreign: needs nbdkit"]
fn a_server_that_is_killed_under_load_is_found_again_and_no_byte_is_wrong() {
    const LEN: u64 = 32 << 20;
    const WRITERS: u64 = 4;
    const SHARE: u64 = LEN / WRITERS;
    // A file, so that what was acknowledged is there after the server is not.
    let mut server = Foreign::qemu_nbd(LEN, &["--shared=0"]);
    let remote = connect(&server);
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let remote = &remote;
                scope.spawn(move || {
                    let own = writer * SHARE;
                    let mut model = vec![0; SHARE as usize];
                    for step in 0..60_u64 {
                        let len = 1 + (step * 7919 + writer * 104_729) % 300_000;
                        let at = (step * 6_700_417) % (SHARE - len);
                        let bytes = vec![(step + writer) as u8; len as usize];
                        remote.write_all_at(&bytes, own + at).unwrap();
                        let (from, to) = (at as usize, (at + len) as usize);
                        model[from..to].copy_from_slice(&bytes);
                        let mut read = vec![0; 4096.max(len as usize / 2)];
                        let at = at.min(SHARE - read.len() as u64);
                        remote.read_exact_at(&mut read, own + at).unwrap();
                        assert!(read == model[at as usize..at as usize + read.len()]);
                    }
                    let mut all = vec![0; SHARE as usize];
                    remote.read_ahead_at(&mut all, own).unwrap();
                    assert!(all == model);
                })
            })
            .collect();
        while writers.iter().any(|writer| !writer.is_finished()) {
            remote.read_exact_at(&mut [0; 64], 0).unwrap();
            server.kill();
            server.start_again();
        }
    });
}
