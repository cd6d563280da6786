//! In the place of TLS, in a program that was built without: there is none.

use std::convert::Infallible;
use std::io::{self, IoSlice};
use std::time::Instant;

use super::wire::Wire;
use super::{NbdPlace, TlsError, TlsOptions};

#[derive(Debug, Clone)]
pub(super) struct TlsConfig(Infallible);

impl TlsConfig {
    pub(super) fn new(_: &TlsOptions, _: &NbdPlace) -> Result<Self, TlsError> {
        Err(TlsError::NotBuilt)
    }
}

#[derive(Debug)]
pub(super) struct Tls(Infallible);

impl Tls {
    pub(super) fn handshake(_: &Wire, config: &TlsConfig, _: Instant) -> io::Result<Self> {
        match config.0 {}
    }

    pub(super) fn receive(&self, _: &Wire, _: &mut [u8], _: Instant) -> io::Result<usize> {
        match self.0 {}
    }

    pub(super) fn try_send(&self, _: &Wire, _: &[IoSlice<'_>]) -> io::Result<usize> {
        match self.0 {}
    }

    pub(super) fn try_flush(&self, _: &Wire) -> io::Result<()> {
        match self.0 {}
    }

    pub(super) fn has_something(&self) -> bool {
        match self.0 {}
    }
}
