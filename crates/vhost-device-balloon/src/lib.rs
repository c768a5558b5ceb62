//! The balloon device as a vhost-user back end, for any monitor that speaks
//! vhost-user (QEMU's `docs/interop/vhost-user.rst`).
//!
//! A thread per guest waits for the front end, its kicks and the operator. The
//! request loop is our own: the `vhost` crate's refuses the memory table that
//! User Mode Linux sends, and has no message for a configuration change. Its
//! message types are used.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::print_stderr, clippy::print_stdout))]

mod busy_poll;
mod config_write_fallback;
mod connector;
mod error;
mod inflight;
mod inflight_queue;
mod limits;
mod memory;
mod server;
mod service;
mod session;
mod vring;
mod vring_recovery;
mod wire;

pub use balloon_abi::Features;
pub use error::{Error, SessionError, Violation};
pub use server::{Backend, End};
pub use service::{Service, ServiceOptions};
