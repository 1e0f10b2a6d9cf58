//! The `landmark` binary.
fn main() {}
