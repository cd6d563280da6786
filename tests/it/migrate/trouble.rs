//! Migrations that go wrong: the source runs on.
