//! What is read is what was written, and everything else is refused by name.

use super::*;
use kvm_bindings::{kvm_cpuid_entry2, kvm_msr_entry};
use proptest::prelude::*;

fn state() -> MachineState {
    let mut cpu = CpuState {
        cpuid: vec![kvm_cpuid_entry2 {
            function: 1,
            ecx: 0x8000_0001,
            ..Default::default()
        }],
        tsc_khz: 2_000_000,
        msrs: vec![kvm_msr_entry {
            index: 0x10,
            data: u64::MAX - 1,
            ..Default::default()
        }],
        ..CpuState::default()
    };
    cpu.regs.rip = 0x10_0000;
    cpu.sregs.cr3 = 0x9000;
    cpu.lapic.regs[7] = -3;
    cpu.events.exception_payload = 5;
    cpu.xsave.0[1023] = 7;
    let mut chips = Chips::default();
    chips.pit.channels[2].count_load_time = -1;
    chips.interrupt_controllers[1].0[511] = 9;
    MachineState {
        memory: vec![Region {
            start: 0,
            len: 1 << 20,
        }],
        chips: Some(chips),
        clock: 12345,
        runs: true,
        serial: Serial {
            scratch: 3,
            in_buffer: b"typed".to_vec(),
            ..Serial::default()
        },
        cpus: vec![cpu.clone(), cpu],
    }
}

#[test]
fn what_is_written_is_what_is_read() {
    let state = state();
    assert_eq!(MachineState::from_bytes(&state.to_bytes()), Ok(state));
}

#[test]
fn every_beginning_of_a_state_is_refused_and_nothing_panics() {
    let bytes = state().to_bytes();
    for len in 0..bytes.len() {
        let error = MachineState::from_bytes(&bytes[..len]).unwrap_err();
        if let StateError::Malformed(malformed) = &error {
            assert!(!malformed.field.is_empty(), "{len}: {error}");
        }
    }
}

#[test]
fn a_cut_names_the_field_that_is_cut() {
    let mut bytes = state().to_bytes();
    bytes.pop();
    let error = MachineState::from_bytes(&bytes).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the state's cpus 1 events exception_payload is cut off"
    );
}

#[test]
fn another_version_is_refused_before_anything_else_is_read() {
    let mut bytes = state().to_bytes();
    bytes[8] = 2;
    bytes.truncate(12);
    let error = MachineState::from_bytes(&bytes).unwrap_err();
    assert_eq!(error, StateError::Version { theirs: 2 });
}

#[test]
fn what_is_left_over_is_refused() {
    let mut bytes = state().to_bytes();
    bytes.push(0);
    let error = MachineState::from_bytes(&bytes).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the state's end is followed by 1 bytes that nothing asks for"
    );
}

#[test]
fn the_state_of_something_else_is_refused() {
    let error = MachineState::from_bytes(b"QEVM\0\0\0\x03 and more").unwrap_err();
    assert_eq!(error, StateError::NotOurs);
}

#[test]
fn a_flag_that_is_neither_no_nor_yes_is_refused() {
    let mut bytes = state().to_bytes();
    // Behind the magic, the version and one region.
    let at = 8 + 4 + 4 + 16;
    assert_eq!(bytes[at], 1);
    bytes[at] = 2;
    let error = MachineState::from_bytes(&bytes).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the state's chips is 0x2, which this version does not know"
    );
}

proptest! {
    /// A peer can send anything.
    #[test]
    fn whatever_is_changed_in_a_state_nothing_panics(at in any::<prop::sample::Index>(), byte: u8, len: u16) {
        let mut bytes = state().to_bytes();
        *at.get_mut(&mut bytes) = byte;
        let _ = MachineState::from_bytes(&bytes);
        bytes.truncate(len.into());
        let _ = MachineState::from_bytes(&bytes);
    }

    #[test]
    fn bytes_without_meaning_are_refused(bytes: Vec<u8>) {
        prop_assert!(MachineState::from_bytes(&bytes).is_err());
        let mut state = b"minivmm\0\x01\0\0\0".to_vec();
        state.extend(bytes);
        // A few of these make the state of an empty machine.
        let _ = MachineState::from_bytes(&state);
    }
}
