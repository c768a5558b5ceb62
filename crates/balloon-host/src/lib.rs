//! The host side of one guest's balloon: the device, the code that releases its memory, and the
//! control API's operations, behind one lock.
//!
//! The vhost-user back end and the VMM (`aerostat run`) both use a [`Shared`]. They differ in how
//! the guest's notifications reach it.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::print_stderr, clippy::print_stdout))]

mod ending;
mod log_limit;
mod reclaim;
mod request_text;
mod request_times;
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

/// The host refused a basic resource, such as a thread or a file descriptor.
#[derive(Debug, thiserror::Error)]
#[error("host: {what} failed")]
pub struct HostError {
    /// The failed operation.
    pub what: &'static str,
    /// The kernel's error.
    #[source]
    pub source: std::io::Error,
}
