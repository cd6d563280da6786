//! QEMUs for tests: a guest of 512 bytes that counts, its RAM in a file, killed on drop.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use memferry::subject::qemu::{Machine, Qmp};
use tempfile::TempDir;

/// Bytes of RAM: the least that QEMU's firmware is content with, rounded up.
pub(crate) const RAM: u64 = 64 << 20;

/// Where the guest keeps its counter.
pub(crate) const COUNTER: u64 = 0x7e00;

/// The guest: a boot sector that counts up and writes the count to one of 64 pages in turn, and to [`COUNTER`].
///
/// ```text
///         cli
///         xor  %ax, %ax
///         mov  %ax, %ds
///         xor  %ebx, %ebx
/// outer:  mov  $0x1000, %ax       # segment 0x1000 is address 0x10000
/// page:   mov  %ax, %es
///         inc  %ebx
///         mov  %ebx, %es:0
///         mov  %ebx, 0x7e00
///         add  $0x100, %ax        # the next page
///         cmp  $0x5000, %ax
///         jb   page
///         jmp  outer
/// ```
const GUEST: [u8; 36] = [
    0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0x66, 0x31, 0xdb, 0xb8, 0x00, 0x10, 0x8e, 0xc0, 0x66, 0x43, 0x26,
    0x66, 0x89, 0x1e, 0x00, 0x00, 0x66, 0x89, 0x1e, 0x00, 0x7e, 0x05, 0x00, 0x01, 0x3d, 0x00, 0x50,
    0x72, 0xe9, 0xeb, 0xe4,
];

/// Long enough for a busy machine, short enough for a test that hangs.
pub(crate) fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// A QEMU process.
#[derive(Debug)]
pub(crate) struct Vm {
    child: Child,
    folder: TempDir,
}

/// What differs from a plain guest.
#[derive(Debug)]
pub(crate) struct Options<'a> {
    /// The machine type.
    pub machine: &'a str,
    /// The `-object` for the RAM `m0`, with `RAM` in place of the path of the file.
    pub backend: &'a str,
    /// More of the command line.
    pub more: &'a [&'a str],
}

impl Default for Options<'_> {
    fn default() -> Self {
        Self {
            machine: "pc",
            backend: "memory-backend-file,id=m0,size=64M,share=on,mem-path=RAM",
            more: &[],
        }
    }
}

impl Vm {
    /// A guest that counts.
    pub(crate) fn source() -> Self {
        Self::start(&Options::default())
    }

    /// A QEMU that waits for a guest.
    pub(crate) fn destination() -> Self {
        Self::start(&Options {
            more: &["-incoming", "defer", "-S"],
            ..Options::default()
        })
    }

    pub(crate) fn start(options: &Options<'_>) -> Self {
        let folder = tempfile::Builder::new()
            .prefix("memferry-test-")
            .tempdir_in("/dev/shm")
            .unwrap();
        File::create(folder.path().join("ram"))
            .unwrap()
            .set_len(RAM)
            .unwrap();
        let mut sector = [0; 512];
        sector[..GUEST.len()].copy_from_slice(&GUEST);
        sector[510..].copy_from_slice(&[0x55, 0xaa]);
        let disk = folder.path().join("disk");
        File::create(&disk).unwrap().write_all(&sector).unwrap();
        let log = File::create(folder.path().join("log")).unwrap();

        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-nodefaults", "-display", "none", "-accel", "tcg"]);
        let (machine, ram) = (options.machine, folder.path().join("ram"));
        if options.backend.is_empty() {
            command.args(["-M", machine]);
        } else {
            command.args(["-M", &format!("{machine},memory-backend=m0")]);
            let object = options.backend.replace("RAM", ram.to_str().unwrap());
            command.args(["-object", &object]);
        }
        command.args(options.more);
        if !options.more.contains(&"-m") {
            command.args(["-m", "64"]);
        }
        command.arg("-drive").arg(format!(
            "if=ide,format=raw,file.locking=off,file={}",
            disk.display()
        ));
        command.arg("-qmp").arg(format!(
            "unix:{},server=on,wait=off",
            folder.path().join("qmp").display()
        ));
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let child = command.stderr(log).spawn().unwrap();
        Self { child, folder }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("qmp")
    }

    pub(crate) fn ram_path(&self) -> PathBuf {
        self.folder.path().join("ram")
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Connects as soon as QEMU listens.
    pub(crate) fn qmp(&mut self) -> Qmp {
        let deadline = soon();
        loop {
            match Qmp::connect(self.socket(), deadline) {
                Ok(qmp) => return qmp,
                Err(error) => {
                    let ended = self.child.try_wait().unwrap();
                    assert!(
                        ended.is_none() && Instant::now() < deadline,
                        "{error}; QEMU says: {}",
                        std::fs::read_to_string(self.folder.path().join("log")).unwrap()
                    );
                    std::thread::yield_now();
                }
            }
        }
    }

    /// A QEMU and a connection to it.
    pub(crate) fn start_and_connect(options: &Options<'_>) -> (Self, Qmp) {
        let mut vm = Self::start(options);
        let qmp = vm.qmp();
        (vm, qmp)
    }

    /// Connects and inspects.
    pub(crate) fn inspected(&mut self) -> (Qmp, Machine) {
        let mut qmp = self.qmp();
        let machine = Machine::inspect(&mut qmp, soon()).unwrap();
        (qmp, machine)
    }

    /// What the guest has counted to.
    pub(crate) fn count(&self) -> u32 {
        let mut bytes = [0; 4];
        let ram = File::open(self.ram_path()).unwrap();
        ram.read_exact_at(&mut bytes, COUNTER).unwrap();
        u32::from_le_bytes(bytes)
    }

    /// Returns when the guest has counted on by some thousands from what it has now.
    pub(crate) fn wait_until_it_counts(&self) {
        let (from, deadline) = (self.count(), soon());
        while self.count() < from.saturating_add(5000) {
            assert!(
                Instant::now() < deadline,
                "the guest does not count on from {from}"
            );
            std::thread::yield_now();
        }
    }

    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(i32::try_from(self.pid()).unwrap()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Ends QEMU as a crash would.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let ended = self.child.try_wait();
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            // A QEMU that ended by itself is what a failed test wants to know of first.
            let log = std::fs::read_to_string(self.folder.path().join("log"));
            eprintln!("QEMU had ended: {ended:?}; its log: {log:?}");
        }
    }
}

/// Copies what a RAM file holds into another one, leaving holes holes.
pub(crate) fn copy_ram(from: &File, to: &File) {
    use rustix::fs::{SeekFrom, seek};
    let mut position = 0;
    while let Ok(begin) = seek(from, SeekFrom::Data(position)) {
        let end = seek(from, SeekFrom::Hole(begin)).unwrap();
        let mut bytes = vec![0; usize::try_from(end - begin).unwrap()];
        from.read_exact_at(&mut bytes, begin).unwrap();
        to.write_all_at(&bytes, begin).unwrap();
        position = end;
    }
}
