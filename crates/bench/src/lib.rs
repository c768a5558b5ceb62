//! What is measured and shown on real guests.
//!
//! A [`Host`] serves the balloon of a guest of the lab, as an operator would run it; a
//! [`Fixture`] is a guest on it, a [`Testbed`] both, ready for measuring. [`inflate`] and
//! [`requests`] measure on testbeds and fill in reports that are printed as JSON or as a
//! table; [`soak`] does at random with a guest what can be done, and verifies its memory.
//! Guests that move have three places: [`migrate`] measures it, [`soak::moves`] does it again
//! and again, and [`demo_move`] shows one move.

#![forbid(unsafe_code)]

mod backend;
pub mod chart;
pub mod compat;
mod cpu_time;
pub mod demo_move;
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
pub mod monitor_choice;
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

pub use backend::Backend;
pub use error::{BenchError, Result};
pub use fixture::{Fixture, REPORTED_MIB};
pub use host::{Host, LIMIT};
pub use logs::{backend_complaints, guest_complaints};
pub use qemu_fixture::{Device, QemuBedOptions, QemuFixture, vhost_user_arguments};
pub use qmp::Qmp;
pub use sample::{Spread, median};
pub use testbed::{Driver, Testbed, TestbedOptions};
