//! The control API of a balloon: HTTP and JSON on a Unix socket.
//!
//! [`api`] holds the JSON as types. Whatever runs a balloon implements
//! [`Balloon`] and hands it to a [`Server`]; whoever steers one uses a
//! [`Client`]. `docs/openapi.json` describes the same for other languages.
//!
//! This crate knows nothing of devices: no queues, no guest addresses.

#![forbid(unsafe_code)]

pub mod api;
pub mod balloon;
pub mod error;
pub mod size;

pub use api::Status;
pub use balloon::Balloon;
pub use error::ControlError;
pub use size::{ParseSizeError, Size};
