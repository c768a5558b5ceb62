//! Benchmarks, soak tests and demos with real guests.
//!
//! A [`Host`] serves the balloon of a guest, as an operator would run it. A [`Fixture`] is a guest
//! on it, a [`Testbed`] both, ready to measure. [`inflate`] and [`requests`] measure on testbeds
//! and fill reports that are printed as JSON or as a table. [`soak`] runs random operations on a
//! guest and verifies its memory. Three modules migrate guests: [`migrate`] measures it,
//! [`soak::moves`] repeats it, and [`demo_migrate`] shows one migration.

#![forbid(unsafe_code)]

mod backend;
pub mod chart;
pub mod compat;
mod cpu_time;
pub mod demo_migrate;
mod error;
mod fixture;
mod floor;
mod host;
pub mod inflate;
pub mod kvm;
mod kvm_host;
pub mod kvm_inflate;
mod logs;
pub mod migrate;
pub mod monitors;
mod proc_text;
mod qemu_fixture;
mod qmp;
pub mod reporting;
pub mod requests;
mod sample;
pub mod soak;
mod testbed;
mod threads;
pub mod vmm_choice;

pub use backend::Backend;
pub use error::{BenchError, Result};
pub use fixture::{Fixture, REPORTED_MIB};
pub use host::{Host, LIMIT};
pub use logs::{backend_complaints, guest_complaints};
pub use qemu_fixture::{Device, QemuFixture, QemuFixtureOptions, vhost_user_arguments};
pub use qmp::Qmp;
pub use sample::{Spread, median};
pub use testbed::{Driver, Testbed, TestbedOptions};
