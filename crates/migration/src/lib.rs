//! Live migration and snapshots of guests.
//!
//! docs/migration.md is the authority on the wire format, the phases, and why no page is lost and
//! no two guests run. This crate depends on neither KVM nor any device: a VMM implements the traits
//! of [`traits`].

#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::print_stderr, clippy::print_stdout))]

mod bandwidth;
pub mod codec;
mod contained;
pub mod convergence;
pub mod cpu;
mod destination;
pub mod dirty;
mod error;
pub mod guest_memory;
pub mod layout;
pub mod limits;
pub mod link;
pub mod observer;
#[cfg(feature = "raw")]
pub mod raw;
mod resolution;
pub mod selection;
pub mod snapshot;
mod source;
mod summary;
pub mod tcp;
pub mod tls;
pub mod traits;
mod wire;
mod worker_pool;

pub use destination::{
    DestinationConfig, DestinationGuest, DestinationOwnership, ReceiveFailure, Received,
    ResolveRequest, receive,
};
pub use error::MigrationError;
pub use resolution::Resolution;
pub use source::{SourceConfig, SourceDoubt, SourceFailure, SourceGuest, migrate};
pub use summary::{Downtime, RoundSummary, Summary};
pub use wire::control::MigrationId;
