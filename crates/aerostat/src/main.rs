//! The `aerostat` command line.
#![forbid(unsafe_code)]
fn main() {}
