//! A guest in QEMU: its process, its sockets, what it says.

use std::fs::File;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use tempfile::TempDir;

use crate::accel::Accel;
use crate::command;
use crate::image::Image;
use crate::interrupt::Leash;
use crate::process;
use crate::qmp::Qmp;
use crate::serial::{Content, Log, Ready, Report, Status, Tick};

/// A guest to start; both ends of a migration are given the same one.
#[derive(Debug, Clone)]
pub struct GuestConfig {
    /// The guest's memory, in bytes; whole MiB.
    pub memory: u64,
    /// What it does there.
    pub writer: Writer,
    /// What the memory is to the host.
    pub backing: Backing,
    /// How it runs.
    pub accel: Accel,
    /// What it boots.
    pub image: Image,
    /// How long it may take until it is ready.
    pub boot_limit: Duration,
}

/// What the page-writer in a guest does.
#[derive(Debug, Clone, Copy)]
pub struct Writer {
    /// Bytes filled with pages that do not compress.
    pub fill: u64,
    /// Bytes of these that are written again and again, at random.
    pub set: u64,
    /// How fast they are.
    pub rate: Rate,
    /// How fast memory is verified.
    pub check: Rate,
}

/// Bytes a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rate {
    /// As close to this number as the guest can.
    Limit(u64),
    /// As fast as the guest can.
    Unlimited,
}

/// What a guest's memory is to the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// A file that other processes can map: what `memferry qemu` needs.
    SharedFile,
    /// Memory of QEMU's own, as without any option: what QEMU's migration is fastest with.
    Private,
    /// The same, 8 KiB smaller. QEMU before 9.0 loses dirty pages of emulated guests whose memory is a multiple of
    /// 256 KiB: it clears 64 pages of its log at a time and forgets to tell the translated code (fixed by its
    /// commit 03bfc2188f06). With any other size it goes page by page, which is slower and right.
    PrivateUneven,
}

impl GuestConfig {
    /// A guest of 512 MiB that has filled 64 MiB and writes 10 MiB a second, in a shared file.
    #[must_use]
    pub fn new(image: Image, accel: Accel) -> Self {
        Self {
            memory: 512 << 20,
            writer: Writer {
                fill: 64 << 20,
                set: 16 << 20,
                rate: Rate::Limit(10 << 20),
                check: Rate::Limit(100 << 20),
            },
            backing: Backing::SharedFile,
            accel,
            image,
            boot_limit: Duration::from_secs(90), // emulated, on a machine that compiles at the same time
        }
    }
}

impl Writer {
    fn parameters(&self) -> String {
        let rate = match self.rate {
            Rate::Limit(0) => "none".to_owned(),
            Rate::Limit(bytes) => bytes.to_string(),
            Rate::Unlimited => "0".to_owned(),
        };
        let check = match self.check {
            Rate::Limit(bytes) => bytes.max(1),
            Rate::Unlimited => 0,
        };
        let Self { fill, set, .. } = self;
        format!("writer.fill={fill} writer.set={set} writer.rate={rate} writer.check={check}")
    }
}

/// A guest that runs, or waits to be migrated to; killed when dropped.
#[derive(Debug)]
pub struct Guest {
    process: Child,
    _leash: Leash,
    monitor: Mutex<Qmp>,
    ticks: Log<Tick>,
    reports: Log<Report>,
    ready: Option<Ready>,
    readers: Vec<JoinHandle<()>>,
    directory: TempDir,
}

/// A kernel's panic takes 40 lines, and its reason is among the first.
const LAST_LINES: usize = 50;
/// How long QEMU itself may take to start, before the guest does anything.
const START_LIMIT: Duration = Duration::from_secs(30);

impl Guest {
    /// Starts a guest and waits until its memory is filled and it ticks.
    ///
    /// # Errors
    /// If QEMU does not start or the guest is not ready in time; holds what QEMU and the guest said.
    pub fn boot(config: &GuestConfig) -> Result<Self> {
        let mut guest = Self::start(config, &[])?;
        let deadline = Instant::now() + config.boot_limit;
        let ready = guest.reports.wait(deadline, |reports| {
            reports.iter().find_map(|report| match &report.content {
                Content::Ready(ready) => Some(Ok(ready.clone())),
                Content::Failed(reason) => Some(Err(anyhow!("the guest gave up: {reason}"))),
                _ => None,
            })
        });
        match ready.and_then(|answer| answer) {
            Ok(ready) => guest.ready = Some(ready),
            Err(reason) => return Err(guest.explain(reason, "the guest did not boot")),
        }
        let first = guest.ticks.wait(deadline, |ticks| ticks.first().copied());
        first.map_err(|reason| guest.explain(reason, "the guest booted but does not tick"))?;
        Ok(guest)
    }

