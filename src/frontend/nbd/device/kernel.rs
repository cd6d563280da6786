//! The two ways to have the kernel run a device.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::signal::SigSet;
use rustix::fs::OFlags;
use rustix::io::Errno;

use super::error::AttachError;
use super::options::{Control, DeviceOptions};
use super::sysfs::{Shown, Sysfs, node};
use super::wait;
use crate::sys::nbd::{ClientFlags, Connect, Netlink, Reconfigure, ioctl};

/// What is to be connected.
#[derive(Debug, Clone)]
pub(super) struct Wanted {
    pub(super) size: u64,
    pub(super) flags: u16,
    pub(super) identifier: String,
    pub(super) options: DeviceOptions,
}

/// A device that the kernel runs for us. Dropping it disconnects it.
#[derive(Debug)]
pub(super) enum Kernel {
    Netlink(NetlinkDevice),
    Ioctl(IoctlDevice),
}

/// How long the kernel may take for what it does at once if all is well.
const SOON: Duration = Duration::from_secs(10);

impl Kernel {
    /// Connects a device over `sockets`, of which the kernel keeps references of its own.
    pub(super) fn connect(
        wanted: &Wanted,
        sockets: &[OwnedFd],
        deadline: Instant,
    ) -> Result<Self, AttachError> {
        let netlink = match wanted.options.control {
            Control::Ioctl => None,
            Control::Netlink => Some(Netlink::open().map_err(unsupported)?),
            Control::Auto => match Netlink::open() {
                Ok(netlink) => Some(netlink),
                Err(error) if error.kind() == io::ErrorKind::Unsupported => None,
                Err(error) => return Err(AttachError::Resources(error)),
            },
        };
        match netlink {
            Some(netlink) => {
                NetlinkDevice::connect(netlink, wanted, sockets, deadline).map(Self::Netlink)
            }
            None => IoctlDevice::connect(wanted, sockets, deadline).map(Self::Ioctl),
        }
    }

    pub(super) fn index(&self) -> u32 {
        match self {
            Self::Netlink(device) => device.index,
            Self::Ioctl(device) => device.index,
        }
    }

    /// Descriptors of the device that are open for running it.
    pub(super) fn descriptors(&self) -> Vec<RawFd> {
        match self {
            Self::Netlink(_) => Vec::new(),
            Self::Ioctl(device) => vec![device.node.as_raw_fd(), device.runners_node],
        }
    }

    /// We have it open: from now on it goes when we do.
    pub(super) fn tie_to_us(&mut self) -> io::Result<()> {
        match self {
            Self::Netlink(device) => device.tie(true),
            // It goes with the thread that runs it.
            Self::Ioctl(_) => Ok(()),
        }
    }

    /// Whether a connection that died can be replaced.
    pub(super) fn replaces(&self) -> bool {
        matches!(self, Self::Netlink(_))
    }

