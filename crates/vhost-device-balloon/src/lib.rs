//! The balloon device as a vhost-user back end, for any front end of the vhost-user
//! protocol (QEMU's `docs/interop/vhost-user.rst`).
//!
//! One thread per guest polls the front end's socket, the kicks and the operator's requests.
//! This crate has its own request loop, because the one of the `vhost` crate refuses the
//! memory table of User Mode Linux and has no message for a configuration change. It uses
//! the message types of the `vhost` crate.

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
