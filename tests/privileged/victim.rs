//! Programs to attach to: this test binary again, being what `MEMFERRY_VICTIM` names.
//!
//! A victim checks itself all the time and aborts if something is wrong with it. It counts in a shared memfd.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::MemfdFlags;

const KIND: &str = "MEMFERRY_VICTIM";
const COUNTER: &str = "MEMFERRY_COUNTER";

/// A user without privileges.
pub(crate) const NOBODY: u32 = 65534;

/// How long anything in these tests may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Waits until `holds`, looking every millisecond.
pub(crate) fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < PATIENCE, "gave up waiting until {what}");
        let tick = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 1_000_000,
        };
        let _ = rustix::event::poll(&mut [], Some(&tick));
    }
}

/// This test binary, which [`instead_of_main`] makes something else.
pub(crate) fn this_binary() -> Command {
    Command::new(std::env::current_exe().unwrap())
}

/// A victim that runs. Killed on drop.
pub(crate) struct Victim {
    child: Child,
    counter: File,
    stdin: Option<ChildStdin>,
}

impl Victim {
    /// Starts a victim and waits until it counts.
    pub(crate) fn start(kind: &str) -> Self {
        let counter = rustix::fs::memfd_create("counter", MemfdFlags::empty()).unwrap();
        rustix::fs::ftruncate(&counter, 4096).unwrap();
        let mut child = this_binary()
            .env(KIND, kind)
            .env(COUNTER, counter.as_raw_fd().to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let stdin = child.stdin.take();
        let victim = Self {
            child,
            counter: counter.into(),
            stdin,
        };
        wait_until("the victim runs", || victim.count() > 0);
        victim
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn count(&self) -> u64 {
        let mut bytes = [0; 8];
        self.counter.read_exact_at(&mut bytes, 0).unwrap();
        u64::from_le_bytes(bytes)
    }

    /// How often a call returned EINTR, or another surprise that a handled signal could have caused.
    pub(crate) fn interruptions(&self) -> u64 {
        let mut bytes = [0; 8];
        self.counter.read_exact_at(&mut bytes, 8).unwrap();
        u64::from_le_bytes(bytes)
    }

    /// Lets a blocked victim do a step: it waits for what this sends.
    pub(crate) fn poke(&mut self) {
        if let Some(stdin) = &mut self.stdin {
            stdin.write_all(b"x").unwrap();
        }
    }

    /// How many queued signals its handler has seen.
    pub(crate) fn signals(&self) -> u64 {
        let mut bytes = [0; 8];
        self.counter.read_exact_at(&mut bytes, 16).unwrap();
        u64::from_le_bytes(bytes)
    }

    /// Its `/proc/PID/status` line of that name.
    pub(crate) fn status(&self, name: &str) -> String {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap().trim_start_matches(':').trim().to_owned()
    }

    pub(crate) fn fds(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid()))
            .unwrap()
            .count()
    }

    /// Its threads' states.
    pub(crate) fn states(&self) -> Vec<char> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap();
        tasks
            .filter_map(|task| {
                let stat = std::fs::read_to_string(task.unwrap().path().join("stat")).ok()?;
                stat.rsplit_once(')')?.1.trim_start().chars().next()
            })
            .collect()
    }

    /// Panics unless it is untraced, not stopped, and makes progress without having found anything wrong.
    pub(crate) fn must_be_well(&mut self, when: &str) {
        wait_until(&format!("the victim is untraced and runs ({when})"), || {
            self.must_be_alive(when);
            self.status("TracerPid") == "0"
                && !self.states().iter().any(|state| "tT".contains(*state))
        });
        let before = self.count();
        self.poke();
        self.poke();
        wait_until(&format!("the victim counts on ({when})"), || {
            self.must_be_alive(when);
            self.count() > before + 1
        });
    }

    fn must_be_alive(&mut self, when: &str) {
        if let Some(status) = self.child.try_wait().unwrap() {
            panic!("the victim died {when}: {status}");
        }
    }

    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs before `main`, on the main thread, which libtest would not give us: if this process was started to be a
/// victim or an injector, it is that and nothing else.
#[used]
#[unsafe(link_section = ".init_array")]
static INSTEAD_OF_MAIN: extern "C" fn() = instead_of_main;

extern "C" fn instead_of_main() {
    if let Ok(region) = std::env::var(crate::trackers::REGION) {
        crate::trackers::be_a_scribe(&region);
    }
    if let Ok(kind) = std::env::var(KIND) {
        let fd: i32 = std::env::var(COUNTER).unwrap().parse().unwrap();
        // SAFETY: the parent passed this descriptor for us to own.
        let counter = Counter(unsafe { OwnedFd::from_raw_fd(fd) }.into());
        be_a_victim(&kind, &counter);
    }
    if let Ok(role) = std::env::var(crate::slice::ROLE) {
        crate::slice::play(&role);
    }
    if let Ok(what) = std::env::var(crate::uffd_handler::ROLE) {
        crate::uffd_handler::be_a_vmm(&what);
    }
    if let Ok(role) = std::env::var(crate::userfaultfd::ROLE) {
        crate::userfaultfd::try_without_privilege(&role);
    }
    #[cfg(feature = "fuse")]
    if let Some(at) = std::env::var_os(crate::fuse::MOUNT_AT) {
        crate::fuse::serve_until_killed(at.as_ref());
    }
    if let Ok(step) = std::env::var(crate::attach::DIE_AT) {
        crate::attach::inject_and_die(&step);
    }
}

