#![expect(
    clippy::host_endian_bytes,
    reason = "netlink speaks the machine's own byte order"
)]

use std::io::Cursor;
use std::os::unix::net::UnixStream;

use std::os::fd::AsFd;

use neli::ToBytes;

use super::*;

/// The bytes of a request, as they go to the kernel.
fn encoded(command: u8, attributes: Vec<Attribute>) -> Vec<u8> {
    let message = message(command, VERSION, attributes).unwrap();
    let envelope = envelope(0x1c, 7, message).unwrap();
    let mut bytes = Cursor::new(Vec::new());
    envelope.to_bytes(&mut bytes).unwrap();
    bytes.into_inner()
}

/// An attribute by hand: length, kind, bytes, and padding to a word.
fn by_hand(kind: u16, payload: &[u8]) -> Vec<u8> {
    let len = u16::try_from(payload.len() + 4).unwrap();
    let mut bytes = [len.to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend(payload);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

const NESTED: u16 = 1 << 15;

#[test]
fn connecting_is_said_as_the_kernel_understands_it() {
    let (one, two) = UnixStream::pair().unwrap();
    let device = Connect {
        index: Some(3),
        size: 1 << 40,
        block_size: 4096,
        server_flags: 0x16d,
        client_flags: ClientFlags::DISCONNECT_ON_CLOSE | ClientFlags::DESTROY_ON_DISCONNECT,
        timeout: Duration::from_millis(1500),
        dead_connection_timeout: Duration::ZERO,
        identifier: "me",
        sockets: &[one.as_fd(), two.as_fd()],
    };
    let socket = |socket: &UnixStream| {
        let descriptor = socket.as_raw_fd().to_ne_bytes();
        by_hand(
            SOCKET_ITEM | NESTED,
            &by_hand(SOCKET_DESCRIPTOR, &descriptor),
        )
    };
    let attributes = [
        by_hand(1, &3_u32.to_ne_bytes()),
        by_hand(2, &(1_u64 << 40).to_ne_bytes()),
        by_hand(3, &4096_u64.to_ne_bytes()),
        by_hand(4, &2_u64.to_ne_bytes()),
        by_hand(5, &0x16d_u64.to_ne_bytes()),
        by_hand(6, &3_u64.to_ne_bytes()),
        by_hand(8, &0_u64.to_ne_bytes()),
        by_hand(10, b"me\0"),
        by_hand(7 | NESTED, &[socket(&one), socket(&two)].concat()),
    ]
    .concat();
    let bytes = encoded(CONNECT, device.attributes().unwrap());
    assert_eq!(
        bytes[..4],
        u32::try_from(bytes.len()).unwrap().to_ne_bytes()
    );
    // Family, request and acknowledgement, the sequence number, no sender; the command and the version.
    assert_eq!(bytes[4..8], [0x1c, 0, 5, 0]);
    assert_eq!(bytes[8..16], [7, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(bytes[16..20], [1, 1, 0, 0]);
    assert_eq!(bytes[20..], attributes);
}

#[test]
fn a_change_says_only_what_changes() {
    let change = Reconfigure {
        index: 9,
        identifier: "abc",
        size: None,
        client_flags: Some(ClientFlags::default()),
        sockets: &[],
    };
    let expected = [
        by_hand(1, &9_u32.to_ne_bytes()),
        by_hand(10, b"abc\0"),
        by_hand(6, &0_u64.to_ne_bytes()),
    ]
    .concat();
    assert_eq!(
        encoded(RECONFIGURE, change.attributes().unwrap())[20..],
        expected
    );
}

#[test]
fn a_part_of_a_second_counts_as_one() {
    for (time, expected) in [(0, 0), (1, 1), (999, 1), (1000, 1), (1001, 2)] {
        assert_eq!(whole_seconds(Duration::from_millis(time)), expected);
    }
}

#[test]
fn a_kernel_without_the_client_is_told_from_an_error() {
    match Netlink::open() {
        Ok(mut netlink) => {
            // Listing needs no privilege where the kernel has it.
            let deadline = Instant::now() + Duration::from_secs(10);
            let _listed = netlink.in_use(deadline);
        }
        Err(error) => assert_eq!(error.kind(), io::ErrorKind::Unsupported, "{error}"),
    }
}
