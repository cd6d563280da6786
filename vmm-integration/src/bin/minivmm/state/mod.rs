//! The state of a machine besides its memory: what is saved, sent, checked and loaded.
//!
//! ```text
//! "minivmm\0" | version u32 | memory | devices | clock | PIT | 3 interrupt controllers | serial | processors
//! ```
//!
//! All of it is read and understood before any of it is loaded.

pub(crate) mod coding;
mod cpu;

pub(crate) use coding::Malformed;
pub(crate) use cpu::{CpuState, XsaveArea};

use kvm_bindings::{kvm_clock_data, kvm_pit_channel_state, kvm_pit_state2};
use vm_superio::SerialState;

use coding::{Coded, Input, coded};

/// The format of the state. Anything that changes what the bytes mean raises it.
pub(crate) const VERSION: u32 = 1;

const MAGIC: [u8; 8] = *b"minivmm\0";

/// All of a machine that is not in its memory.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct MachineState {
    /// The regions of its memory.
    pub(crate) memory: Vec<Region>,
    /// What the kernel emulates, where it can.
    pub(crate) chips: Option<Chips>,
    /// The guest's paravirtual clock, in nanoseconds since it was started.
    pub(crate) clock: u64,
    pub(crate) serial: Serial,
    /// Whether the guest ran before it was suspended.
    pub(crate) runs: bool,
    pub(crate) cpus: Vec<CpuState>,
}

/// A region of a guest's memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Region {
    /// Where it begins, as the guest sees it.
    pub(crate) start: u64,
    /// In bytes.
    pub(crate) len: u64,
}

/// The interrupt controllers and the timer that the kernel emulates.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Chips {
    pub(crate) pit: kvm_pit_state2,
    /// The two PICs and the I/O APIC, each as KVM lays it out.
    pub(crate) interrupt_controllers: [Controller; 3],
}

/// An interrupt controller, as KVM lays it out: on x86, so little-endian.
#[derive(Clone, Copy, PartialEq)]
pub(crate) struct Controller(pub(crate) [u8; 512]);

impl Default for Controller {
    fn default() -> Self {
        Self([0; 512])
    }
}

impl std::fmt::Debug for Controller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Controller({:02x?}…)", &self.0[..16])
    }
}

impl Coded for Controller {
    fn put(&self, output: &mut Vec<u8>) {
        output.extend_from_slice(&self.0);
    }

    fn take(input: &mut Input<'_>) -> Result<Self, Malformed> {
        input.bytes().map(Self)
    }
}

/// The registers of the serial port, and what was typed and not read yet.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Serial {
    pub(crate) baud_divisor_low: u8,
    pub(crate) baud_divisor_high: u8,
    pub(crate) interrupt_enable: u8,
    pub(crate) interrupt_identification: u8,
    pub(crate) line_control: u8,
    pub(crate) line_status: u8,
    pub(crate) modem_control: u8,
    pub(crate) modem_status: u8,
    pub(crate) scratch: u8,
    pub(crate) in_buffer: Vec<u8>,
}

macro_rules! serial_state {
    ($($field:ident),* $(,)?) => {
        coded! { Serial { $($field),* } }

        impl From<SerialState> for Serial {
            fn from(state: SerialState) -> Self {
                Self { $($field: state.$field),* }
            }
        }

        impl From<Serial> for SerialState {
            fn from(state: Serial) -> Self {
                Self { $($field: state.$field),* }
            }
        }
    };
}

serial_state!(
    baud_divisor_low,
    baud_divisor_high,
    interrupt_enable,
    interrupt_identification,
    line_control,
    line_status,
    modem_control,
    modem_status,
    scratch,
    in_buffer,
);

coded! {
    Region { start, len }
    Chips { pit, interrupt_controllers }
    kvm_pit_state2 { channels, flags }
    kvm_pit_channel_state {
        count, latched_count, count_latched, status_latched, status, read_state, write_state, write_latch, rw_mode, mode, bcd, gate,
        count_load_time,
    }
    MachineState { memory, chips, clock, serial, runs, cpus }
}

impl<T: Coded> Coded for Option<T> {
    fn put(&self, output: &mut Vec<u8>) {
        self.is_some().put(output);
        if let Some(inner) = self {
            inner.put(output);
        }
    }

    fn take(input: &mut Input<'_>) -> Result<Self, Malformed> {
        bool::take(input)?.then(|| T::take(input)).transpose()
    }
}

/// Why a state was refused. Nothing was loaded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum StateError {
    /// It is something else.
    #[error("this is not the state of a minivmm machine")]
    NotOurs,
    /// It is of another version of this program.
    #[error(
        "the state's version is {theirs} and this minivmm reads version {VERSION}: use the same version at both ends"
    )]
    Version {
        /// Which.
        theirs: u32,
    },
    /// It is damaged.
    #[error(transparent)]
    Malformed(#[from] Malformed),
}

impl MachineState {
    /// As bytes.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        VERSION.put(&mut bytes);
        self.put(&mut bytes);
        bytes
    }

    /// From bytes, which may be anything.
    ///
    /// # Errors
    /// If they are not all of a state of this version.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Self, StateError> {
        let mut input = Input::new(bytes);
        if input.bytes::<8>() != Ok(MAGIC) {
            return Err(StateError::NotOurs);
        }
        let theirs = input.field("version")?;
        if theirs != VERSION {
            return Err(StateError::Version { theirs });
        }
        let state = Self::take(&mut input)?;
        input.end().map_err(|error| error.within("end"))?;
        Ok(state)
    }
}

/// The clock as KVM takes it: at `nanos`, whatever the time of day is.
pub(crate) fn clock(nanos: u64) -> kvm_clock_data {
    kvm_clock_data {
        clock: nanos,
        ..kvm_clock_data::default()
    }
}

#[cfg(test)]
mod tests;