/// What a victim writes its counts to.
struct Counter(File);

impl Counter {
    fn set(&self, slot: u64, value: u64) {
        self.0.write_all_at(&value.to_le_bytes(), slot * 8).unwrap();
    }
}

fn be_a_victim(kind: &str, counter: &Counter) -> ! {
    // SAFETY: asks to be killed when the parent dies.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    match kind {
        "compute" => compute(counter),
        "threads" => {
            for _ in 0..4 {
                std::thread::spawn(|| {
                    loop {
                        check_the_cpu_state();
                    }
                });
            }
            compute(counter)
        }
        "seccomp-kill" => {
            filter_userfaultfd(libc::SECCOMP_RET_KILL_PROCESS);
            compute(counter)
        }
        "seccomp-errno" => {
            filter_userfaultfd(libc::SECCOMP_RET_ERRNO | 1);
            compute(counter)
        }
        "unprivileged" => {
            // SAFETY: changes the user of this process, which has one thread.
            assert_eq!(unsafe { libc::setuid(NOBODY) }, 0);
            compute(counter)
        }
        "uninterruptible" => wait_uninterruptibly(counter),
        "coroutine" => compute_on_a_stack_among_other_memory(counter),
        "signals" => count_signals(counter),
        blocked => block(blocked, counter),
    }
}

fn compute(counter: &Counter) -> ! {
    for round in 1.. {
        check_the_cpu_state();
        check_arithmetic();
        check_the_signal_mask();
        counter.set(0, round);
    }
    unreachable!()
}

/// Sums in floating point, which must come out the same to the last bit.
fn check_arithmetic() {
    let sum = || {
        (1..200).fold(0.0_f64, |sum, n| {
            std::hint::black_box(sum + f64::from(n).sqrt() / 3.0)
        })
    };
    assert_eq!(sum().to_bits(), sum().to_bits());
}

/// Spins with known values in the registers that a system call or a sloppy restore would change, and below the
/// stack pointer.
fn check_the_cpu_state() {
    const A: u64 = 0x1122_3344_5566_7788;
    const B: u64 = 0x99aa_bbcc_ddee_ff00;
    let (mut rcx, mut r11, mut rdi, mut low, mut zone): (u64, u64, u64, u64, u64) = (A, B, A, 0, 0);
    let (mut r10, mut xmm, mut ymm): (u64, u64, u64) = (B, 0, 0);
    let mut x87 = 0_f64;
    // SAFETY: touches the listed registers and its own red zone only.
    unsafe {
        std::arch::asm!(
            "mov [rsp - 8], {pattern}",
            "mov [rsp - 128], {pattern}",
            "movq xmm7, {pattern}",
            "movq xmm1, {pattern}",
            "vpbroadcastq ymm9, xmm1",
            "fldpi",
            "2: dec {spins}",
            "jnz 2b",
            "fstp qword ptr [{x87}]",
            "vextracti128 xmm1, ymm9, 1",
            "movq {ymm}, xmm1",
            "movq {xmm}, xmm7",
            "mov {zone}, [rsp - 8]",
            "mov {low}, [rsp - 128]",
            pattern = in(reg) A,
            spins = inout(reg) 2000_u64 => _,
            x87 = in(reg) &raw mut x87,
            ymm = out(reg) ymm,
            xmm = out(reg) xmm,
            zone = out(reg) zone,
            low = out(reg) low,
            inout("rcx") rcx,
            inout("r11") r11,
            inout("rdi") rdi,
            inout("r10") r10,
            out("xmm1") _, out("xmm7") _, out("xmm9") _,
            out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
            out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
        );
    }
    let right = [rcx, rdi, xmm, ymm, zone, low] == [A; 6] && [r11, r10] == [B; 2];
    if !right || x87.to_bits() != std::f64::consts::PI.to_bits() {
        std::process::abort();
    }
}

/// As a runtime with small stacks does: spins with the stack pointer in the middle of a buffer whose other bytes
/// are in use.
fn compute_on_a_stack_among_other_memory(counter: &Counter) -> ! {
    const BYTE: u8 = 0xa5;
    let mut memory = vec![BYTE; 64 << 10];
    for round in 1.. {
        let stack = memory[32 << 10..].as_mut_ptr();
        // SAFETY: while the stack pointer is elsewhere nothing uses the stack, and no signal has a handler.
        unsafe {
            std::arch::asm!(
                "xchg rsp, {stack}",
                "2: dec {spins}",
                "jnz 2b",
                "xchg rsp, {stack}",
                stack = inout(reg) stack => _,
                spins = inout(reg) 2_000_000_u64 => _,
            );
        }
        if memory.iter().any(|&byte| byte != BYTE) {
            std::process::abort();
        }
        counter.set(0, round);
    }
    unreachable!()
}

