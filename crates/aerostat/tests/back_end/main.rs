//! `aerostat vhost-user` as a process: kills, stops, sandbox, and several guests.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]
#![allow(clippy::cast_possible_truncation, reason = "small numbers of our own")]

#[path = "../../../vhost-device-balloon/tests/support/mod.rs"]
mod support;

mod crash;
mod guests;
mod life;
mod panics;
mod sandboxed;
mod traffic;

/// The program under test.
const PROGRAM: &str = env!("CARGO_BIN_EXE_aerostat");