    /// Starts a QEMU that waits for `migrate-incoming`. With `paused` the guest does not run when it has arrived
    /// until it is told to.
    ///
    /// # Errors
    /// If QEMU does not start; holds what it said.
    pub fn incoming(config: &GuestConfig, paused: bool) -> Result<Self> {
        let options: &[&str] = if paused {
            &["-incoming", "defer", "-S"]
        } else {
            &["-incoming", "defer"]
        };
        Self::start(config, options)
    }

    /// The guest's ticks so far.
    #[must_use]
    pub fn ticks(&self) -> &Log<Tick> {
        &self.ticks
    }

    /// What the guest has reported so far.
    #[must_use]
    pub fn reports(&self) -> &Log<Report> {
        &self.reports
    }

    /// What the guest said when it was ready; nothing for one that was migrated here.
    #[must_use]
    pub fn ready(&self) -> Option<&Ready> {
        self.ready.as_ref()
    }

    /// A monitor of QEMU that nobody else uses.
    pub fn monitor(&self) -> MutexGuard<'_, Qmp> {
        self.monitor.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The socket of a second monitor, for the program under test.
    #[must_use]
    pub fn qmp_socket(&self) -> PathBuf {
        self.directory.path().join("qmp")
    }

    /// The file that is the guest's memory, where it is one.
    #[must_use]
    pub fn memory_file(&self) -> PathBuf {
        self.directory.path().join("ram")
    }

    /// QEMU's process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Whether QEMU runs the guest's processors.
    ///
    /// # Errors
    /// If QEMU does not answer.
    pub fn is_running(&self) -> Result<bool> {
        let status = self
            .monitor()
            .execute("query-status", serde_json::json!({}))?;
        Ok(status["running"] == true)
    }

    /// The processor time that QEMU and the guest have used, to 10 ms.
    ///
    /// # Errors
    /// If the process is gone.
    pub fn cpu_time(&self) -> Result<Duration> {
        process::cpu_time(self.pid())
    }

    /// The part of [`cpu_time`](Self::cpu_time) that QEMU's threads for the guest's processors have used.
    ///
    /// # Errors
    /// If QEMU does not answer.
    pub fn vcpu_time(&self) -> Result<Duration> {
        let processors = self
            .monitor()
            .execute("query-cpus-fast", serde_json::json!({}))?;
        let threads = processors.as_array().into_iter().flatten();
        threads
            .filter_map(|processor| processor["thread-id"].as_u64())
            .map(|thread| process::thread_cpu_time(self.pid(), thread))
            .sum()
    }

    /// Waits until the guest has verified all of its memory once more, from the beginning, and found it right.
    ///
    /// # Errors
    /// If a page is wrong, or it takes longer than `deadline`.
    pub fn await_clean_pass(&self, deadline: Instant) -> Result<Status> {
        let statuses = |reports: &[Report]| -> Vec<Status> {
            reports.iter().filter_map(Report::status).cloned().collect()
        };
        let now = self.reports.all().len();
        let status = self.reports.wait(deadline, |reports| {
            let statuses = statuses(&reports[now..]);
            let (first, last) = (statuses.first()?, statuses.last()?);
            // The pass under way began too early; the one after it is whole.
            (last.errors > 0 || last.passes >= first.passes + 2).then(|| last.clone())
        })?;
        if status.errors > 0 {
            bail!("the guest found {} wrong pages", status.errors);
        }
        Ok(status)
    }

    /// Adds to an error what QEMU and the guest said last.
    #[must_use]
    pub fn explain(&self, reason: anyhow::Error, what: &str) -> anyhow::Error {
        let said: Vec<String> = self
            .reports
            .all()
            .into_iter()
            .filter_map(|report| match report.content {
                Content::Other(line) | Content::Mismatch(line) | Content::Failed(line) => {
                    Some(line)
                }
                Content::Ready(_) | Content::Status(_) => None,
            })
            .collect();
        let tail = said[said.len().saturating_sub(LAST_LINES)..].join("\n");
        let complaints =
            std::fs::read_to_string(self.directory.path().join("stderr")).unwrap_or_default();
        reason.context(format!(
            "{what}\nQEMU said: {complaints}\nthe guest said: {tail}"
        ))
    }

