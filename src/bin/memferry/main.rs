//! The command for operators.

fn main() {}