    /// Puts a socket in place of one that died. [`io::ErrorKind::StorageFull`] while the kernel has not noticed that one did.
    pub(super) fn replace(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        match self {
            Self::Netlink(device) => device.replace(socket),
            Self::Ioctl(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Disconnects the device. What is still asked of it fails.
    pub(super) fn disconnect(&mut self, deadline: Instant) -> io::Result<()> {
        match self {
            Self::Netlink(device) => device.disconnect(deadline),
            Self::Ioctl(device) => device.disconnect(deadline),
        }
    }
}

/// A device that was connected by netlink.
#[derive(Debug)]
pub(super) struct NetlinkDevice {
    netlink: Netlink,
    index: u32,
    identifier: String,
    remove_node: bool,
    connected: bool,
}

impl NetlinkDevice {
    fn connect(
        mut netlink: Netlink,
        wanted: &Wanted,
        sockets: &[OwnedFd],
        deadline: Instant,
    ) -> Result<Self, AttachError> {
        let options = &wanted.options;
        let sockets: Vec<BorrowedFd<'_>> = sockets.iter().map(AsFd::as_fd).collect();
        // Not yet to be disconnected on the last close: udev opens a new device and closes it, maybe before we have opened it.
        let client_flags = flags(options.remove_node, false);
        let index = netlink
            .connect(
                &Connect {
                    index: None,
                    size: wanted.size,
                    block_size: options.block_size,
                    server_flags: wanted.flags,
                    client_flags,
                    timeout: options.kernels_timeout(),
                    dead_connection_timeout: options.dead_connection_timeout,
                    identifier: &wanted.identifier,
                    sockets: &sockets,
                },
                deadline,
            )
            .map_err(AttachError::Connect)?;
        Ok(Self {
            netlink,
            index,
            identifier: wanted.identifier.clone(),
            remove_node: options.remove_node,
            connected: true,
        })
    }

    fn tie(&mut self, tied: bool) -> io::Result<()> {
        let change = Reconfigure {
            index: self.index,
            identifier: &self.identifier,
            size: None,
            client_flags: Some(flags(self.remove_node, tied)),
            sockets: &[],
        };
        self.netlink.reconfigure(&change, Instant::now() + SOON)
    }

    fn replace(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        let change = Reconfigure {
            index: self.index,
            identifier: &self.identifier,
            size: None,
            client_flags: None,
            sockets: &[socket],
        };
        self.netlink.reconfigure(&change, Instant::now() + SOON)
    }

    fn disconnect(&mut self, deadline: Instant) -> io::Result<()> {
        if self.connected {
            // The kernel would do it once more on the last close, and complain that the sockets are gone. If this is refused, it does.
            let _untied = self.tie(false);
            self.netlink.disconnect(self.index, deadline)?;
            self.connected = false;
        }
        Ok(())
    }
}

impl Drop for NetlinkDevice {
    fn drop(&mut self) {
        // Who wants to know whether it worked disconnects first.
        let _disconnected = self.disconnect(Instant::now() + SOON);
    }
}

fn flags(remove_node: bool, tied: bool) -> ClientFlags {
    let mut flags = ClientFlags::default();
    if remove_node {
        flags = flags | ClientFlags::DESTROY_ON_DISCONNECT;
    }
    if tied {
        flags = flags | ClientFlags::DISCONNECT_ON_CLOSE;
    }
    flags
}

fn unsupported(error: io::Error) -> AttachError {
    match error.kind() {
        io::ErrorKind::Unsupported => AttachError::Unsupported(error),
        _ => AttachError::Resources(error),
    }
}

/// A device that was set up by ioctl, and the thread that the kernel runs it with.
#[derive(Debug)]
pub(super) struct IoctlDevice {
    index: u32,
    node: File,
    /// The descriptor of the thread that runs it.
    runners_node: RawFd,
    runner: Option<JoinHandle<io::Result<()>>>,
}

impl IoctlDevice {
    fn connect(
        wanted: &Wanted,
        sockets: &[OwnedFd],
        deadline: Instant,
    ) -> Result<Self, AttachError> {
        let devices = Sysfs::default().devices().unwrap_or_default();
        if devices.is_empty() {
            return Err(AttachError::Unsupported(io::Error::new(
                io::ErrorKind::Unsupported,
                "the kernel has no client for network block devices: `modprobe nbd`",
            )));
        }
        for shown in &devices {
            if let Some(node) = claim(shown, wanted, sockets)? {
                return Self::run(shown, node, deadline);
            }
        }
        Err(AttachError::NoneFree(devices.len()))
    }

    fn run(shown: &Shown, node: File, deadline: Instant) -> Result<Self, AttachError> {
        let mut device = Self {
            index: shown.index,
            node,
            runners_node: -1,
            runner: None,
        };
        let node = device.node.try_clone().map_err(AttachError::Resources)?;
        device.runners_node = node.as_raw_fd();
        let (tell, told) = mpsc::channel();
        let runner = thread::Builder::new()
            .name("nbd-run".into())
            .spawn(move || {
                // Nobody listens if attaching was given up.
                let _told = tell.send(rustix::thread::gettid().as_raw_nonzero().get());
                // A signal that was meant for the process would end the device if it came to this thread.
                let _blocked = SigSet::all().thread_block();
                ioctl::run(&node)
            });
        device.runner = Some(runner.map_err(AttachError::Resources)?);
        let runner = told
            .recv_timeout(SOON)
            .ok()
            .and_then(|pid| u32::try_from(pid).ok());
        // The kernel shows the thread that runs the device once it does.
        loop {
            match shown.pid().map_err(AttachError::Connect)? {
                Some(pid) if super::liveness::sees_all_processes() && Some(pid) != runner => {
                    return Err(AttachError::NotOurs {
                        path: node_path(device.index),
                        found: format!("thread {pid} runs it"),
                    });
                }
                Some(_) => return Ok(device),
                None => {}
            }
            if let Some(runner) = device.runner.take_if(|runner| runner.is_finished()) {
                let ended = runner.join().unwrap_or(Ok(()));
                let error = ended
                    .err()
                    .unwrap_or_else(|| io::ErrorKind::ConnectionAborted.into());
                return Err(AttachError::Connect(error));
            }
            if Instant::now() >= deadline {
                return Err(AttachError::TimedOut {
                    what: "running the device",
                    limit: SOON,
                });
            }
            wait::a_moment();
        }
    }

    fn disconnect(&mut self, deadline: Instant) -> io::Result<()> {
        let Some(runner) = self.runner.take() else {
            return Ok(());
        };
        // Fails if it has ended by itself.
        let _asked = ioctl::disconnect(&self.node);
        while !runner.is_finished() {
            if Instant::now() >= deadline {
                self.runner = Some(runner);
                return Err(io::ErrorKind::TimedOut.into());
            }
            wait::a_moment();
        }
        let _ended = ioctl::clear_queue(&self.node);
        ioctl::clear_socket(&self.node)
    }
}

impl Drop for IoctlDevice {
    fn drop(&mut self) {
        if self.runner.is_some() {
            let _disconnected = self.disconnect(Instant::now() + SOON);
        } else {
            // Claimed and never run, or done with already: then there is nothing to clear.
            let _cleared = ioctl::clear_socket(&self.node);
        }
    }
}

fn node_path(index: u32) -> std::path::PathBuf {
    node(index)
}

/// Takes a device for us, if nobody else has it. The first socket is what claims it: the kernel takes it from one thread only.
fn claim(shown: &Shown, wanted: &Wanted, sockets: &[OwnedFd]) -> Result<Option<File>, AttachError> {
    let taken = shown.size().unwrap_or(1) != 0
        || shown.pid().map_or(true, |pid| pid.is_some())
        || !shown.stacked().is_empty();
    if taken {
        return Ok(None);
    }
    let path = node(shown.index);
    let open = |flags: OFlags| {
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(i32::try_from(flags.bits()).expect("flags fit"))
            .open(&path)
    };
    // Whoever has it for himself, such as a mount, is not disturbed. But this must not stay so: we want it to be mounted.
    let exclusive = match open(OFlags::EXCL) {
        Ok(exclusive) => exclusive,
        Err(error) if is_busy(&error) || error.kind() == io::ErrorKind::NotFound => {
            return Ok(None);
        }
        Err(error) => {
            return Err(AttachError::Open {
                path,
                source: error,
            });
        }
    };
    let device = open(OFlags::empty()).map_err(|source| AttachError::Open {
        path: path.clone(),
        source,
    })?;
    drop(exclusive);
    let Some((first, others)) = sockets.split_first() else {
        return Err(AttachError::Options("a device has a connection".to_owned()));
    };
    match ioctl::set_socket(&device, first) {
        Err(error) if is_busy(&error) || error.kind() == io::ErrorKind::InvalidInput => {
            return Ok(None);
        }
        claimed => claimed.map_err(AttachError::Connect)?,
    }
    let set_up = || {
        for socket in others {
            ioctl::set_socket(&device, socket)?;
        }
        let options = &wanted.options;
        ioctl::set_blocks(
            &device,
            options.block_size,
            wanted.size / u64::from(options.block_size),
        )?;
        ioctl::set_flags(&device, wanted.flags)?;
        let seconds = u32::try_from(options.kernels_timeout().as_secs()).unwrap_or(u32::MAX);
        ioctl::set_timeout(&device, seconds)
    };
    match set_up() {
        Ok(()) => Ok(Some(device)),
        Err(error) => {
            let _cleared = ioctl::clear_socket(&device);
            Err(AttachError::Connect(error))
        }
    }
}

fn is_busy(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::BUSY.raw_os_error())
}
