//! What the guest finds at I/O ports: a serial port, and the ways to ask for an end.

use std::fmt;
use std::io::{self, Write};
use std::ops::Deref;
use std::sync::{Mutex, MutexGuard, PoisonError};

use vm_superio::serial::NoEvents;
use vm_superio::{Serial, SerialState, Trigger};
use vmm_sys_util::eventfd::EventFd;

/// The first serial port of a PC.
const COM1: u16 = 0x3f8;
/// What the guest writes ends the machine: QEMU's `isa-debug-exit`, at the address that everybody gives it.
const EXIT: u16 = 0xf4;
/// The keyboard controller's command port, by which a PC is reset.
const KEYBOARD: u16 = 0x64;
const RESET: u8 = 0xfe;

/// What a guest can ask of its machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Request {
    /// To be over, with a result.
    Exit(u8),
    /// To begin anew.
    Reset,
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exit(code) => write!(f, "its end, with {code}"),
            Self::Reset => f.write_str("a reset"),
        }
    }
}

/// Where the serial port's bytes go.
pub(crate) type Console = Box<dyn Write + Send>;

/// The devices at I/O ports.
pub(crate) struct Ports {
    serial: Mutex<Option<Serial<Interrupt, NoEvents, Console>>>,
}

impl fmt::Debug for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ports").finish_non_exhaustive()
    }
}

/// An interrupt line, as an eventfd that KVM watches.
#[derive(Debug)]
pub(crate) struct Interrupt(EventFd);

impl Interrupt {
    pub(crate) fn new() -> io::Result<Self> {
        EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map(Self)
    }
}

impl Deref for Interrupt {
    type Target = EventFd;

    fn deref(&self) -> &EventFd {
        &self.0
    }
}

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

impl Ports {
    /// A serial port that prints to `console` and interrupts by `interrupt`.
    pub(crate) fn new(interrupt: Interrupt, console: Console) -> Self {
        Self {
            serial: Mutex::new(Some(Serial::new(interrupt, console))),
        }
    }

    fn serial(&self) -> MutexGuard<'_, Option<Serial<Interrupt, NoEvents, Console>>> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest writes to a port.
    ///
    /// # Errors
    /// If that asks for something.
    pub(crate) fn write(&self, port: u16, data: &[u8]) -> Result<(), Request> {
        match (port, data) {
            (EXIT, [code, ..]) => Err(Request::Exit(*code)),
            (KEYBOARD, [RESET]) => Err(Request::Reset),
            _ => {
                if let (Some(register), [value]) = (register(port), data)
                    && let Some(serial) = &mut *self.serial()
                {
                    // What the console refuses is lost, as on a line that nobody listens to; the guest cannot be told.
                    let _ = serial.write(register, *value);
                }
                Ok(())
            }
        }
    }

    /// The guest reads a port.
    pub(crate) fn read(&self, port: u16, data: &mut [u8]) {
        match (register(port), data) {
            (Some(register), [value]) => {
                *value = self
                    .serial()
                    .as_mut()
                    .map_or(0xff, |serial| serial.read(register));
            }
            (_, data) => data.fill(0xff),
        }
    }

    /// Types `bytes` on the serial line; how many of them found room.
    ///
    /// # Errors
    /// If the guest cannot be interrupted.
    pub(crate) fn type_in(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut serial = self.serial();
        let Some(serial) = &mut *serial else {
            return Ok(0);
        };
        let room = serial.fifo_capacity().min(bytes.len());
        serial
            .enqueue_raw_bytes(&bytes[..room])
            .map_err(|error| io::Error::other(format!("{error:?}")))
    }

    /// The registers of the serial port.
    pub(crate) fn save(&self) -> SerialState {
        self.serial()
            .as_ref()
            .map(Serial::state)
            .unwrap_or_default()
    }

    /// Gives the serial port other registers.
    ///
    /// # Errors
    /// If there are more bytes in its buffer than that holds.
    pub(crate) fn load(&self, state: &SerialState) -> io::Result<()> {
        let mut slot = self.serial();
        let Some(serial) = slot.take() else {
            return Ok(());
        };
        let trigger = Interrupt(serial.interrupt_evt().try_clone()?);
        let console = serial.into_writer();
        match Serial::from_state(state, trigger, NoEvents, console) {
            Ok(serial) => *slot = Some(serial),
            Err(error) => {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("the serial port's state does not fit it: {error:?}"),
                ));
            }
        }
        Ok(())
    }
}

/// Which register of the serial port is at `port`.
fn register(port: u16) -> Option<u8> {
    let register = u8::try_from(port.checked_sub(COM1)?).ok()?;
    (register < 8).then_some(register)
}
