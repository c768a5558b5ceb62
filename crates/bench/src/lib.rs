//! What is measured and shown on real guests.
//!
//! A [`Testbed`] is a guest of the lab and the back end of its balloon, as an
//! operator would run them. [`inflate`] and [`requests`] measure on testbeds and fill
//! in reports that are printed as JSON or as a table.

#![forbid(unsafe_code)]

mod backend;
pub mod chart;
pub mod compat;
mod cpu_time;
mod error;
mod floor;
pub mod inflate;
pub mod monitors;
mod qemu_bed;
mod qmp;
pub mod reporting;
pub mod requests;
mod sample;
mod testbed;

pub use backend::Backend;
pub use error::{BenchError, Result};
pub use qemu_bed::{Device, QemuBed, QemuBedOptions, vhost_user_arguments};
pub use qmp::Qmp;
pub use sample::{Spread, median};
pub use testbed::{Driver, Testbed, TestbedOptions};