    fn start(config: &GuestConfig, options: &[&str]) -> Result<Self> {
        let directory = directory(config.memory)?;
        let path = |name: &str| directory.path().join(name);
        let listen = |name: &str| listen(&path(name));
        let (serial, ticks, harness) = (listen("serial")?, listen("ticks")?, listen("harness")?);
        if config.backing == Backing::SharedFile {
            File::create_new(path("ram"))?.set_len(config.memory)?;
        }
        let mut process = Command::new("qemu-system-x86_64")
            .args(arguments(config, directory.path()))
            .args(options)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(path("stderr"))?)
            .spawn()
            .context("cannot start qemu-system-x86_64 (Debian: apt-get install qemu-system-x86)")?;
        let leash = Leash::hold(&process);
        let connected = connect(&mut process, [&serial, &ticks, &harness]).and_then(|ports| {
            let [serial, ticks, harness] = ports;
            Ok((serial, ticks, Qmp::new(harness)?))
        });
        let (serial, ticks, monitor) = match connected {
            Ok(connected) => connected,
            Err(reason) => {
                end(&mut process);
                let complaints = std::fs::read_to_string(path("stderr")).unwrap_or_default();
                return Err(reason.context(format!("QEMU does not start: {complaints}")));
            }
        };
        let (reports, reports_reader) = Log::read(serial, Report::parse);
        let (ticks, ticks_reader) = Log::read(ticks, Tick::parse);
        Ok(Self {
            process,
            _leash: leash,
            monitor: Mutex::new(monitor),
            ticks,
            reports,
            ready: None,
            readers: vec![reports_reader, ticks_reader],
            directory,
        })
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        end(&mut self.process);
        for reader in self.readers.drain(..) {
            // It ends because QEMU's ends of the sockets are closed; a panic of its own is printed already.
            let _printed = reader.join();
        }
    }
}

/// Where a guest's sockets and memory are: in memory, unless that is too small.
pub(crate) fn directory(room_for: u64) -> Result<TempDir> {
    let shared_memory = Path::new("/dev/shm");
    let mut builder = tempfile::Builder::new();
    builder.prefix("memferry-guest-");
    // A guest whose file does not fit dies of SIGBUS later on; containers often have 64 MiB there.
    let room =
        rustix::fs::statvfs(shared_memory).map_or(0, |found| found.f_bavail * found.f_frsize);
    let made = if room > room_for + (64 << 20) {
        builder.tempdir_in(shared_memory)
    } else {
        builder.tempdir()
    };
    made.context("cannot make a directory for the guest")
}

fn arguments(config: &GuestConfig, directory: &Path) -> Vec<String> {
    let at = |name: &str| directory.join(name).display().to_string();
    let missing = if config.backing == Backing::PrivateUneven {
        8 << 10
    } else {
        0
    };
    let size = format!("{}K", (config.memory - missing) >> 10);
    let mut words: Vec<String> = Vec::new();
    let mut add = |option: &str, value: String| words.extend([option.to_owned(), value]);
    add("-accel", config.accel.name().to_owned());
    add("-m", size.clone());
    match config.backing {
        Backing::Private | Backing::PrivateUneven => add("-machine", "pc".to_owned()),
        Backing::SharedFile => {
            add("-machine", "pc,memory-backend=ram".to_owned());
            let file = at("ram");
            add(
                "-object",
                format!("memory-backend-file,id=ram,size={size},mem-path={file},share=on"),
            );
        }
    }
    for (name, option, device) in [
        ("serial", "-serial", "chardev:serial"),
        ("ticks", "-serial", "chardev:ticks"),
        ("harness", "-mon", "chardev=harness,mode=control"),
    ] {
        add(
            "-chardev",
            format!("socket,id={name},path={},server=off", at(name)),
        );
        add(option, device.to_owned());
    }
    add("-qmp", format!("unix:{},server=on,wait=off", at("qmp")));
    add("-display", "none".to_owned());
    add("-kernel", config.image.kernel.display().to_string());
    add("-initrd", config.image.initramfs.display().to_string());
    // `mitigations=off`: nothing in there is secret, and emulation is slow enough.
    let kernel = "console=ttyS0 quiet panic=-1 reboot=t mitigations=off";
    add(
        "-append",
        format!("{kernel} {}", config.writer.parameters()),
    );
    words.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(str::to_owned));
    words
}

/// Makes a socket for QEMU. It connects to us, not we to it: so nothing that a guest says early is lost.
pub(crate) fn listen(path: &Path) -> Result<UnixListener> {
    let listener = UnixListener::bind(path)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Waits until QEMU has connected to every listener.
pub(crate) fn connect<const N: usize>(
    process: &mut Child,
    listeners: [&UnixListener; N],
) -> Result<[UnixStream; N]> {
    let deadline = Instant::now() + START_LIMIT;
    let mut ports = Vec::new();
    for listener in listeners {
        let port =
            command::poll_until(deadline, || match (listener.accept(), process.try_wait()) {
                (Ok((port, _)), _) => Some(Ok(port)),
                (Err(_), Ok(Some(status))) => Some(Err(anyhow!("it ended: {status}"))),
                (Err(_), _) => None,
            });
        let port = port.with_context(|| format!("it did nothing for {START_LIMIT:?}"))??;
        port.set_nonblocking(false)?;
        ports.push(port);
    }
    match <[UnixStream; N]>::try_from(ports) {
        Ok(ports) => Ok(ports),
        Err(_) => bail!("as many ports as listeners"),
    }
}

pub(crate) fn end(process: &mut Child) {
    // Fails only where it has ended already.
    let _ended = process.kill();
    let _reaped = process.wait();
}
