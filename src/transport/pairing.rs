//! The one string that an operator carries from the destination to the source.

use std::fmt;
use std::io;
use std::str::FromStr;

/// Where the leecher listens, which session is meant, and the secret that proves both sides were told of it.
///
/// Written as `memferry1:ADDRESS#SESSION.SECRET`, the address as `host:port`. Whoever has the string can become the
/// source of this one migration, so it is to be treated like a password until it was used.
#[derive(Clone, PartialEq, Eq)]
pub struct Pairing {
    /// `host:port`.
    pub address: String,
    /// Names the session; not secret.
    pub session: [u8; 8],
    /// Shared secret.
    pub(super) secret: [u8; 16],
}

/// Why a string is no pairing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PairingError {
    /// It does not begin as a pairing does.
    #[error(
        "this is no pairing string: it begins with memferry1: and is printed by the receiving side"
    )]
    NoPairing,
    /// It is of another version.
    #[error(
        "this pairing string is of another version of memferry; use the same version on both hosts"
    )]
    OtherVersion,
    /// Something is missing or was cut off.
    #[error("this pairing string is incomplete: copy it whole, from memferry1: to its end")]
    Incomplete,
}

const PREFIX: &str = "memferry1:";

impl Pairing {
    /// A new session at `address`, with a secret from the kernel.
    ///
    /// # Errors
    /// If the kernel has no random numbers to give.
    pub fn new(address: String) -> io::Result<Self> {
        let mut random = [0; 24];
        fill_random(&mut random)?;
        let (session, secret) = random.split_first_chunk().expect("24 is more than 8");
        Ok(Self {
            address,
            session: *session,
            secret: secret.try_into().expect("24 - 8 is 16"),
        })
    }
}

/// Fills `bytes` with random numbers from the kernel.
pub(super) fn fill_random(bytes: &mut [u8]) -> io::Result<()> {
    let mut filled = 0;
    while filled < bytes.len() {
        filled +=
            rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())?;
    }
    Ok(())
}

impl fmt::Display for Pairing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}#", self.address)?;
        self.session
            .iter()
            .try_for_each(|byte| write!(f, "{byte:02x}"))?;
        f.write_str(".")?;
        self.secret
            .iter()
            .try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Pairing {
    /// Does not print the secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pairing")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

impl FromStr for Pairing {
    type Err = PairingError;

    fn from_str(text: &str) -> Result<Self, PairingError> {
        let text = text.trim();
        let Some(rest) = text.strip_prefix(PREFIX) else {
            return Err(if text.starts_with("memferry") {
                PairingError::OtherVersion
            } else {
                PairingError::NoPairing
            });
        };
        let (address, rest) = rest.split_once('#').ok_or(PairingError::Incomplete)?;
        let (session, secret) = rest.split_once('.').ok_or(PairingError::Incomplete)?;
        if !address.contains(':') {
            return Err(PairingError::Incomplete);
        }
        Ok(Self {
            address: address.to_owned(),
            session: from_hex(session).ok_or(PairingError::Incomplete)?,
            secret: from_hex(secret).ok_or(PairingError::Incomplete)?,
        })
    }
}

fn from_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != N * 2 {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks(2)) {
        let nibble = |digit: u8| char::from(digit).to_digit(16);
        let value = nibble(pair[0])? * 16 + nibble(pair[1])?;
        *byte = u8::try_from(value).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pairing_is_read_back_as_it_was_printed() {
        let pairing = Pairing::new("[::1]:7000".into()).unwrap();
        assert_eq!(pairing.to_string().parse(), Ok(pairing));
    }

    #[test]
    fn a_wrong_string_is_refused_with_the_reason() {
        for (text, error) in [
            ("", PairingError::NoPairing),
            ("tcp://host:1", PairingError::NoPairing),
            ("memferry9:h:1#00.00", PairingError::OtherVersion),
            ("memferry1:h:1#0011223344556677", PairingError::Incomplete),
            ("memferry1:h:1#00.zz", PairingError::Incomplete),
        ] {
            assert_eq!(text.parse::<Pairing>(), Err(error), "{text}");
        }
    }

    #[test]
    fn the_secret_is_not_in_the_debug_output() {
        let pairing = Pairing::new("h:1".into()).unwrap();
        let secret = pairing.to_string();
        let secret = secret.split_once('.').unwrap().1;
        assert!(!format!("{pairing:?}").contains(secret));
    }
}
