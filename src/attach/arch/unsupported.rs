//! The CPUs that nobody has ported injection to: [`Target::open`](crate::attach::Target::open) refuses, so that
//! nothing else here is ever reached.

use std::io;

use crate::sys::ptrace::Tid;

pub(in crate::attach) const SECCOMP_ARCHITECTURE: u32 = 0;

fn unsupported() -> io::Error {
    io::ErrorKind::Unsupported.into()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::attach) struct Call {
    pub(in crate::attach) name: &'static str,
    pub(in crate::attach) number: u32,
    pub(in crate::attach) argument: u64,
}

impl Call {
    pub(in crate::attach) const RETURN: Self = Self {
        name: "rt_sigreturn",
        number: 0,
        argument: 0,
    };

    pub(in crate::attach) fn userfaultfd(flags: u32) -> Self {
        Self {
            name: "userfaultfd",
            number: 0,
            argument: u64::from(flags),
        }
    }

    pub(in crate::attach) fn close(fd: u32) -> Self {
        Self {
            name: "close",
            number: 0,
            argument: u64::from(fd),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::attach) struct Registers;

impl Registers {
    pub(in crate::attach) fn read(_: Tid) -> io::Result<Self> {
        Err(unsupported())
    }

    pub(in crate::attach) fn write(&self, _: Tid) -> io::Result<()> {
        Err(unsupported())
    }

    pub(in crate::attach) fn is_64_bit(&self) -> bool {
        false
    }

    pub(in crate::attach) fn stack_pointer(&self) -> u64 {
        0
    }

    pub(in crate::attach) fn instruction_pointer(&self) -> u64 {
        0
    }

    pub(in crate::attach) fn set_instruction_pointer(&mut self, _: u64) {}

    pub(in crate::attach) fn in_call(&self) -> bool {
        false
    }

    pub(in crate::attach) fn result(&self) -> i64 {
        0
    }

    pub(in crate::attach) fn hide_the_stop(&mut self) {}

    pub(in crate::attach) fn armed(_: &Self, _: &Frame, _: &Gadgets) -> Self {
        Self
    }

    pub(in crate::attach) fn armed_with(_: &Self, _: &Frame, _: &Gadgets, _: Call) -> Self {
        Self
    }

    pub(in crate::attach) fn redirect(&mut self, _: &Frame, _: Call) {}

    pub(in crate::attach) fn seccomp_arguments(&self, _: Call) -> [u64; 6] {
        [0; 6]
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::attach) struct Gadgets;

impl Gadgets {
    pub(in crate::attach) const LONGEST: usize = 1;
    pub(in crate::attach) const NAMES: &str = "nothing";

    pub(in crate::attach) fn patterns(&self) -> [(u64, &'static [u8]); 0] {
        []
    }

    pub(in crate::attach) fn after_call(&self) -> u64 {
        0
    }
}

#[derive(Debug, Default)]
pub(in crate::attach) struct Search;

impl Search {
    pub(in crate::attach) fn look(&mut self, _: u64, _: &[u8]) -> bool {
        true
    }

    pub(in crate::attach) fn found(&self) -> Option<Gadgets> {
        None
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::attach) struct Frame {
    pub(in crate::attach) address: u64,
    pub(in crate::attach) bytes: Vec<u8>,
}

impl Frame {
    pub(in crate::attach) fn new(
        _: Tid,
        _: &Registers,
        _: u64,
        _: &Gadgets,
    ) -> io::Result<Option<Self>> {
        Err(unsupported())
    }
}
