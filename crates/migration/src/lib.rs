//! Live migration and snapshots of guests.
//!
//! docs/migration.md is the authority on the wire, the phases, and why no page is lost and no two
//! guests run. This crate knows no KVM and no device: a monitor implements the traits of
//! [`seams`].

#![forbid(unsafe_code)]

mod bandwidth;
pub mod convergence;
pub mod cpu;
pub mod dirty;
mod error;
pub mod layout;
pub mod limits;
pub mod link;
pub mod seams;
pub mod selection;
mod wire;

pub use error::MigrationError;
pub use wire::control::MigrationId;
