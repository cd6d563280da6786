//! Guests that Memferry is tested with: building them, booting them, and reading what they say.
