//! Ownership: one token a session, which leaves the seeder with Release and reaches the leecher with nothing else.

/// The right to run the subject. The seeder makes one for each session, at random.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Token(pub [u8; 16]);

impl core::fmt::Debug for Token {
    /// Does not print the token: a log must not hand over a guest.
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Token(..)")
    }
}

/// Who may run the subject, as far as one side knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ownership {
    /// This side, and no other.
    Here,
    /// The other side, or nobody while the token is on its way. This side never runs the subject again.
    There,
}
