//! Remote memory as a path, a file or a slice of this machine.
