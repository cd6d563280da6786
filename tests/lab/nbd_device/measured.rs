//! How long attaching takes, beside what it costs the kernel; how fast a device is, by connections.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use super::*;
use memferry::frontend::nbd::{Control, Readiness};
use memferry::sys::nbd::{ClientFlags, Connect, Netlink};

/// The middle one, and the first and the last but a tenth.
fn spread(mut times: Vec<Duration>) -> String {
    times.sort_unstable();
    let at = |tenth: usize| times[(times.len() - 1) * tenth / 10].as_secs_f64() * 1000.0;
    format!("{:7.2} ms ({:.2} to {:.2})", at(5), at(1), at(9))
}

/// The least that can serve: one connection, one request at a time, zeros.
fn serve_zeros(mut socket: UnixStream) {
    let zeros = vec![0; 1 << 20];
    let mut request = [0; 28];
    while socket.read_exact(&mut request).is_ok() {
        let command = u16::from_be_bytes([request[6], request[7]]);
        let len =
            usize::try_from(u32::from_be_bytes(*request[24..].first_chunk().unwrap())).unwrap();
        if command == 2 {
            return;
        }
        let mut reply = vec![0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0];
        reply.extend(&request[8..16]);
        if command == 0 {
            reply.extend(&zeros[..len]);
        }
        if socket.write_all(&reply).is_err() {
            return;
        }
    }
}

/// What attaching costs at least: the kernel is told, and the device is opened.
fn attach_bare(size: u64) -> (Duration, Duration, Duration) {
    let start = Instant::now();
    let (ours, kernels) = UnixStream::pair().unwrap();
    let server = std::thread::spawn(move || serve_zeros(ours));
    let mut netlink = Netlink::open().unwrap();
    let device = Connect {
        index: None,
        size,
        block_size: 4096,
        server_flags: 1,
        client_flags: ClientFlags::default(),
        timeout: Duration::from_secs(30),
        dead_connection_timeout: Duration::ZERO,
        identifier: "bare",
        sockets: &[kernels.as_fd()],
    };
    let index = netlink.connect(&device, Instant::now() + LIMIT).unwrap();
    let connected = start.elapsed();
    let file = std::fs::File::open(format!("/dev/nbd{index}")).unwrap();
    let opened = start.elapsed();
    let begin = Instant::now();
    netlink.disconnect(index, Instant::now() + LIMIT).unwrap();
    drop(file);
    let ended = begin.elapsed();
    server.join().unwrap();
    (connected, opened, ended)
}

#[test]
#[ignore = "measurement"]
fn measure_attaching_by_each_way_beside_the_least_that_it_takes() {
    const ROUNDS: usize = 30;
    let storage = memory(64 << 20);
    let size = storage.len();
    let bare: Vec<_> = (0..ROUNDS).map(|_| attach_bare(size)).collect();
    println!(
        "the kernel alone, connected: {}",
        spread(bare.iter().map(|bare| bare.0).collect())
    );
    println!(
        "the kernel alone, opened:    {}",
        spread(bare.iter().map(|bare| bare.1).collect())
    );
    println!(
        "the kernel alone, ended:     {}",
        spread(bare.iter().map(|bare| bare.2).collect())
    );
    for control in [Control::Netlink, Control::Ioctl] {
        for readiness in [Readiness::Poll, Readiness::Uevent] {
            for connections in [1, 2, 4] {
                let options = DeviceOptions {
                    control,
                    readiness,
                    connections,
                    ..DeviceOptions::default()
                };
                let (mut attached, mut detached) = (Vec::new(), Vec::new());
                for _ in 0..ROUNDS {
                    let start = Instant::now();
                    let mut device = Device::attach(Arc::clone(&storage), &options).unwrap();
                    attached.push(start.elapsed());
                    let start = Instant::now();
                    device.detach(LIMIT).unwrap();
                    detached.push(start.elapsed());
                }
                println!(
                    "{control:?}, {readiness:?}, {connections} connections: attached {}, detached {}",
                    spread(attached),
                    spread(detached)
                );
            }
        }
    }
}

#[test]
#[ignore = "measurement"]
fn measure_throughput_by_connections() {
    const LEN: u64 = 64 << 20;
    for connections in [1, 2, 3, 4, 8] {
        for readers in [1_u64, 4] {
            let storage = memory(LEN);
            storage
                .write_all_at(&vec![1; usize::try_from(LEN).unwrap()], 0)
                .unwrap();
            let options = DeviceOptions {
                connections,
                direct: true,
                ..DeviceOptions::default()
            };
            let mut device = Device::attach(storage, &options).unwrap();
            let rate = |operation: &(dyn Fn(u64, &mut [u8]) + Sync)| {
                let start = Instant::now();
                std::thread::scope(|scope| {
                    for reader in 0..readers {
                        scope.spawn(move || {
                            let mut buffer = vec![1; (1 << 20) + 4096];
                            let skip = buffer.as_ptr().align_offset(4096);
                            let bytes = &mut buffer[skip..skip + (1 << 20)];
                            for offset in (reader * LEN / readers..(reader + 1) * LEN / readers)
                                .step_by(1 << 20)
                            {
                                operation(offset, bytes);
                            }
                        });
                    }
                });
                LEN as f64 / start.elapsed().as_secs_f64() / 1e6
            };
            let read = rate(&|offset, bytes| device.file().read_exact_at(bytes, offset).unwrap());
            let write = rate(&|offset, bytes| device.file().write_all_at(bytes, offset).unwrap());
            println!(
                "{connections} connections, {readers} threads: read {read:.0} MB/s, written {write:.0} MB/s"
            );
            device.detach(LIMIT).unwrap();
        }
    }
}