/// Waits in state D, as for a disk: for a child that never gives back what it borrowed.
fn wait_uninterruptibly(counter: &Counter) -> ! {
    counter.set(0, 1);
    let flags = libc::CLONE_VFORK | libc::SIGCHLD;
    // SAFETY: without CLONE_VM this is a fork that waits; the child only waits to be killed with us.
    let child = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    if child == 0 {
        // SAFETY: asks to be killed when the parent dies.
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
        loop {
            // SAFETY: waits for a signal.
            unsafe { libc::pause() };
        }
    }
    std::process::abort()
}

/// No victim blocks a signal outside a call.
fn check_the_signal_mask() {
    let mut mask = 0_u64;
    // SAFETY: the kernel writes the 8 bytes of its mask.
    let result = unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_BLOCK,
            std::ptr::null::<u64>(),
            &raw mut mask,
            8,
        )
    };
    if result != 0 || mask != 0 {
        std::process::abort();
    }
}

/// Blocks in one system call again and again. What it returns is right or the victim aborts; EINTR is counted.
fn block(call: &str, counter: &Counter) -> ! {
    let mut interruptions = 0;
    let mut input = libc::pollfd {
        fd: 0,
        events: libc::POLLIN,
        revents: 0,
    };
    let span = libc::timespec {
        tv_sec: 0,
        tv_nsec: 40_000_000,
    };
    let word = 0_u32;
    // SAFETY: makes an epoll instance.
    let epoll = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
    let mut event = libc::epoll_event { events: 1, u64: 0 };
    // SAFETY: `event` lives through the call.
    unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, 0, &raw mut event) };
    counter.set(0, 1);
    let mut rounds = 1;
    loop {
        let start = Instant::now();
        #[allow(
            clippy::multiple_unsafe_ops_per_block,
            reason = "one of them is executed"
        )]
        // SAFETY: every pointer is to a local that lives through the call.
        let result: libc::c_long = unsafe {
            match call {
                "nanosleep" => libc::nanosleep(&raw const span, std::ptr::null_mut()).into(),
                "poll" => libc::poll(&raw mut input, 1, -1).into(),
                "poll-timeout" => libc::poll(std::ptr::null_mut(), 0, 40).into(),
                "ppoll" => {
                    let mut mask = std::mem::zeroed();
                    libc::sigfillset(&raw mut mask);
                    libc::ppoll(&raw mut input, 1, std::ptr::null(), &raw const mask).into()
                }
                "epoll" => libc::epoll_wait(epoll, &raw mut event, 1, -1).into(),
                "read" => 1,
                "futex" => libc::syscall(
                    libc::SYS_futex,
                    &raw const word,
                    libc::FUTEX_WAIT,
                    0,
                    &raw const span,
                ),
                _ => std::process::abort(),
            }
        };
        let error = std::io::Error::last_os_error().raw_os_error().unwrap();
        let timed = matches!(call, "nanosleep" | "poll-timeout" | "futex");
        if result < 0 && error == libc::EINTR {
            interruptions += 1;
            counter.set(1, interruptions);
            continue;
        }
        let right = match call {
            "futex" => result < 0 && error == libc::ETIMEDOUT,
            "nanosleep" | "poll-timeout" => result == 0,
            _ => result == 1,
        };
        if !right || (timed && start.elapsed() < Duration::from_millis(39)) {
            std::process::abort();
        }
        if !timed {
            let mut byte = 0_u8;
            // SAFETY: reads one byte into `byte`.
            let read = unsafe { libc::read(0, (&raw mut byte).cast(), 1) };
            if read != 1 {
                interruptions += 1;
                counter.set(1, interruptions);
                continue;
            }
        }
        check_the_signal_mask();
        rounds += 1;
        counter.set(0, rounds);
    }
}

static SIGNALS: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);

extern "C" fn count_signal(_: libc::c_int) {
    SIGNALS.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
}

/// Counts the queued signals that it is sent, in slot 2.
fn count_signals(counter: &Counter) -> ! {
    let handler: extern "C" fn(libc::c_int) = count_signal;
    // SAFETY: the handler only adds to an atomic.
    unsafe { libc::signal(libc::SIGRTMIN(), handler as libc::sighandler_t) };
    for round in 1.. {
        check_the_cpu_state();
        counter.set(2, SIGNALS.load(std::sync::atomic::Ordering::Relaxed));
        counter.set(0, round);
    }
    unreachable!()
}

/// Installs a filter that answers userfaultfd with `answer`.
pub(crate) fn filter_userfaultfd(answer: u32) {
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let mut filter = [
        step(0x20, 0, 0, 0),
        step(0x15, 0, 1, 323),
        step(0x06, 0, 0, answer),
        step(0x06, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: 4,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: gives up privileges by exec, which this process does not need.
    let result = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    assert_eq!(result, 0);
    // SAFETY: `program` names `filter`, which the kernel copies.
    let result = unsafe {
        libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER,
            &raw const program,
        )
    };
    assert_eq!(result, 0);
}
