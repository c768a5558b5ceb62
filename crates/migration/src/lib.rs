//! Live migration and snapshots of guests.
//!
//! docs/migration.md is the authority on the wire, the phases, and why no page is lost and no two
//! guests run. This crate knows no KVM and no device: a monitor implements the traits of
//! [`seams`].

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
pub mod raw;
pub mod seams;
pub mod selection;
mod shares;
pub mod snapshot;
mod source;
mod summary;
pub mod tcp;
pub mod tls;
mod wire;

pub use destination::{
    Asking, Custody, DestinationConfig, DestinationGuest, ReceiveFailure, Received, Settled,
    receive,
};
pub use error::MigrationError;
pub use source::{Fate, SourceConfig, SourceDoubt, SourceFailure, SourceGuest, migrate};
pub use summary::{Downtime, RoundSummary, Summary};
pub use wire::control::MigrationId;
