//! The least that a block device of ours is compared with: one connection, one request at a time.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use memferry::backend::MemoryStorage;
use memferry::chunk::Storage;
use memferry::frontend::nbd::{Device, DeviceOptions};
use memferry::sys::nbd::{ClientFlags, Connect, Netlink};

use super::measure::milliseconds;
use super::rig::READ_AHEAD;
use crate::command;

/// A block device with a plain loop behind it.
#[derive(Debug)]
pub(super) struct Serial {
    index: u32,
    netlink: Netlink,
    server: Option<JoinHandle<io::Result<()>>>,
}

const HAS_FLAGS: u16 = 1;
const SEND_FLUSH: u16 = 1 << 2;
const BLOCK: u32 = 4096;
/// For what the kernel does with a device.
const LIMIT: Duration = Duration::from_secs(20);

impl Serial {
    pub(super) fn attach(storage: Arc<dyn Storage>) -> Result<Self> {
        let mut netlink = Netlink::open()?;
        let (kernel, ours) = UnixStream::pair()?;
        let size = storage.len();
        let server = thread::spawn(move || serve(ours, &*storage));
        let device = Connect {
            index: None,
            size,
            block_size: BLOCK,
            server_flags: HAS_FLAGS | SEND_FLUSH,
            client_flags: ClientFlags::default(),
            timeout: LIMIT,
            dead_connection_timeout: Duration::ZERO,
            identifier: "",
            sockets: &[kernel.as_fd()],
        };
        let index = netlink.connect(&device, Instant::now() + LIMIT)?;
        Ok(Self {
            index,
            netlink,
            server: Some(server),
        })
    }

    /// Opens it, which may have to wait for its node.
    pub(super) fn open(&self) -> Result<File> {
        let path = PathBuf::from(format!("/dev/nbd{}", self.index));
        let file = || OpenOptions::new().read(true).write(true).open(&path).ok();
        command::poll_until(Instant::now() + LIMIT, file)
            .with_context(|| format!("{} cannot be opened", path.display()))
    }

    /// Has the kernel read ahead as far as from a device of ours.
    pub(super) fn read_ahead(&self) -> Result<()> {
        let setting = format!("/sys/block/nbd{}/queue/read_ahead_kb", self.index);
        fs::write(Path::new(&setting), (READ_AHEAD >> 10).to_string()).context(setting)
    }
}

impl Drop for Serial {
    fn drop(&mut self) {
        let _gone = self.netlink.disconnect(self.index, Instant::now() + LIMIT);
        if let Some(server) = self.server.take() {
            // It ends with its socket; what it says of that is no news.
            let _ended = server.join();
        }
    }
}

/// Reads a request, does it, replies; until it is told to disconnect, or the socket ends.
fn serve(mut socket: UnixStream, storage: &dyn Storage) -> io::Result<()> {
    let mut request = [0; 28];
    let mut data = Vec::new();
    loop {
        socket.read_exact(&mut request)?;
        let [.., l3, l2, l1, l0] = request;
        let kind = u16::from_be_bytes([request[6], request[7]]);
        let length = u32::from_be_bytes([l3, l2, l1, l0]);
        let offset = request[16..24].try_into().map_err(io::Error::other)?;
        let offset = u64::from_be_bytes(offset);
        let length = usize::try_from(length).map_err(io::Error::other)?;
        let mut reply = *b"\x67\x44\x66\x98\0\0\0\0........";
        reply[8..].copy_from_slice(&request[8..16]);
        match kind {
            0 => {
                data.resize(length, 0);
                storage.read_exact_at(&mut data, offset)?;
                socket.write_all(&reply)?;
                socket.write_all(&data)?;
            }
            1 => {
                data.resize(length, 0);
                socket.read_exact(&mut data)?;
                storage.write_all_at(&data, offset)?;
                socket.write_all(&reply)?;
            }
            3 => {
                storage.flush()?;
                socket.write_all(&reply)?;
            }
            _ => return Ok(()),
        }
    }
}

/// How long attaching takes until the first page was read, in milliseconds: a device of ours, and the least.
#[derive(Debug, Default)]
pub(super) struct Attaching {
    pub(super) ours: Vec<f64>,
    pub(super) least: Vec<f64>,
}

const SIZE: u64 = 64 << 20;
const TIMES: usize = 10;

/// Attaches both in turns.
pub(super) fn attaching() -> Result<Attaching> {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new(SIZE));
    let mut page = [0; BLOCK as usize];
    let mut times = Attaching::default();
    for _ in 0..TIMES {
        let began = Instant::now();
        let mut device = Device::attach(Arc::clone(&storage), &DeviceOptions::default())?;
        device.file().read_exact_at(&mut page, 0)?;
        times.ours.push(milliseconds(began.elapsed()));
        device.detach(LIMIT)?;

        let began = Instant::now();
        let serial = Serial::attach(Arc::clone(&storage))?;
        serial.open()?.read_exact_at(&mut page, 0)?;
        times.least.push(milliseconds(began.elapsed()));
    }
    Ok(times)
}
