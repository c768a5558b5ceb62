//! The balloon of one guest as a host holds it: the device, what releases its memory, and what
//! the control API asks, behind one lock.
//!
//! A vhost-user back end and a monitor with the balloon in its own process both hold a
//! [`Shared`]; they differ in how the guest's notifications reach it.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::print_stderr, clippy::print_stdout))]

mod ending;
mod log_limit;
mod reclaim;
mod request_text;
mod requests;
pub mod ring;
mod saved;
mod shared;
mod stats_clock;

pub use ending::Ending;
pub use log_limit::LogLimit;
pub use reclaim::{HostReclaim, Work};
pub use shared::{DeviceGuard, Shared};
pub use stats_clock::StatsClock;

/// Something that every process has was refused.
#[derive(Debug, thiserror::Error)]
#[error("host: {what} failed")]
pub struct HostError {
    /// The call.
    pub what: &'static str,
    /// What the kernel said.
    #[source]
    pub source: std::io::Error,
}
